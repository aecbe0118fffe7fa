"""The help of the conversion tools, and an environment that is not a rank's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tools import load_tool

TOOLS = ["convert_hf_to_megatron", "convert_megatron_to_hf", "check_conversion"]


@pytest.mark.parametrize("tool", TOOLS)
def test_help_has_examples(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_tool(tool).main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert f"python tools/{tool}.py" in text.split("examples:")[1]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "abc", "RANK": "0"}, "WORLD_SIZE: got 'abc', expected an integer"),
        ({"WORLD_SIZE": "-4", "RANK": "0"}, "WORLD_SIZE: got '-4', expected an integer"),
        ({"WORLD_SIZE": "4"}, "RANK: got nothing, expected the environment of a rank"),
    ],
)
def test_an_environment_that_is_not_a_ranks_is_one_line(
    tool: str,
    variables: dict[str, str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert load_tool(tool).main([str(tmp_path / "in"), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and says in printed and "or unset WORLD_SIZE" in printed
