"""An export of what does not repeat itself says what an export of the whole program says, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from diffcr_compile.export import onnx_model, regrow
from diffcr_compile.export.copied_nodes import like_nodes
from diffcr_compile.export.onnx_model import (
    export_graph,
    exported_program,
    graph_from_exported,
)
from diffcr_compile.export.repeats import EXPORTED, Run, find_repeats
from diffcr_compile.export.units import cut_into_units
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.open_kept_tokens import OpenKeptTokens
from diffcr_compile.program import Program, evaluating
from tests import models
from tests.conftest import Case, make_case
from tests.model_parts import Block

DEPTH = 6


def deeper(name: str, **layers: int) -> models.Example:
    """One of the small models of diffusers with more blocks."""
    model, inputs = models.DIFFUSERS[name]()
    config = {**model.config, **layers}
    return type(model).from_config(config).eval(), inputs


EXAMPLES: dict[str, Callable[[], models.Example]] = {
    "plain": lambda: models.plain(depth=DEPTH),
    "joint": lambda: (models.JointDiT(depth=DEPTH).eval(), models.joint()[1]),
    "dit": lambda: deeper("dit", num_layers=DEPTH),
    "pixart": lambda: deeper("pixart", num_layers=DEPTH),
    "sd3": lambda: deeper("sd3", num_layers=DEPTH),
    "flux": lambda: deeper("flux", num_layers=4, num_single_layers=DEPTH),
}


@pytest.fixture(scope="module")
def deep() -> Callable[[str], Case]:
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            torch.manual_seed(0)
            made[name] = make_case(name, EXAMPLES[name]())
        return made[name]

    return get


def opened(case: Case, every: int = 1) -> Program:
    """Half of the tokens in every block, of which each `every`-th is open."""
    half = {spec.name: spec.num_tokens // 2 for spec in case.routed.blocks}
    names = case.names[::every]
    return run_passes(
        case.frozen(half), [OpenKeptTokens({name: half[name] for name in names})]
    )


def repeats(program: Program) -> list[Run]:
    with evaluating(program.module):
        return find_repeats(program)


def as_a_whole(program: Program) -> tuple[bytes, dict[str, str]]:
    model, nodes = graph_from_exported(exported_program(program), program)
    return model.SerializeToString(deterministic=True), nodes


def as_written(program: Program) -> tuple[bytes, dict[str, str]]:
    model, nodes = export_graph(program)
    return model.SerializeToString(deterministic=True), nodes


# With K open there is more to get wrong; without, the large ones say little that the small ones do not.
LONG = {("dense", "sd3"), ("dense", "flux")}


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        pytest.param(stage, name, marks=[pytest.mark.soak] if (stage, name) in LONG else [])
        for stage in ("dense", "open")
        for name in EXAMPLES
    ],
)
def test_graph_and_node_map_are_those_of_the_whole_program(
    deep: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch, name: str, stage: str
) -> None:
    case = deep(name)
    program = case.captured if stage == "dense" else opened(case)
    assert max(len(run.units) for run in repeats(program)) >= DEPTH - 2
    expected = as_a_whole(program)
    monkeypatch.delattr(onnx_model, "exported_program")  # it must not fall back
    assert as_written(program) == expected


def test_runs_between_fixed_k_are_told_apart(deep: Callable[[str], Case]) -> None:
    """Every other block has an open K: neighbours are unlike each other, and nothing is left out."""
    program = opened(deep("plain"), every=2)
    assert repeats(program) == []
    assert as_written(program) == as_a_whole(program)


def test_the_exporter_gets_as_many_nodes_for_more_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    translated = onnx_model._translated

    def counted(exported: Any) -> Any:
        found.append(len(exported.graph.nodes))
        return translated(exported)

    monkeypatch.setattr(onnx_model, "_translated", counted)
    for depth in (5, 10):
        export_graph(make_case(f"{depth}", models.plain(depth=depth)).captured)
    few, many = found
    assert few == many


class NumberedBlock(Block):
    """Computes with its number: no two of them do the same."""

    number = 0

    def mix(self, x: Tensor) -> Tensor:
        return x * (1 + self.number / 8)


class BufferBlock(Block):
    """A buffer of other values in every block."""

    def __init__(self, width: int = 16, **options: Any) -> None:
        super().__init__(width, **options)
        self.register_buffer("scale", torch.rand(width))

    def mix(self, x: Tensor) -> Tensor:
        return x * self.scale


class FoldedBlock(Block):
    """A constant that the optimiser works out of a weight: each block has its own."""

    def __init__(self, width: int = 16, **options: Any) -> None:
        super().__init__(width, **options)
        self.offset = nn.Parameter(torch.rand(width))

    def mix(self, x: Tensor) -> Tensor:
        return x + (self.offset * 2)[None, None]


class DecomposedBlock(Block):
    """A constant that is worked out of a weight before the export."""

    def __init__(self, width: int = 16, **options: Any) -> None:
        super().__init__(width, **options)
        self.turn = nn.Parameter(torch.rand(width, width))

    def mix(self, x: Tensor) -> Tensor:
        return x @ torch.linalg.qr(self.turn)[0]


class TakenTwiceDiT(models.OwnDiT):
    """What leaves the third block is read again at the end."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        for number, block in enumerate(self.blocks):
            tokens = block(tokens, condition)
            if number == 2:
                early = tokens
        return self.image(tokens + early)


