"""New weights into the engines, all or nothing, and proven before they are sampled from (R5).

The student lies in pieces on all ranks; each data-parallel leader has an engine. All ranks walk the
HF tensors in lockstep (`weights.export_weights`): each layer is put together where all ranks see
it, and dropped; leaders feed it to their engines meanwhile. So no rank ever holds the whole model.
Where all ranks and engines are on one machine's CPU, a layer is built in memory that the engines
read too (`weights/gather`); elsewhere collectives hand each tensor to every rank.

What each check sees:

    finite check     NaN or Inf in a parameter, before anything is sent; the engine stays as it was.
                     Again as converted to the engine's type, layer by layer, before it is sent
    manifest         in the engine's process, before loading: missing, extra, misshapen, wrong type,
                     truncated, changed on the way
    version          a push that the engine did not take part in
    probe            anything else: the engine's log-probs of given sequences against the trainer's
                     own (transposed, swapped or stale weights, a stale head, a stale cache)

A failure on one rank is raised on all, so that none waits for one that gave up. A failed engine
is ended, and the next attempt, in which all ranks take part, starts it again.

Collectives: the export's; per phase one gather of a short message from each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from megatron_vopd.collectives import gather_outcomes
from megatron_vopd.errors import EngineError, UserError
from megatron_vopd.hf.facts import ModelFacts
from megatron_vopd.hf.mapping import LayerSpec
from megatron_vopd.megatron.groups import Groups
from megatron_vopd.megatron.weights import export_weights
from megatron_vopd.rollout.engine import Engine, PushReport
from megatron_vopd.rollout.weights.gather import SharedGather, machine_id
from megatron_vopd.rollout.weights.send import WeightSource, is_finite

ScoreFn = Callable[[Sequence[Sequence[int]]], list[list[float]]]


@dataclass(frozen=True)
class Probe:
    """Sequences whose log-probs prove a push.

    Attributes:
        sequences: token ids, the same on every rank; at least two ids each. One longer than a block
            of the engine's cache also proves that the cache was dropped.
        tolerance: largest |log-prob of the engine - of the trainer|, nats. Sums differ in order:
            in fp32 by 1e-5 in a few layers and more in many; in bf16 by 0.1 on single tokens.
        relative: how much more for each nat of the probe's largest |log-prob|. Logits are rounded
            in proportion to their size, and a model that is very sure of itself has large ones.
    """

    sequences: tuple[tuple[int, ...], ...]
    tolerance: float = 1e-4
    relative: float = 0.0

    def __post_init__(self) -> None:
        if not self.sequences or min(map(len, self.sequences)) < 2:
            raise ValueError("probe: expected at least one sequence, of at least two ids each")

    def limit(self, logprobs: Sequence[Sequence[float]]) -> float:
        """Return the largest gap allowed to these log-probs of the trainer, nats."""
        largest = max(abs(logprob) for row in logprobs for logprob in row)
        return self.tolerance + self.relative * largest


def make_probe(
    vocab_size: int,
    num_sequences: int = 4,
    length: int = 48,
    tolerance: float = 1e-4,
    relative: float = 0.0,
) -> Probe:
    """Make a probe of random ids, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (num_sequences, length), generator=generator).tolist()
    return Probe(tuple(map(tuple, ids)), tolerance, relative)


def push(
    student: torch.nn.Module,
    facts: ModelFacts,
    groups: Groups,
    engine: Engine | None,
    policy_version: int,
    score_fn: ScoreFn | None = None,
    probe: Probe | None = None,
    layer_spec: LayerSpec = "local",
    attempts: int = 2,
) -> PushReport:
    """Bring every engine to the student's weights. Called by all ranks of the world together.

    Parameters must be current on every rank: with a distributed optimizer that overlaps their
    gathering, gather them first.

    Args:
        student: the model, not wrapped.
        engine: of this rank; None: it has none.
        score_fn: sequences -> the trainer's log-probs of ids 1.. of each, on every rank that has an
            engine; collective, called on every rank. None: the push is not probed.
        attempts: pushes until it is given up.

    Returns:
        On every rank the report of the slowest engine, its probe gap the largest of all.

    Raises:
        EngineError: on every rank. No engine holds weights that were found wrong.
    """
    _require_finite(student)
    gather = _shared_gather(student, engine)
    failures: list[str] = []
    try:
        for attempt in range(1, attempts + 1):
            reports, failures = _attempt(
                student, facts, groups, engine, policy_version, layer_spec, gather
            )
            if not failures and score_fn is not None and probe is not None:
                reports, failures = _prove(engine, reports, score_fn, probe)
            if not failures:
                return _slowest(reports, policy_version, attempt)
    finally:
        if gather is not None:
            gather.close()
    raise EngineError(
        f"push of policy version {policy_version} failed {attempts} times; last: "
        + "; ".join(failures)
    )


