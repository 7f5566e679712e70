"""The ONNX graphs of an artifact: the first export pays, the graphs of further timestep buckets are made from it.

Buckets that differ in numbers of kept tokens only share one export, with K open. It is the graph for engines with one
profile per bucket, and with its K filled in it is the static graph of each bucket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from diffcr_compile import routing
from diffcr_compile.durable import atomic_write_bytes
from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.export.at_kept_tokens import at_kept_tokens
from diffcr_compile.export.profiles_graph import BucketGroup, group_buckets, open_program
from diffcr_compile.export.weights import WeightsWriter
from diffcr_compile.passes.open_kept_tokens import input_name
from diffcr_compile.program import Program

Made = tuple[ModelProto, dict[str, str]]
Column = tuple[int, ...]


@dataclasses.dataclass
class BucketGraphs:
    """Writes the graphs of FROZEN programs over one weights file.

    Args:
        frozen: one program per timestep bucket.
        folder: the artifact in the making.
        writer: of its weights file, open.
        export: makes the ONNX graph and the node map of a program.
        profiles: also write the graphs whose K is open.
        derives: make the graphs of buckets from the one whose K is open.
        max_topk: largest K of one TopK in a graph whose K is open.

    Attributes:
        paths: of the static graph of each bucket, filled by :meth:`write`.
        rows: of the manifest's ``profile_graphs``, likewise.
        nodes: graph -> node map, likewise.
    """

    frozen: Sequence[Program]
    folder: Path
    writer: WeightsWriter
    export: Callable[[Program], Made]
    profiles: bool
    derives: bool
    max_topk: int | None
    paths: dict[int, str] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    nodes: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def write(self, done: Callable[[int], None]) -> None:
        """Write every graph; `done` is called with each bucket whose graph is there."""
        schedule = self.frozen[0].schedule
        assert schedule is not None
        opened = 0
        for group in group_buckets(schedule, self.max_topk):
            derivable = self.derives and any(self._derivable(b) for b in group.buckets)
            made, problem = self._open(group) if self.profiles or derivable else (None, "")
            for bucket in group.buckets:
                self._write_bucket(bucket, group, made)
                done(bucket)
            if not self.profiles:
                continue
            if made is None:
                self._rows_of_buckets(group, problem or group.remark)
                continue
            path = f"onnx/profiles{f'_{opened}' if opened else ''}.onnx"
            opened += 1
            self._put(made, path)
            kept = dict(_inputs(made[0], group))
            self.rows.append(_row(path, group.buckets, kept, group.remark))

    def _open(self, group: BucketGroup) -> tuple[Made | None, str]:
        """The graph of a group with K open; None where there is nothing to open, or why it cannot be."""
        if not group.kept:
            return None, ""
        program = open_program(self.frozen[0], group, self.max_topk)
        try:
            return self.export(program), ""
        except UnsupportedModelError as error:
            return None, f"K cannot be left open in this model: {error.message}"

    def _write_bucket(self, bucket: int, group: BucketGroup, opened: Made | None) -> None:
        column = self._column(bucket)
        for other, path in self.paths.items():  # buckets with equal columns share one graph
            if self._column(other) == column:
                self.paths[bucket] = path
                return
        made = None
        if opened is not None and self.derives and self._derivable(bucket):
            made = self._derived(bucket, group, opened)
        self.paths[bucket] = f"onnx/bucket_{bucket:02d}.onnx"
        self._put(made or self.export(self.frozen[bucket]), self.paths[bucket])

    def _derived(self, bucket: int, group: BucketGroup, opened: Made) -> Made | None:
        program = self.frozen[bucket]
        assert program.schedule is not None
        blocks = dict(_inputs(opened[0], group))
        column = program.schedule.column(bucket)
        kept = {name: column[block] for name, block in blocks.items()}
        present = {name: program.block(block).num_tokens for name, block in blocks.items()}
        try:
            return at_kept_tokens(*opened, kept, present)
        except UnsupportedModelError:
            return None  # a shape depends on K in a way that is not followed: the bucket pays for its own export

    def _derivable(self, bucket: int) -> bool:
        """Whether FROZEN says K as the graph with K open does, and all of it."""
        program = self.frozen[bucket]
        selects = program.graph.find_nodes(op="call_function", target=routing.select_tokens)
        in_pieces = any(len(node.args) > 3 for node in selects)
        too_many = self.max_topk is not None and any(
            isinstance(node.args[1], int) and node.args[1] > self.max_topk for node in selects
        )
        gated = program.gate != "straight_through"  # a gate stays where a block keeps all
        return not (in_pieces or too_many or gated)

    def _column(self, bucket: int) -> Column:
        program = self.frozen[bucket]
        assert program.schedule is not None
        column = program.schedule.column(bucket)
        return tuple(column[spec.name] for spec in program.blocks)

    def _rows_of_buckets(self, group: BucketGroup, remark: str) -> None:
        paths = dict.fromkeys(self.paths[bucket] for bucket in group.buckets)
        for path in paths:
            served = [b for b in group.buckets if self.paths[b] == path]
            self.rows.append(_row(path, served, {}, remark))

    def _put(self, made: Made, path: str) -> None:
        model, self.nodes[path] = made
        self.writer.externalize(model)
        atomic_write_bytes(self.folder / path, model.SerializeToString(deterministic=True))


def _inputs(model: ModelProto, group: BucketGroup) -> list[tuple[str, str]]:
    """(input, block) of each open K, in graph order."""
    blocks = {input_name(block): block for block in group.kept}
    return [
        (value.name, blocks[value.name]) for value in model.graph.input if value.name in blocks
    ]


def _row(
    onnx: str, buckets: Sequence[int], kept_inputs: dict[str, str], remark: str
) -> dict[str, Any]:
    return {
        "onnx": onnx,
        "buckets": list(buckets),
        "kept_inputs": kept_inputs,
        "remark": remark,
    }
