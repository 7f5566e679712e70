"""What is trained and how: adapters, checkpointing, block outputs; and what stops a calibration."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.calibrate.block_outputs import BlockOutputs, dense_twin
from diffcr_compile.calibrate.check_states import check_states
from diffcr_compile.calibrate.checkpointing import recomputed_blocks
from diffcr_compile.calibrate.data import TeacherStates, roll_out
from diffcr_compile.calibrate.loop import CalibrationResult, run_calibration
from diffcr_compile.calibrate.lora import (
    _add_adapters,
    adapted_layers,
    low_rank,
    merge_adapters,
)
from diffcr_compile.calibrate.memory import out_of_memory_in_words
from diffcr_compile.calibrate.ratio_search import RatioSearch
from diffcr_compile.calibrate.rollout_size import rollout_size
from diffcr_compile.calibrate.run import Run
from diffcr_compile.calibrate.samplers import FlowEuler
from diffcr_compile.calibrate.state import load_state
from diffcr_compile.calibrate.trained import TrainedParameters, check_precision
from diffcr_compile.config import (
    CalibrationConfig,
    CompileConfig,
    RolloutConfig,
    RoutingConfig,
    make_config,
)
from diffcr_compile.errors import (
    AccuracyError,
    DiffCRError,
    EnvironmentMissingError,
    ResourceError,
    UnsupportedModelError,
    UsageError,
)
from diffcr_compile.macs import measure_costs
from diffcr_compile.program import Program, run_flat, selector_name
from diffcr_compile.resumable import load_trained, save_trained
from diffcr_compile.schedule import CostTable, TimestepBuckets
from diffcr_compile.stages import routed_program, teacher_states
from tests import models
from tests.conftest import Case
from tests.model_parts import Block, OwnDiT, inputs_for

BUCKETS = TimestepBuckets.even(2, 0.0, 1.0)
FAST = {"steps": 8, "batch": 4, "save_every": 4, "settle": 0.5, "ratios": "gradient"}


@pytest.fixture(scope="module")
def case(cases: Callable[..., Case]) -> Case:
    return cases("plain")


@pytest.fixture(scope="module")
def states(case: Case) -> TeacherStates:
    config = RolloutConfig(trajectories=8, batch=4)
    return roll_out(case.captured, FlowEuler(4, 1.0), config, lambda *_: {}, seed=0)


def fresh(case: Case) -> Program:
    """A routed program that a test may train."""
    module = copy.deepcopy(case.routed.module)
    return dataclasses.replace(case.routed, module=module).attached()


@pytest.fixture
def program(case: Case) -> Program:
    return fresh(case)


def calibrated(
    program: Program, states: TeacherStates, folder: Path | None = None, **options: Any
) -> CalibrationResult:
    extra = {name: options.pop(name) for name in ("report",) if name in options}
    config = CalibrationConfig(**{**FAST, **options})
    costs = costs_of(len(program.blocks), program)
    return run_calibration(
        program, states, config, costs, BUCKETS, 0.7, folder=folder, key="k", **extra
    )


_COSTS: dict[int, CostTable] = {}  # one model only: measured once


def costs_of(blocks: int, program: Program) -> CostTable:
    if blocks not in _COSTS:
        _COSTS[blocks] = measure_costs(program, 4, 0.25)
    return _COSTS[blocks]


def weights(program: Program) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in program.module.named_parameters()}


def keep(program: Program, kept: int) -> None:
    for spec in program.blocks:
        program.module.get_submodule(selector_name(spec.name)).keep(kept)


def batch_of(states: TeacherStates, count: int = 6) -> dict[str, Tensor]:
    return states.take(torch.arange(count), frozenset(states.inputs))[0]


# ------------------------------------------------------------------------------ what stops it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": {}}, "their inputs are"),
        ({"x": (6, 2, 5, 5)}, r"x has shape \(6, 2, 5, 5\), expected \(6, 2, 6, 6\)"),
        ({"x": (5, 2, 6, 6)}, r"expected \(6, 2, 6, 6\)"),
        ({"x": math.nan}, "x holds NaN"),
        (
            {"target": (4, 2, 6, 6)},
            r"target has shape \(4, 2, 6, 6\), expected \(6, 2, 6, 6\)",
        ),
        ({"target": (6, 4, 6, 6)}, r"expected \(6, 2, 6, 6\)"),
        ({"target": (6, 1, 1, 1)}, r"expected \(6, 2, 6, 6\)"),
        ({"target": math.inf}, "answers hold NaN or infinity"),
        ({"timesteps": (6, 1)}, "timesteps have shape"),
        ({"timesteps": (0,)}, "there are none"),
    ],
    ids=str,
)
def test_states_that_do_not_fit_are_refused_before_the_first_step(
    program: Program, states: TeacherStates, change: dict[str, Any], message: str
) -> None:
    inputs = {"x": torch.zeros(6, 2, 6, 6), "t": torch.full((6,), 0.5)}
    fields = {"target": torch.zeros(6, 2, 6, 6), "timesteps": inputs["t"]}
    for name, value in change.items():
        if name == "inputs":
            inputs = value
            continue
        new = (
            torch.zeros(value) if isinstance(value, tuple) else torch.full((6, 2, 6, 6), value)
        )
        (inputs if name in inputs else fields)[name] = new
    broken = TeacherStates(inputs, **fields)
    with pytest.raises(UsageError, match=message) as caught:
        calibrated(program, broken)
    assert caught.value.code == "DCR-U072"
    check_states(program, states)  # and what fits is taken


@pytest.mark.parametrize("value", [-0.1, 1.5, 700.0])
def test_timesteps_outside_of_the_buckets_are_refused(
    program: Program, states: TeacherStates, value: float
) -> None:
    timesteps = states.timesteps.clone()
    timesteps[3] = value
    with pytest.raises(UsageError, match="1 of 32 training states") as caught:
        calibrated(program, dataclasses.replace(states, timesteps=timesteps))
    assert caught.value.code == "DCR-U073"
    assert "routing.timestep_low" in str(caught.value)


def test_an_infinite_error_stops_before_the_first_step_and_says_where(
    program: Program, states: TeacherStates, tmp_path: Path
) -> None:
    target = states.target.clone()
    target[states.timesteps > 0.5] = 1e30
    with pytest.raises(
        AccuracyError, match=r"bucket 1: .*which says what blocks cost, is inf"
    ) as caught:
        calibrated(
            program, dataclasses.replace(states, target=target), tmp_path, ratios="errors"
        )
    assert caught.value.code == "DCR-Q010"


def test_an_infinite_loss_stops_with_the_step_and_the_state_before_it(
    program: Program, states: TeacherStates, tmp_path: Path
) -> None:
    """Bucket 1, which step 2 takes, has answers whose square overflows."""
    target = states.target.clone()
    target[states.timesteps > 0.5] = 1e30
    broken = dataclasses.replace(states, target=target)
    with pytest.raises(AccuracyError, match="step 2: the loss is inf") as caught:
        calibrated(program, broken, tmp_path)
    assert caught.value.code == "DCR-Q010"
    assert f"The state after step 1 is in {tmp_path / 'state.safetensors'}" in str(
        caught.value
    )
    tensors, facts = load_state(tmp_path, "k") or ({}, {})
    assert facts["done"] == 1
    assert all(bool(t.isfinite().all()) for t in tensors.values())


def test_a_gradient_that_is_not_finite_changes_nothing(program: Program) -> None:
    trained = TrainedParameters(program, CalibrationConfig())
    before = weights(program)
    for parameter in trained.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    name, parameter = next(iter(trained.parameters.items()))
    assert parameter.grad is not None
    parameter.grad.view(-1)[0] = math.nan
    with pytest.raises(
        AccuracyError, match=f"step 7: the gradient of {name} is NaN"
    ) as caught:
        trained.update(6)
    assert caught.value.code == "DCR-Q010"
    assert all(torch.equal(before[n], p) for n, p in program.module.named_parameters())


def test_running_out_of_memory_says_what_to_lower(
    program: Program, states: TeacherStates
) -> None:
    """By the allocator's own error: half an exabyte."""
    with pytest.raises(ResourceError, match=r"calibration\.batch") as caught:
        calibrated(program, states, report=lambda *_: torch.empty(2**57))
    assert caught.value.code == "DCR-R010"
    for setting in ("checkpointing", "bf16", "lora"):
        assert setting in str(caught.value)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")]
)
def test_every_kind_of_out_of_memory_is_known(error: Exception) -> None:
    with (
        pytest.raises(ResourceError, match=r"rollouts\.batch"),
        out_of_memory_in_words("rollouts.batch"),
    ):
        raise error
    with (
        pytest.raises(RuntimeError, match="another"),
        out_of_memory_in_words("rollouts.batch"),
    ):
        raise RuntimeError("another")


