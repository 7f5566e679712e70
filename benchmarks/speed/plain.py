"""The dense model through plain ``torch.onnx.export``: what a user has without this package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.export.onnx_model import OPSET
from diffcr_compile.quiet import quiet_torch


class _Tensors(nn.Module):
    """Takes tensors in order and returns one."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.others = {n: value for n, value in inputs.items() if n not in self.names}

    def forward(self, *tensors: Tensor) -> Tensor:
        call = dict(zip(self.names, tensors, strict=True))
        output: Tensor = self.model(**call, **{**self.others, "return_dict": False})[0]
        return output


def plain_onnx(model: nn.Module, inputs: Mapping[str, Any], path: Path) -> None:
    """Export with torch's own defaults, weights in a file beside the graph."""
    wrapped = _Tensors(model, inputs)
    tensors = tuple(inputs[name] for name in wrapped.names)
    with quiet_torch():
        made = torch.onnx.export(
            wrapped,
            tensors,
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=wrapped.names,
        )
    assert made is not None
    made.save(str(path), external_data=True)
