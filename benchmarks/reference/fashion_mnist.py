"""Fashion-MNIST from the Debian package ``dataset-fashion-mnist``, checked by hash.

``apt-get install dataset-fashion-mnist`` puts the files into /usr/share/datasets/fashion-mnist;
without root, ``apt-get download dataset-fashion-mnist && dpkg -x *.deb DIR`` does. Licence: MIT.
"""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

Split = Literal["train", "test"]
DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# The .gz files in the package are re-compressed, so the decompressed bytes are what is checked.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
HEADER_BYTES = {"images": 16, "labels": 8}


def load(folder: Path, split: Split) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32) in [-1, 1], zero-padded from 28 x 28, and labels (N,) in 0..9."""
    prefix = "train" if split == "train" else "t10k"
    pixels = _read(folder, f"{prefix}-images-idx3-ubyte").reshape(-1, 1, 28, 28)
    labels = _read(folder, f"{prefix}-labels-idx1-ubyte")
    images = torch.from_numpy(pixels.copy()).float() / 127.5 - 1
    return pad(images, (2, 2, 2, 2), value=-1.0), torch.from_numpy(labels.copy()).long()


def _read(folder: Path, name: str) -> np.ndarray:
    path = folder / f"{name}.gz"
    if not path.exists():
        raise SystemExit(
            f"{path} does not exist. Install the Debian package dataset-fashion-mnist, or point "
            "--data at the folder that holds its .gz files."
        )
    content = gzip.decompress(path.read_bytes())
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise SystemExit(f"{path}: sha256 of the content is {found}, expected {SHA256[name]}")
    kind = "images" if "images" in name else "labels"
    return np.frombuffer(content, dtype=np.uint8)[HEADER_BYTES[kind] :]