def _require_finite(student: torch.nn.Module) -> None:
    """Check this rank's own shards; raise on all ranks if any rank finds a fault."""
    bad = [name for name, shard in student.named_parameters() if not is_finite(shard)]
    found = f"{bad[0]} and {len(bad) - 1} more parameters are not finite" if bad else ""
    _, failures = gather_outcomes(None, found)
    if failures:
        raise EngineError(f"push: {'; '.join(failures)}; the engines keep their weights")


def _shared_gather(student: torch.nn.Module, engine: Engine | None) -> SharedGather | None:
    """Make a gather through shared memory, where every engine reads what every rank writes."""
    on_cpu = all(shard.device.type == "cpu" for shard in student.parameters())
    place = machine_id() if on_cpu else None
    found, _ = gather_outcomes((place, engine is not None, engine and engine.shared_dtype), "")
    places = {place for place, _, _ in found}
    dtypes = [dtype for _, has_engine, dtype in found if has_engine]
    if None in places or len(places) > 1 or len(set(dtypes)) != 1 or dtypes[0] is None:
        return None
    return SharedGather(dtypes[0], is_reused=len(dtypes) == 1 and found[0][1])


def _attempt(
    student: torch.nn.Module,
    facts: ModelFacts,
    groups: Groups,
    engine: Engine | None,
    policy_version: int,
    layer_spec: LayerSpec,
    gather: SharedGather | None,
) -> tuple[list[PushReport], list[str]]:
    tensors = export_weights(student, facts, groups, layer_spec, with_tied_head=True, gather=gather)
    source = WeightSource(tensors) if gather is None else WeightSource(tensors, gather.take_segment)
    report, failure = None, ""
    if engine is not None:
        try:
            report = engine.update_weights(source, policy_version)
            if engine.policy_version != policy_version:
                failure = f"the engine has version {engine.policy_version}"
                engine.refuse_weights(failure)
        except Exception as error:  # of any type: the other ranks wait for this rank's outcome
            failure = _failure(error)
    try:
        source.finish()
    except Exception as error:
        failure = failure or _failure(error)
    return gather_outcomes(report, failure)


def _failure(error: Exception) -> str:
    """Return an error as the other ranks report it, with its type where it is none of ours."""
    if isinstance(error, (EngineError, UserError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _prove(
    engine: Engine | None, reports: list[PushReport], score_fn: ScoreFn, probe: Probe
) -> tuple[list[PushReport], list[str]]:
    gap, failure = 0.0, ""
    try:
        expected = score_fn(probe.sequences)
        if engine is not None:
            gap = max(
                largest_gap(engine.probe_logprobs(probe.sequences, replica), expected)
                for replica in range(engine.num_replicas)
            )
            limit = probe.limit(expected)
            if not gap <= limit:
                failure = (
                    f"the engine's log-probs of the probe are off by {gap:.3g} nats "
                    f"(limit {limit:.3g}): it does not hold the student's weights"
                )
                engine.refuse_weights(failure)
    except Exception as error:  # of any type, as in `_attempt`
        failure = _failure(error)
        _refuse(engine, failure)
    gaps, failures = gather_outcomes(gap if engine is not None else None, failure)
    return [replace(report, probe_gap=max(gaps, default=0.0)) for report in reports], failures


def _refuse(engine: Engine | None, failure: str) -> None:
    """Drop weights that could not be proven; an engine that cannot be ended is known to be bad."""
    if engine is not None:
        with suppress(EngineError):
            engine.refuse_weights(failure)


def largest_gap(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> float:
    """Return the largest |found - expected|; NaN where one is NaN."""
    gaps = [
        abs(a - b)
        for ours, theirs in zip(found, expected, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    return float("nan") if any(gap != gap for gap in gaps) else max(gaps)


def _slowest(reports: list[PushReport], policy_version: int, attempt: int) -> PushReport:
    slowest = max(
        reports,
        key=lambda report: report.seconds,
        default=PushReport(policy_version, num_bytes=0, seconds=0.0),
    )
    return replace(slowest, attempts=attempt)
