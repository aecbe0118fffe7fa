"""A script: vLLM samples from a model folder; prints token ids and their log-probs as JSON."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    # One process, small cache, loopback only.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    prompts = json.loads(sys.argv[2])
    engine = LLM(
        sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        logprobs_mode="processed_logprobs",
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=64,
    )
    sampling = SamplingParams(
        temperature=1.0, max_tokens=24, seed=0, logprobs=0, detokenize=False, ignore_eos=True
    )
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    found = []
    for output in outputs:
        sampled = output.outputs[0]
        pairs = zip(sampled.token_ids, sampled.logprobs or [], strict=True)
        logprobs = [step[token].logprob for token, step in pairs if step]
        found.append({"ids": list(sampled.token_ids), "logprobs": logprobs})
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
