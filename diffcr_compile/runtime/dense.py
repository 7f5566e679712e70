"""Run one plain ONNX file: the dense baseline that benchmarks compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from diffcr_compile.runtime.backend import make_session, run_session
from diffcr_compile.runtime.complex_inputs import as_graph_input


class DenseRunner:
    """The dense model in ONNX Runtime on the CPU, called like a :class:`Runner`.

    Args:
        path: the ONNX file.
        threads: threads inside an operator; None for ONNX Runtime's default.
    """

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.session = make_session(path, threads=threads)
        self.inputs = {node.name: node for node in self.session.get_inputs()}

    def __call__(self, **inputs: Any) -> Any:
        arrays = {name: as_graph_input(np.asarray(value)) for name, value in inputs.items()}
        outputs = run_session(self.session, arrays, "the dense model")
        return outputs[0] if len(outputs) == 1 else tuple(outputs)
