"""Responses of a teacher to a file of prompts, for training with objective.prefix: teacher."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatron_vopd.errors import FAILED, OK
from megatron_vopd.run.terminal import counting_bar
from megatron_vopd.run.tool_options import run_tool, tool_parser

SUMMARY = """\
Sample responses of a model to prompts with vLLM, and write them as JSONL that a run trains on:

  objective: {prefix: teacher}
  data: {responses: ./OUT.jsonl}

Each line is the prompt's record with response_ids, response, finish_reason (stop, length) and the
log-probs of the distribution sampled (temperature and nucleus applied, nats). OUT.jsonl appears
when it is whole; until then OUT.jsonl.partial grows. Killed at any time, the same command resumes
where it was: no response is lost, none is there twice. OUT.jsonl.info.json says what the responses
were made from; with another model, other prompts or other sampling the command is refused."""
EXAMPLES = """\
  python tools/generate_teacher_responses.py ./Qwen3-1.7B prompts.jsonl responses.jsonl
  python tools/generate_teacher_responses.py ./teacher prompts.jsonl out.jsonl --samples 4 --seed 1
  python tools/generate_teacher_responses.py ./teacher prompts.jsonl out.jsonl --tokenizer ./student
the last renders prompts by the student's chat template, where the two models' templates differ: a
run refuses responses to other prompt ids than its own."""


def _bounded(kind: type, low: float, high: float, what: str):
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"got {text}, expected {what}")
        return value

    parse.__name__ = what
    return parse


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    count = _bounded(int, 1, 2**31 - 1, "an integer >= 1")
    share = _bounded(float, 1e-6, 1, "a number above 0 and at most 1")
    parser = tool_parser(SUMMARY, EXAMPLES)
    parser.add_argument("model", metavar="MODEL_DIR", help="the teacher: HF folder or hub id")
    parser.add_argument("prompts", metavar="PROMPTS", help=".jsonl, .parquet, folder or hub id")
    parser.add_argument("out", metavar="OUT.jsonl", type=Path)
    add = parser.add_argument
    add("--samples", type=count, default=1, help="responses per prompt (default 1)")
    add("--max-tokens", type=count, default=2048, help="longest response (default 2048)")
    heat = _bounded(float, 0, 10, "a number from 0 to 10")
    add("--temperature", type=heat, default=1.0, help="0 is greedy (default 1)")
    add("--top-p", type=share, default=1.0, help="nucleus (default 1)")
    seed = _bounded(int, 0, 2**32 - 1, "an integer >= 0")
    add("--seed", type=seed, default=0, help="of all responses; each has its own (default 0)")
    add("--tokenizer", help="folder whose tokenizer and template render prompts (MODEL_DIR)")
    template = "tokenizer (its own), none (plain text) or a Jinja file (default tokenizer)"
    add("--chat-template", default="tokenizer", help=template)
    add("--thinking", action="store_true", help="enable_thinking of the chat template")
    add("--prompt-field", default="prompt", help="field that holds the prompt (default prompt)")
    longest = "longer prompts are left out and counted (default 1024)"
    add("--max-prompt-tokens", type=count, default=1024, help=longest)
    add("--dtype", choices=("bf16", "fp32"), default="bf16", help="compute type (default bf16)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--tp", type=count, default=1, help="tensor-parallel size (default 1)")
    add("--batch", type=count, default=256, help="prompts sampled at a time (default 256)")
    memory = "share of a GPU's memory (default 0.9)"
    add("--memory-fraction", type=share, default=0.9, help=memory)
    return parser.parse_args(arguments)


def local(text: str) -> str:
    """Return a command line's path as settings write it: what is no hub id begins with ./ or /."""
    is_id = text.count("/") == 1 and not text.endswith((".jsonl", ".parquet", "/"))
    is_relative = not text.startswith(("/", "./", "../", "~"))
    return f"./{text}" if is_relative and (os.path.exists(text) or not is_id) else text


def run(options: argparse.Namespace) -> int:
    import torch

    from megatron_vopd.errors import EngineError
    from megatron_vopd.files.response_file import ResponseFile
    from megatron_vopd.run.teacher_responses import Job, generate, make_engine, plan, require_vllm

    has_gpu = torch.cuda.is_available()
    device = options.device if options.device != "auto" else "cuda" if has_gpu else "cpu"
    paths = {key: local(getattr(options, key)) for key in ("model", "prompts")}
    tokenizer = options.tokenizer and local(options.tokenizer)
    made = plan(Job(**{**vars(options), **paths, "tokenizer": tokenizer, "device": device}))
    require_vllm()
    total = len(made.places)
    print(f"{len(made.prompts)} prompts, {made.num_too_long} left out as too long", flush=True)
    with ResponseFile(options.out, made.identity(), made.places) as file:
        if file.repaired:
            print(f"note: {file.repaired}", flush=True)
        if file.num_lines and not file.is_complete:
            print(f"going on after {file.num_lines} of {total} responses", flush=True)
        engine = make_engine(made)
        try:
            with counting_bar("responses") as show:
                generate(made, file, engine, lambda done: show(done, total))
        except (EngineError, KeyboardInterrupt) as error:
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
            left = f"{file.num_lines} of {total} responses are safe; the same command resumes"
            print(f"{what}; {left}".replace("\n", " "), file=sys.stderr, flush=True)
            return FAILED
        finally:
            engine.close()
    with suppress(FileNotFoundError):
        os.unlink(f"{options.out}.engine.log")
    print(f"{options.out}: {total} responses", flush=True)
    return OK


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_tool(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