# --------------------------------------------------------------------------------- rollouts


def test_the_size_of_rollouts_is_that_of_their_files(case: Case, tmp_path: Path) -> None:
    config = RolloutConfig(trajectories=5, batch=2)
    size = rollout_size(case.captured, config, steps=3)
    roll_out(case.captured, FlowEuler(3, 1.0), config, lambda *_: {}, 0, tmp_path)
    held = 0
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            held += sum(file.get_tensor(n).nbytes for n in file.keys())  # noqa: SIM118
    assert size.disk_bytes == held
    assert size.memory_bytes == 2 * held


def settings(max_gib: float) -> CompileConfig:
    return make_config({
        "routing": {"timestep_high": 1.0, "buckets": 2},
        "rollouts": {"trajectories": 4, "batch": 2, "steps": 2, "max_gib": max_gib},
    })  # fmt: skip


def test_rollouts_that_are_too_large_are_refused_before_anything_runs(case: Case) -> None:
    seen: list[Any] = []
    with pytest.raises(ResourceError, match=r"rollouts.trajectories to at most \d+") as caught:
        teacher_states(
            case.captured, None, settings(1e-6), None, None, None, lambda *e: seen.append(e)
        )
    assert caught.value.code == "DCR-R011"
    assert seen == []


def test_the_size_is_told_before_anything_runs(case: Case) -> None:
    seen: list[Any] = []
    teacher_states(
        case.captured, None, settings(1.0), None, None, None, lambda *e: seen.append(e)
    )
    assert [event[:3] for event in seen] == [("rollouts", n, 2) for n in range(3)]
    assert seen[0][3] == {"disk_bytes": 8 * 580, "memory_bytes": 16 * 580}  # 2 × 72 + 1 floats


