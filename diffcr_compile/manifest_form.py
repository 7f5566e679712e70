"""Whether the parts of a manifest that a load reads have the form that it expects.

The checksum of a manifest tells damage from what was written; this looks at what somebody wrote who made the
checksum fit. Standard library only: this file goes on the device with the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffcr_compile.manifest import Manifest

PRECISIONS = ("fp32", "fp16", "bf16", "int8")
# What the tolerance of a parity gate is about.
MEASURES = ("max_abs", "rel_l2")
# What the tensors of a graph may hold, as numpy names it.
DTYPES = frozenset(
    {"bool", "complex64", "complex128", "float16", "float32", "float64", "bfloat16"}
    | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
_ROWS = {
    "buckets": {"index", "low", "high", "weight", "onnx", "golden"},
    "inputs": {"name", "dtype", "shape"},
    "outputs": {"name", "dtype", "shape"},
}
_SHOWN = 40


def wrong_form(manifest: Manifest) -> str | None:
    """The first part of another form, in words; None where every part has its own."""
    # each check may rely on those before it
    for check in (
        _rows, _tensors, _paths, _buckets, _roles, _schedule, _parity, _precision, _constants, _profile_graphs,
        _files,
    ):  # fmt: skip
        found = check(manifest)
        if found is not None:
            return found
    return None


def _rows(manifest: Manifest) -> str | None:
    for key, wanted in _ROWS.items():
        found = getattr(manifest, key)
        whole = isinstance(found, list) and bool(found)
        if not whole or not all(isinstance(r, dict) and wanted <= set(r) for r in found):
            return f"{key} must list entries with {sorted(wanted)}"
    return None


def _tensors(manifest: Manifest) -> str | None:
    for key in ("inputs", "outputs"):
        for row in getattr(manifest, key):
            if not _is_tensor(row):
                return f"{key} has {str(row)[:200]}, which names no tensor"
    return None


def _is_tensor(row: Mapping[str, Any]) -> bool:
    """Whether a row says name, dtype and shape of a tensor."""
    shape = row["shape"]
    return (
        isinstance(row["name"], str)
        and isinstance(row["dtype"], str)
        and row["dtype"] in DTYPES
        and isinstance(shape, list)
        and all(_is_whole(size) for size in shape)
    )


def _paths(manifest: Manifest) -> str | None:
    names = [row[key] for row in manifest.buckets for key in ("onnx", "golden")]
    if not all(isinstance(name, str) for name in (*names, manifest.weights)):
        return "weights and the files of a timestep bucket must be paths"
    return None


def _buckets(manifest: Manifest) -> str | None:
    """A timestep is looked up among the upper edges, so each bucket must begin where the last one ends."""
    edge = None
    for number, row in enumerate(manifest.buckets):
        low, high, weight = row["low"], row["high"], row["weight"]
        if not (_is_number(low) and _is_number(high) and low < high):
            return f"a timestep bucket goes from {_short(low)} to {_short(high)}"
        if edge is not None and low != edge:
            return f"timestep bucket {number} begins at {low}, expected {edge}, where the one before it ends"
        if type(row["index"]) is not int or row["index"] != number:
            return f"timestep bucket {number} has the index {_short(row['index'])}"
        if not _is_number(weight) or weight < 0:
            return f"timestep bucket {number} has the weight {_short(weight)}"
        edge = high
    return None


def _roles(manifest: Manifest) -> str | None:
    names = [row["name"] for row in manifest.inputs]
    for role in ("timestep_input", "sample_input"):
        found = getattr(manifest, role)
        if found is not None and found not in names:
            return f"{role} is {_short(found)}, the inputs are {names}"
    if manifest.timestep_input is None and len(manifest.buckets) > 1:
        return f"timestep_input is null, but there are {len(manifest.buckets)} timestep buckets to choose from"
    return None


def _schedule(manifest: Manifest) -> str | None:
    schedule, tokens = manifest.schedule, manifest.num_tokens
    if not isinstance(tokens, dict) or not all(_is_whole(n) for n in tokens.values()):
        return "num_tokens must map blocks to numbers of tokens"
    if not isinstance(schedule, dict):
        return "schedule must map blocks to kept tokens"
    for block, kept in schedule.items():
        if not isinstance(kept, list) or len(kept) != len(manifest.buckets):
            return f"schedule must have {len(manifest.buckets)} kept tokens for {_short(block)}, one per timestep bucket"
        if not all(_is_whole(n) and n <= tokens.get(block, -1) for n in kept):
            return f"schedule keeps {_short(kept)} of {tokens.get(block)} tokens in {_short(block)}"
    return None


def _parity(manifest: Manifest) -> str | None:
    parity = manifest.parity
    whole = isinstance(parity, dict) and parity.get("measure") in MEASURES
    if not whole or not _is_number(parity.get("tolerance")) or parity["tolerance"] <= 0:
        return f"parity must have a tolerance above 0 and a measure of {list(MEASURES)}"
    return None


def _precision(manifest: Manifest) -> str | None:
    precision = manifest.precision
    if not isinstance(precision, dict) or precision.get("type") not in PRECISIONS:
        return f"precision must have a type of {list(PRECISIONS)}"
    return None


def _constants(manifest: Manifest) -> str | None:
    if not isinstance(manifest.constants, dict):
        return "constants must map arguments to values"
    return None


def _profile_graphs(manifest: Manifest) -> str | None:
    """The rows have their form, and serve every timestep bucket once or are none."""
    rows = manifest.profile_graphs
    if isinstance(rows, list) and all(_is_profile_graph(row, manifest) for row in rows):
        served = sorted(bucket for row in rows for bucket in row["buckets"])
        if not rows or served == list(range(len(manifest.buckets))):
            return None
    return (
        "profile_graphs must list entries with onnx, buckets, kept_inputs and remark, each "
        "bucket once"
    )


def _is_profile_graph(row: Any, manifest: Manifest) -> bool:
    wanted = {"onnx", "buckets", "kept_inputs", "remark"}
    if not isinstance(row, dict) or not wanted <= set(row):
        return False
    buckets, inputs = row["buckets"], row["kept_inputs"]
    return (
        isinstance(row["onnx"], str)
        and isinstance(buckets, list)
        and all(type(bucket) is int for bucket in buckets)
        and isinstance(inputs, dict)
        and all(
            isinstance(block, str) and block in manifest.schedule for block in inputs.values()
        )
    )


def _files(manifest: Manifest) -> str | None:
    files = manifest.files
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and type(entry.get("bytes")) is int
        for entry in files.values()
    ):
        return "files must map paths to sha256 and bytes"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    """Whether it is a number of elements or tokens that a graph may have."""
    return type(value) is int and 0 <= value < 1 << 31


def _short(value: Any) -> str:
    return repr(value)[:_SHOWN]
