"""How large the activations get that int8 layers read, found by NVIDIA ModelOpt's calibrators."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram

from diffcr_compile.errors import EnvironmentMissingError
from diffcr_compile.export.int8 import token_linears
from diffcr_compile.program import Program


class Int8Ranges:
    """The largest magnitude that each linear layer of tokens reads, over all states and timestep buckets.

    Layers are named by their weights, which all buckets share, so one set of scales serves every graph.

    Raises:
        EnvironmentMissingError: ModelOpt is not installed.
    """

    def __init__(self) -> None:
        self._new = _calibrator()
        self._found: dict[str, Any] = {}

    def watch(
        self, exported: ExportedProgram, program: Program
    ) -> dict[fx.Node, Callable[[Tensor], None]]:
        """Layers of a float32 program -> what is to be called with each of their inputs."""
        watchers = {}
        for node, name in token_linears(exported, program).items():
            watchers[node] = self._found.setdefault(name, self._new()).collect
        return watchers

    def largest(self) -> dict[str, float]:
        """Name of a weight -> the largest magnitude; of layers that ran."""
        found = {name: one.compute_amax() for name, one in self._found.items()}
        return {name: float(value) for name, value in found.items() if value is not None}


def _calibrator() -> Callable[[], Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of versions of packages that are not used here
            from modelopt.torch.quantization.calib import MaxCalibrator
    except ImportError as error:
        raise EnvironmentMissingError(
            f"int8 graphs need NVIDIA ModelOpt, which cannot be imported ({error}). Install it with: "
            "pip install 'diffcr-compile[int8]', or export with precision fp16.",
            code="DCR-E013",
        ) from error
    made: Callable[[], Any] = MaxCalibrator
    return made
