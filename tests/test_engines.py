"""TensorRT-RTX builds the reference model in float16, every bucket in both modes, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel

import diffcr_compile as dcr
from benchmarks.engines import (
    CAPABILITIES,
    KEPT,
    RESULTS,
    STEPS,
    GraphsOnly,
    build_all,
    calibrated_programs,
    frozen_programs,
    half_along_a_run,
    sampled_difference,
    spanning_scratch,
    write_graphs,
)
from diffcr_compile.export.half import compute_in_half
from diffcr_compile.export.onnx_model import exported_program, graph_from_exported
from diffcr_compile.export.precision import TOLERANCES, HalfGraphs
from diffcr_compile.export.rtx_build import build_rtx
from diffcr_compile.export.weights import WEIGHTS_FILE
from diffcr_compile.program import Program
from diffcr_compile.reference import demo


@pytest.fixture(scope="module")
def frozen() -> list[Program]:
    return frozen_programs(demo.load_reference_dit(), demo.example_inputs(2))


@pytest.fixture(scope="module")
def half(frozen: list[Program]) -> HalfGraphs:
    return half_along_a_run(frozen)


@pytest.fixture(scope="module")
def reference(
    frozen: list[Program], half: HalfGraphs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, GraphsOnly]:
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("engines")
    return folder, write_graphs(frozen, half, folder)


def test_float16_is_near_float32_in_every_state_of_a_sampling_run(half: HalfGraphs) -> None:
    """Of the reference model: relative L2 of at most 5e-3, nothing NaN or infinite, no island needed."""
    assert half.states == STEPS + len(KEPT[0])  # the golden inputs too
    assert [row.bucket for row in half.rows] == [0, 1, 2, 3]
    for row in half.rows:
        assert (row.non_finite, row.tolerance) == (0, 5e-3)
        assert (
            1e-5 < row.rel_l2 <= 5e-3
        )  # the worst of its bucket; exactly 0 would be no float16
    assert half.islands == ()
    assert half.swapped < 0.02


@pytest.mark.soak
def test_float16_left_to_itself_samples_what_float32_does_after_a_calibration() -> None:
    """With its own states and tokens, at every step of four runs. Untrained routers are far from it."""
    frozen = calibrated_programs()
    found = sampled_difference(frozen, half_along_a_run(frozen))
    assert found["finite"]
    assert max(found["rel_l2"]) <= 5e-3


def test_the_committed_figures_are_within_their_bounds() -> None:
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert set(record["engines"]) == set(CAPABILITIES)
    assert all(row["spanning_over_one_engine"] <= 1.5 for row in record["engines"].values())
    calibrated = record["float16_calibrated"]
    same, alone = calibrated["worst_rel_l2_same_tokens"], calibrated["samples"]["rel_l2"]
    assert max(same, *alone) <= 5e-3
    bfloat16 = record["bfloat16"]
    calibrated = bfloat16["calibrated"]
    same, alone = calibrated["worst_rel_l2_same_tokens"], calibrated["samples"]["rel_l2"]
    assert max(same, *alone) <= TOLERANCES["bf16"]
    assert all(row["spanning_over_one_engine"] <= 1.5 for row in bfloat16["engines"].values())
    assert record["int8"]["non_finite"] == 0
    assert max(record["int8"]["rel_l2_same_tokens"]) <= TOLERANCES["int8"]
    spanning, fp16 = record["attention"]["fp16_spanning"], record["attention"]["fp16"]
    assert spanning["activation_bytes"] < fp16["one_score_matrix_bytes"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_bucket_builds_in_both_modes(
    reference: tuple[Path, GraphsOnly], capability: str
) -> None:
    found = build_all(*reference, capability)
    weights = (reference[0] / "onnx" / WEIGHTS_FILE).stat().st_size
    separate = found["per_bucket"]["engines"]
    (shared,) = found["pinned"]["engines"]
    (spanning,) = found["spanning"]["engines"]
    buckets = len(KEPT[0])
    assert len(separate) == shared["profiles"] == buckets
    # one set of kernels and one of weights: little more than the smallest static engine
    assert spanning["profiles"] == 1
    assert found["spanning_over_one_engine"] <= 1.5
    # weights are in each engine, and in the shared one once: kernels of a profile weigh what they weigh
    overhead = max(engine["bytes"] for engine in separate) - weights
    assert overhead > 0
    assert shared["bytes"] < weights + 1.25 * buckets * overhead
    assert found["pinned"]["bytes"] < 0.75 * found["per_bucket"]["bytes"]
    # a profile needs no more scratch memory than the static graph of its bucket, but for a little
    static = [engine["activation_bytes"][0] for engine in separate]
    assert len(shared["activation_bytes"]) == buckets
    for profile, alone in zip(shared["activation_bytes"], static, strict=True):
        assert profile <= 1.1 * alone
    assert spanning["activation_bytes"][0] <= 1.1 * max(static)


def test_attention_is_fused_in_every_block_in_half_precision_and_in_none_in_float32() -> None:
    """With 1,936 tokens a score matrix is larger than all other scratch memory: one would show."""
    pytest.importorskip("tensorrt_rtx")
    torch.manual_seed(0)
    side, heads = 88, 4
    model = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=16, in_channels=1, out_channels=1,
        num_layers=2, sample_size=side, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=2,
    ).eval()  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 1, side, side),
        "timestep": torch.tensor([300.0]),
        "class_labels": torch.tensor([1]),
    }
    kept = (side // 2) ** 2 * 3 // 4
    program = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.75)[0].program
    exported = exported_program(program)
    scratch = {}
    for name, made in (
        ("fp16", compute_in_half(exported, program)),
        ("bf16", compute_in_half(exported, program, precision="bf16")),
        ("fp32", exported),
    ):
        graph = graph_from_exported(made, program, bfloat16=name == "bf16")[0]
        (scratch[name],) = build_rtx(graph.SerializeToString()).activation_bytes
    assert max(scratch["fp16"], scratch["bf16"]) < heads * kept * kept * 2
    # nor does a profile that spans buckets, with room for the most kept tokens
    spanning = spanning_scratch(model, inputs, (kept, kept // 2, kept // 4))
    assert spanning < heads * kept * kept * 2
    assert scratch["fp32"] > heads * kept * kept * 4
