"""A zoo of diffusion transformers: tiny, seeded, random weights, each at two token counts.

``ZOO`` maps a name to a :class:`ZooModel`. The files of this folder fill it: the classes of diffusers
(``image_*.py``, ``video_*.py``, ``audio_3d.py``) and hand-written models (``handwritten.py``) for what is
found outside of it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["image", "video", "audio", "3d", "handwritten"]
Build = Callable[[int], tuple[nn.Module, dict[str, Any]]]
_FILES = ("image_1", "image_2", "video_1", "video_2", "audio_3d", "handwritten")


@dataclasses.dataclass(frozen=True)
class ZooModel:
    """One model of the zoo.

    Attributes:
        name: class name in diffusers, or a word for what a hand-written model stands for.
        kind: what it denoises.
        build: ``build(size)`` returns (model in evaluation mode, keyword inputs of batch 2 whose two
            samples differ); size 0 is the smaller token count, 1 the larger one.
        refused: None if at least one routed unit is expected; otherwise words that the reasons for
            refusing it must contain.
    """

    name: str
    kind: Kind
    build: Build
    refused: str | None = None


ZOO: dict[str, ZooModel] = {}


def zoo(name: str, kind: Kind, *, refused: str | None = None) -> Callable[[Build], Build]:
    """Register ``build(size)`` under `name`; the weights are seeded before it runs."""

    def register(build: Build) -> Build:
        def seeded(size: int) -> tuple[nn.Module, dict[str, Any]]:
            torch.manual_seed(0)
            model, inputs = build(size)
            return model.eval(), inputs

        if name in ZOO:
            raise ValueError(f"the zoo has a {name} already")
        ZOO[name] = ZooModel(name, kind, seeded, refused)
        return build

    return register


def load_zoo() -> dict[str, ZooModel]:
    """Import every file of the zoo."""
    for file in _FILES:
        importlib.import_module(f"tests.zoo.{file}")
    return ZOO
