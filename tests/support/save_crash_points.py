"""The save of a run's checkpoint that ends at each of its file operations, and what is left.

A script, started by test_save_crash. The run folder holds step_0 and step_1; retention removes the
older one once step_2 is there. Scenarios: `new`: step_2 is saved; `again`: it is there already, and
saved once more; `damaged`: it is there with a bit turned over.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.crash_points import Faults, strike, watch

OK, REFUSED = 0, 2


def _saving(models: Path, run_dir: Path, steps: list[int], armed: bool) -> Callable:
    """Return an action that saves a run as if it had made so many steps, armed or not."""

    def action(faults: Faults, audited: list[str]) -> int:
        from megatron_vopd.errors import UserError
        from megatron_vopd.megatron.groups import init_single_process
        from megatron_vopd.types import Layout
        from tests.support.layouts import Case
        from tests.support.resumable import make
        from tests.support.steps import Setup

        init_single_process()
        student = str(next(models.iterdir()))
        setup = Setup(Case("", Layout(1)), student, {"teacher": student})
        made = make(setup, run_dir, keep=2 if armed else 3)
        if armed:
            watch(run_dir, audited)
            faults.arm()
        try:
            for step in steps:
                made.trainer.step = step
                made.checkpoints.save()
        except UserError as error:
            _said(run_dir).write_text(str(error))
            return REFUSED
        return OK

    return action


def _said(run_dir: Path) -> Path:
    """Return the path at which the line of a refused save is noted."""
    return run_dir.with_name(f"{run_dir.name}.said")


def _folder(template: Path, run_dir: Path, scenario: str) -> None:
    shutil.copytree(template, run_dir)
    if scenario == "new":
        shutil.rmtree(run_dir / "checkpoints" / "step_2")
        (run_dir / "checkpoints" / "latest").write_text("step_1\n")
    if scenario == "damaged":
        path = run_dir / "checkpoints" / "step_2" / "__0_0.distcp"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def _problem(run_dir: Path, scenario: str, mode: str, ended: dict[str, Any]) -> str:
    """Return what is wrong with the run folder that was left; empty when nothing is."""
    from megatron_vopd.run.folder import newest_valid, saved_steps
    from megatron_vopd.run.start import choose

    chosen, refused = newest_valid(run_dir)
    if chosen is None:
        return f"nothing valid: {refused}"
    visible = saved_steps(run_dir)
    if scenario == "again" and chosen.name != "step_2":
        return "a saved step was destroyed"
    if refused and scenario != "damaged":
        return f"partial: {refused}"
    if len(visible) < 2 and scenario != "damaged":
        return f"only {visible} left"
    if (mode == "fail") == ended["killed"]:
        return f"ended {ended}"
    if mode == "fail" and ended.get("status") not in (OK, REFUSED):
        return f"ended {ended}"
    if ended.get("status") == REFUSED:
        line = _said(run_dir).read_text()
        if "\n" in line or not line.startswith(f"{run_dir}/") or "; " not in line:
            return f"said {line!r}"
    choose(run_dir, "auto")
    left = [path.name for path in (run_dir / "checkpoints").glob("*.tmp-*")]
    return f"left after a start: {left}" if left else ""


def enumerate_points(models: Path, template: Path, root: Path, scenario: str, mode: str) -> dict:
    """Try every operation of one scenario."""

    def one(run_dir: Path, at: int) -> dict[str, Any]:
        _folder(template, run_dir, scenario)
        action = _saving(models, run_dir, [2], True)
        return strike(action, root / f"{run_dir.name}.traceback", mode, at)

    whole = one(root / "whole", 0)
    assert whole.get("status") == OK, whole
    newest: dict[str, int] = {}
    problems = []
    for at in range(1, whole["count"] + 1):
        run_dir = root / f"{mode}{at}"
        ended = one(run_dir, at)
        problem = _problem(run_dir, scenario, mode, ended)
        if problem:
            problems.append([at, whole["seen"][at - 1], problem])
        from megatron_vopd.run.folder import newest_valid

        name = str(getattr(newest_valid(run_dir)[0], "name", None))
        newest[name] = newest.get(name, 0) + 1
        shutil.rmtree(run_dir)
    audited = sorted(whole["audit"])
    seen = sorted(
        "remove" if name == "unlink" else name
        for name in whole["seen"]
        if name not in ("write", "fsync")
    )
    return {
        "points": whole["count"],
        "newest": newest,
        "problems": problems,
        "unseen": audited != seen and [audited, seen],
    }


def main() -> None:
    models, root, *scenarios = sys.argv[1:]
    import warnings

    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(1)
    import tests.support.preload
    from megatron_vopd.megatron import cpu_runtime

    cpu_runtime.activate()
    import tests.support.resumable  # noqa: F401

    template = Path(root) / "template"
    # The template keeps all three; the save under test removes the oldest.
    made = strike(_saving(Path(models), template, [0, 1, 2], False), Path(root) / "made", "kill", 0)
    assert made.get("status") == OK, (Path(root) / "made").read_text()
    for name in scenarios:
        scenario, mode = name.split("-")
        folder = Path(root) / name
        folder.mkdir()
        found = enumerate_points(Path(models), template, folder, scenario, mode)
        print(json.dumps({name: found}), flush=True)


if __name__ == "__main__":
    main()
