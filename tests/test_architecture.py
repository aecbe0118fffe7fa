"""What keeps the code small and its layers apart. There is no list of exemptions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_vopd"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_SECTION_FIELDS = 400, 60, 15

# A module may import its own layer and the layers below it. A folder counts as one module.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("types", "problems", "config"),
    ("model_facts", "hf_folder", "preflight", "ops", "objectives", "hub", "stop_ids"),
    ("publish", "model_files", "inert_pickle", "checkpoint_values", "checkpoint_format"),
    ("response_file", "state_cache"),
    ("cpu_runtime", "parallel", "vocab_parallel"),
    ("attention", "hf_mapping", "model", "hf_io", "checkpoint", "publish_together"),
    ("records", "record_fields", "prompt_stream"),
    ("rollout", "packing", "data", "curriculum", "metrics", "metrics_file", "run_log", "report"),
    ("grading_worker", "grading", "final_answer", "responses"),
    ("model_source", "checkpoint_model", "hf_import", "hf_export", "conversion_check"),
    ("activation_memory",),
    ("memory_estimate",),
    ("memory_table", "settings", "sharing", "guard"),
    ("stopping",),
    ("collector", "forward", "student", "weight_sync", "evaluation"),
    ("teacher",),
    ("loss", "scoring", "cached_states"),
    ("optimizer_state", "random_state", "run_folder", "run_resume", "run_identity"),
    ("run_engine", "run_sources", "run_caches"),
    ("trainer", "student_export", "teacher_responses", "exit_code"),
    ("run_checkpoint",),
    ("run_start",),
    ("assembly",),
    ("dry_run",),
    ("run_loop",),
    ("demo_data", "demo_models", "demo_stages", "demo_report"),
    ("demo",),
    ("train", "cli", "tool_cli"),
)
LAYER_OF = {module: level for level, modules in enumerate(LAYERS) for module in modules}

# Heavy packages, and calls between ranks, are for the named modules only.
FENCES: dict[str, set[str]] = {
    "megatron.core": {
        "parallel",
        "model",
        "attention",
        "hf_io",
        "checkpoint",
        "forward",
        "student",
        "optimizer_state",
        "random_state",
        "loss",
        "cpu_runtime",
    },
    "megatron.training": set(),
    "vllm": {"rollout"},
    "datasets": {"records"},
    "math_verify": {"grading_worker"},
    "torch.utils.tensorboard": {"run_log"},
    "wandb": {"run_log"},
    "transformers": {"data", "hf_io", "model", "conversion_check", "demo_models"},
}
COLLECTIVE_MODULES = {
    "vocab_parallel",
    "parallel",
    "teacher",
    "sharing",
    "metrics",
    "weight_sync",
    "checkpoint",
}
COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "batch_isend_irecv",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "irecv",
    "isend",
    "new_group",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
}

SOURCES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def module_of(path: Path) -> str:
    """The name under which LAYERS knows a file: its own, or that of its folder in the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_modules(tree: ast.AST) -> set[str]:
    """Dotted names of everything that is imported anywhere in a file."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    if module == "__init__":
        return
    assert module in LAYER_OF, f"{module} has no layer: add it to LAYERS"
    for name in imported_modules(ast.parse(path.read_text())):
        if is_under(name, "megatron_vopd") and name != "megatron_vopd":
            target = name.split(".")[1]
            if target in ("__version__", "_C"):
                continue
            assert LAYER_OF[target] <= LAYER_OF[module], f"{module} imports {target} above it"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_fences(path: Path) -> None:
    module, tree = module_of(path), ast.parse(path.read_text())
    for name in imported_modules(tree):
        for package, allowed in FENCES.items():
            assert not is_under(name, package) or module in allowed, f"{module} imports {name}"
    if module not in COLLECTIVE_MODULES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
                owner = ast.unparse(node.value)
                assert owner not in ("dist", "torch.distributed"), f"{module}: {owner}.{node.attr}"


@pytest.mark.parametrize("path", [*SOURCES, *TOOLS], ids=lambda p: str(p.relative_to(ROOT)))
def test_size_caps(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name}: {lines} lines"


def test_config_sections_are_small() -> None:
    from megatron_vopd.config import Config

    for name, field in Config.model_fields.items():
        fields = getattr(field.annotation, "model_fields", {})
        assert len(fields) <= MAX_SECTION_FIELDS, f"section {name}: {len(fields)} fields"


@pytest.mark.parametrize(
    "module", ["objectives", "config", "hf_mapping", "model_facts", "data", "metrics", "report"]
)
def test_pure_modules_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, megatron_vopd.{module}; "
        "print([m for m in ('megatron', 'vllm', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_file_is_ascii() -> None:
    for path in [*SOURCES, *TOOLS, *(ROOT / "tests").rglob("*.py")]:
        assert path.read_bytes().isascii(), path
