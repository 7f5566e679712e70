"""FROZEN programs -> ONNX graphs over one weights file, golden outputs, parity, manifest.

Import it as ``diffcr_compile.export``. One room per step:

* ``lower``       rewrites that ONNX needs, whatever the model
* ``onnx_model``  program -> ``onnx.ModelProto``, opset 20, standard ops, static shapes
* ``weights``     one ``weights.bin`` under all graphs, each content once
* ``golden``      inputs and outputs per timestep bucket
* ``parity``      two executions, in numbers
* ``artifact``    all of it, into a folder with a manifest
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Lets ``dcr.export(frozen, "out/")`` and ``diffcr_compile.export.artifact`` be one name.

    The public function and this folder are both called ``export``, and Python binds a subpackage to
    that name in its parent whenever it is imported, whoever came first.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("diffcr_compile.api").export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
