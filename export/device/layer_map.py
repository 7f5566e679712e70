"""From a layer of an engine back to the modules of the model: ``engines/<device>/layers.json``.

``model/node_map.json`` leads from a module to its ONNX nodes; TensorRT writes into each layer which ONNX nodes it
was fused of. Together they say what a line of a profiler is about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from diffcr_compile.durable import write_json_atomic
from diffcr_compile.engine_plan import EnginePlan
from diffcr_compile.errors import ArtifactError

LAYERS_FILE = "layers.json"
NODE_MAP = "model/node_map.json"
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


class Inspected(Protocol):
    """What can describe its engines."""

    def layer_information(self, engine: str) -> str: ...


def write_layers(artifact: Path, folder: Path, plan: EnginePlan, engines: Inspected) -> None:
    """Write ``layers.json``: engine -> its layers, each with the ONNX nodes and modules it was made of.

    Args:
        artifact: the artifact's folder.
        folder: of the engines.
        plan: which engines there are.
        engines: describes them.
    """
    origins = _origins(artifact / NODE_MAP)
    found = {
        spec.name: list(
            layer_rows(engines.layer_information(spec.name), origins.get(spec.onnx, {}))
        )
        for spec in plan.engines
    }
    write_json_atomic(folder / LAYERS_FILE, found)


def _origins(path: Path) -> dict[str, dict[str, str]]:
    """Graph -> ONNX node -> module; nothing if the artifact has no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
            raise TypeError("expected an object of nodes for each graph")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}. Copy the artifact again, or make it anew with diffcr compile.",
            code="DCR-A004",
        ) from error
    return found


def layer_rows(information: str, origins: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """One row per layer.

    Args:
        information: JSON of TensorRT's engine inspector.
        origins: ONNX node -> module.
    """
    for layer in json.loads(information).get("Layers", []):
        # an engine that was built without details has names only
        about = {"Name": layer} if isinstance(layer, str) else layer
        name = str(about.get("Name", ""))
        nodes = _NODE.findall(str(about.get("Metadata", "")))
        modules = dict.fromkeys(origins[node] for node in nodes if origins.get(node))
        yield {
            "layer": name,
            "type": str(about.get("LayerType", "")),
            "nodes": nodes,
            "modules": list(modules),
        }
