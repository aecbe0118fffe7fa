"""The leaders' engines of a run, and the pusher that gives them the student's weights.

No engine is started here: the first push does that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from megatron_vopd.config.schema import Config, RolloutSection
from megatron_vopd.hf.dtypes import CONFIG_DTYPES
from megatron_vopd.megatron.student import Student
from megatron_vopd.preflight.servers import PROBE_TOKENS, context_needed
from megatron_vopd.rollout.engine import Engine, PushReport
from megatron_vopd.rollout.push import Probe, make_probe, push
from megatron_vopd.rollout.vllm.local import LocalEngine
from megatron_vopd.rollout.vllm.server import ServerEngine, ServerSettings, servers_of_leader
from megatron_vopd.rollout.vllm.settings import LocalSettings
from megatron_vopd.run.settings import step_settings
from megatron_vopd.trainer.student_logprobs import sequence_logprobs

# Largest gap between engine and trainer on one token of the probe, nats, by what both compute in.
_PROBE_TOLERANCES = {"fp32": 1e-4, "bf16": 0.3}
# The same for each nat of the largest log-prob: fp32 rounds at 6e-8, in sums of many terms.
_PROBE_RELATIVE = {"fp32": 2e-5, "bf16": 0.0}

# (student, ids that all models share) -> this rank's engine and what gives it weights.
EngineFactory = Callable[[Student, int], "tuple[Engine | None, Pusher | None]"]


class Pusher:
    """The push of the student's weights to the engines; `report` is that of the last push.

    Args:
        engine: the engine of this rank; None: it leads none.
        probe: sequences on which engines and trainer are compared.
        longest: most tokens of a row when the trainer computes its log-probs.
    """

    def __init__(self, student: Student, engine: Engine | None, probe: Probe, longest: int) -> None:
        self._student, self._engine, self._probe, self._longest = student, engine, probe, longest
        self.report: PushReport | None = None

    def __call__(self, policy_version: int) -> PushReport:
        """Push the weights under this version. Every rank of the world calls it."""
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


def engines_of(config: Config, model_dir: str, run_dir: Path, device: str) -> EngineFactory:
    """Return a function that makes this rank's engine and pusher, as configured.

    Args:
        model_dir: HF folder of the student; its config is read.
        run_dir: engine logs go into its folder `engines`.
        device: "cpu" or "cuda", already resolved.
    """

    def make(student: Student, vocab_size: int) -> tuple[Engine | None, Pusher | None]:
        """Make neither where nothing is sampled, and no engine on ranks that lead none."""
        if not (step_settings(config, (), None).num_asked or config.evaluates):
            return None, None
        row = config.max_sequence_tokens
        exact = config.student.dtype == config.rollout.dtype == "fp32"
        probe = make_run_probe(exact, vocab_size, row)
        engine = None
        if student.groups.is_leader:
            longest = context_needed(config.max_engine_tokens)
            longest = min(longest, student.facts.max_positions)
            place = (student.groups.coordinates.dp, student.groups.layout.dp)
            seed, logs = config.run.seed, run_dir / "engines"
            gpu = _own_gpu() if device == "cuda" else None
            known = (longest, device, seed, gpu)
            engine = make_engine(config.rollout, model_dir, logs, *place, *known)
        return engine, Pusher(student, engine, probe, row)

    return make


def _own_gpu() -> str:
    """Return this rank's GPU as the engine's process has to name it."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    local_rank = int(os.environ["LOCAL_RANK"])
    return visible[local_rank] if visible else str(local_rank)


def make_run_probe(is_exact: bool, vocab_size: int, longest: int) -> Probe:
    """Make the probe of pushes; its tolerance follows from what trainer and engine compute in.

    Args:
        is_exact: trainer and engine both compute in fp32.
        vocab_size: the probe draws ids below it.
        longest: most tokens of a sequence.
    """
    kind = "fp32" if is_exact else "bf16"
    tolerance, relative = _PROBE_TOLERANCES[kind], _PROBE_RELATIVE[kind]
    length = min(PROBE_TOKENS, longest)
    return make_probe(vocab_size, length=length, tolerance=tolerance, relative=relative)


def make_engine(
    rollout: RolloutSection,
    model_dir: str,
    log_dir: str | Path,
    leader: int,
    num_leaders: int,
    max_model_len: int,
    device: str,
    seed: int,
    gpu: str | None = None,
) -> Engine:
    """Make a leader's engine. It is not started yet: the first push does that.

    Args:
        model_dir: HF folder of the student; its config is read.
        log_dir: where engines write their logs.
        leader, num_leaders: which data-parallel replica this rank leads, of how many.
        max_model_len: longest prompt and response together.
        device: "cpu" or "cuda", already resolved.
        seed: seed of the run.
        gpu: the leader's GPU, for CUDA_VISIBLE_DEVICES.

    Raises:
        UserError: a local engine over several GPUs, or a server on another host that
            `rollout.allow_remote` does not allow.
    """
    dtype = CONFIG_DTYPES[rollout.dtype].name
    if rollout.engine == "server":
        urls, push_urls = servers_of_leader(rollout.urls, leader, num_leaders)
        return ServerEngine(
            ServerSettings(
                urls,
                push_urls,
                dtype=dtype,
                transport="shm" if device == "cpu" else "nccl",
                model_dir=model_dir,
                allow_remote=rollout.allow_remote,
                deadline_seconds=rollout.deadline_seconds,
                max_model_len=max_model_len,
            )
        )
    return LocalEngine(
        LocalSettings(
            model_dir,
            log_path=str(Path(log_dir) / f"engine_{leader}.log"),
            max_model_len=max_model_len,
            dtype=dtype,
            device=device,
            tp=rollout.tp,
            gpu=gpu,
            seed=seed,
            deadline_seconds=rollout.deadline_seconds,
            memory_fraction=rollout.memory_fraction,
            cpu_threads=rollout.cpu_threads,
        )
    )
