"""Checks of a configuration against the models that it names, before anything is loaded.

Only local folders are read; hub ids are listed as not checked. Every finding is one line:
a Problem (refused) or a Notice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_vopd.config.notices import notices as config_notices
from megatron_vopd.config.schema import Config
from megatron_vopd.config.world import cut_problems, layouts, world_problems
from megatron_vopd.errors import Notice, Problem, shown
from megatron_vopd.hf.facts import ModelError, ModelFacts, layout_problems
from megatron_vopd.hf.folder import ModelFolder, missing_files, read_model_folder
from megatron_vopd.types import Layout, is_local_path


@dataclass
class Findings:
    """The result of a check.

    Attributes:
        problems: mistakes, each of which is refused.
        notices: remarks that are no mistakes.
        cuts: layouts by key of the model; empty when they do not fit the world.
        models: models that could be read, by key.
    """

    problems: list[Problem] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)
    cuts: dict[str, Layout] = field(default_factory=dict)
    models: dict[str, ModelFolder] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, ModelFacts]:
        """Shapes of the models, by key."""
        return {key: model.facts for key, model in self.models.items()}


def preflight(
    config: Config,
    world_size: int,
    device: str | None = None,
    models: Mapping[str, ModelFolder] | None = None,
) -> Findings:
    """Find every problem and notice of `config` on `world_size` ranks.

    Args:
        device: "cpu" or "cuda", already resolved; None: `parallel.device`, where `auto` counts as
            GPUs.
        models: all models of the run, if they were read before; None: the local ones are read.
    """
    findings = Findings(world_problems(config, world_size), config_notices(config))
    if not cut_problems(config, world_size):
        findings.cuts = layouts(config, world_size)
    if models is None:
        models = _read_models(config.model_paths, findings)
    findings.models = dict(models)
    findings.problems += _run_dir_problems(os.path.join(config.run.dir, config.run.name))
    on_gpu = (device or config.parallel.device) != "cpu"
    if config.has_engines and config.rollout.engine == "local" and on_gpu:
        findings.notices += _sampling_notices(findings.cuts.get("student"))
    prompt, contract = config.data.max_prompt_tokens, config.data.eos_contract
    longest = {"curriculum.ladder": config.max_response_tokens}
    evaluated = {"evaluation.max_tokens": config.evaluation.max_tokens} if config.evaluates else {}
    for key, model in models.items():
        if key in findings.cuts:
            parallel = config.parallel.sequence_parallel
            findings.problems += _layout_problems(key, model, findings.cuts[key], parallel)
        responses = longest | (evaluated if key == "student" else {})
        findings.problems += _context_problems(key, model, prompt, responses)
        findings.problems += _engine_problems(key, model, config.rollout.tp)
        findings.problems += _id_problems(key, model)
        if key != "student" and "student" in models:
            _compare(key, models["student"], model, contract, findings)
    findings.problems += _contract_problems(contract, models)
    return findings


def _read_models(paths: Mapping[str, str], findings: Findings) -> dict[str, ModelFolder]:
    """Read every local model; report in `findings` those that cannot be read, and hub ids."""
    models: dict[str, ModelFolder] = {}
    for key, path in paths.items():
        if not is_local_path(path):
            text = f"not checked: hub id {path} (give a local folder to check the model)"
            findings.notices.append(Notice(f"{key}.path", text))
            continue
        try:
            model = read_model_folder(os.path.expanduser(path))
            missing = missing_files(model.path)
        except ModelError as error:
            expected = "a supported model folder"
            findings.problems.append(Problem(f"{key}.path", shown(path), expected, str(error)))
            continue
        models[key] = model
        if missing:
            text = f"not in the folder, and needed by a run: {', '.join(map(shown, missing[:3]))}"
            findings.notices.append(Notice(f"{key}.path", text))
        if model.code_files:
            names = ", ".join(shown(name)[1:-1] for name in model.code_files[:5])
            text = f"the folder carries code ({names}); it is never executed"
            findings.notices.append(Notice(f"{key}.path", text))
    return models


def _run_dir_problems(run_dir: str) -> list[Problem]:
    """Require that the run's folder can be written, or made where it is absent."""
    nearest = os.path.abspath(run_dir)
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    if os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK):
        return []
    got = f"{shown(run_dir)}, where {shown(nearest)} is "
    got += "not writable" if os.path.isdir(nearest) else "no folder"
    remedy = "choose another run.name or run.dir"
    return [Problem("run.dir", got, "a folder that can be written", remedy)]


def _sampling_notices(layout: Layout | None) -> list[Notice]:
    """Say how many GPUs sample, where local engines leave some idle meanwhile."""
    if layout is None or layout.dp == layout.world_size:
        return []
    text = (
        f"on GPUs {layout.dp} of {layout.world_size} sample, one for each replica of the student "
        f"({layout}); the others wait meanwhile: rollout.engine=server samples on GPUs of its own"
    )
    return [Notice("rollout.engine", text)]


