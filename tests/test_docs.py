"""The documents say what is true: links, names, rules and commands are there, and commands run."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vopd.cli import main
from megatron_vopd.config import config_table_markdown
from tests.support import ROOT
from tests.support.shown_commands import SHOWN
from tests.support.tiny_models import TinyModel

README = ROOT / "README.md"
FOLDERS = ("megatron_vopd", "csrc", "tests", "tools", "docs", "examples", ".github")
TRACKED = [path for path in ROOT.iterdir() if path.is_file()]
TRACKED += [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
PAGES = [path for path in TRACKED if path.suffix == ".md" and "results" not in path.parts]
COMMAND_PAGES = [README, *sorted((ROOT / "docs" / "guide").glob("*.md"))]
CODE = [path for path in TRACKED if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".yaml"}]


def blocks(path: Path, *languages: str) -> Iterator[str]:
    """Fenced blocks of a page in one of the languages."""
    for language, body in re.findall(
        r"^ *```(\w+)\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE
    ):
        if language in languages:
            yield body


def commands(path: Path) -> Iterator[tuple[str, str]]:
    """(command, output shown after it) of a page; comments are left out."""
    for body in blocks(path, "sh"):
        for line in body.replace("\\\n", " ").splitlines():
            command = re.split(r"\s+# ", line)[0].strip()
            if command and not command.startswith("#"):
                yield command, ""
    for body in blocks(path, "console"):
        for part in re.split(r"^\$ ", body, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            yield command, output


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_the_readme_is_short_and_begins_with_what_matters() -> None:
    text = README.read_text()
    lines = text.splitlines()
    assert len(lines) <= 170 and len(text.split()) <= 1700
    first = "\n".join(lines[:40])
    for needed in ("Eq. 10", "log q(a) - log p(a)", "docs/demo.png", "make demo", "[gpu,engine]"):
        assert needed in first, needed
    for needed in ("vopd check", "-m megatron_vopd.train"):
        assert needed in first, needed


def test_the_table_of_settings_is_the_schemas() -> None:
    page = ROOT / "docs" / "guide" / "configuration.md"
    assert config_table_markdown().strip() in page.read_text()


def test_what_the_readme_points_at_is_there() -> None:
    """Every file of its tree, and every name of its table in the file that it is said to be in."""
    text = README.read_text()
    tree = text.split("```text\n")[1].split("```")[0].splitlines()
    for line in tree[1:]:
        folder = ROOT / "megatron_vopd" if line.startswith("  ") else ROOT
        for name in re.split(r"\s{2,}", line.strip())[0:1]:
            assert (folder / name).exists(), name
    table = text.split("| where is | file and name |\n")[1].split("\n\n")[0]
    rows = [row.split("|")[2] for row in table.splitlines()[1:]]
    assert len(rows) >= 7
    for row in rows:
        names = re.findall(r"`([^`]+)`", row)
        files = [ROOT / "megatron_vopd" / name for name in names if name.endswith(".py")]
        assert files and all(path.exists() for path in files), row
        known = set().union(*map(defined_names, files)) | {"checkpoint.resume: auto"}
        assert {name for name in names if not name.endswith(".py")} <= known, row


def defined_names(path: Path) -> set[str]:
    """Functions, classes, methods as `Class.method`, and constants of a module."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [one.name for one in node.body if isinstance(one, ast.FunctionDef)]
            found |= {name for method in methods for name in (method, f"{node.name}.{method}")}
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_links_lead_somewhere(path: Path) -> None:
    prose = re.sub(
        r"^ *```.*?^ *```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL | re.MULTILINE
    )
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_python_files_that_are_named_exist(path: Path) -> None:
    if path.name == "CHANGELOG.md":
        return  # speaks of files that are gone
    places = (ROOT, ROOT / "megatron_vopd", ROOT / "tests", ROOT / "tests" / "support")
    for name in re.findall(r"`([\w/.]+\.(?:py|sh|yaml|sbatch|h|cpp|cu|cuh))`", path.read_text()):
        if name in ("config.yaml", "utils.py"):
            continue  # a run's own; what CONTRIBUTING forbids
        here = any((place / name).exists() for place in (*places, path.parent))
        parts = name.split("/")
        below = any(one.parts[-len(parts) :] == tuple(parts) for one in TRACKED)
        assert here or below, name


