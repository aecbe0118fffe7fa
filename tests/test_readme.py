"""What the README shows is what the code says."""

from __future__ import annotations

from pathlib import Path

from megatron_vopd.config import config_table_markdown

ROOT = Path(__file__).parents[1]


def test_the_table_of_settings_is_the_schemas() -> None:
    assert config_table_markdown().strip() in (ROOT / "README.md").read_text()


def test_every_file_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text().split("## Where things are")[1].split("##")[0]
    named = [word for cell in text.split("|") for word in cell.split("`")[1::2]]
    assert len(named) > 10
    for name in named:
        places = [ROOT / name, ROOT / "megatron_vopd" / name, ROOT / "tests" / name]
        assert any(place.exists() for place in places), name
