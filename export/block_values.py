"""What leaves each block of a graph, and a short mark of it: the reference that a bisection compares with.

A mark is the norm of a value and its products with 32 vectors of random signs. The norm of a difference can be
told from the difference of two marks to about a quarter, whatever the size of the value; the values themselves
would be larger than the weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from diffcr_compile.data_files import read_json
from diffcr_compile.errors import ArtifactError

Array = npt.NDArray[Any]
BLOCK_VALUES = "golden/blocks.json"
SIGNS = 32
_SEED = 20_26
# Elements of a value that are multiplied at a time, an even number.
_PART = 1 << 14
Mark = tuple[float, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class BlockValue:
    """One value that leaves a block.

    Attributes:
        block: its name.
        value: name of the value in the graph.
        node: name of the node that makes it.
        shape: of the value.
        dtype: as numpy names it.
        norm: L2.
        signs: products with vectors of random signs.
    """

    block: str
    value: str
    node: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    signs: tuple[float, ...]

    def difference(self, found: Array) -> float:
        """Relative L2 of another execution's value from this one, to about a quarter; inf if it has NaN."""
        if found.shape != self.shape or not np.isfinite(found).all():
            return math.inf
        norm, signs = mark(found)
        other, mine = np.array(signs), np.array(self.signs)
        estimate = float(np.linalg.norm(other - mine)) / math.sqrt(SIGNS)
        return max(estimate, abs(norm - self.norm)) / max(self.norm, 1e-30)


def mark(array: Array) -> Mark:
    """Norm, and products with 32 vectors of random signs, the same on every machine."""
    return marks([array])[0]


def marks(arrays: Sequence[Array]) -> list[Mark]:
    """:func:`mark` of each array; signs are made once for all of them, a part at a time."""
    flats = [np.ravel(array) for array in arrays]
    # Raw output of the generator, which NumPy keeps for ever; a bit is a sign.
    generator = np.random.PCG64(_SEED)
    products = np.zeros((len(flats), SIGNS))
    for start in range(0, max((flat.size for flat in flats), default=0), _PART):
        words = generator.random_raw(_PART // 2).astype("<u8").view(np.uint8)
        bits = np.unpackbits(words, bitorder="little").reshape(_PART, SIGNS)
        longer = [number for number, flat in enumerate(flats) if flat.size > start]
        rows = np.zeros((len(longer), _PART))
        for row, number in zip(rows, longer, strict=True):
            part = flats[number][start : start + _PART]
            row[: part.size] = part
        products[longer] += rows @ (2.0 * bits - 1.0)  # (values, 32)
    return [
        (float(np.linalg.norm(flat.astype(np.float64))), tuple(map(float, row)))
        for flat, row in zip(flats, products, strict=True)
    ]


def leaving(
    model: ModelProto, origins: Mapping[str, str], blocks: Sequence[str]
) -> Iterator[tuple[str, str, str]]:
    """(block, value, node) of each value that a block makes and something else reads, in order.

    Args:
        model: the graph.
        origins: node -> module or line of the outer graph (``model/node_map.json``).
        blocks: names.
    """
    graph = model.graph
    homes = {node.name: block_of(origins.get(node.name, ""), blocks) for node in graph.node}
    readers: dict[str, set[str]] = {value.name: {""} for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(homes[node.name])
    for node in graph.node:
        home = homes[node.name]
        for name in node.output if home else ():
            if readers.get(name, set()) - {home}:
                yield home, name, node.name


def block_of(origin: str, blocks: Sequence[str]) -> str:
    """The block that a node belongs to; "" if none. A router and a scatter are their block's."""
    for block in sorted(blocks, key=len, reverse=True):
        line = block.replace(".", "_")
        if origin in (block, line) or origin.startswith((f"{block}.", f"{line}_")):
            return block
    return ""


def to_json(values: Sequence[BlockValue]) -> list[dict[str, Any]]:
    """As it stands in the file."""
    return [dataclasses.asdict(value) for value in values]


def read_block_values(artifact: Path) -> dict[str, list[BlockValue]]:
    """Graph -> what leaves its blocks for the golden inputs of the first bucket that runs it.

    Raises:
        ArtifactError: the artifact has none, or the file is damaged.
    """
    path = artifact / BLOCK_VALUES
    if not path.is_file():
        raise ArtifactError(
            f"{path} does not exist: the artifact was exported by an older version. Export it again to "
            "find out which block is off.",
            code="DCR-A004",
        )
    try:
        found = read_json(path)
        return {graph: [_value(row) for row in rows] for graph, rows in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}. Copy the artifact again, or make it anew with diffcr compile.",
            code="DCR-A004",
        ) from error


def _value(row: Mapping[str, Any]) -> BlockValue:
    return BlockValue(
        **{**row, "shape": tuple(row["shape"]), "signs": tuple(map(float, row["signs"]))}
    )
