"""The dry run: the same findings as the full way, numbers by hand, and what it says about them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.blocks import BlockSpec
from diffcr_compile.config import CompileConfig, RoutingConfig, make_config
from diffcr_compile.errors import UsageError
from diffcr_compile.legality import Findings, find_blocks
from diffcr_compile.planning.advice import advise, suggested_budget
from diffcr_compile.planning.dry_run import dry_run
from diffcr_compile.planning.estimates import ModelSizes, estimate
from diffcr_compile.planning.inspection import Plan
from diffcr_compile.planning.plan_text import plan_text, span
from diffcr_compile.planning.targets import find_target
from tests import models
from tests.model_parts import Block, OwnDiT, inputs_for
from tests.test_cli import run
from tests.test_legality import ILLEGAL, LEGAL

ROOT = Path(__file__).resolve().parent.parent
JSON_KEYS = {
    "blocks", "refused", "refused_mac_share", "error", "note", "parameters", "on_meta", "macs_dense",
    "macs_outer", "smallest_budget", "macs_per_byte", "macs_per_byte_from", "target", "troubles",
    "ops", "estimates_bytes", "recommendations", "next_command",
}  # fmt: skip
BLOCK_KEYS = {
    "name", "tokens", "width", "stream", "first_token", "roles", "shares_index", "removable",
    "permutation_error", "same_as", "macs", "mac_share", "router_macs", "moved_bytes",
    "break_even_keep_ratio", "break_even_keep_ratio_macs_only",
}  # fmt: skip
ESTIMATE_KEYS = {
    "weights", "calibrate", "calibrate_routers", "rollouts", "artifact", "folder", "disk_peak",
    "engine_build", "engines",
}  # fmt: skip
FACTORIES: dict[str, Callable[[], models.Example]] = {
    **{name: case[0] for name, case in LEGAL.items()},
    **{name: case[0] for name, case in ILLEGAL.items()},
    "twice": models.twice,
    "no container": models.no_container,
}


@pytest.fixture(scope="module")
def dit_plan() -> Plan:
    return dcr.inspect(*models.tiny_dit())


# --------------------------------------------------------- the same as with the whole model


def facts(spec: BlockSpec) -> tuple[Any, ...]:
    return tuple(value for name, value in dataclasses.asdict(spec).items() if name != "error")


def words(findings: Findings) -> dict[str, str]:
    """Refusals without the numbers that an experiment on other inputs gives."""
    return {r.block: re.sub(r"\d\.\de[+-]\d+", "#", r.reason) for r in findings.refused}


@pytest.mark.parametrize("name", FACTORIES)
def test_a_dry_run_finds_what_the_full_experiments_find(name: str) -> None:
    model, inputs = FACTORIES[name]()
    full = find_blocks(model, (), inputs)
    dry = dry_run(model, (), inputs)
    assert [facts(s) for s in dry.findings.blocks] == [facts(s) for s in full.blocks]
    assert words(dry.findings) == words(full)
    assert dry.findings.sample == full.sample
    assert all(spec.error < 1e-12 for spec in dry.findings.blocks)
    assert dry.note is None  # it is the quick way that found them


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "text first in one stream"])
def test_weights_on_the_meta_device_are_enough(name: str) -> None:
    model, inputs = FACTORIES[name]()
    full = find_blocks(model, (), inputs)
    meta = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()}
    empty = copy.deepcopy(model).to("meta")
    for given in (inputs, meta):
        plan = dcr.inspect(empty, given)
        assert [facts(b.spec) for b in plan.details] == [facts(s) for s in full.blocks]
        assert plan.error is None
        assert plan.on_meta
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    assert plan.macs == dcr.inspect(model, inputs).macs


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["dit", "convolution", "dicts in, tuple out"])
def test_the_model_is_left_as_it_was(name: str, training: bool) -> None:
    model, inputs = FACTORIES[name]()
    model.train(training)
    before = {key: (value, value.clone()) for key, value in model.state_dict().items()}
    dcr.inspect(model, inputs)
    for key, value in model.state_dict(keep_vars=False).items():
        assert value.data_ptr() == before[key][0].data_ptr()
        assert torch.equal(value, before[key][1])
    for module in model.modules():
        assert module.training is training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)


# ------------------------------------------------------- one experiment per structure


def test_blocks_of_one_structure_share_one_experiment(dit_plan: Plan) -> None:
    first, *others = dit_plan.details
    assert first.same_as is None
    assert [block.same_as for block in others] == [first.spec.name] * 2


class ShiftBlock(Block):
    """Adds each token's neighbour, `shift` places away; 0 adds the token itself and is legal."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.shift = 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, *args, **kwargs)
        return y + 0.5 * torch.roll(y, self.shift, 1)


