"""Imported once by the process that every test rank is forked from: imports are slow."""

import warnings

warnings.filterwarnings("ignore")

from megatron_vopd.megatron import cpu_runtime  # noqa: E402

cpu_runtime.activate()

import transformers.models.llama.modeling_llama  # noqa: E402
import transformers.models.qwen2.modeling_qwen2  # noqa: E402
import transformers.models.qwen3.modeling_qwen3  # noqa: E402
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: E402, F401
from megatron.core import dist_checkpointing  # noqa: E402, F401
from megatron.core.optimizer import get_megatron_optimizer  # noqa: E402, F401

import megatron_vopd.megatron.model  # noqa: E402
import megatron_vopd.megatron.weights  # noqa: E402
import megatron_vopd.trainer.trainer  # noqa: E402, F401
