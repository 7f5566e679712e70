"""Static graphs that are made from the one with K open, and graphs that are run in pieces."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import diffcr_compile as dcr
from diffcr_compile.errors import ArtifactError, UnsupportedModelError
from diffcr_compile.export import artifact, in_pieces, parity
from diffcr_compile.export.at_kept_tokens import at_kept_tokens
from diffcr_compile.export.block_values import read_block_values
from diffcr_compile.export.in_pieces import run_in_pieces
from diffcr_compile.export.onnx_model import export_graph, onnx_from_program
from diffcr_compile.export.weights import WeightsWriter
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.open_kept_tokens import OpenKeptTokens, input_name
from diffcr_compile.program import Program
from diffcr_compile.runtime.backend import make_session
from diffcr_compile.runtime.onnx_backend import OnnxBackend
from diffcr_compile.schedule import TimestepBuckets, TokenSchedule
from tests.conftest import Case


def half(case: Case) -> dict[str, int]:
    return {spec.name: spec.num_tokens // 2 for spec in case.routed.blocks}


def outputs(model: onnx.ModelProto, program: Program) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = {name: tensor.numpy() for name, tensor in program.example.items()}
    found: list[np.ndarray] = session.run(None, given)
    return found


@pytest.mark.parametrize("name", ["plain", "dit", "sd3", "flux"])
def test_a_derived_graph_is_the_one_that_an_export_of_its_own_gives(
    cases: Callable[..., Case], name: str
) -> None:
    """At a K of its own in each block, and all tokens kept in the first."""
    case = cases(name)
    opened = run_passes(case.frozen(half(case)), [OpenKeptTokens(half(case))])
    model, origins = export_graph(opened)
    present = {input_name(s.name): s.num_tokens for s in case.routed.blocks}
    column = {
        spec.name: spec.num_tokens if number == 0 else max(1, spec.num_tokens // (number + 1))
        for number, spec in enumerate(case.routed.blocks)
    }
    kept = {input_name(block): k for block, k in column.items()}
    derived, names = at_kept_tokens(model, origins, kept, present)
    program = case.frozen(column)
    own = onnx_from_program(program)
    assert [v.name for v in derived.graph.input] == [v.name for v in own.graph.input]
    assert [v.name for v in derived.graph.output] == [v.name for v in own.graph.output]
    assert set(names) == {node.name for node in derived.graph.node}
    onnx.checker.check_model(derived, full_check=True)
    for found, expected in zip(outputs(derived, program), outputs(own, program), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    mine, theirs = (
        collections.Counter(n.op_type for n in m.graph.node) for m in (derived, own)
    )
    assert not mine - theirs


def test_a_graph_that_reads_the_length_otherwise_is_exported_by_itself(
    cases: Callable[..., Case],
) -> None:
    case = cases("one_block")
    program = OpenKeptTokens({"blocks.0": 4})(case.frozen({"blocks.0": 3})).program
    model, origins = export_graph(program)
    model.graph.node.add(op_type="Neg", input=["kref_blocks_0"], output=["read"], name="read")
    model.graph.output.add(name="read")
    with pytest.raises(UnsupportedModelError):
        at_kept_tokens(model, origins, {"kref_blocks_0": 3}, {"kref_blocks_0": 6})


def test_pieces_give_what_the_whole_graph_gives(
    cases: Callable[..., Case], tmp_path: Path
) -> None:
    case = cases("dit")
    program = case.frozen(half(case))
    path = tmp_path / "graph.onnx"
    with WeightsWriter(tmp_path / "weights.bin") as writer:
        model, _ = export_graph(program, writer)
        writer.externalize(model)
    path.write_bytes(model.SerializeToString())
    expected = outputs(onnx_from_program(program), program)
    given = {name: tensor.numpy() for name, tensor in program.example.items()}
    inner = model.graph.node[len(model.graph.node) // 2].output[0]
    wanted = [*(value.name for value in model.graph.output), inner]
    (found,) = run_in_pieces(path, model, wanted, [given], piece_bytes=1 << 14)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    assert len(found) == len(wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["graph.onnx", "weights.bin"]


def test_pieces_of_a_graph_with_k_open_run_for_several_k(
    cases: Callable[..., Case], tmp_path: Path
) -> None:
    case = cases("plain")
    opened = run_passes(case.frozen(half(case)), [OpenKeptTokens(half(case))])
    path = tmp_path / "graph.onnx"
    with WeightsWriter(tmp_path / "weights.bin") as writer:
        model, _ = export_graph(opened, writer)
        writer.externalize(model)
    path.write_bytes(model.SerializeToString())
    inputs = [
        {name: tensor.numpy() for name, tensor in opened.example.items()}
        | dict.fromkeys(map(input_name, half(case)), np.zeros(kept, np.float32))
        for kept in (3, 11)
    ]
    names = [value.name for value in model.graph.output]
    found = run_in_pieces(path, model, names, inputs, piece_bytes=1 << 12)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for given, arrays in zip(inputs, found, strict=True):
        np.testing.assert_allclose(arrays[0], session.run(None, given)[0], atol=1e-6)
    assert not np.allclose(found[0][0], found[1][0])


def test_an_export_that_is_checked_in_pieces_is_the_same(
    cases: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = cases("plain")
    frozen = dcr.freeze(case.routed.module, keep_ratio=0.5)
    whole = dcr.export(frozen, tmp_path / "whole").folder
    monkeypatch.setattr(in_pieces, "PIECE_BYTES", 1 << 12)
    parts = dcr.export(frozen, tmp_path / "parts").folder
    for name in ("onnx/weights.bin", "onnx/bucket_00.onnx", "golden/bucket_00.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    (one,), (two,) = (read_block_values(folder).values() for folder in (whole, parts))
    assert [value.value for value in one] == [value.value for value in two]
    for left, right in zip(one, two, strict=True):
        assert left.norm == pytest.approx(right.norm, rel=1e-5)


@pytest.mark.parametrize("piece_bytes", [1 << 12, 1 << 28])
def test_checks_have_as_many_threads_as_torch(
    cases: Callable[..., Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    piece_bytes: int,
) -> None:
    case, asked = cases("plain"), []

    def session(path: Path, *, threads: int | None = None, **options: Any) -> Any:
        asked.append(threads)
        return make_session(path, threads=threads, **options)

    for module in (in_pieces, parity):
        monkeypatch.setattr(module, "make_session", session)
    monkeypatch.setattr(in_pieces, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(artifact, "write_block_values", lambda *_: None)  # no check
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    half = {b.name: (b.num_tokens // 2, b.num_tokens // 3) for b in case.routed.blocks}
    schedule = TokenSchedule(
        half, {b.name: b.num_tokens for b in case.routed.blocks}, TimestepBuckets.even(2, 0, 1)
    )
    dcr.export(dcr.freeze(case.routed.module, schedule=schedule), tmp_path / "out")
    assert len(asked) >= 3
    assert set(asked) == {3}


def test_weights_of_another_file_are_refused(
    cases: Callable[..., Case], tmp_path: Path
) -> None:
    program = cases("one_block").frozen({"blocks.0": 3})
    with WeightsWriter(tmp_path / "one.bin") as one:
        model, _ = export_graph(program, one)
        one.externalize(model)
    with (
        WeightsWriter(tmp_path / "two.bin") as two,
        pytest.raises(ArtifactError, match="already lies in another file"),
    ):
        two.externalize(model)


def test_one_session_serves_every_bucket(cases: Callable[..., Case], tmp_path: Path) -> None:
    case = cases("plain")
    blocks = case.routed.blocks
    schedule = TokenSchedule(
        {b.name: (9 + i, 18, b.num_tokens) for i, b in enumerate(blocks)},
        {b.name: b.num_tokens for b in blocks},
        TimestepBuckets.even(3, 0, 1),
    )
    dcr.export(dcr.freeze(case.routed.module, schedule=schedule), tmp_path / "out")
    static = dcr.load(tmp_path / "out")
    shared = dcr.load(tmp_path / "out", share_weights=True)
    assert isinstance(shared.backend, OnnxBackend)
    assert isinstance(static.backend, OnnxBackend)
    assert {graph.onnx for graph in shared.backend.graphs} == {"onnx/profiles.onnx"}
    assert len({graph.onnx for graph in static.backend.graphs}) == 3
    arrays = {name: tensor.numpy() for name, tensor in case.routed.example.items()}
    time_name = static.manifest.timestep_input
    assert time_name is not None
    for row in static.manifest.buckets:
        middle = np.full_like(arrays[time_name], (row["low"] + row["high"]) / 2)
        call = {**arrays, time_name: middle}
        np.testing.assert_allclose(shared(**call), static(**call), atol=1e-5)
