"""Which block is off: planted mistakes are named, in graphs and in engines; Polygraphy's JSON, in and out."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save
from torch import Tensor
from torch.nn import functional

import diffcr_compile as dcr
from diffcr_compile import cli
from diffcr_compile.durable import atomic_write_bytes, write_json_atomic
from diffcr_compile.errors import AccuracyError, ArtifactError, UsageError
from diffcr_compile.export.bisect import bisect_engine, bisect_onnx, write_block_values
from diffcr_compile.export.block_values import (
    BlockValue,
    block_of,
    leaving,
    mark,
    read_block_values,
)
from diffcr_compile.export.parity import run_onnx
from diffcr_compile.export.weights import WeightsWriter
from diffcr_compile.manifest import Manifest, hash_files, read_manifest, write_manifest
from diffcr_compile.polygraphy_results import compare_results, write_polygraphy
from diffcr_compile.runtime.polygraphy_json import read_inputs, read_outputs, write_outputs
from diffcr_compile.validate import validate_artifact, validate_engines
from tests.model_parts import Block, OwnDiT, inputs_for

FAKES = Path(__file__).parent / "fakes"
BLOCKS = [f"blocks.{n}" for n in range(12)]  # blocks.1 is a prefix of blocks.10
SHAPE = (2, 8, 16)


def write(folder: Path, wrong: str | None = None, infinite: bool = False) -> Path:
    """Twelve blocks x + tanh(x @ w), a scatter each; one of them may be planted wrong."""
    generator = np.random.default_rng(0)
    nodes, constants, origins = [], [], {}
    x = "x"

    def add(op: str, inputs: list[str], output: str, origin: str) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{len(nodes)}"))
        origins[nodes[-1].name] = origin
        return output

    for block in BLOCKS:
        w = generator.standard_normal((16, 16)).astype(np.float32) / 4
        if block == wrong:
            w = w * (np.inf if infinite else 1.01)
        constants.append(numpy_helper.from_array(w.astype(np.float32), f"{block}.w"))
        product = add("MatMul", [x, f"{block}.w"], f"{block}.p", f"{block}.to_q")
        x = add("Add", [x, add("Tanh", [product], f"{block}.t", block)], f"{block}.s", block)
        x = add("Identity", [x], f"{block}.out", block.replace(".", "_") + "_scatter")
    add("Neg", [x], "output", "proj_out")
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, SHAPE) for n in ("x", "output")
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    with WeightsWriter(folder / "onnx/weights.bin") as writer:
        writer.externalize(model)
    atomic_write_bytes(folder / "onnx/bucket_00.onnx", model.SerializeToString())
    write_json_atomic(folder / "model/node_map.json", {"onnx/bucket_00.onnx": origins})
    write_json_atomic(
        folder / "model/schedule.json", {"kept_tokens": {block: [8] for block in BLOCKS}}
    )
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("bisect") / "out")
    x = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    (output,) = run_onnx(folder / "onnx/bucket_00.onnx", {"x": x}, threads=1)
    golden = save({"input.x": x, "output.output": output})
    atomic_write_bytes(folder / "golden/bucket_00.safetensors", golden)
    write_block_values(folder, ["onnx/bucket_00.onnx"], ["golden/bucket_00.safetensors"])
    _manifest(folder)
    return folder


def _manifest(folder: Path) -> None:
    tensor = {"dtype": "float32", "shape": list(SHAPE)}
    bucket = {"onnx": "onnx/bucket_00.onnx", "golden": "golden/bucket_00.safetensors"}
    manifest = Manifest(
        created="2026-01-01T00:00:00+00:00",
        model={"name": "stack", "revision": None, "parameters": 12 * 256},
        versions={},
        inputs=[{"name": "x", **tensor}],
        outputs=[{"name": "output", **tensor}],
        timestep_input=None,
        sample_input="x",
        buckets=[{"index": 0, "low": 0.0, "high": 1.0, "weight": 1.0, **bucket}],
        weights="onnx/weights.bin",
        schedule={block: [8] for block in BLOCKS},
        num_tokens=dict.fromkeys(BLOCKS, 8),
        budget={"metric": "macs", "asked": None, "reached": None},
        parity={"tolerance": 1e-4, "measure": "max_abs"},
        files=hash_files(folder),
        stages={},
    )
    write_manifest(folder, manifest)


def planted(plain: Path, folder: Path, block: str, infinite: bool = False) -> Path:
    """The artifact with one block wrong, and a manifest that knows nothing of it."""
    out = Path(shutil.copytree(plain, folder))
    write(out, block, infinite)
    (out / "manifest.json").unlink()
    _manifest(out)
    return out


@pytest.mark.parametrize("block", ["blocks.0", "blocks.1", "blocks.10", "blocks.11"])
def test_a_planted_mistake_is_named_by_its_block(
    plain: Path, tmp_path: Path, block: str
) -> None:
    out = planted(plain, tmp_path / "out", block)
    found = bisect_onnx(out, read_manifest(out), 0, 1e-4)
    assert found is not None
    assert (found.block, found.value) == (block, f"{block}.out")
    assert 1e-4 < found.rel_l2 < 0.1
    with pytest.raises(
        AccuracyError, match=rf"first block that is off is '{block}'"
    ) as caught:
        validate_artifact(out, bisect=True)
    assert caught.value.code == "DCR-Q001"


def test_infinite_values_are_named_too(plain: Path, tmp_path: Path) -> None:
    out = planted(plain, tmp_path / "out", "blocks.5", infinite=True)
    found = bisect_onnx(out, read_manifest(out), 0, 1e-4)
    assert found is not None
    assert found.block == "blocks.5"
    assert math.isinf(found.rel_l2)


def test_nothing_is_named_where_all_is_right(plain: Path) -> None:
    assert bisect_onnx(plain, read_manifest(plain), 0, 1e-6) is None
    validate_artifact(plain, bisect=True)
    assert list(plain.rglob("*.partial")) == []


def test_a_mistake_after_the_last_block_is_said_to_be_there(
    plain: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(plain, tmp_path / "out"))
    model = onnx.load(str(out / "onnx/bucket_00.onnx"), load_external_data=False)
    model.graph.node[-1].op_type = "Abs"
    atomic_write_bytes(out / "onnx/bucket_00.onnx", model.SerializeToString())
    (out / "manifest.json").unlink()
    _manifest(out)
    with pytest.raises(AccuracyError, match="what comes after the last one"):
        validate_artifact(out, bisect=True)


def test_an_artifact_without_marks_says_what_to_do(plain: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(plain, tmp_path / "out"))
    (out / "golden/blocks.json").unlink()
    with pytest.raises(ArtifactError, match="Export it again"):
        read_block_values(out)
    (out / "golden/blocks.json").write_text('{"onnx/bucket_00.onnx": [{}]}')
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_block_values(out)


@pytest.mark.parametrize("block", ["blocks.0", "blocks.7", "blocks.11"])
def test_engines_of_parts_name_the_block_in_few_builds(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: str
) -> None:
    monkeypatch.syspath_prepend(str(FAKES))
    out = planted(plain, tmp_path / "out", block)
    found = bisect_engine(out, read_manifest(out), 0, 1e-4)
    assert found is not None
    assert found.block == block
    assert found.runs <= 1 + math.ceil(math.log2(len(BLOCKS))) + 1
    assert bisect_engine(plain, read_manifest(plain), 0, 1e-4) is None
    assert list(out.rglob("*.partial")) == []
    _forget()


def test_the_verb_names_the_block_of_an_engine_that_is_off(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffcr_compile.engine_plan import plan_engines
    from diffcr_compile.export.device.builder import build_engines
    from diffcr_compile.export.device.job import BuildSettings
    from diffcr_compile.runtime.open_engines import open_device

    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    out = planted(plain, tmp_path / "out", "blocks.3")
    manifest = read_manifest(out)
    plan = plan_engines(manifest, "per_bucket")
    build_engines(out, manifest, plan, open_device()[2], BuildSettings())
    with pytest.raises(
        AccuracyError, match=r"first block that is off is 'blocks\.3'"
    ) as caught:
        validate_engines(out, bisect=True)
    assert caught.value.code == "DCR-Q002"
    _forget()


def _forget() -> None:
    for name in [n for n in sys.modules if n in ("tensorrt", "cuda") or n.startswith("cuda.")]:
        del sys.modules[name]


# ------------------------------------------------------------------------------------- marks


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-6, 1e-3, 0.1, 10.0]))
def test_a_mark_tells_the_size_of_a_difference_within_a_factor_of_two(
    seed: int, scale: float
) -> None:
    generator = np.random.default_rng(seed)
    value = generator.standard_normal((3, 7, 11))
    other = value.copy()
    rows = generator.integers(0, 3)
    other[rows] += scale * generator.standard_normal((7, 11))
    true = np.linalg.norm(other - value) / np.linalg.norm(value)
    norm, signs = mark(value)
    found = BlockValue("b", "v", "n", value.shape, "float64", norm, signs).difference(other)
    assert true / 2 < found < 2 * true


def test_a_mark_is_the_same_on_every_machine() -> None:
    norm, signs = mark(np.arange(5, dtype=np.float32))
    assert norm == pytest.approx(math.sqrt(30))
    # products with signs written out from the generator's documented bits
    raw = np.random.PCG64(20_26).random_raw(3)
    words = [int(w) >> shift & 0xFFFFFFFF for w in raw for shift in (0, 32)][:5]
    for number in (0, 31):
        expected = sum(k if w >> number & 1 else -k for k, w in enumerate(words))
        assert signs[number] == pytest.approx(expected)


def test_nodes_belong_to_the_block_whose_name_their_origin_has() -> None:
    assert block_of("blocks.1.norm", BLOCKS) == "blocks.1"
    assert block_of("blocks.10", BLOCKS) == "blocks.10"
    assert block_of("blocks_10_scatter", BLOCKS) == "blocks.10"
    assert block_of("blocks_1_router.score", BLOCKS) == "blocks.1"
    assert block_of("pos_embed", BLOCKS) == ""


def test_what_leaves_a_block_is_what_others_read(plain: Path) -> None:
    model = onnx.load(str(plain / "onnx/bucket_00.onnx"), load_external_data=False)
    origins = json.loads((plain / "model/node_map.json").read_text())["onnx/bucket_00.onnx"]
    found = list(leaving(model, origins, BLOCKS))
    assert [(block, value) for block, value, _ in found] == [(b, f"{b}.out") for b in BLOCKS]


# ------------------------------------------------------------------------------------- Polygraphy


def test_polygraphy_reads_what_is_written_and_the_other_way_round(
    plain: Path, tmp_path: Path
) -> None:
    os.environ.setdefault("POLYGRAPHY_AUTOINSTALL_DEPS", "0")
    # a dev dependency: a missing one is a failure, not a skip
    from polygraphy.comparator import IterationResult, RunResults
    from polygraphy.json import load_json, save_json

    inputs_path, outputs_path = write_polygraphy(plain, tmp_path)
    golden = run_onnx(plain / "onnx/bucket_00.onnx", load_json(str(inputs_path))[0], threads=1)
    loaded = RunResults.load(str(outputs_path))
    ((runner, results),) = loaded.items()
    assert runner == "golden"
    np.testing.assert_array_equal(results[0]["output"], golden[0])
    assert list(read_inputs(inputs_path)[0]) == ["x"]

    theirs = RunResults()
    call = IterationResult({"output": golden[0] + 1e-5}, runtime=0.5, runner_name="trt-runner")
    theirs.append(("trt-runner", [call, call]))
    theirs.save(str(tmp_path / "theirs.json"))
    (first, second) = read_outputs(tmp_path / "theirs.json")["trt-runner"]
    np.testing.assert_array_equal(first["output"], golden[0] + np.float32(1e-5))
    assert set(second) == {"output"}
    save_json([{"x": np.float16([1, 2])}], str(tmp_path / "inputs.json"))
    assert read_inputs(tmp_path / "inputs.json")[0]["x"].dtype == np.float16


def test_results_of_polygraphy_are_compared_with_the_golden_outputs(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    _, outputs = write_polygraphy(plain, tmp_path)
    golden = read_outputs(outputs)["golden"][0]["output"]
    write_outputs(tmp_path / "good.json", "trt", [{"output": golden * 1.0001}])
    write_outputs(tmp_path / "bad.json", "trt", [{"output": golden * 1.1}])
    write_outputs(tmp_path / "other.json", "trt", [{"y": golden}])
    (row,) = compare_results(plain, tmp_path / "good.json", 0)
    assert row["passed"]
    assert row["rel_l2"] == pytest.approx(1e-4, rel=1e-2)
    for name, status in (("good", 0), ("bad", 6), ("other", 2), ("missing", 2)):
        arguments = ["validate", str(plain), "--results", str(tmp_path / f"{name}.json")]
        monkeypatch.setattr(sys, "argv", ["diffcr", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        assert code == status, name
    capsys.readouterr()
    with pytest.raises(UsageError, match="no timestep bucket 7"):
        compare_results(plain, tmp_path / "good.json", 7)


@pytest.mark.parametrize(
    "text",
    ["[1]", "{}", '{"polygraphy_class": "RunResults"}', "[{\"x\": {\"array\": \"!\"}}]", "nothing",
     '{"polygraphy_class": "RunResults", "lst": [["a", [{"outputs": {"y": 1}}]]]}'],
)  # fmt: skip
def test_what_is_no_json_of_polygraphy_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    for read in (read_inputs, read_outputs):
        with pytest.raises(UsageError):
            read(tmp_path / "x.json")


def _npz() -> bytes:
    data = io.BytesIO()
    np.savez(data, x=np.zeros(2))
    return data.getvalue()


def _npy(array: Any) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def _header(text: str) -> bytes:
    head = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head


NO_ARRAYS = {
    "nothing": b"",
    "npz": _npz(),
    "bad zip": b"PK\x03\x04 and no more",
    "text": b"1.0 2.0",
    "pickle": _npy(np.array([{}], dtype=object)),
    "words": _npy(np.array(["a"])),
    "cut": _npy(np.zeros(4))[:-1],
    "longer": _npy(np.zeros(4)) + b"0",
    "huge": _header("{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,)}"),
    "negative": _header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1,)}"),
    "no header": _header("{'descr': '<f8', 'fortran_order': "),
    "deep": _header("(" * 110),
    "other version": b"\x93NUMPY\x09\x00" + bytes(100),
}


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_bytes_that_are_no_array_of_numbers_are_refused(name: str, tmp_path: Path) -> None:
    array = {
        "array": base64.b64encode(NO_ARRAYS[name]).decode(),
        "polygraphy_class": "ndarray",
    }
    (tmp_path / "in.json").write_text(json.dumps([{"x": array}]))
    with pytest.raises(UsageError, match="arrays of numpy") as caught:
        read_inputs(tmp_path / "in.json")
    assert caught.value.code == "DCR-U006"


class AddedMaskDiT(OwnDiT):
    """Each block is given a mask of 0 and minus infinity, which is cut with its tokens."""

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        tokens, condition = self.embed(x, t)
        added = torch.where(mask > 0, 0.0, -math.inf)[:, None, None]  # (B, 1, 1, N)
        for block in self.blocks:
            tokens = block(tokens, condition, added)
        return self.image(tokens)


class AddedMaskBlock(Block):
    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        read = functional.scaled_dot_product_attention(
            x[:, None], x[:, None], x[:, None], mask
        )
        return super().forward(x + read[:, 0], condition)


def test_a_mask_of_minus_infinity_that_leaves_a_block_is_left_out(tmp_path: Path) -> None:
    mask = torch.ones(2, 16)
    mask[1, 10:] = 0
    model = AddedMaskDiT(block=AddedMaskBlock, side=4, depth=2).eval()
    frozen = dcr.freeze(dcr.route(model, inputs_for(4, mask=mask)), keep_ratio=0.5)
    dcr.export(frozen, tmp_path / "out")
    (values,) = read_block_values(tmp_path / "out").values()
    assert {value.block for value in values} == {"blocks.0", "blocks.1"}
    assert all(math.isfinite(number) for v in values for number in (v.norm, *v.signs))
    manifest = read_manifest(tmp_path / "out")
    assert bisect_onnx(tmp_path / "out", manifest, 0, 1e-3) is None
