"""The help of the conversion tools."""

from __future__ import annotations

import pytest

from tests.support.tools import load_tool


@pytest.mark.parametrize(
    "tool", ["convert_hf_to_megatron", "convert_megatron_to_hf", "check_conversion"]
)
def test_help_has_examples(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        load_tool(tool).main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert f"python tools/{tool}.py" in text.split("examples:")[1]
