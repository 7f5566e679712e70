"""Top-k of more tokens than TensorRT ranks: the set of a plain top-k, also where logits are equal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile import routing
from diffcr_compile.errors import PreconditionError, TargetError
from diffcr_compile.export.lint import lint
from diffcr_compile.export.parity import compare, run_onnx
from diffcr_compile.export.rtx_build import build_rtx_engine
from diffcr_compile.large_topk import count_until, large_topk, pieces
from diffcr_compile.passes.freeze_kept_tokens import FreezeKeptTokens
from diffcr_compile.planning.targets import all_targets
from diffcr_compile.runtime.backend import make_session
from tests.conftest import Case
from tests.model_parts import OwnDiT, inputs_for, randn

TENSORRT = [target.name for target in all_targets() if target.engine != "onnxruntime"]
LIMIT = 3840


def kept_set(logits: Tensor, kept: int) -> list[set[int]]:
    """The slow way: sort by logit, and by position where logits are equal."""
    rows = logits.tolist()
    return [
        set(sorted(range(len(row)), key=lambda i, row=row: (-row[i], i))[:kept])
        for row in rows
    ]


class Chooser(nn.Module):
    def __init__(self, kept: int, limit: int) -> None:
        super().__init__()
        self.kept, self.limit = kept, limit

    def forward(self, logits: Tensor) -> Tensor:
        return large_topk(logits, self.kept, self.limit)


def exported(kept: int, limit: int, logits: Tensor, path: Path) -> Path:
    made = torch.onnx.export(
        Chooser(kept, limit).eval(), (logits,), dynamo=True, opset_version=20, verbose=False
    )
    assert made is not None
    onnx.save(made.model_proto, path)
    return path


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), tokens=st.integers(1, 300))
def test_the_set_is_that_of_a_sort(data: st.DataObject, batch: int, tokens: int) -> None:
    kept, limit = data.draw(st.integers(1, tokens)), data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(0, 1000))
    shuffled = torch.stack([torch.randperm(tokens) for _ in range(batch)]) * 0.37
    index = large_topk(shuffled + seed, kept, limit)
    assert index.shape == (batch, kept)
    assert [set(row) for row in index.tolist()] == kept_set(shuffled, kept)


@pytest.mark.parametrize(
    ("tokens", "kept", "limit"),
    [
        (300, 250, 60),
        (300, 100, 60),
        (300, 150, 40),
        (257, 256, 9),
        (130, 129, 1),
        (384, 200, 7),
    ],
)
def test_among_equal_logits_the_first_tokens_are_kept_in_onnx(
    tokens: int, kept: int, limit: int, tmp_path: Path
) -> None:
    logits = (randn(2, tokens) * 2).round() / 2
    logits[1] = 0.25  # all equal
    path = exported(kept, limit, logits, tmp_path / "choose.onnx")
    session = make_session(path)
    (index,) = session.run(None, {session.get_inputs()[0].name: logits.numpy()})
    assert [set(row) for row in index.tolist()] == kept_set(logits, kept)


def test_the_spelling_with_fewer_pieces_is_used(tmp_path: Path) -> None:
    ops = {}
    for kept in (250, 100, 150):
        model = onnx.load(exported(kept, 60, randn(1, 300), tmp_path / "choose.onnx"))
        ops[kept] = Counter(node.op_type for node in model.graph.node)
        assert not {"NonZero", "CumSum", "Loop"} & set(ops[kept])
    assert ops[250]["TopK"] == pieces(50, 60) == 1
    assert ops[100]["TopK"] == pieces(100, 60) == 2
    assert ops[150]["TopK"] == pieces(150, 60) == 3
    assert ops[250]["MatMul"] == 1
    assert ops[100]["MatMul"] == ops[150]["MatMul"] == 0


def test_in_pieces_the_order_is_that_of_top_k_and_the_complement_ascends() -> None:
    logits = torch.randperm(300)[None] * 0.5
    assert torch.equal(large_topk(logits, 100, 60), logits.topk(100, dim=1).indices)
    ascending = large_topk(logits, 250, 60)
    assert torch.equal(ascending, logits.topk(250, dim=1).indices.sort(dim=1).values)


def test_running_counts_are_exact() -> None:
    mask = (randn(2, 16_384 + 5) > 0).to(torch.float32)
    assert torch.equal(count_until(mask), mask.long().cumsum(1))


def in_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every matrix product in float16, as a pass that makes a graph half does it."""
    nodes = []
    for node in model.graph.node:
        if node.op_type != "MatMul":
            nodes.append(node)
            continue
        names = [*node.input, node.output[0]]
        nodes += [
            *(onnx.helper.make_node("Cast", [n], [f"{n}_half"], to=10) for n in names[:2]),
            onnx.helper.make_node("MatMul", [f"{n}_half" for n in names[:2]], ["half"]),
            onnx.helper.make_node("Cast", ["half"], [names[2]], to=1),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def test_positions_stay_right_where_a_precision_pass_makes_products_half(
    tmp_path: Path,
) -> None:
    logits = randn(1, 16_384)
    path = exported(14_000, LIMIT, logits, tmp_path / "choose.onnx")
    model = in_half(onnx.load(path))
    assert sum(
        node.op_type == "Cast" and node.attribute[0].i == 10 for node in model.graph.node
    )
    onnx.save(model, path)
    session = make_session(path)
    (index,) = session.run(None, {session.get_inputs()[0].name: logits.numpy()})
    assert index[0].tolist() == sorted(kept_set(logits, 14_000)[0])


def test_select_tokens_is_a_plain_top_k_up_to_the_limit() -> None:
    logits = randn(2, 40)
    for shares in (False, True):
        plain = routing.select_tokens(logits, 16, shares)
        assert torch.equal(plain, routing.select_tokens(logits, 16, shares, 16))
        pieced = routing.select_tokens(logits, 16, shares, 15)
        assert [set(r) for r in pieced.tolist()] == [set(r) for r in plain.tolist()]
        assert pieced.shape == plain.shape


def test_freezing_names_the_limit_only_where_k_is_beyond_it(cases) -> None:
    case: Case = cases("dit")
    first, second, third = case.names
    tokens = case.routed.blocks[0].num_tokens
    schedule = case.schedule({first: 10, second: 11, third: tokens})
    frozen = FreezeKeptTokens(schedule, 0, max_topk=10)(case.routed).program
    nodes = frozen.graph.find_nodes(op="call_function", target=routing.select_tokens)
    assert [node.args[1:] for node in nodes] == [
        (10, False),
        (11, False, 10),
        (tokens, False, 10),
    ]
    without = FreezeKeptTokens(schedule, 0)(case.routed).program
    nodes = without.graph.find_nodes(op="call_function", target=routing.select_tokens)
    assert [len(node.args) for node in nodes] == [3, 3, 3]
    with pytest.raises(PreconditionError, match="max_topk must be at least 1, got 0"):
        FreezeKeptTokens(schedule, 0, max_topk=0)(case.routed)


# ---------------------------------------------------------------------- 16,384 tokens


class LinearAttentionBlock(nn.Module):
    """Attention whose cost is linear in the tokens, so that a test can afford 16,384 of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.modulation = nn.Linear(width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x) * self.modulation(condition)[:, None]).chunk(3, dim=-1)
        context = k.softmax(1).transpose(1, 2) @ v  # (B, C, C), of the tokens that are here
        return x + self.out(q.softmax(-1) @ context)


class SoftmaxAttentionBlock(LinearAttentionBlock):
    """One head of plain attention; the score matrix has K x K elements."""

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        mixed = self.qkv(self.norm(x) * self.modulation(condition)[:, None])
        q, k, v = mixed[:, None].chunk(3, dim=-1)  # (B, 1, N, C)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


def compile_16384(
    block: type[nn.Module], kept: int, out: Path, batch: int, depth: int
) -> tuple[dcr.Artifact, Tensor]:
    """An artifact for every TensorRT target, and the eager output with plain top-k."""
    inputs = {name: value[:batch] for name, value in inputs_for(side=128).items()}
    routed = dcr.route(OwnDiT(block, side=128, depth=depth).eval(), inputs)
    ratio = kept / 16_384
    plain = dcr.freeze(routed, keep_ratio=ratio)[0]
    frozen = dcr.freeze(routed, keep_ratio=ratio, target=TENSORRT)
    with torch.no_grad():
        reference = plain(**inputs)
    artifact = dcr.export(frozen, out, target=TENSORRT)
    assert {kept} == {row[0] for row in artifact.manifest.schedule.values()}
    return artifact, reference


def check_16384(artifact: dcr.Artifact, reference: Tensor, inputs: dict[str, Tensor]) -> None:
    """It suits every target, agrees with the plain top-k in ONNX Runtime, and builds."""
    graph = artifact.folder / "onnx/bucket_00.onnx"
    errors = [f for f in lint(artifact.folder, all_targets()) if f.severity == "error"]
    assert errors == []
    found = run_onnx(graph, {name: value.numpy() for name, value in inputs.items()})
    row = compare("plain top-k -> ONNX Runtime", found, [reference], 1e-5)
    assert row.passed, row
    pytest.importorskip("tensorrt_rtx")
    assert build_rtx_engine(graph, "SM86")


@pytest.mark.parametrize(("kept", "topks"), [(14_000, 1), (4_000, 2)])
def test_16384_tokens_export_suit_every_target_build_and_match_eager(
    kept: int, topks: int, tmp_path: Path
) -> None:
    inputs = inputs_for(side=128)
    artifact, reference = compile_16384(LinearAttentionBlock, kept, tmp_path / "out", 2, 2)
    model = onnx.load(str(tmp_path / "out/onnx/bucket_00.onnx"), load_external_data=False)
    assert sum(node.op_type == "TopK" for node in model.graph.node) == 2 * topks
    check_16384(artifact, reference, inputs)


@pytest.mark.soak
@pytest.mark.parametrize("kept", [14_000, 4_000])
def test_16384_tokens_with_softmax_attention(kept: int, tmp_path: Path) -> None:
    inputs = {name: value[:1] for name, value in inputs_for(side=128).items()}
    artifact, reference = compile_16384(SoftmaxAttentionBlock, kept, tmp_path / "out", 1, 1)
    check_16384(artifact, reference, inputs)


def test_without_a_target_k_beyond_the_limit_is_one_top_k_which_the_target_refuses(
    tmp_path: Path,
) -> None:
    routed = dcr.route(OwnDiT(LinearAttentionBlock, side=64, depth=1).eval(), inputs_for(64))
    frozen = dcr.freeze(routed, keep_ratio=4_000 / 4_096)
    artifact = dcr.export(frozen, tmp_path / "out")
    found = [f for f in lint(artifact.folder, all_targets()) if f.severity == "error"]
    assert {(f.rule, f.operator, f.count, f.where) for f in found} == {
        ("topk", "TopK", 1, "blocks.0")
    }
    assert [f.target for f in found] == TENSORRT
    assert "K = 4000, TensorRT 10.3 builds up to 3840" in found[0].reason
    with pytest.raises(TargetError, match=r"1 × TopK \(topk\): K = 4000.*\[blocks.0\]"):
        dcr.export(frozen, tmp_path / "refused", target="jetson-orin-nx")
    assert not (tmp_path / "refused/manifest.json").exists()
    assert np.isfinite(artifact.manifest.parity["max_abs"])