def test_the_code_cites_only_what_the_repository_holds() -> None:
    """Documents by name and section, rules R1 to R10, identifiers of the matrix of faults."""
    held = {path.name: path for path in PAGES} | {"summary.md": README}  # a study's output
    rules = held["reliability.md"].read_text()
    for path in CODE:
        text = path.read_text()
        for name, section in re.findall(r"([\w/]+\.md)(?:,? section (\d+))?", text):
            assert Path(name).name in held, f"{page_name(path)}: {name}"
            page = held[Path(name).name].read_text()
            assert not section or re.search(rf"^## {section}\. ", page, re.MULTILINE), (
                f"{page_name(path)}: {name} section {section}"
            )
        docstrings = " ".join(re.findall(r'"""(.*?)"""', text, re.DOTALL))
        for rule in re.findall(r"\((?:rule )?(R\d+)\)", docstrings):
            assert f"**{rule}." in rules, f"{page_name(path)}: {rule}"
        for cited in re.findall(
            r"(?:^|\()((?:[CTSHX]\d+(?:-[CTSHX]\d+)?(?:, )?)+)[:).]", docstrings
        ):
            for name in re.findall(r"[CTSHX]\d+", cited):
                assert re.search(rf"\b{name}\b", rules), f"{page_name(path)}: {name}"


def test_every_shown_command_is_accounted_for() -> None:
    shown = {command for path in COMMAND_PAGES for command, _ in commands(path)}
    assert shown == set(SHOWN), shown ^ set(SHOWN)
    for command, how in SHOWN.items():
        if how.startswith("tests/"):
            name, _, test = how.partition("::")
            assert (ROOT / name).exists(), f"{command}: {how}"
            assert not test or test in (ROOT / name).read_text(), f"{command}: {how}"
        else:
            assert re.fullmatch(r"run \d|not run: .+", how), f"{command}: {how}"


@pytest.mark.parametrize("command", [c for c, how in SHOWN.items() if how.startswith("run ")])
def test_a_shown_command_does_what_is_shown(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    program, *arguments = shlex.split(command)
    assert program == "vopd"
    status = main(arguments)
    captured = capsys.readouterr()
    assert status == int(SHOWN[command].removeprefix("run "))
    for path in COMMAND_PAGES:
        for other, output in commands(path):
            if other == command and output:
                assert output.strip() == (captured.out.strip() or captured.err.strip())


@pytest.mark.parametrize("page", ["README.md", "docs/guide/library.md"])
def test_python_examples_run(page: str) -> None:
    """Blocks run one after the other, as a reader would type them; Megatron's needs four ranks."""
    kept = [body for body in blocks(ROOT / page, "python") if "megatron_vopd.megatron" not in body]
    assert kept
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(kept)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_conversions(tmp_path: Path) -> None:
    """The walk through the conversion tools on a small model, each command as it is shown."""
    TinyModel("qwen3", True, 1003).save(tmp_path / "raw", 0).rename(tmp_path / "Qwen3-tiny")
    (page,) = [path for path in COMMAND_PAGES if path.name == "converting.md"]
    launcher = f"{sys.executable} -m torch.distributed.run --standalone"
    for command, output in commands(page):
        if "Qwen3-tiny" not in command:
            continue
        line = command.replace("tools/", f"{ROOT}/tools/").replace("torchrun", launcher)
        line = re.sub(r"^python ", f"{sys.executable} ", line)
        run = subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True, text=True)
        refused = "exists already" in output
        assert run.returncode == (2 if refused else 0), f"{command}\n{run.stderr}"
        last = output.strip().splitlines()[-1].split(":")[-1][-20:]
        assert last in run.stdout + run.stderr, command