def numbered() -> nn.Module:
    model = models.OwnDiT(depth=DEPTH, block=NumberedBlock)
    for number, block in enumerate(model.blocks):
        block.number = number
    return model


def tied() -> nn.Module:
    model = models.OwnDiT(depth=DEPTH)
    for block in model.blocks:
        block.mlp = model.blocks[0].mlp
    return model


@pytest.mark.parametrize(
    ("factory", "lengths"),
    [
        (numbered, []),
        (tied, []),
        (lambda: models.OwnDiT(depth=DEPTH, block=BufferBlock), []),
        (lambda: models.OwnDiT(depth=DEPTH, block=FoldedBlock), [DEPTH]),
        (lambda: models.OwnDiT(depth=DEPTH, block=DecomposedBlock), [DEPTH]),
        (lambda: TakenTwiceDiT(depth=DEPTH + 2), [3, DEPTH - 1]),
    ],
    ids=["numbers", "tied", "buffers", "folded", "decomposed", "taken twice"],
)
def test_blocks_that_look_alike_keep_what_is_their_own(
    factory: Callable[[], nn.Module], lengths: list[int]
) -> None:
    torch.manual_seed(0)
    program = make_case("own", (factory().eval(), models.plain()[1])).captured
    assert [len(run.units) for run in repeats(program)] == lengths
    assert as_written(program) == as_a_whole(program)


def test_units_that_became_other_nodes_are_exported_one_by_one(
    deep: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = opened(deep("plain"))
    expected, asked = as_a_whole(program), []
    monkeypatch.setattr(regrow, "like_nodes", lambda *_: asked.append(1))
    assert as_written(program) == expected
    assert asked


def test_units_meet_behind_a_scatter(deep: Callable[[str], Case]) -> None:
    units = cut_into_units(deep("plain").frozen(dict.fromkeys(deep("plain").names, 9)))
    assert len(units) == DEPTH
    ends = {getattr(unit[-1].target, "__name__", "") for unit in units}
    assert ends == {"scatter_tokens"}
    assert {len(unit) for unit in units} == {len(units[0])}


def test_the_second_of_two_exported_units_is_the_one_that_is_copied() -> None:
    """The first reads what is before the run, so its neighbourhood is not that of the others."""
    assert EXPORTED == 2


def chain(*ops: tuple[str, float]) -> tuple[ir.Value, list[ir.Node]]:
    """One node after the other, each with a number as attribute and a constant as second input."""
    value = first = ir.Value(name="x")
    nodes = []
    for name, number in ops:
        attributes = [ir.AttrFloat32("alpha", number)]
        nodes.append(ir.Node("", name, [value], attributes))
        value = nodes[-1].outputs[0]
    return first, nodes


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        ([("Elu", 1.0), ("Selu", 2.0)], True),
        ([("Elu", 1.0), ("Selu", 3.0)], False),
        ([("Elu", 1.0), ("Elu", 2.0)], False),
        ([("Elu", 1.0)], False),
    ],
)
def test_nodes_are_alike_if_ops_attributes_and_order_are(
    other: list[tuple[str, float]], alike: bool
) -> None:
    (x, first), (y, second) = chain(("Elu", 1.0), ("Selu", 2.0)), chain(*other)
    assert like_nodes(first, second, {x: y}) is alike


def test_nodes_that_read_another_value_are_not_alike() -> None:
    (x, first), (_, second) = chain(("Elu", 1.0)), chain(("Elu", 1.0))
    assert not like_nodes(first, second, {})
    assert not like_nodes(first, second, {x: ir.Value(name="z")})


@pytest.mark.parametrize("values", [[1, 2], [1, 3], [1.0, 2.0]])
def test_constants_are_alike_if_type_and_content_are(values: list[float]) -> None:
    one, two = (
        ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(numbers))])
        for numbers in ([1, 2], values)
    )
    assert like_nodes([one], [two], {}) is (values == [1, 2] and isinstance(values[0], int))
