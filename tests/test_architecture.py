"""What keeps the code small and its packages apart (docs/how/architecture.md). Nobody is exempt."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_vopd"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_SECTION_FIELDS = 400, 60, 15
MAX_TOP_LEVEL_MODULES, MAX_ROOMS, MAX_EDGES, MAX_CONFIG_READERS = 9, 20, 80, 20

# A room is a package, or a module at the front door. It imports strictly lower floors only.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "ops", "curriculum"),
    ("types", "collectives", "files", "vocab_parallel"),
    ("objectives", "hf", "config"),
    ("data", "megatron", "preflight"),
    ("rollout", "checkpoint"),
    ("trainer",),
    ("run",),
    ("train", "demo"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# What a room may import; every room may import errors and types.
ALLOWED: dict[str, str] = {
    "errors": "",
    "ops": "",
    "curriculum": "",
    "types": "",
    "collectives": "",
    "files": "",
    "vocab_parallel": "ops",
    "objectives": "ops",
    "hf": "files",
    "config": "",
    "data": "hf config",
    "preflight": "hf config",
    "megatron": "hf config vocab_parallel collectives",
    "rollout": "megatron hf collectives",
    "checkpoint": "megatron hf files collectives",
    "trainer": "rollout megatron data files objectives vocab_parallel curriculum ops collectives",
    "run": "trainer rollout checkpoint megatron data preflight hf config objectives curriculum "
    "files collectives",
    "demo": "run rollout data files",
    "train": "run megatron config collectives",
    "cli": "run demo preflight data config",
}

# Heavy packages, and calls between ranks, are for the named places only.
FENCES: dict[str, tuple[str, ...]] = {
    "megatron.core": ("megatron", "checkpoint"),
    "megatron.training": (),
    "vllm": ("rollout",),
    "datasets": ("data",),
    "math_verify": ("data/grading_worker",),
    "torch.utils.tensorboard": ("run/log",),
    "wandb": ("run/log",),
    "transformers": ("data", "hf", "megatron", "checkpoint/convert", "demo"),
}
COLLECTIVE_PLACES = (
    "collectives",
    "vocab_parallel",
    "megatron/groups",
    "megatron/teacher",
    "trainer/exchange",
    "trainer/metrics",
)
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
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def place_of(path: Path) -> str:
    """Return the path of a file within the package, without its ending: `run/log`."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def room_of(path: Path) -> str:
    return place_of(path).partition("/")[0]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_modules(path: Path) -> set[str]:
    """List the dotted names of everything that is imported anywhere in a file."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_rooms(path: Path) -> set[str]:
    """List the other rooms of the package that a file imports."""
    ours = {name for name in imported_modules(path) if is_under(name, "megatron_vopd")}
    rooms = {name.split(".")[1] for name in ours if "." in name}
    return rooms - {room_of(path), "__version__", "_C"}


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def is_at(place: str, allowed: tuple[str, ...]) -> bool:
    return any(place == one or place.startswith(one + "/") for one in allowed)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=place_of)
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert not imported_modules(path)
        return
    assert room in FLOOR_OF, f"{room} has no floor: add it to FLOORS and ALLOWED"
    allowed = {"errors", "types", *ALLOWED[room].split()}
    for other in sorted(imported_rooms(path)):
        assert FLOOR_OF[other] < FLOOR_OF[room], f"{room} imports {other}, which is not below it"
        assert other in allowed, f"{room} may import {sorted(allowed)}, not {other}"


def test_the_house_is_small() -> None:
    rooms = {room_of(path) for path in SOURCES} - {"__init__"}
    edges = {(room_of(path), room) for path in SOURCES for room in imported_rooms(path)}
    assert rooms == set(FLOOR_OF) == set(ALLOWED)
    assert len(rooms) <= MAX_ROOMS and len(FLOORS) <= 9
    assert len(edges) <= MAX_EDGES, f"{len(edges)} edges"
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP_LEVEL_MODULES


def test_the_documented_imports_are_these() -> None:
    """docs/how/architecture.md, section 5: `run` is written there in words."""
    page = (ROOT / "docs" / "how" / "architecture.md").read_text()
    table = page.split("| package | may import |\n")[1].split("\n\n")[0]
    documented = {}
    for row in table.splitlines()[1:]:
        _, rooms, imports, _ = (re.sub(r" \([^)]*\)", "", cell) for cell in row.split("|"))
        documented |= {room: set(re.findall(r"\w+", imports)) for room in re.findall(r"\w+", rooms)}
    below = {room for room in FLOOR_OF if FLOOR_OF[room] < FLOOR_OF["run"]}
    documented["run"] = below - {"ops", "vocab_parallel"}
    ground = {"errors", "types"}
    for room, imports in documented.items():
        assert imports - ground == set(ALLOWED[room].split()) - ground, room
    assert documented.keys() == ALLOWED.keys()


def test_few_functions_take_a_whole_config() -> None:
    readers = [
        f"{place_of(path)}.{function.name}"
        for path in SOURCES
        if room_of(path) != "config"
        for function in functions(path)
        for argument in (*function.args.args, *function.args.kwonlyargs)
        if argument.annotation is not None and ast.unparse(argument.annotation) == "Config"
    ]
    assert len(readers) <= MAX_CONFIG_READERS, f"{len(readers)}: {readers}"
    places = {reader.partition(".")[0] for reader in readers}
    assert all(is_at(place, ("preflight", "run", "train", "cli")) for place in places), places


@pytest.mark.parametrize("path", SOURCES, ids=place_of)
def test_fences(path: Path) -> None:
    place = place_of(path)
    for name in imported_modules(path):
        for package, allowed in FENCES.items():
            fine = not is_under(name, package) or is_at(place, allowed)
            assert fine, f"{place} imports {name}"
    if not is_at(place, COLLECTIVE_PLACES):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES:
                owner = ast.unparse(node.value)
                assert owner not in ("dist", "torch.distributed"), f"{place}: {owner}.{node.attr}"


@pytest.mark.parametrize("path", [*SOURCES, *TOOLS], ids=lambda p: str(p.relative_to(ROOT)))
def test_size_caps(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        assert lines <= MAX_FUNCTION_LINES, f"{function.name}: {lines} lines"


def test_config_sections_are_small() -> None:
    from megatron_vopd.config import Config

    for name, field in Config.model_fields.items():
        fields = getattr(field.annotation, "model_fields", {})
        assert len(fields) <= MAX_SECTION_FIELDS, f"section {name}: {len(fields)} fields"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=place_of)
def test_packages_hold_one_line_and_import_nothing(path: Path) -> None:
    if room_of(path) in ("__init__", "config"):
        return
    assert ast.get_docstring(tree_of(path)) and len(tree_of(path).body) == 1


@pytest.mark.parametrize(
    "module",
    [
        "objectives",
        "curriculum",
        "config",
        "hf.mapping",
        "hf.facts",
        "data.prompts",
        "trainer.metrics",
        "run.report",
    ],
)
def test_pure_modules_import_nothing_heavy(module: str) -> None:
    code = (
        f"import sys, megatron_vopd.{module}; "
        "print([m for m in ('megatron', 'vllm', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_tests_import_public_names_only(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level == 0 and not any(is_under(module, own) for own in ("megatron_vopd", "tests")):
            continue
        for name in [*module.split("."), *(alias.name for alias in node.names)]:
            assert not name.startswith("_") or name.endswith("__"), f"{module} {name}: is private"
            assert not name.startswith("test_"), f"{module} {name}: share it in tests/support"


def test_every_file_is_ascii() -> None:
    for path in [*SOURCES, *TOOLS, *TESTS]:
        assert path.read_bytes().isascii(), path
