"""A script: a trainer with an engine of two workers, which ends in one of several ways."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megatron_vopd.rollout.engine import Sampling
from megatron_vopd.rollout.vllm.local import LocalEngine
from tests.support.engines import make_prompts, settings
from tests.support.tiny_models import reference_tensors


def main() -> None:
    folder, log_path, how = sys.argv[1:]
    engine = LocalEngine(settings(folder, log_path, tp=2))
    engine.update_weights(reference_tensors(Path(folder)).items(), 1)
    engine.generate(make_prompts(4), Sampling(max_tokens=8))
    # The leader of the session that all processes of the engine belong to.
    print(f"UP {min(engine.processes())}", flush=True)
    sys.stdin.readline()
    if how == "close":
        engine.close()
    if how == "exception":
        raise RuntimeError("the trainer fails")
    if how == "wait":
        time.sleep(600)


if __name__ == "__main__":
    main()