def _layout_problems(
    key: str, model: ModelFolder, layout: Layout, sequence_parallel: bool
) -> list[Problem]:
    """Report every axis along which the model cannot be cut by `layout`."""
    trained = key == "student"
    section = "parallel" if trained else key
    reasons = layout_problems(model.facts, layout, trained, trained and sequence_parallel)
    problems = []
    for reason in reasons:
        axis = reason.partition("=")[0]
        got = str(getattr(layout, axis))
        expected = f"a size that suits the model {model.path}"
        problems.append(Problem(f"{section}.{axis}", got, expected, reason))
    return problems


def _context_problems(
    key: str, model: ModelFolder, prompt: int, longest: Mapping[str, int]
) -> list[Problem]:
    """Compare the longest prompt and response (setting -> tokens) with the model's context."""
    return [
        Problem(
            setting,
            f"{prompt} prompt + {response} response = {prompt + response} tokens",
            f"at most the context of {key}, {model.context}",
            f"shorten data.max_prompt_tokens or {setting}",
        )
        for setting, response in longest.items()
        if prompt + response > model.context
    ]


def _engine_problems(key: str, model: ModelFolder, tp: int) -> list[Problem]:
    """Require that `rollout.tp` divides the student's heads."""
    heads = model.facts.num_heads
    if key != "student" or heads % tp == 0:
        return []
    remedy = "lower rollout.tp to a divisor of the heads"
    return [Problem("rollout.tp", str(tp), f"a divisor of the student's {heads} heads", remedy)]


def _id_problems(key: str, model: ModelFolder) -> list[Problem]:
    """Report a tokenizer or EOS id that the embedding has no row for."""
    ids = [*(model.vocabulary or {}).values(), *model.eos_ids]
    largest = max(ids, default=0)
    if largest < model.facts.vocab_size:
        return []
    return [
        Problem(
            f"{key}.path",
            f"token id {largest} in the tokenizer",
            f"ids below the model's vocab_size {model.facts.vocab_size}",
            "use the tokenizer that belongs to the model",
        )
    ]


def _compare(
    key: str,
    student: ModelFolder,
    teacher: ModelFolder,
    contract: str | None,
    findings: Findings,
) -> None:
    """Compare tokenizer, EOS ids and chat template of a teacher with the student's.

    Differences are added to `findings`, as problems or notices.
    """
    if student.vocabulary is None or teacher.vocabulary is None:
        text = "tokenizers not compared: no tokenizer.json in one of the folders"
        findings.notices.append(Notice(f"{key}.path", text))
    else:
        findings.problems += _vocabulary_problems(key, student.vocabulary, teacher.vocabulary)
    if student.facts.vocab_size != teacher.facts.vocab_size:
        sizes = f"{student.facts.vocab_size} and {teacher.facts.vocab_size}"
        text = f"vocab_size of student and teacher differ ({sizes}); the common ids are compared"
        findings.notices.append(Notice(f"{key}.path", text))
    if student.eos_ids != teacher.eos_ids and contract is None:
        got = f"EOS ids {sorted(student.eos_ids)} (student), {sorted(teacher.eos_ids)} ({key})"
        findings.problems.append(
            Problem(
                "data.eos_contract",
                got,
                "equal sets, or a contract",
                "set data.eos_contract=teacher (the student learns the teacher's end), student or "
                "union",
            )
        )
    differing = sorted(student.special_tokens ^ teacher.special_tokens)
    if differing:
        text = f"special in one of student and teacher only: {shown(differing[:5])}"
        findings.notices.append(Notice(f"{key}.path", text))
    if student.chat_template != teacher.chat_template:
        text = "the chat templates differ; the teacher sees prompts in the student's template"
        findings.notices.append(Notice(f"{key}.path", text))


def _vocabulary_problems(
    key: str, student: dict[str, int], teacher: dict[str, int]
) -> list[Problem]:
    """Require that every token has the same id in both; report how many have not."""
    differing = [
        token
        for token in student.keys() | teacher.keys()
        if student.get(token) != teacher.get(token)
    ]
    if not differing:
        return []
    first = min(differing)
    got = (
        f"{len(differing)} tokens that differ from the student's, such as {shown(first)} "
        f"(student {student.get(first, 'without it')}, teacher {teacher.get(first, 'without it')})"
    )
    remedy = "use a teacher of the student's model family"
    return [Problem(f"{key}.path", got, "the student's tokenizer", remedy)]


def _contract_problems(contract: str | None, models: Mapping[str, ModelFolder]) -> list[Problem]:
    """Require that the contract names one set of EOS ids, and that it is not empty."""
    teachers = {model.eos_ids for key, model in models.items() if key != "student"}
    if contract == "teacher" and len(teachers) > 1:
        remedy = "set data.eos_contract=union"
        return [Problem("data.eos_contract", "teacher", "teachers with equal EOS ids", remedy)]
    names = [key for key in models if (key == "student") == (contract != "teacher")]
    if contract == "union" or not names or any(models[key].eos_ids for key in names):
        return []
    expected = "eos_token_id in generation_config.json or config.json"
    return [Problem(f"{names[0]}.path", "no EOS id", expected, "add it: a response has to end")]
