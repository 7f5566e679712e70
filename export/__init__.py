"""FROZEN programs -> ONNX graphs over one weights file, golden outputs, parity, manifest.

Import it as ``diffcr_compile.export``. One room per step:

* ``lower``       rewrites that ONNX needs, whatever the model
* ``onnx_model``  program -> ``onnx.ModelProto``, opset 20, standard ops, static shapes
* ``weights``     one ``weights.bin`` under all graphs, each content once
* ``precision``   float16 products, float32 islands, and how both are judged
* ``golden``      inputs and outputs per timestep bucket
* ``profiles_graph``  one graph for several buckets, with K as the length of an input
* ``parity``      two executions, in numbers
* ``artifact``    all of it, into a folder with a manifest
"""

from __future__ import annotations

from diffcr_compile.callable_package import make_callable

make_callable(__name__)
