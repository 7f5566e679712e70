"""Linear shortcuts of bypassed tokens: against the slow loop, against least squares, and through the whole compiler."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcr_compile as dcr
from diffcr_compile.block_graphs import block_groups, structure
from diffcr_compile.calibrate.data import TeacherStates, roll_out
from diffcr_compile.calibrate.fit_shortcuts import RIDGE, ShortcutFit
from diffcr_compile.calibrate.trained import routing_parameters
from diffcr_compile.calibrate.warm_start import warm_start
from diffcr_compile.config import make_config
from diffcr_compile.errors import AccuracyError, UsageError
from diffcr_compile.export.onnx_model import onnx_from_program
from diffcr_compile.export.rtx_build import build_rtx_engine
from diffcr_compile.macs import measure_costs
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.blend_two_bins import BlendTwoBins
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from diffcr_compile.passes.remove_full_blocks import has_routing
from diffcr_compile.program import Program, run_flat
from diffcr_compile.rebuild import rebuild
from diffcr_compile.shortcut import LinearShortcut
from tests import models
from tests.conftest import CLOSE, Case, equal, flat, keeping
from tests.reference import SHAPES, slowly_routed

RANK = 3
OURS = ["plain", "joint", "rotary", "masked", "nested"]


@pytest.fixture(scope="module")
def with_shortcuts(cases: Callable[..., Case]) -> Callable[..., Case]:
    """A case with shortcuts of rank 3 that are not zero."""
    made: dict[tuple[str, str], Case] = {}

    def get(name: str, gate: Any = "straight_through") -> Case:
        if (name, gate) not in made:
            plain = cases(name)
            insert = InsertTokenRouters(gate=gate, shortcut_rank=RANK)
            routed = run_passes(plain.captured, [insert])
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for shortcut in routed.module.shortcuts.values():
                    for parameter in shortcut.parameters():
                        parameter.copy_(
                            0.3 * torch.randn(parameter.shape, generator=generator)
                        )
            made[name, gate] = dataclasses.replace(plain, routed=routed)
        return made[name, gate]

    return get


def matrices(program: Program) -> dict[str, tuple[Tensor, Tensor]]:
    """Block -> its shortcut as one matrix (C, C) and an offset (C,)."""
    return {
        name: ((s.up.weight @ s.down.weight).detach(), s.up.bias.detach())
        for name, s in program.module.shortcuts.items()
    }


def mixed(case: Case) -> dict[str, int]:
    """K in {5, N // 2, N}, another one for each block."""
    return {
        spec.name: (5, spec.num_tokens // 2, spec.num_tokens)[number % 3]
        for number, spec in enumerate(case.routed.blocks)
    }


# ---------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize("name", [*models.DIFFUSERS, *OURS])
@pytest.mark.parametrize("training", [False, True])
def test_with_all_tokens_it_is_the_dense_model(
    name: str, training: bool, with_shortcuts: Callable[..., Case]
) -> None:
    """Bit for bit, whatever the shortcuts are: nobody takes them."""
    case = with_shortcuts(name)
    with torch.no_grad(), keeping(case, {}, training=training):
        assert equal(case.routed.module(**case.inputs), case.model(**case.inputs))
    full = case.frozen({s.name: s.num_tokens for s in case.routed.blocks})
    assert not has_routing(full)
    assert full.module.shortcuts == {}
    with torch.no_grad():
        assert equal(full.module(**case.inputs), case.model(**case.inputs))


@pytest.mark.parametrize("gate", ["straight_through", "paper"])
@pytest.mark.parametrize("name", list(models.DIFFUSERS))
def test_frozen_equals_the_slow_loop(
    name: str, gate: str, with_shortcuts: Callable[..., Case]
) -> None:
    case = with_shortcuts(name, gate)
    column, shortcuts = mixed(case), matrices(case.routed)
    frozen = case.frozen(column)
    weights = case.router_weights()
    with torch.no_grad():
        with slowly_routed(
            case.model, weights, column, SHAPES[name], gate, shortcuts=shortcuts
        ):
            expected = flat(case.model(**case.inputs))
        with slowly_routed(case.model, weights, column, SHAPES[name], gate):
            without = flat(case.model(**case.inputs))
        found = flat(frozen.module(**case.inputs))
        with keeping(case, column):
            assert equal(case.routed.module(**case.inputs), frozen.module(**case.inputs))
    for a, b, other in zip(found, expected, without, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
        # the comparison has teeth: without shortcuts the output is another one
        assert (b - other).abs().max() > 100 * (a - b).abs().max()


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_a_skipped_block_leaves_its_shortcut(
    name: str, with_shortcuts: Callable[..., Case]
) -> None:
    case = with_shortcuts(name)
    column = dict.fromkeys(case.names, 0)
    frozen = case.frozen(column)
    assert not any(n.target in case.names for n in frozen.graph.nodes)
    assert list(frozen.module.shortcuts) == case.names
    shortcuts = matrices(case.routed)
    with torch.no_grad():
        with slowly_routed(
            case.model, case.router_weights(), column, SHAPES[name], shortcuts=shortcuts
        ):
            expected = flat(case.model(**case.inputs))
        for a, b in zip(flat(frozen.module(**case.inputs)), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_a_part_gets_what_it_would_have_added() -> None:
    """Granularity mlp: the model adds the part's output to the stream, so a bypassed token gets the map alone."""
    model, inputs = models.tiny_dit()
    plain, routed = (
        dcr.route(model, inputs, config={"granularity": "mlp", "shortcut_rank": rank})
        for rank in (0, RANK)
    )
    program = routed.program
    assert {spec.bypass for spec in program.blocks} == {"zeros"}
    schedule = dict.fromkeys(program.module.selectors, 7)
    with torch.no_grad():
        for shortcut in program.module.shortcuts.values():
            shortcut.up.bias.normal_(generator=torch.Generator().manual_seed(0))
            for name, kept in schedule.items():
                program.module.selectors[name].keep(kept)
                plain.selectors[name].keep(kept)
        for name, router in routed.routers.items():
            plain.routers[name].score.weight.copy_(router.score.weight)
        seen: dict[str, list[Tensor]] = {}
        for graph, key in ((plain, "plain"), (routed, "routed")):
            scatter = next(n for n in graph.graph.nodes if n.name.endswith("_scatter"))
            recorder = _Recorder(graph, scatter)
            recorder.run(*inputs.values())
            seen[key] = recorder.seen
    first = next(iter(program.module.shortcuts.values()))
    without, found = seen["plain"][0], seen["routed"][0]
    bypassed = without.abs().sum(2) == 0
    assert int(bypassed[0].sum()) == program.blocks[0].num_tokens - 7
    assert torch.equal(found[~bypassed], without[~bypassed])
    expected = first.up.bias.expand_as(found)
    torch.testing.assert_close(found[bypassed], expected[bypassed])


class _Recorder(torch.fx.Interpreter):
    def __init__(self, module: torch.fx.GraphModule, wanted: torch.fx.Node) -> None:
        super().__init__(module)
        self.wanted, self.seen = wanted, list[Tensor]()

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n is self.wanted:
            self.seen.append(value)
        return value


def test_two_bins_are_weighed_against_the_shortcut(
    with_shortcuts: Callable[..., Case],
) -> None:
    """At equal bins the blend is one forward at that K; between bins it lies between the two."""
    case = with_shortcuts("dit")
    blended = run_passes(case.routed, [BlendTwoBins()])
    names = case.names
    with torch.no_grad(), keeping(case, dict.fromkeys(names, 20)):
        fixed = run_flat(case.routed, case.routed.example)[0]
        torch.testing.assert_close(run_flat(blended, blended.example)[0], fixed, **CLOSE)
        outputs = {}
        for weight in (0.0, 1.0):
            for name in names[:1]:
                case.selector(name).keep_between(10, 20, torch.tensor(weight), two_bin=True)
            outputs[weight] = run_flat(blended, blended.example)[0]
        case.selector(names[0]).keep(10)
        low = run_flat(case.routed, case.routed.example)[0]
    torch.testing.assert_close(outputs[1.0], fixed, **CLOSE)
    torch.testing.assert_close(outputs[0.0], low, **CLOSE)
    assert (low - fixed).abs().max() > 1e-3


def test_the_boundary_estimator_goes_from_shortcut_to_block(
    with_shortcuts: Callable[..., Case],
) -> None:
    """The tokens between the bins: at weight 0 they bypass the block, at 1 they are kept."""
    case = with_shortcuts("dit")
    name = case.names[0]
    others = dict.fromkeys(case.names[1:], 64)
    with torch.no_grad(), keeping(case, others):
        for weight, alike in ((0.0, 10), (1.0, 20)):
            case.selector(name).keep_between(10, 20, torch.tensor(weight), two_bin=False)
            found = run_flat(case.routed, case.routed.example)[0]
            case.selector(name).keep(alike)
            expected = run_flat(case.routed, case.routed.example)[0]
            # the block sees twenty tokens in either case, so its attention differs at weight 0
            if weight:
                torch.testing.assert_close(found, expected, **CLOSE)
            else:
                case.selector(name).keep(20)
                with_block = run_flat(case.routed, case.routed.example)[0]
                assert (found - expected).norm() < (found - with_block).norm()


# -------------------------------------------------------------------------------- closed form


@pytest.mark.parametrize("rank", [1, 3, 8, 11])
def test_the_fit_is_the_best_map_of_its_rank(rank: int) -> None:
    """Against scipy-free brute force: gradient descent from it finds nothing better; full rank is least squares."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 50, 8, generator=generator, dtype=torch.float64) + 2
    truth = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    y = x @ truth + 0.1 * torch.randn(2, 50, 8, generator=generator, dtype=torch.float64) - 1
    fit = ShortcutFit(8)
    fit.add(x[:1], y[:1])
    fit.add(x[1:], y[1:])
    shortcut = LinearShortcut(8, rank, 0, 50, adds=True).double()
    fit.put_into(shortcut)
    flat_x, flat_y = x.flatten(0, 1), y.flatten(0, 1)
    centred = (flat_x - flat_x.mean(0)).numpy()
    ridge = RIDGE * np.mean(np.diag(centred.T @ centred))

    def loss() -> Tensor:
        matrix = shortcut.up.weight @ shortcut.down.weight
        left = flat_y - shortcut.change(flat_x[None])[0]
        return left.square().sum() + ridge * matrix.square().sum()

    reached = loss()
    reached.backward()  # type: ignore[no-untyped-call]
    scale = float(flat_y.square().sum())
    for name, parameter in shortcut.named_parameters():
        assert parameter.grad is not None
        slope = parameter.grad
        if rank > 8:  # the unused rows stay zero
            slope = slope[:8] if name == "down.weight" else slope
            slope = slope[:, :8] if name == "up.weight" else slope
        assert float(slope.abs().max()) < 1e-8 * scale, name
    if rank >= 8:
        stacked = np.concatenate([centred, math.sqrt(ridge) * np.eye(8)])
        wanted = np.concatenate([(flat_y - flat_y.mean(0)).numpy(), np.zeros((8, 8))])
        expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0]
        matrix = (shortcut.up.weight @ shortcut.down.weight).detach().numpy()
        np.testing.assert_allclose(matrix.T, expected, rtol=1e-9, atol=1e-10)
    else:  # not merely a stationary point: other starts of the same rank end no lower
        for start in range(3):
            other = LinearShortcut(8, rank, 0, 50, adds=True).double()
            torch.manual_seed(start)
            for parameter in other.parameters():
                torch.nn.init.normal_(parameter)
            optimizer = torch.optim.LBFGS(
                other.parameters(), max_iter=500, line_search_fn="strong_wolfe"
            )

            def closure(other: LinearShortcut = other, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                matrix = other.up.weight @ other.down.weight
                left = flat_y - other.change(flat_x[None])[0]
                value = left.square().sum() + ridge * matrix.square().sum()
                value.backward()  # type: ignore[no-untyped-call]
                return value

            optimizer.step(closure)
            assert closure().item() > reached.item() * (1 - 1e-6)


@pytest.fixture(scope="module")
def states() -> TeacherStates:
    model, inputs = models.tiny_dit()
    routed = dcr.route(model, inputs)
    config = make_config({"rollouts": {"trajectories": 8, "batch": 8, "steps": 4}})

    def labels(generator: torch.Generator, count: int) -> dict[str, Tensor]:
        return {"class_labels": torch.randint(0, 10, (count,), generator=generator)}

    return roll_out(routed.program, dcr.FlowEuler(4), config.rollouts, labels, 0)


def routed_dit(rank: int) -> dcr.DiTGraph:
    model, inputs = models.tiny_dit()
    return dcr.route(model, inputs, config={"shortcut_rank": rank})


def test_routers_predict_what_shortcuts_leave(states: TeacherStates) -> None:
    """Against numpy on rows collected by hand."""
    routed = routed_dit(4)
    program = routed.program
    warm_start(program, states, torch.arange(len(states)), batch=4)
    name = program.blocks[1].name
    shortcut = program.module.shortcuts[name]
    rows, sizes, before, after = [], [], 0.0, 0.0

    def collect(_: object, args: tuple[Tensor, ...], kwargs: object, output: Tensor) -> None:
        nonlocal before, after
        x, residual = args[0].double(), output.double() - args[0].double()
        left = residual - shortcut.change(args[0]).double()
        before, after = (
            before + float(residual.square().sum()),
            after + float(left.square().sum()),
        )
        size = left.norm(dim=2).log()
        rows.append((x - x.mean(1, keepdim=True)).flatten(0, 1))
        sizes.append((size - size.mean(1, keepdim=True)).flatten())

    block = program.module.get_submodule(name)
    handle = block.register_forward_hook(collect, with_kwargs=True)
    inputs, _ = states.take(torch.arange(len(states)), frozenset(states.inputs))
    with torch.no_grad():
        run_flat(program, inputs)
    handle.remove()
    assert after < before
    x, z = torch.cat(rows).numpy(), torch.cat(sizes).numpy()
    ridge = RIDGE * np.mean(np.diag(x.T @ x))
    stacked = np.concatenate([x, math.sqrt(ridge) * np.eye(x.shape[1])])
    expected = np.linalg.lstsq(stacked, np.concatenate([z, np.zeros(x.shape[1])]), rcond=None)
    found = routed.routers[name].score.weight[0].detach().numpy()
    np.testing.assert_allclose(found, expected[0], rtol=1e-4, atol=1e-5)  # stored in fp32


def test_values_that_are_not_finite_are_refused_by_name(states: TeacherStates) -> None:
    routed = routed_dit(2)
    name = routed.program.blocks[1].name
    block = routed.get_submodule(name)
    handle = block.register_forward_hook(lambda _, __, output: output.clone().fill_(math.inf))
    with pytest.raises(AccuracyError, match=f"{name}: .* no shortcut can be fitted"):
        warm_start(routed.program, states, torch.arange(4), batch=4)
    handle.remove()


# -------------------------------------------------------------------------------- calibration


def calibrated(
    rank: int, states: TeacherStates, **settings: Any
) -> tuple[dcr.DiTGraph, dcr.CalibrationResult]:
    routed = routed_dit(rank)
    config = {
        "routing": {"shortcut_rank": rank},
        "calibration": {"batch": 4, "lr_weights": 1e-3, **settings},
    }
    return routed, dcr.calibrate(routed, states, budget=0.6, config=config)


@pytest.mark.parametrize("train", ["ratio", "router", "lora", "all"])
def test_what_is_trained(train: str, states: TeacherStates) -> None:
    """Shortcuts belong to the routing: fitted always, trained with the routers."""
    if train == "lora":
        pytest.importorskip("peft")
    routed, _ = calibrated(2, states, steps=3, train=train)
    fitted, _ = calibrated(2, states, steps=0)
    changed = [
        not torch.allclose(p, q, rtol=1e-6, atol=1e-8)  # two fits differ in the order of sums
        for p, q in zip(
            routing_parameters(routed.program).values(),
            routing_parameters(fitted.program).values(),
            strict=True,
        )
    ]
    assert len(changed) == len(routed.program.blocks) * 4
    assert not any(changed) if train == "ratio" else all(changed)
    assert all(s.up.bias.abs().max() > 0 for s in routed.shortcuts.values())


def test_a_calibration_goes_on_from_its_state(tmp_path: Path, states: TeacherStates) -> None:
    """Killed after some steps: the rest ends at the same weights, to the bit."""
    settings = {"routing": {"shortcut_rank": 2},
                "calibration": {"batch": 4, "steps": 6, "save_every": 2}}  # fmt: skip
    whole = routed_dit(2)
    dcr.calibrate(whole, states, budget=0.6, config=settings)
    killed = routed_dit(2)

    def stop(stage: str, done: int, count: int, facts: Mapping[str, Any]) -> None:
        if stage == "calibrate" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dcr.calibrate(
            killed, states, budget=0.6, config=settings, folder=tmp_path, progress=stop
        )
    again = routed_dit(2)
    dcr.calibrate(again, states, budget=0.6, config=settings, folder=tmp_path)
    for name, parameter in routing_parameters(whole.program).items():
        assert torch.equal(parameter, routing_parameters(again.program)[name]), name


# -------------------------------------------------------------------------------------- costs


def test_macs_are_those_of_the_frozen_graph(with_shortcuts: Callable[..., Case]) -> None:
    """Against torch's own counter on the graph that is exported."""
    from torch.utils.flop_counter import FlopCounterMode

    case = with_shortcuts("dit")
    costs = measure_costs(case.routed, 8, 0.1, skip_blocks=True)
    batch = case.routed.batch
    for kept in (0, 8, 32, 64):
        frozen = case.frozen(dict.fromkeys(case.names, kept))
        counter = FlopCounterMode(display=False)
        with (
            torch.no_grad(),
            counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            frozen.module(**case.inputs)
        found = counter.get_total_flops() / 2 / batch
        said = costs.outer + sum(
            costs.per_level[name][costs.levels[name].index(kept)] for name in case.names
        )
        assert said == pytest.approx(found, rel=1e-6), kept
    planned = measure_costs(case.captured, 8, 0.1, skip_blocks=True, shortcut_rank=RANK)
    assert planned == costs
    spec = case.routed.blocks[0]
    plain = measure_costs(case.captured, 8, 0.1, skip_blocks=True)
    more = np.subtract(costs.moved_bytes[spec.name], plain.moved_bytes[spec.name])
    stream = 4 * spec.width * spec.num_tokens
    assert more.tolist() == [2 * stream] * (len(more) - 1) + [0]
    row = costs.routing[spec.name]
    shortcut = 2 * RANK * spec.width * spec.num_tokens
    assert (row[0], row[-1]) == (shortcut, 0)
    assert row[1] == shortcut + spec.num_tokens * spec.width


# ------------------------------------------------------------------------- the whole compiler


def test_compiled_exported_and_made_again(tmp_path: Path) -> None:
    """ONNX equals torch, the learned file brings the shortcuts back, and the settings say so."""
    model, inputs = models.tiny_dit()
    config = {
        "routing": {"shortcut_rank": 2, "buckets": 2},
        "rollouts": {"trajectories": 4, "steps": 4, "batch": 4},
        "calibration": {"steps": 2, "batch": 2, "train": "router"},
    }
    out = tmp_path / "out"
    dcr.compile(model, out, example_inputs=inputs, budget="60%", config=config)
    rebuilt = rebuild(
        out, models.tiny_dit()[0]
    )  # refuses what differs from the golden outputs
    runner = dcr.load(out)
    for graph in rebuilt.frozen:
        assert graph.shortcuts
        assert all(s.up.bias.abs().max() > 0 for s in graph.shortcuts.values())
        program = graph.program
        assert program.schedule is not None
        low, high = program.schedule.buckets.ranges()[program.bucket or 0]
        example = {
            **program.example,
            "timestep": torch.full_like(program.example["timestep"], (low + high) / 2),
        }
        found = runner(**{name: tensor.numpy() for name, tensor in example.items()})
        with torch.no_grad():
            expected = run_flat(program, example)[0]
        # fp32 in another order of sums, through a few blocks
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_an_engine_builds_with_shortcuts_and_a_skipped_block(
    with_shortcuts: Callable[..., Case],
) -> None:
    """The ONNX graph in ONNX Runtime equals torch; TensorRT-RTX builds it for SM86."""
    pytest.importorskip("tensorrt_rtx")
    import onnxruntime

    case = with_shortcuts("dit")
    column = dict(zip(case.names, (0, 7, 64), strict=True))
    frozen = case.frozen(column)
    model = onnx_from_program(frozen).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    given = {name: tensor.numpy() for name, tensor in frozen.example.items()}
    (found,) = session.run(None, {i.name: given[i.name] for i in session.get_inputs()})
    with torch.no_grad():
        expected = run_flat(frozen, frozen.example)[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, **CLOSE)
    assert len(build_rtx_engine(model, "SM86")) > 0


def test_blocks_that_share_an_index_share_a_shortcut() -> None:
    """One map for a span, and it says what the span's blocks add together."""
    model, inputs = models.tiny_dit()
    routed = dcr.route(model, inputs, config={"share_index": 3, "shortcut_rank": 64})
    (name,) = routed.shortcuts
    assert len(routed.program.blocks[0].members) == 3
    costs = measure_costs(routed.program, 8, 0.25)
    width, tokens = routed.program.blocks[0].width, routed.program.blocks[0].num_tokens
    assert costs.routing[name][0] == tokens * (2 * 64 * width + width)


def test_a_block_is_measured_with_its_shortcut(with_shortcuts: Callable[..., Case]) -> None:
    """What latency tables time: the block alone, equal to what it does in the model."""
    case = with_shortcuts("dit")
    costs = measure_costs(case.routed, 16, 0.25)
    (group,) = block_groups(case.routed, costs.levels)
    assert list(group.program.module.shortcuts) == list(group.blocks[:1])
    plain = run_passes(case.captured, [InsertTokenRouters()])
    (without,) = block_groups(plain, costs.levels)
    # a table of the one must not be taken for one of the other
    assert structure(group.program) != structure(without.program)


def test_a_rank_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match=r"routing\.shortcut_rank"):
        make_config({"routing": {"shortcut_rank": -1}})
