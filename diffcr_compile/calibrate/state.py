"""The resumable state of a calibration: one safetensors file, replaced atomically."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffcr_compile.errors import ArtifactError

FILE = "state.safetensors"


def save_state(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and JSON-able facts; a crash leaves the old state or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{FILE}.partial"
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        temporary,
        {"facts": json.dumps(facts)},
    )
    os.replace(temporary, folder / FILE)


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
            if facts["key"] != key:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118
    except Exception as error:
        raise ArtifactError(
            f"{path} cannot be read ({type(error).__name__}: {error}); it was changed from outside. "
            "Delete it to start the calibration anew."
        ) from error
