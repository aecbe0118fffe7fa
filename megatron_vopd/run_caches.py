"""The caches of teachers' hidden states that a configuration asks for (`teacher.cache_dir`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_vopd.config import Config
from megatron_vopd.hub import local_model_folder
from megatron_vopd.parallel import in_step, in_step_all
from megatron_vopd.run_identity import fingerprint
from megatron_vopd.state_cache import StateCache, text_digest, text_name
from megatron_vopd.teacher import Teacher
from megatron_vopd.types import Rollout


def open_caches(
    config: Config, teachers: Mapping[str, Teacher], given: Sequence[Rollout]
) -> dict[str, StateCache]:
    """Caches by key of the teacher. Every rank of the world calls it.

    Args:
        given: all ready responses of the run, unshortened.

    Raises:
        CacheError: on every rank, a folder of another teacher or of texts that changed, or torn.
    """
    found = {}
    for key in sorted(teachers):
        section = config.named_teachers[key]
        texts = {text_name(r): text_digest(r) for r in given if r.prompt.teacher == key}
        if section.cache_dir is None or not texts:
            continue
        folder, teacher = Path(section.cache_dir), teachers[key]
        path = in_step(lambda s=section, k=key: local_model_folder(s.path, f"{k}.path"))
        identity = in_step_all(
            lambda p=path: fingerprint(Path(p)) if dist.get_rank() == 0 else None
        )[0]
        states = teacher.received(0)
        cache = StateCache(
            folder, {"teacher": str(identity)}, teacher.facts.hidden_size, states.dtype
        )
        in_step(lambda c=cache, t=texts: c.prepare(t) if dist.get_rank() == 0 else None)
        in_step(cache.scan)
        found[key] = cache
    return found
