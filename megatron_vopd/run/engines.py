"""The leaders' engines of a run, and what gives them the student's weights.

No engine is started here: the first push does that.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_vopd.config import Config
from megatron_vopd.hf.dtypes import CONFIG_DTYPES
from megatron_vopd.megatron.student import Student
from megatron_vopd.rollout.engine import Engine, PushReport
from megatron_vopd.rollout.push import Probe, is_leader, make_probe, push
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.rollout.vllm.server import ServerEngine, ServerSettings, shares
from megatron_vopd.rollout.vllm.settings import LocalSettings
from megatron_vopd.trainer.student_logprobs import sequence_logprobs

# Largest gap between engine and trainer on one token of the probe, nats, by what both compute in.
_PROBE_TOLERANCES = {"fp32": 1e-4, "bf16": 0.3}
# The same for each nat of the largest log-prob: fp32 rounds at 6e-8, in sums of many terms.
_PROBE_RELATIVE = {"fp32": 2e-5, "bf16": 0.0}
_PROBE_LENGTH = 48


class Pusher:
    """Gives the engines the student's weights, and keeps the report of the last push."""

    def __init__(self, student: Student, engine: Engine | None, probe: Probe, longest: int) -> None:
        self._student, self._engine, self._probe, self._longest = student, engine, probe, longest
        self.report: PushReport | None = None

    def __call__(self, policy_version: int) -> PushReport:
        student = self._student
        self.report = push(
            student.bare,
            student.facts,
            student.groups,
            self._engine,
            policy_version,
            lambda sequences: sequence_logprobs(student, sequences, self._longest),
            self._probe,
            student.options.layer_spec,
        )
        return self.report

    def ensure(self, policy_version: int) -> None:
        """Push unless this version was pushed last. Every rank of the world calls it."""
        if self.report is None or self.report.policy_version != policy_version:
            self(policy_version)


def make_run_engine(
    config: Config, student: Student, student_dir: str, run_dir: Path, device: str
) -> Engine | None:
    """This rank's engine; None: it is no leader."""
    if not is_leader(student.groups):
        return None
    response = config.max_response_tokens if config.has_rollouts else 0
    if config.evaluates:
        response = max(response, config.evaluation.max_tokens)
    longest = config.data.max_prompt_tokens + response
    return make_engine(
        config,
        student_dir,
        run_dir,
        student.groups.coordinates.dp,
        student.groups.layout.dp,
        min(max(longest, _PROBE_LENGTH + 1), student.facts.max_positions),
        device,
        _own_gpu() if device == "cuda" else None,
    )


def _own_gpu() -> str:
    """This rank's GPU as the engine's process has to name it."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    local_rank = int(os.environ["LOCAL_RANK"])
    return visible[local_rank] if visible else str(local_rank)


def run_probe(config: Config, vocab_size: int) -> Probe:
    """Of pushes; its tolerance follows from the types that trainer and engine compute in."""
    exact = config.student.dtype == config.rollout.dtype == "fp32"
    length = min(_PROBE_LENGTH, config.train.max_tokens_per_microbatch)
    kind = "fp32" if exact else "bf16"
    tolerance, relative = _PROBE_TOLERANCES[kind], _PROBE_RELATIVE[kind]
    return make_probe(vocab_size, length=length, tolerance=tolerance, relative=relative)


def make_engine(
    config: Config,
    model_dir: str,
    run_dir: str | Path,
    leader: int,
    num_leaders: int,
    max_model_len: int,
    device: str,
    gpu: str | None = None,
) -> Engine:
    """Not started yet: the first push does that.

    Args:
        model_dir: HF folder of the student; its config is read.
        run_dir: engine logs go into its folder `engines`.
        leader, num_leaders: which data-parallel replica this rank leads, of how many.
        max_model_len: longest prompt and response together.
        device: "cpu" or "cuda", already resolved.
        gpu: the leader's own, for CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: too large an engine.
    """
    rollout = config.rollout
    dtype = CONFIG_DTYPES[rollout.dtype].name
    if rollout.engine == "server":
        urls, push_urls = shares(rollout.urls, leader, num_leaders)
        return ServerEngine(
            ServerSettings(
                urls,
                push_urls,
                dtype=dtype,
                transport="shm" if device == "cpu" else "nccl",
                model_dir=model_dir,
                allow_remote=rollout.allow_remote,
                deadline_seconds=rollout.deadline_seconds,
            )
        )
    return LocalEngine(
        LocalSettings(
            model_dir,
            log_path=str(Path(run_dir) / "engines" / f"engine_{leader}.log"),
            max_model_len=max_model_len,
            dtype=dtype,
            device=device,
            tp=rollout.tp,
            gpu=gpu,
            seed=config.run.seed,
            deadline_seconds=rollout.deadline_seconds,
            memory_fraction=rollout.memory_fraction,
            cpu_threads=rollout.cpu_threads,
        )
    )