class WeightedBlock(Block):
    """Weighs tokens by position; weights that are all 1 are legal."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.register_buffer("weights", torch.ones(36))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, *args, **kwargs)
        return y * self.weights[: y.shape[1], None]


class HalfBlock(Block):
    """With all 36 tokens it is any block; with fewer it may refuse."""

    def __init__(self, width: int, **options: Any) -> None:
        super().__init__(width, **options)
        self.pinned = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.pinned and x.shape[1] != 36:
            raise ValueError("36 tokens are needed")
        return super().forward(x, *args, **kwargs)


def test_equal_classes_and_weights_with_another_attribute_are_tried_apart() -> None:
    model = OwnDiT(block=ShiftBlock).eval()
    model.blocks[1].shift = 1
    found = dry_run(model, (), inputs_for(), RoutingConfig(granularity="block"))
    assert [spec.name for spec in found.findings.blocks] == ["blocks.0"]
    assert [r.block for r in found.findings.refused] == ["blocks.1"]
    assert "mixes tokens by their position" in found.findings.refused[0].reason
    assert found.same_as == {}


def test_equal_classes_with_other_contents_of_a_buffer_are_tried_apart() -> None:
    model = OwnDiT(block=WeightedBlock).eval()
    model.blocks[1].weights[:18] = 0.5
    found = dry_run(model, (), inputs_for(), RoutingConfig(granularity="block"))
    assert [spec.name for spec in found.findings.blocks] == ["blocks.0"]
    assert [r.block for r in found.findings.refused] == ["blocks.1"]


@pytest.mark.parametrize("pinned", [0, 1])
def test_equal_with_all_tokens_but_not_with_half_of_them_are_tried_apart(pinned: int) -> None:
    model = OwnDiT(block=HalfBlock).eval()
    model.blocks[pinned].pinned = True
    found = dry_run(model, (), inputs_for(), RoutingConfig(granularity="block"))
    assert [spec.name for spec in found.findings.blocks] == [f"blocks.{1 - pinned}"]
    assert "36 tokens are needed" in found.findings.refused[0].reason


def test_parts_of_refused_blocks_are_those_of_the_full_search() -> None:
    """Tried in one block of each structure; ``blocks.1`` has those of ``blocks.0``."""
    model, inputs = models.window()
    plan = dcr.inspect(model, inputs)
    full = find_blocks(model, (), inputs)
    assert [block.spec for block in plan.details] == list(full.blocks)
    assert [spec.name for spec in full.blocks] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert plan.details[1].same_as == "blocks.0.mlp"
    assert plan.refused["blocks.0"] == full.refused[0].reason
    # the MACs of the parts are not counted twice
    known = sum(b.share or 0 for b in plan.details) + sum(r.share or 0 for r in plan.refusals)
    whole = dcr.inspect(model, inputs, RoutingConfig(granularity="block"))
    assert known == pytest.approx(sum(r.share or 0 for r in whole.refusals))


def test_a_number_that_changes_nothing_does_not_part_blocks() -> None:
    model = OwnDiT().eval()
    for number, block in enumerate(model.blocks):
        block.layer_number = number
    assert dry_run(model, (), inputs_for()).same_as == {"blocks.1": "blocks.0"}


# --------------------------------------------------------------- models that resist


class LooksAtValues(OwnDiT):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = 2.0 if float(t[0]) > 0.5 else 1.0
        return super().forward(x, t) * scale


def test_a_model_that_looks_at_values_is_run_on_real_numbers() -> None:
    plan = dcr.inspect(LooksAtValues().eval(), inputs_for())
    assert [block.spec.name for block in plan.details] == ["blocks.0", "blocks.1"]
    assert plan.note is not None
    assert "ran on real numbers" in plan.note
    assert plan.error is not None
    assert "LooksAtValues cannot be captured" in plan.error
    assert plan.next_command() is None
    assert "cannot be captured" in str(plan)


def test_a_model_that_looks_at_values_and_has_none_is_said_so() -> None:
    plan = dcr.inspect(LooksAtValues().eval().to("meta"), inputs_for())
    assert plan.error is not None
    assert "does not run without data" in plan.error
    assert json.loads(json.dumps(plan.to_json()))["blocks"] == []
    assert "cannot be captured" in str(plan)


def test_wrong_inputs_are_in_the_result() -> None:
    plan = dcr.inspect(OwnDiT().eval(), {"x": torch.randn(2, 3, 6, 6), "t": torch.rand(2)})
    assert plan.error is not None
    assert "does not run on the example inputs" in plan.error


# ------------------------------------------------------------------ numbers by hand

WIDTH, TOKENS = 32, 64  # of tiny_dit
FIXED = 6 * WIDTH**2 + 256 * WIDTH + WIDTH**2  # modulation and the timestep embedder


def dit_macs(kept: float) -> float:
    return 12 * WIDTH**2 * kept + 2 * kept**2 * WIDTH + FIXED


def test_macs_and_shares_are_those_of_the_formula(dit_plan: Plan) -> None:
    assert dit_plan.costs is not None
    total = dit_plan.costs.outer + 3 * dit_macs(TOKENS)
    assert dit_plan.macs == total
    for block in dit_plan.details:
        assert block.macs == dit_macs(TOKENS)
        assert block.share == pytest.approx(dit_macs(TOKENS) / total, rel=1e-12)


def test_plain_costs_are_those_of_the_settings(dit_plan: Plan) -> None:
    assert dit_plan.costs is not None
    for levels in dit_plan.costs.levels.values():
        assert levels == (16, 32, 48, 64)
    config = RoutingConfig(multiple_of=8, max_keep_ratio=0.5)
    plan = dcr.inspect(*models.tiny_dit(), config)
    assert plan.costs is not None
    for name, levels in plan.costs.levels.items():
        assert levels == (8, 16, 24, 32, 64)
        expected = [dit_macs(k) + (TOKENS * WIDTH if k < TOKENS else 0) for k in levels]
        assert list(plan.costs.per_level[name]) == expected


@pytest.mark.parametrize("balance", [0.0, 3.4, 30.0])
def test_break_even_solves_the_equation_of_costs(balance: float) -> None:
    plan = dcr.inspect(*models.tiny_dit(), RoutingConfig(multiple_of=4), macs_per_byte=balance)
    over = plan.details[0].overhead
    assert over is not None
    router = TOKENS * WIDTH
    assert over.router_macs == router
    assert over.moved_bytes == 4 * WIDTH * (4 * TOKENS / 2 + 2 * TOKENS)
    # dit_macs(K) + router + balance * bytes(K) = dit_macs(N), a quadratic equation in K
    a = 2 * WIDTH
    b = 12 * WIDTH**2 + balance * 4 * WIDTH * 4
    c = FIXED + router + balance * 4 * WIDTH * 2 * TOKENS - dit_macs(TOKENS)
    kept = (-b + math.sqrt(b * b - 4 * a * c)) / (2 * a)
    assert over.break_even == pytest.approx(kept / TOKENS, abs=1e-3)
    assert 0 < kept < TOKENS


def test_moving_bytes_can_cost_more_than_routing_saves() -> None:
    plan = dcr.inspect(*models.tiny_dit(), macs_per_byte=1e4)
    assert all(b.overhead is not None and b.overhead.break_even is None for b in plan.details)
    assert any("routing never pays in" in line for line in plan.recommendations)
    assert "never" in str(plan)


def test_token_aligned_arguments_are_moved_too() -> None:
    """tiny_flux: two rotary tables of 36 image tokens x 16 in fp32, without a batch axis."""
    plan = dcr.inspect(*models.tiny_flux())
    over = plan.details[0].overhead
    assert over is not None
    stream = 4 * 32 * (4 * 18 + 2 * 36)
    tables = 2 * (2 * 18 * 16 * 4)
    assert over.moved_bytes == stream + tables


def test_roles_of_every_argument() -> None:
    plan = dcr.inspect(*models.tiny_flux())
    roles = plan.details[0].roles
    assert roles == {
        "kwargs['hidden_states']": "image stream",
        "kwargs['encoder_hidden_states']": "text stream",
        "kwargs['temb']": "global",
        "kwargs['image_rotary_emb'][0]": "token-aligned, axis 0",
        "kwargs['image_rotary_emb'][1]": "token-aligned, axis 0",
    }


def test_estimates_are_those_of_the_formula() -> None:
    sizes = ModelSizes(
        weights=1000, routing=10, width=3, blocks=2, inputs=0, inputs_per_sample=30,
        outputs_per_sample=20, forward=700, batch=3,
    )  # fmt: skip
    config = make_config(
        {"routing": {"buckets": 4}, "rollouts": {"trajectories": 5, "steps": 6},
         "calibration": {"batch": 7}}
    )  # fmt: skip
    found = estimate(sizes, config, 3.3)
    teacher = 5 * 6 * (30 + 20)
    graphs = 5 * 2 * 6500
    assert found.rollouts == teacher
    assert found.artifact == 1000 + 10 + graphs + 4 * 3 * 50
    assert found.folder == found.artifact + 4 * 1010 + teacher + 1010 + 1000
    assert found.disk_peak == found.folder + 4 * 1010
    base = 450_000_000
    assert found.calibrate == base + 1000 + 9 * 1010 + 7 * 700 + teacher
    assert found.calibrate_routers == base + 1000 + 9 * 10 + 7 * 700 + teacher
    assert (found.engine_build, found.engines) == (3300, 4000)
    assert estimate(sizes, config, None).engines is None


def test_the_estimate_of_adapters_follows_their_rank() -> None:
    """One layer of 64 by 64 weights, routed with one router of 64."""
    sizes = ModelSizes(
        weights=4 * 64 * 64, routing=4 * 64, width=64, blocks=1, inputs=0, inputs_per_sample=0,
        outputs_per_sample=0, forward=2000, batch=1,
    )  # fmt: skip
    config = make_config({"calibration": {"train": "lora", "lora_rank": 4}})
    adapters = 4 * (64 * 4 + 4 * 64)
    found = estimate(sizes, config, None)
    merged = 2 * sizes.weights
    assert found.calibrate - found.calibrate_routers == 9 * adapters + merged - sizes.weights


@pytest.mark.parametrize(("rank", "matrices"), [(0, 1), (16, 2)])
def test_where_little_is_trained_the_warm_start_holds_most(rank: int, matrices: int) -> None:
    """Least squares hold matrices of 64 by 64 in float64, per block."""
    sizes = ModelSizes(
        weights=5000, routing=100, width=64, blocks=3, inputs=0, inputs_per_sample=0,
        outputs_per_sample=0, forward=70, batch=1,
    )  # fmt: skip
    config = make_config(
        {"calibration": {"train": "router"}, "routing": {"shortcut_rank": rank}}
    )
    found = estimate(sizes, config, None)
    matrix = 64 * 64 * 8
    assert found.calibrate == 450_000_000 + 5000 + 2 * 100 + 3 * matrices * matrix + 70


def test_estimates_of_the_demo_are_near_what_was_measured() -> None:
    """Against the committed report of a real run."""
    from diffcr_compile.reference import demo

    measured = json.loads((ROOT / "benchmarks/results/demo_report.json").read_text())
    plan = dcr.inspect(demo.load_reference_dit(), demo.example_inputs())
    assert plan.estimates is not None
    assert plan.macs == measured["macs"]["dense"]
    assert plan.estimates.weights == pytest.approx(measured["size"]["weights_bytes"], rel=0.05)
    assert plan.estimates.artifact == pytest.approx(measured["size"]["onnx_bytes"], rel=0.1)
    assert plan.estimates.calibrate == pytest.approx(
        measured["peak_rss_bytes"]["calibrate"], rel=0.35
    )


# ------------------------------------------------------------------------- advice


@pytest.mark.parametrize(
    ("smallest", "expected"),
    [(None, None), (0.1, 0.6), (0.55, 0.6), (0.56, 0.65), (0.7, 0.75), (0.99, 1.0)],
)
def test_the_suggested_budget_can_be_reached(
    smallest: float | None, expected: float | None
) -> None:
    found = suggested_budget(smallest)
    assert found == (None if expected is None else pytest.approx(expected))


def with_tokens(plan: Plan, tokens: int, target: str) -> Plan:
    details = tuple(
        dataclasses.replace(b, spec=dataclasses.replace(b.spec, num_tokens=tokens))
        for b in plan.details
    )
    return dataclasses.replace(plan, details=details, target=find_target(target))


def test_more_tokens_than_tensorrt_can_rank_are_named(dit_plan: Plan) -> None:
    config = CompileConfig()

    def said(tokens: int, target: str) -> list[str]:
        lines = advise(with_tokens(dit_plan, tokens, target), {"float16"}, config)
        return [line for line in lines if "TopK" in line]

    assert said(3840, "orin-jp6") == []
    assert said(4096, "ort-cpu") == []
    (line,) = said(4096, "orin-jp6")
    assert "K > 3840" in line
    assert "between 0.938 and 1" in line
    assert """--set 'export.target=["jetson-agx-orin@jp6.2"]'""" in line
    assert "between 0.469 and 1" in said(8192, "orin-jp6")[0]


def test_float_types_are_judged_for_the_target(dit_plan: Plan) -> None:
    config = CompileConfig()
    orin = with_tokens(dit_plan, 64, "orin-jp6")
    assert any("fp16 or bf16" in line for line in advise(orin, {"float32"}, config))
    half = CompileConfig.model_validate({"export": {"precision": "fp16"}})
    assert not any("score matrix" in line for line in advise(orin, {"float32"}, half))
    assert not any("score matrix" in line for line in advise(orin, {"float16"}, config))
    assert any("opset 20" in line for line in advise(dit_plan, {"bfloat16"}, config))


class Cumulates(OwnDiT):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t).cumsum(-1)


def test_ops_that_the_target_dislikes_are_named() -> None:
    model, inputs = Cumulates().eval(), inputs_for()
    plan = dcr.inspect(model, inputs, target="orin-jp6")
    assert list(plan.to_json()["troubles"]) == ["aten.cumsum.default"]
    assert any("aten.cumsum.default runs 1 times" in line for line in plan.recommendations)
    assert dcr.inspect(model, inputs).to_json()["troubles"] == {}


def test_large_rollouts_and_little_memory_are_named(
    dit_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dit_plan.estimates is not None
    large = dataclasses.replace(
        dit_plan.estimates,
        calibrate=30 * 10**9,
        calibrate_routers=5 * 10**9,
        rollouts=19 * 10**9,
    )
    plan = dataclasses.replace(dit_plan, estimates=large)
    monkeypatch.setattr("diffcr_compile.planning.advice.installed_memory", lambda: 8 * 10**9)
    lines = advise(plan, {"float32"}, CompileConfig())
    assert any("30.0 GB" in line and "calibration.train=router" in line for line in lines)
    assert any("19.0 GB (3,840 states of 4.95 MB)" in line for line in lines)
    monkeypatch.setattr("diffcr_compile.planning.advice.installed_memory", lambda: None)
    assert not any("this machine" in line for line in advise(plan, set(), CompileConfig()))


def test_bfloat16_that_a_cpu_does_not_multiply_is_said_before_the_training(
    dit_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines(precision: str, fast: bool, devices: set[str], steps: int = 10) -> str:
        monkeypatch.setattr(
            "diffcr_compile.planning.advice.fast_bfloat16", lambda device: fast
        )
        config = make_config({"calibration": {"precision": precision, "steps": steps}})
        return "\n".join(advise(dit_plan, {"float32"}, config, devices))

    assert "calibration.precision=fp32" in lines("bf16", False, {"cpu"})
    assert "bfloat16 instructions" not in lines("bf16", True, {"cpu"})
    assert "bfloat16 instructions" not in lines("bf16", False, {"cuda"})
    assert "bfloat16 instructions" not in lines("fp32", False, {"cpu"})
    assert "bfloat16 instructions" not in lines("bf16", False, {"cpu"}, steps=0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"calibration": {"steps": 0}}, True),
        ({"calibration": {"train": "router"}}, True),
        ({"calibration": {"train": "all"}}, False),
        ({"calibration": {"train": "router"}, "routing": {"shortcut_rank": 4}}, False),
    ],
)
def test_where_no_weight_learns_shortcuts_are_recommended(
    dit_plan: Plan, settings: dict[str, Any], said: bool
) -> None:
    lines = "\n".join(advise(dit_plan, {"float32"}, make_config(settings)))
    assert ("routing.shortcut_rank=16" in lines) == said


def test_a_plan_counts_the_shortcuts_that_are_asked_for() -> None:
    """Smallest budget, break-even and memory, against the plan without."""
    model, inputs = models.tiny_dit()
    plain, other = (
        dcr.inspect(model, inputs, config={"shortcut_rank": rank}) for rank in (0, 4)
    )
    blocks = [block.spec for block in plain.details]
    more = sum(2 * 4 * spec.width * spec.num_tokens for spec in blocks)
    assert plain.costs is not None
    assert other.costs is not None
    assert plain.smallest_budget is not None
    assert other.smallest_budget is not None
    gap = (other.smallest_budget - plain.smallest_budget) * plain.costs.dense
    assert gap == pytest.approx(more)
    assert plain.estimates is not None
    assert other.estimates is not None
    numbers = sum(
        9 * spec.width for spec in blocks
    )  # 2 * 4 * C in the matrices, C in the offset
    assert other.estimates.artifact - plain.estimates.artifact == 4 * numbers
    for one, two in zip(plain.details, other.details, strict=True):
        assert one.overhead is not None
        assert two.overhead is not None
        spec = one.spec
        assert two.overhead.router_macs - one.overhead.router_macs == (
            8 * spec.width * spec.num_tokens
        )
        assert two.overhead.break_even_macs is not None
        assert one.overhead.break_even_macs is not None
        assert two.overhead.break_even_macs < one.overhead.break_even_macs


# ------------------------------------------------------------------ JSON, text, command line


def test_json_has_its_stable_keys(dit_plan: Plan) -> None:
    found = json.loads(json.dumps(dit_plan.to_json("demo")))
    assert set(found) == JSON_KEYS
    assert [set(block) for block in found["blocks"]] == [BLOCK_KEYS] * 3
    assert set(found["estimates_bytes"]) == ESTIMATE_KEYS
    assert found["next_command"] == "diffcr compile demo -o out --budget 60%"


def test_json_keys_are_there_when_nothing_can_be_routed() -> None:
    plan = dcr.inspect(*models.convolution(), RoutingConfig(granularity="block"))
    found = json.loads(json.dumps(plan.to_json()))
    assert set(found) == JSON_KEYS
    assert found["next_command"] is None
    assert found["smallest_budget"] is None
    assert found["macs_dense"] > 0
    assert sum(found["refused_mac_share"].values()) == pytest.approx(
        1 - outer_share(found), rel=1e-6
    )


def outer_share(found: dict[str, Any]) -> float:
    """OwnDiT outside its blocks: the patch embedding, the timestep and the last layer."""
    every = dry_run(*_with_args(models.convolution()), RoutingConfig(granularity="block"))
    assert every.total_macs is not None
    return 1 - sum(every.macs.values()) / found["macs_dense"]


def _with_args(example: models.Example) -> tuple[nn.Module, tuple[()], dict[str, Any]]:
    return example[0], (), example[1]


def test_text_has_one_row_per_group_and_ends_with_the_command(dit_plan: Plan) -> None:
    text = plan_text(dit_plan, "tiny", "python:a:b", "in.safetensors")
    lines = text.splitlines()
    (row,) = [line for line in lines if line.startswith("transformer_blocks")]
    assert row.split()[:2] == ["transformer_blocks.0-2", "3"]
    assert "2 others have the same structure as transformer_blocks.0" in text
    assert lines[-1] == (
        "next:  diffcr compile python:a:b --inputs in.safetensors -o out --budget 60%"
    )
    header = next(line for line in lines if line.startswith("can be routed"))
    assert header.index("break-even") + len("break-even") == len(row)  # aligned to the right


def test_text_of_refused_blocks_gives_one_reason_per_group() -> None:
    plan = dcr.inspect(*models.window(), RoutingConfig(granularity="block"))
    lines = str(plan).splitlines()
    where = lines.index("refused, stay dense")
    assert lines[where + 1].startswith("  blocks.0-1 (2, ")
    assert "permuting its image tokens" in lines[where + 1]
    assert not any(line.startswith("next:") for line in lines)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.0", "a.1", "a.2"], "a.0-2"),
        (["a.0", "a.2", "a.3"], "a.0,2-3"),
        (["a.7"], "a.7"),
        (["a.0", "b.1"], "a.0, b.1"),
        (["a.0.mlp", "a.1.mlp"], "a.0-1.mlp"),
        (["a.0.1", "a.0.2"], "a.0.1-2"),
    ],
)
def test_span(names: list[str], expected: str) -> None:
    assert span(names) == expected


def test_cli_takes_a_target(monkeypatch: Any, capsys: Any) -> None:
    arguments = ("inspect", "python:tests.test_cli:tiny", "--target", "orin-jp6")
    assert run(monkeypatch, *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"]["max_topk"] == 3840
    assert found["next_command"].startswith("diffcr compile python:tests.test_cli:tiny -o out")
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "TensorRT 10.3" in printed
    assert printed.rstrip().splitlines()[-1] == f"next:  {found['next_command']}"


def test_cli_leaves_with_2_for_an_unknown_target(monkeypatch: Any, capsys: Any) -> None:
    assert run(monkeypatch, "inspect", "demo", "--target", "toaster") == 2
    assert "orin-jp6" in capsys.readouterr().err


def test_unknown_target_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="there is no target 'toaster'"):
        dcr.inspect(*models.tiny_dit(), target="toaster")


# ---------------------------------------------------------------------- a large model

LARGE = """
import json, resource, sys, time
import torch
from diffusers import PixArtTransformer2DModel
import diffcr_compile as dcr

