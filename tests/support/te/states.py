"""What this package answers beside a TransformerEngine that is absent, old, broken or of no use.

`python -m tests.support.te.states FOLDER...` asks in a process of its own for each folder, which
goes before all others on the path, and prints one line of JSON for it.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from pathlib import Path

ASKED = [(backend, device) for backend in ("auto", "te", "local") for device in ("cpu", "cuda")]


def answers(folder: str) -> dict[str, str]:
    """Return the layer spec, or the refusal, of each backend and device."""
    from megatron_vopd.errors import UserError
    from megatron_vopd.megatron.transformer_engine import hide_if_broken

    sys.path.insert(0, folder)
    hide_if_broken()
    from megatron_vopd.run.start import resolved_layer_spec

    found = {}
    for asked in ASKED:
        try:
            found[" ".join(asked)] = str(resolved_layer_spec(*asked))
        except UserError as error:
            found[" ".join(asked)] = str(error)
    return found


def write_package(folder: Path, version: str, code: str) -> Path:
    """Write a package of that name and version whose `pytorch` part is `code`."""
    package, metadata = (
        folder / "transformer_engine",
        folder / f"transformer_engine-{version}.dist-info",
    )
    (package / "pytorch").mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").touch()
    (package / "pytorch" / "__init__.py").write_text(code)
    (metadata / "METADATA").write_text(f"Name: transformer_engine\nVersion: {version}\n")
    return folder


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    import torch  # noqa: F401  (once for all)

    for path in sys.argv[1:]:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            print(json.dumps(pool.apply(answers, (path,))), flush=True)
