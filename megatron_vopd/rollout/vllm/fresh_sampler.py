"""vLLM started afresh on a model folder: text in, text out, nothing of a run in between.

`python -m megatron_vopd.rollout.vllm.fresh_sampler MODEL_DIR CONTEXT MAX_TOKENS` reads a JSON list
of prompts from standard input and prints the list of greedy responses as its last line. Weights,
tokenizer and end-of-sequence ids are those of the folder: it proves that an export is whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vopd.errors import EngineError
from megatron_vopd.rollout.vllm.settings import LocalSettings


def greedy_texts(
    model_dir: Path, prompts: Sequence[str], context: int, max_tokens: int, log_path: Path
) -> list[str]:
    """Return the likeliest response to each prompt, from a fresh vLLM on the CPU, in fp32.

    Args:
        context: longest prompt and response together, in tokens.
        log_path: file of vLLM's output; replaced.

    Raises:
        EngineError: it ended without an answer.
    """
    settings = LocalSettings(str(model_dir), str(log_path), context)
    command = [sys.executable, "-m", __name__, str(model_dir), str(context), str(max_tokens)]
    with open(log_path, "w", encoding="utf-8") as log:
        process = subprocess.run(
            command,
            input=json.dumps(list(prompts)),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=settings.environment(os.environ),
            check=False,
        )
    if process.returncode != 0:
        raise EngineError(
            f"vLLM on {model_dir}: exit status {process.returncode} (log: {log_path})"
        )
    return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    model_dir, context, max_tokens = sys.argv[1:]
    llm = LLM(model_dir, dtype="float32", enforce_eager=True, max_model_len=int(context))
    sampling = SamplingParams(temperature=0.0, max_tokens=int(max_tokens))
    outputs = llm.generate(json.load(sys.stdin), sampling, use_tqdm=False)
    print(json.dumps([output.outputs[0].text for output in outputs]), flush=True)


if __name__ == "__main__":
    main()
