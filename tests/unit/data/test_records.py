"""Records from every kind of source, offline, with names that say where each one stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vopd.data.records import EVALUATION_SPLITS, read_records
from tests.support.data_cases import RECORDS, refused, write_jsonl


class TestSources:
    """The same five records from every kind of place, with names that say which one."""

    def names(self, path: str, splits: tuple[str, ...] = ("train",)) -> list[str]:
        records = list(read_records(path, "data.train", splits))
        assert [record.fields for record in records] == RECORDS
        return [record.name for record in records]

    def test_jsonl(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", RECORDS)
        assert self.names(path) == [f"a.jsonl:{i}" for i in range(1, 6)]
        text = Path(path).read_text().replace("\n", "\n\n").encode("utf-8-sig")
        Path(path).write_bytes(text)
        assert self.names(path) == [f"a.jsonl:{i}" for i in range(1, 10, 2)]

    def test_parquet_and_saved_folders(self, tmp_path: Path) -> None:
        from datasets import Dataset, DatasetDict

        data = Dataset.from_list(RECORDS)
        data.to_parquet(tmp_path / "a.parquet")
        data.save_to_disk(tmp_path / "saved")
        DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "splits")
        assert self.names(str(tmp_path / "a.parquet"))[4] == "a.parquet:5"
        assert self.names(str(tmp_path / "saved"))[0] == "saved:1"
        assert self.names(str(tmp_path / "splits"))[0] == "splits/train:1"
        rows = list(read_records(str(tmp_path / "splits"), "data.evaluation", EVALUATION_SPLITS))
        assert [row.name for row in rows] == ["splits/test:1"]

    def test_folder_of_files_with_splits(self, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "d" / "data" / "train-0.jsonl", RECORDS[:2])
        write_jsonl(tmp_path / "d" / "data" / "train-1.jsonl", RECORDS[2:])
        write_jsonl(tmp_path / "d" / "data" / "test-0.jsonl", RECORDS)
        names = self.names(str(tmp_path / "d"))
        assert names[1:3] == ["data/train-0.jsonl:2", "data/train-1.jsonl:1"]
        assert self.names(str(tmp_path / "d"), EVALUATION_SPLITS)[0] == "data/test-0.jsonl:1"
        refused(lambda: self.names(str(tmp_path / "d"), ("other",)), "splits test, train", "other")

    def test_folder_of_other_formats(self, tmp_path: Path) -> None:
        from datasets import Dataset

        (tmp_path / "p").mkdir()
        Dataset.from_list(RECORDS).to_parquet(tmp_path / "p" / "train.parquet")
        assert self.names(str(tmp_path / "p"))[0] == "p/train:1"
        (tmp_path / "j").mkdir()
        (tmp_path / "j" / "all.json").write_text(json.dumps(RECORDS))
        assert self.names(str(tmp_path / "j"))[0] == "j/train:1"

    def test_local_files_need_no_cache(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A home that cannot be written is usual on clusters."""
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/proc/none"))
        write_jsonl(tmp_path / "d" / "train.jsonl", RECORDS)
        assert len(self.names(str(tmp_path / "d"))) == 5
        (tmp_path / "j").mkdir()
        (tmp_path / "j" / "all.json").write_text(json.dumps(RECORDS))
        assert len(self.names(str(tmp_path / "j"))) == 5

    def test_hub_id_from_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The real hub client reads offline, from a cache laid out as it lays it out."""
        import huggingface_hub.constants as constants

        cached = tmp_path / "datasets--org--prompts"
        write_jsonl(cached / "snapshots" / "abc" / "train.jsonl", RECORDS)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("abc")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert self.names("org/prompts")[0] == "train.jsonl:1"
        refused(lambda: self.names("org/absent"), "data.train", "org/absent", "./path")

    def test_no_code_and_no_foreign_files(self, tmp_path: Path) -> None:
        folder = tmp_path / "d"
        write_jsonl(folder / "train.jsonl", RECORDS)
        marker = tmp_path / "ran"
        (folder / "d.py").write_text(f"open({str(marker)!r}, 'w')")
        refused(lambda: self.names(str(folder)), "data.train", "scripts are no longer supported")
        (folder / "d.py").rename(folder / "other.py")
        self.names(str(folder))
        write_jsonl(tmp_path / "secret.jsonl", RECORDS)
        readme = "---\nconfigs:\n- config_name: default\n  data_files: ../secret.jsonl\n---\n"
        (folder / "README.md").write_text(readme)
        refused(lambda: self.names(str(folder)), "data.train")
        assert not marker.exists()
