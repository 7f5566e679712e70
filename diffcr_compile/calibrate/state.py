"""The resumable state of a calibration: one safetensors file, replaced atomically."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from diffcr_compile.errors import ArtifactError
from diffcr_compile.tensor_file import write_tensors

FILE = "state.safetensors"
FORM = 2  # of the names in the file; another one cannot be read and is not taken up


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-able facts; a crash leaves the old state or the new one."""
    write_tensors(folder / FILE, tensors, {"facts": json.dumps({**facts, "form": FORM})})


def load_state(folder: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The saved state if there is one for these settings.

    Args:
        folder: where it was saved.
        key: fingerprint of model, data and settings; a state with another one is not ours.

    Raises:
        ArtifactError: the file cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            if facts["key"] != key or facts.get("form") != FORM:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except Exception as error:
        raise ArtifactError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it was changed from outside. "
            "Delete it to start the calibration anew."
        ) from error