def test_a_disk_that_is_full_is_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = rollout_size(case.captured, RolloutConfig(trajectories=5), steps=3)

    class Usage:
        free = size.disk_bytes - 1

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(ResourceError, match="on disk"):
        size.check(8.0, "rollouts.trajectories", tmp_path)
    (tmp_path / "rollouts_0000.safetensors").write_bytes(b"1")
    size.check(8.0, "rollouts.trajectories", tmp_path)  # one byte of it is there already


# ----------------------------------------------------------------------------- what is trained


def test_what_is_not_trained_gets_no_gradients(
    program: Program, states: TeacherStates
) -> None:
    before = weights(program)
    calibrated(program, states, train="router")
    for name, parameter in program.module.named_parameters():
        assert parameter.requires_grad  # as it was
        if "router" not in name:
            assert parameter.grad is None
            assert torch.equal(parameter, before[name])


def test_ratios_alone_can_be_learned(program: Program, states: TeacherStates) -> None:
    result = calibrated(program, states, train="ratio")
    assert len(result.history) == FAST["steps"]
    assert result.schedule.reached <= 0.7


# ------------------------------------------------------------------------------------- lora


def test_adapters_train_and_the_base_stays(
    case: Case, program: Program, states: TeacherStates
) -> None:
    blocks = {spec.name: program.module.get_submodule(spec.name) for spec in program.blocks}
    base = {n: (p, p.detach().clone()) for n, p in program.module.named_parameters()}
    layers = {f"{name}.weight" for name in adapted_layers(program)}
    result = calibrated(
        program, states, train="lora", lora_rank=2, steps=60, lr_weights=5e-3, batch=8
    )
    for name, (parameter, before) in base.items():
        if "router" not in name:
            assert torch.equal(parameter, before)  # the user's own are never written to
    assert all(program.module.get_submodule(n) is not block for n, block in blocks.items())
    found = dict(program.module.named_parameters())
    assert found.keys() == base.keys()  # a plain model again
    for name, parameter in found.items():
        if name in layers:
            change = parameter.detach() - base[name][1]
            assert 1 <= int(torch.linalg.matrix_rank(change, atol=1e-6)) <= 2
        elif "router" not in name:
            assert parameter is base[name][0]
    losses = [record["loss"] for record in result.history]
    settled = losses[-24:]  # the same schedule throughout
    assert sum(settled[-8:]) < sum(settled[:8])


