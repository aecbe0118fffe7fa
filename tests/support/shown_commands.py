"""Every command that README.md and docs/guide show: where it is run, or why it is not.

A value is one of
    run N            `tests/test_docs.py` runs it as it stands; it ends with status N
    tests/...::name  that test runs it, with a small model, a scratch folder or a stand-in
    not run: reason
"""

from __future__ import annotations

CHECK_4B = "vopd check examples/math_qwen3_4b/config.yaml"
TRAIN = "torchrun --standalone --nproc-per-node 8 -m megatron_vopd.train"
DEMO = "tests/integration/demo/test_demo.py::test_all_stages_once_and_bars_that_are_not_met"
REPORT = "tests/unit/run/test_report.py::test_one_page_with_every_curve"
DOCTOR = "tests/unit/preflight/test_doctor.py::test_this_environment_is_sound"
# Resolved by pip, not installed.
RESOLVED = "tests/unit/tools/test_installing.py::test_pip_resolves_the_set_for_gpus"
NO_GPUS = "not run: needs 8 GPUs and downloads two models"

SHOWN: dict[str, str] = {
    "make demo": DEMO,
    "make test": "not run: it is what runs these tests",
    "make test-all": "not run: it is what runs these tests",
    "make install": "not run: `make test` begins with it",
    "make engine": "not run: `make test-all` begins with it",
    ". .venv/bin/activate": "not run: it changes the shell that it is typed into",
    "pip install -c constraints/gpu.txt vllm setuptools wheel ninja pybind11": RESOLVED,
    'pip install --no-build-isolation -c constraints/gpu.txt -e ".[gpu,engine]"': RESOLVED,
    "vopd doctor": DOCTOR,
    "vopd doctor --for gpu": DOCTOR,
    f"{CHECK_4B} --world-size 8": "run 0",
    f"{CHECK_4B} --world-size 8 student.path=./tests/fixtures/models/Qwen3-4B-Base "
    "teacher.path=./tests/fixtures/models/Qwen3-4B": "run 0",
    "vopd check examples/math_qwen3_1.7b/config.yaml objective.baseline=full train.steps=10 "
    "'curriculum.ladder=[512, 1024]'": "run 0",
    "vopd check examples/math_qwen3_1.7b/config.yaml rollout.temperature=0.7": "run 2",
    "vopd exit-code --clear examples/math_qwen3_4b/config.yaml": "run 0",
    "vopd exit-code examples/math_qwen3_4b/config.yaml": "run 1",
    f"{TRAIN} examples/math_qwen3_4b/config.yaml": NO_GPUS,
    f"{TRAIN} examples/math_qwen3_4b/config.yaml train.steps=10 run.name=short": NO_GPUS,
    "torchrun --standalone --nproc-per-node 4 -m megatron_vopd.train "
    "examples/arithmetic/distil.yaml --dry-run": "tests/integration/preflight/test_memory.py::"
    "test_the_estimate_is_near_what_was_needed",
    "sbatch examples/qwen3_8b_from_32b/launch.sbatch ./Qwen3-8B teacher.path=./Qwen3-32B": "tests/"
    "unit/run/test_status.py::TestScripts",
    "sbatch examples/qwen3_4b_from_235b/launch.sbatch student.path=./Qwen3-4B "
    "teacher.path=./Qwen3-235B-A22B": "tests/unit/run/test_status.py::TestScripts",
    "examples/servers/start.sh examples/arithmetic/distil.yaml rollout.engine=server "
    "'rollout.urls=[http://127.0.0.1:8000, http://127.0.0.1:8001]'": "tests/"
    "integration/rollout/test_engine_servers.py",
    "vopd server-commands examples/qwen3_8b_from_32b/config.yaml": "run 0",
    "torchrun --nproc-per-node 4 tools/convert_hf_to_megatron.py ./Qwen3-tiny "
    "./Qwen3-tiny-megatron --tp 2 --pp 2 --verify": "tests/test_docs.py::test_conversions",
    "python tools/convert_megatron_to_hf.py ./Qwen3-tiny-megatron ./Qwen3-tiny-again --verify": (
        "tests/test_docs.py::test_conversions"
    ),
    "python tools/check_conversion.py ./Qwen3-tiny ./Qwen3-tiny-megatron": (
        "tests/test_docs.py::test_conversions"
    ),
    "python tools/check_conversion.py ./Qwen3-tiny ./Qwen3-tiny-again": (
        "tests/test_docs.py::test_conversions"
    ),
    "python tools/convert_hf_to_megatron.py ./Qwen3-tiny ./Qwen3-tiny-again": (
        "tests/test_docs.py::test_conversions"
    ),
    "python tools/convert_megatron_to_hf.py ./runs/demo/vopd/checkpoints/step_200 "
    "./runs/demo/vopd-step_200": "tests/distributed/checkpoint/test_run_conversion.py",
    "python tools/generate_teacher_responses.py ./runs/demo/teacher/hf/step_250 "
    "./runs/demo/data/train.jsonl ./runs/demo/teacher_responses.jsonl --chat-template none "
    "--max-tokens 34 --dtype fp32": "tests/integration/run/test_teacher_responses.py",
    "vopd report runs/demo/vopd": REPORT,
}