torch.manual_seed(0)
model = PixArtTransformer2DModel(
    num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
    sample_size=64, patch_size=2, cross_attention_dim=1152, caption_channels=4096,
    use_additional_conditions=False,
).eval()
inputs = {
    "hidden_states": torch.randn(1, 4, 64, 64), "encoder_hidden_states": torch.randn(1, 300, 4096),
    "timestep": torch.tensor([500]),
    "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
}
plan = dcr.inspect(model, inputs, target="orin-jp6")
used = resource.getrusage(resource.RUSAGE_SELF)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({
    "plan": plan.to_json(), "rss": used.ru_maxrss * unit, "seconds": used.ru_utime + used.ru_stime,
}))
"""


def test_a_model_of_610_million_parameters_takes_a_minute_and_4_gb() -> None:
    """Building it, its fp32 weights (2.4 GB) and loading torch included.

    Seconds are those of the processor, all threads together: on an idle machine it takes no longer,
    and what else runs on this one does not count.
    """
    done = subprocess.run(
        [sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rss"] < 4e9
    assert found["seconds"] < 60
    plan = found["plan"]
    assert plan["parameters"] == pytest.approx(610e6, rel=0.01)
    assert len(plan["blocks"]) == 28
    assert plan["error"] is None
    # self-attention, cross-attention to 300 text tokens, feed-forward
    width, tokens, text = 1152, 1024, 300
    block = (
        4 * width**2 * tokens + 2 * tokens**2 * width
        + 2 * width**2 * tokens + 2 * width**2 * text + 2 * tokens * text * width
        + 8 * width**2 * tokens
    )  # fmt: skip
    assert {b["macs"] for b in plan["blocks"]} == {block}
    assert plan["macs_dense"] == plan["macs_outer"] + 28 * block
    assert plan["estimates_bytes"]["weights"] == pytest.approx(4 * 610e6, rel=0.01)
    assert [b["same_as"] for b in plan["blocks"]] == [None, *["transformer_blocks.0"] * 27]