def test_merged_adapters_are_the_adapters(program: Program) -> None:
    with torch.no_grad():
        dense = run_flat(program, program.example)[0]
    with low_rank(program, rank=3, seed=0):
        with torch.no_grad():
            untrained = run_flat(program, program.example)[0]
            for name, parameter in program.module.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(0.1 * torch.randn_like(parameter))
            program.module.eval()
            keep(program, 20)
            adapted = run_flat(program, program.example)[0]
        assert torch.equal(untrained, dense)  # B starts at zero
    with torch.no_grad():
        merged = run_flat(program, program.example)[0]
    # one product with the sum against the sum of two: fp32 rounding
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)
    assert (merged - dense).abs().max() > 0.05  # they do something
    assert not any("lora" in name for name, _ in program.module.named_modules())


def test_an_interrupted_run_with_adapters_ends_like_an_uninterrupted_one(
    case: Case, program: Program, states: TeacherStates, tmp_path: Path
) -> None:
    whole = fresh(case)
    expected = calibrated(whole, states, train="lora")

    def stop(record: dict[str, Any], _: int) -> None:
        if record["step"] == 6:
            raise KeyboardInterrupt

    blocks = [program.module.get_submodule(spec.name) for spec in program.blocks]
    with pytest.raises(KeyboardInterrupt):
        calibrated(program, states, tmp_path, train="lora", report=stop)
    assert [program.module.get_submodule(s.name) for s in program.blocks] == blocks
    found = calibrated(program, states, tmp_path, train="lora")
    assert [r["loss"] for r in found.history] == [r["loss"] for r in expected.history]
    pairs = zip(whole.module.parameters(), program.module.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_what_adapters_learned_is_kept_on_disk(
    case: Case, program: Program, states: TeacherStates, tmp_path: Path
) -> None:
    config = make_config({"calibration": {"train": "lora"}})
    calibrated(program, states, train="lora", lr_weights=5e-3)
    save_trained(program, tmp_path / "routed.safetensors", config)
    with safe_open(tmp_path / "routed.safetensors", "pt") as file:
        names = set(file.keys())
    routers = {n for n, _ in program.module.named_parameters() if "_select.router." in n}
    assert names == routers | {f"{n}.weight" for n in adapted_layers(program)}
    again = fresh(case)
    load_trained(again, tmp_path / "routed.safetensors", config)
    pairs = zip(program.module.parameters(), again.module.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_layers_that_others_use_get_no_adapter(program: Program) -> None:
    every = set(adapted_layers(program))
    name = sorted(every)[0]
    program.module.register_module("other", program.module.get_submodule(name))
    assert set(adapted_layers(program)) == every - {name}
    with low_rank(program, 2, 0):
        adapted = {
            n.split(".lora_A")[0]
            for n, _ in program.module.named_parameters()
            if "lora_A" in n
        }
        assert adapted == every - {name}


class ReadsTheWeight(nn.Module):
    """Uses a Linear layer's weight without calling the layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.extra = block, nn.Linear(16, 16)

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        found: Tensor = self.block(x @ self.extra.weight.T, *rest)
        return found


def test_a_block_that_reads_weights_is_refused_and_left_as_it_was(program: Program) -> None:
    name = program.blocks[0].name
    odd = ReadsTheWeight(program.module.get_submodule(name))
    program.module.set_submodule(name, odd)
    with (
        pytest.raises(AccuracyError, match="reads a Linear") as caught,
        low_rank(program, 2, 0),
    ):
        pass
    assert caught.value.code == "DCR-Q011"
    assert program.module.get_submodule(name) is odd


def test_without_peft_lora_says_what_to_install(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with (
        pytest.raises(EnvironmentMissingError, match=r"diffcr-compile\[lora\]") as caught,
        low_rank(program, 2, 0),
    ):
        pass
    assert caught.value.code == "DCR-E011"


def test_merging_twice_changes_nothing(program: Program) -> None:
    before = weights(program)
    merge_adapters(program)
    assert all(torch.equal(before[n], p) for n, p in program.module.named_parameters())


# ----------------------------------------------------------------------------- checkpointing


def gradients(program: Program, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients, and the bytes that autograd keeps for the backward."""
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    program.module.zero_grad()
    program.module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run_flat(program, inputs)[0].square().mean()
    first = kept
    loss.backward()
    found = [p.grad.clone() for p in program.module.parameters() if p.grad is not None]
    return loss.detach(), found, first


def test_checkpointing_gives_the_same_gradients_and_keeps_less(
    program: Program, states: TeacherStates
) -> None:
    keep(program, 20)
    inputs = batch_of(states)
    loss, plain, kept = gradients(program, inputs)
    with recomputed_blocks(program):
        again, recomputed, less = gradients(program, inputs)
    assert torch.equal(loss, again)
    assert len(plain) == len(recomputed) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert less < 0.5 * kept
    blocks = [program.module.get_submodule(spec.name) for spec in program.blocks]
    assert not any("forward" in vars(block) for block in blocks)


def test_a_calibration_with_checkpointing_is_the_same(
    case: Case, program: Program, states: TeacherStates
) -> None:
    other = fresh(case)
    plain = calibrated(program, states)
    recomputed = calibrated(other, states, checkpointing=True)
    assert [r["loss"] for r in plain.history] == [r["loss"] for r in recomputed.history]
    pairs = zip(program.module.parameters(), other.module.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


# ----------------------------------------------------------------------------- block outputs


def slow_distance(case: Case, program: Program, inputs: dict[str, Tensor]) -> Tensor:
    """By hooks on the user's blocks, and by putting kept tokens back one by one."""
    dense: dict[str, Tensor] = {}
    handles = [
        case.model.get_submodule(spec.name).register_forward_hook(
            lambda _, __, output, name=spec.name: dense.update({name: output})
        )
        for spec in program.blocks
    ]
    case.model(**inputs)
    for handle in handles:
        handle.remove()
    streams, chosen, processed = {}, {}, {}
    for spec in program.blocks:

        def on_select(_: Any, args: Any, output: Any, name: str = spec.name) -> None:
            streams[name], chosen[name] = args[0], output.positions

        def on_block(_: Any, __: Any, output: Any, name: str = spec.name) -> None:
            processed[name] = output

        selector = program.module.get_submodule(selector_name(spec.name))
        handles.append(selector.register_forward_hook(on_select))
        block = program.module.get_submodule(spec.name)
        handles.append(block.register_forward_hook(on_block))
    run_flat(program, inputs)
    for handle in handles:
        handle.remove()
    errors = []
    for spec in program.blocks:
        routed = streams[spec.name].clone()
        for sample, positions in enumerate(chosen[spec.name]):
            for row, position in enumerate(positions):
                routed[sample, position] = processed[spec.name][sample, row]
        for sample, wanted in enumerate(dense[spec.name].double()):
            error = (routed[sample].double() - wanted).square().sum()
            errors.append(error / wanted.square().sum())
    return torch.stack(errors).mean()


def test_the_distance_of_block_outputs_is_the_slow_one(
    case: Case, program: Program, states: TeacherStates
) -> None:
    inputs = batch_of(states, 3)
    outputs = BlockOutputs(program, dense_twin(program))
    keep(program, 12)
    program.module.eval()
    with torch.no_grad():
        expected = slow_distance(case, program, inputs)
        run_flat(outputs.student, inputs)
        found = outputs.distance(inputs)
    assert expected > 1e-3
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)  # fp32 sums
    keep(program, 36)
    with torch.no_grad():
        run_flat(outputs.student, inputs)
        assert float(outputs.distance(inputs)) == 0


def test_the_teacher_keeps_all_tokens_and_the_weights_it_was_made_with(
    cases: Callable[..., Case], states: TeacherStates
) -> None:
    """Even with the paper's gate, whose routed model differs from the dense one from the start."""
    case = cases("plain", "paper")
    program = fresh(case)
    inputs = batch_of(states, 3)
    dense = dense_twin(program)
    with torch.no_grad():
        expected = case.model(**inputs)
        keep(program, 12)
        found = run_flat(dense, inputs)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options", [{"train": "all"}, {"train": "router"}, {"estimator": "two_bin"}], ids=str
)
def test_block_outputs_are_learned_too(
    case: Case, program: Program, states: TeacherStates, options: dict[str, Any]
) -> None:
    other = fresh(case)
    plain = calibrated(program, states, **options)
    both = calibrated(other, states, block_outputs=0.1, **options)
    # more than the output's error from the first steps on that keep fewer tokens
    assert all(
        b["loss"] > a["loss"] for a, b in zip(plain.history[:3], both.history[:3], strict=True)
    )
    changed = [
        not torch.equal(one, two)
        for one, two in zip(
            program.module.parameters(), other.module.parameters(), strict=True
        )
    ]
    assert any(changed)
    assert not any("tap" in name for name, _ in other.module.named_modules())


def test_every_way_to_train_meets_the_budget_together(
    program: Program, states: TeacherStates
) -> None:
    result = calibrated(
        program, states, train="lora", checkpointing=True, block_outputs=0.1, precision="bf16"
    )
    assert 0.5 < result.schedule.reached <= 0.7
    assert all(math.isfinite(record["loss"]) for record in result.history)


def test_a_failed_calibration_is_a_documented_error(program: Program) -> None:
    empty = TeacherStates(
        {"x": torch.zeros(0, 2, 6, 6), "t": torch.zeros(0)}, torch.zeros(0), torch.zeros(0)
    )
    with pytest.raises(DiffCRError) as caught:
        calibrated(program, empty)
    assert caught.value.exit_code == 2


# ------------------------------------------------------------------------ what does not end well


def interrupted(record: dict[str, Any], _: int) -> None:
    if record["step"] == 5:
        raise KeyboardInterrupt


@pytest.mark.parametrize("train", ["router", "lora", "all"])
def test_an_interrupted_calibration_leaves_the_program_as_it_was(
    program: Program, states: TeacherStates, train: str
) -> None:
    """Else the next one asks a half-trained, compressed model for the dense model's answers."""
    before, inputs = weights(program), batch_of(states)
    output = run_flat(program, inputs)[0]
    with pytest.raises(KeyboardInterrupt):
        calibrated(program, states, train=train, report=interrupted)
    assert not program.module.training
    assert torch.equal(run_flat(program, inputs)[0], output)
    assert set(weights(program)) == set(before)
    assert all(torch.equal(before[n], p) for n, p in weights(program).items())


def test_after_a_gradient_that_is_not_finite_the_same_program_can_be_calibrated(
    case: Case, program: Program, states: TeacherStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = calibrated(fresh(case), states, train="router").history

    def broken(self: Run, step: int, blends: list[Tensor]) -> None:
        for parameter in self.trained.parameters.values():
            parameter.grad = torch.full_like(parameter, math.nan)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_sum_gradients", broken)
        with pytest.raises(AccuracyError, match="step 1: the gradient"):
            calibrated(program, states, train="router")
    assert all(p.grad is None for p in program.module.parameters())
    found = calibrated(program, states, train="router").history
    assert [r["loss"] for r in found] == [r["loss"] for r in expected]


def with_parts(case: Case, make: Callable[[nn.Module], nn.Module]) -> Program:
    """The program with something more in the feed-forward of every block."""
    program = fresh(case)
    for spec in program.blocks:
        block = program.module.get_submodule(spec.name)
        block.mlp[1] = make(block.mlp[1]).eval()
    return program


@pytest.mark.parametrize("train", ["ratio", "all"])
def test_running_statistics_stay(case: Case, states: TeacherStates, train: str) -> None:
    def with_norm(part: nn.Module) -> nn.Module:
        return nn.Sequential(part, Transposed(nn.BatchNorm1d(32)))

    program = with_parts(case, with_norm).attached()
    before = {n: b.clone() for n, b in program.module.named_buffers() if "running" in n}
    assert before
    calibrated(program, states, train=train)
    after = dict(program.module.named_buffers())
    assert all(torch.equal(after[n], b) for n, b in before.items())


class Transposed(nn.Module):
    """A module of (B, C, N) on (B, N, C)."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("train", ["router", "all"])
def test_checkpointing_and_block_outputs_go_together(
    case: Case, states: TeacherStates, train: str
) -> None:
    losses = [
        [r["loss"] for r in calibrated(fresh(case), states, train=train,
                                       block_outputs=0.5, checkpointing=checkpointing).history]
        for checkpointing in (False, True)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("train", ["router", "all"])
def test_dropout_is_off_as_it_was_when_the_dense_model_answered(
    case: Case, states: TeacherStates, train: str
) -> None:
    parts = (nn.Identity, lambda: nn.Dropout(0.5))
    one, other = (
        [r["loss"] for r in calibrated(with_parts(case, make), states, train=train).history]
        for make in ((lambda part, last=last: nn.Sequential(part, last())) for last in parts)
    )
    assert one == other


def test_labels_are_not_dropped_while_a_calibration_runs() -> None:
    """diffusers' DiT drops a tenth of its class labels in training mode, in every block by itself."""
    model, inputs = models.tiny_dit()
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 0.9
    settings = {"routing": {"buckets": 2}, "rollouts": {"trajectories": 4, "steps": 4, "batch": 4},
                "calibration": {"steps": 4, "batch": 4}}  # fmt: skip
    routed = dcr.route(model, inputs, settings["routing"])
    learned = dcr.calibrate(routed, budget="100%", config=settings)
    # all tokens kept: what is learned from is what the model says already
    assert learned.history[0]["loss"] < 1e-10


# ----------------------------------------------------------------------- settings that meet


def test_a_step_in_which_every_block_is_skipped_changes_nothing(
    program: Program, states: TeacherStates
) -> None:
    """At K = 0 no router has a gradient."""
    costs = measure_costs(program, 4, 0.5, skip_blocks=True)
    config = CalibrationConfig(**{**FAST, "train": "router"})
    smallest = costs.smallest_budget() + 1e-6
    result = run_calibration(program, states, config, costs, BUCKETS, smallest)
    assert {k for kept in result.schedule.kept_tokens.values() for k in kept} == {0}
    assert len(result.history) == config.steps


@pytest.mark.parametrize("estimator", ["boundary", "two_bin"])
def test_parts_of_blocks_are_calibrated_in_bfloat16(estimator: str) -> None:
    """Autocast leaves what a feed-forward returns in another type than the stream it is put back into."""
    model, inputs = models.plain()
    settings = {
        "routing": {
            "timestep_high": 1.0,
            "buckets": 2,
            "multiple_of": 4,
            "granularity": "mlp",
        },
        "rollouts": {"trajectories": 4, "steps": 4, "batch": 4},
        "calibration": {"steps": 6, "batch": 4, "precision": "bf16", "estimator": estimator},
    }
    routed = dcr.route(model, inputs, settings["routing"])
    learned = dcr.calibrate(routed, budget="80%", config=settings)
    assert any(k < 36 for kept in learned.schedule.kept_tokens.values() for k in kept)
    assert all(math.isfinite(record["loss"]) for record in learned.history)


class ImageFirst(nn.Module):
    """A block of two streams that returns the image before the text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both = Block(width)

    def forward(self, image: Tensor, text: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        both = self.both(torch.cat([text, image], 1), condition)
        return both[:, text.shape[1] :], both[:, : text.shape[1]]


class ImageFirstDiT(OwnDiT):
    def __init__(self) -> None:
        super().__init__(block=ImageFirst)
        self.text = nn.Linear(12, self.width)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        words = self.text(text)
        for block in self.blocks:
            tokens, words = block(tokens, words, condition)
        return self.image(tokens)


def test_two_bins_and_block_outputs_go_together_whichever_stream_comes_first() -> None:
    settings = {
        "routing": {"timestep_high": 1.0, "buckets": 2, "multiple_of": 4},
        "rollouts": {"trajectories": 4, "steps": 4, "batch": 4},
        "calibration": {"steps": 4, "batch": 4, "estimator": "two_bin", "block_outputs": 0.1},
    }
    inputs = inputs_for(text=torch.ones(2, 5, 12))
    routed = dcr.route(ImageFirstDiT().eval(), inputs, settings["routing"])
    learned = dcr.calibrate(routed, budget="70%", config=settings)
    assert len(learned.history) == 4


@pytest.mark.parametrize("kind", [torch.int8, torch.bfloat16])
@pytest.mark.parametrize("train", ["all", "lora"])
def test_without_steps_weights_that_cannot_learn_are_no_hindrance(
    kind: torch.dtype, train: str
) -> None:
    """Such as the integers of a quantised layer."""
    model, inputs = models.plain()
    if kind.is_floating_point:
        model, inputs = model.to(kind), {n: t.to(kind) for n, t in inputs.items()}
    else:
        table = torch.zeros(3, dtype=kind)
        model.blocks[0].table = nn.Parameter(table, requires_grad=False)
    settings = {
        "routing": {"timestep_high": 1.0, "buckets": 2, "multiple_of": 4},
        "rollouts": {"trajectories": 4, "steps": 4, "batch": 4},
        "calibration": {"steps": 0, "batch": 4, "train": train},
    }
    routed = dcr.route(model, inputs, settings["routing"])
    assert dcr.calibrate(routed, budget="80%", config=settings).schedule.reached <= 0.8


@pytest.mark.parametrize("train", ["ratio", "router", "lora", "all"])
def test_the_users_own_weights_learn_afterwards_as_before(train: str) -> None:
    model, inputs = models.plain()
    model.blocks[0].mlp[0].bias.requires_grad_(False)
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    settings = {
        "routing": {"timestep_high": 1.0, "buckets": 2, "multiple_of": 4},
        "rollouts": {"trajectories": 4, "steps": 4, "batch": 4},
        "calibration": {"steps": 3, "batch": 4, "train": train, "lora_rank": 2},
    }
    routed = dcr.route(model, inputs, settings["routing"])
    dcr.calibrate(routed, budget="80%", config=settings)
    for name, parameter in model.named_parameters():
        required, value = before[name]
        assert parameter.requires_grad == required
        assert torch.equal(parameter, value)


def test_a_rank_that_is_gone_at_a_step_that_solves_again_leaves_the_schedule_of_before(
    case: Case, states: TeacherStates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step solves again when it is done again, and from the schedule that it had then."""
    options = {"ratios": "errors", "steps": 12}
    (solving, *_) = CalibrationConfig(**{**FAST, **options}).resolve_steps
    expected = calibrated(fresh(case), states, **options)
    solved, done = RatioSearch.solve_by_errors, []

    def solved_in_vain(self: RatioSearch, *given: Any) -> None:
        solved(self, *given)
        assert self.schedule is not None
        whole = dict.fromkeys(self.schedule.kept_tokens, (36, 36))
        if done:  # not before the first step
            self._settle(dataclasses.replace(self.schedule, kept_tokens=whole))

    def gone(self: Run, step: int, blends: list[Tensor]) -> None:
        done.append(step)
        if step == solving:
            raise EnvironmentMissingError("another rank does not answer")

    program = fresh(case)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_sum_gradients", gone)
        patch.setattr(RatioSearch, "solve_by_errors", solved_in_vain)
        with pytest.raises(EnvironmentMissingError, match=f"after step {solving} is in"):
            calibrated(program, states, tmp_path, **options)
    _, facts = load_state(tmp_path, "k") or ({}, {})
    assert [36, 36] not in facts["schedule"]["kept_tokens"].values()
    found = calibrated(program, states, tmp_path, **options)
    assert found.schedule == expected.schedule
    assert [r["loss"] for r in found.history] == [r["loss"] for r in expected.history]


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("train", ["lora", "all"])
def test_weights_in_half_precision_are_not_trained(
    program: Program, train: str, kind: torch.dtype
) -> None:
    for spec in program.blocks:
        program.module.get_submodule(spec.name).to(kind)
    config = CalibrationConfig(train=train)
    if train == "lora":
        _add_adapters(program, 4, 0)
    with pytest.raises(UsageError, match=r"Call \.float\(\)") as caught:
        check_precision(program, config)
    assert caught.value.code == "DCR-U077"
    check_precision(program, CalibrationConfig(train="router"))


def test_a_random_router_is_measured_alike_every_time(
    cases: Callable[..., Case], states: TeacherStates
) -> None:
    schedules = set()
    for _ in range(2):
        program = routed_program(cases("plain").captured, RoutingConfig(router="random"), 0)
        torch.rand(1 + len(schedules))  # the process has drawn other numbers before
        found = calibrated(program, states, train="ratio", ratios="errors", steps=0)
        schedules.add((str(found.schedule.kept_tokens), found.keep_ratios.values.tobytes()))
        torch.manual_seed(7)
    assert len(schedules) == 1


class InPlaceBlock(Block):
    """Overwrites a tensor that its own backward needs."""

    def forward(self, *args: Tensor) -> Tensor:
        y = args[0] + self.attention(self.norm(args[0]))
        y += self.mlp(self.norm(y))
        return y


@pytest.mark.parametrize("train", ["router", "all"])
def test_a_model_without_gradients_says_so_and_is_calibrated_without_steps(
    states: TeacherStates, train: str
) -> None:
    program = dcr.route(OwnDiT(block=InPlaceBlock).eval(), inputs_for()).program
    costs, buckets = measure_costs(program, 4, 0.25), TimestepBuckets.even(2, 0.0, 1.0)
    config = CalibrationConfig(steps=4, batch=4, train=train)
    with pytest.raises(UnsupportedModelError, match="in place") as caught:
        run_calibration(program, states, config, costs, buckets, 0.8)
    assert caught.value.code == "DCR-M005"
    config = CalibrationConfig(steps=0, batch=4, train=train)
    assert (
        run_calibration(program, states, config, costs, buckets, 0.8).schedule.reached <= 0.8
    )
