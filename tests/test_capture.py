"""nn.Module -> CAPTURED: same call, same output bit for bit, the user's own parameters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import diffcr_compile as dcr
from diffcr_compile.aliases import is_write
from diffcr_compile.capture import capture
from diffcr_compile.errors import CaptureError, UnsupportedModelError, UsageError
from diffcr_compile.input_names import input_names
from diffcr_compile.legality import find_blocks
from diffcr_compile.program import Program, Stage, rebuild_call, run_flat, tensor_args
from diffcr_compile.randomness import differs_from_itself, draws
from tests import models
from tests.conftest import Case

ALL = [*models.DIFFUSERS, "joint", "rotary", "masked", "nested", "keyword"]


def _captured(example: models.Example) -> Program:
    model, inputs = example
    findings = find_blocks(model, (), inputs)
    return capture(model, (), inputs, findings.blocks, findings.refused, findings.sample)


def _same(found: Any, expected: Any) -> bool:
    """Equal type, structure and bits."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if hasattr(expected, "to_tuple"):
        return _same(found.to_tuple(), expected.to_tuple())
    return all(_same(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_the_graph_returns_what_the_model_returns(
    name: str, cases: Callable[..., Case]
) -> None:
    case = cases(name)
    with torch.no_grad():
        expected = case.model(**case.inputs)
        assert _same(case.captured.module(**case.inputs), expected)
    assert case.captured.stage == Stage.CAPTURED
    assert case.captured.batch == 2


@pytest.mark.parametrize("name", [*models.DIFFUSERS, "joint", "masked", "nested"])
def test_other_batch_sizes_are_exact_too(name: str, cases: Callable[..., Case]) -> None:
    case = cases(name)
    assert case.captured.dynamic_batch
    for inputs in (_samples(case.inputs, [1]), _samples(case.inputs, [1, 0, 1, 1])):
        with torch.no_grad():
            assert _same(case.captured.module(**inputs), case.model(**inputs))


def _samples(tree: Any, chosen: list[int]) -> Any:
    if isinstance(tree, dict):
        return {key: _samples(value, chosen) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_samples(value, chosen) for value in tree]
    return tree[chosen] if models.is_batched(tree) else tree


def test_a_capture_of_one_sample_runs_on_more(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    one = models.one_sample(case.inputs)
    program = capture(case.model, (), one, case.findings.blocks)
    assert program.batch == 1
    with torch.no_grad():
        assert _same(program.module(**one), case.model(**one))
        assert _same(program.module(**case.inputs), case.model(**case.inputs))


@pytest.mark.parametrize("name", ["dit", "flux", "rotary"])
def test_every_parameter_is_the_users_own(name: str, cases: Callable[..., Case]) -> None:
    case = cases(name)
    own = dict(case.model.named_parameters())
    for key, parameter in case.captured.module.named_parameters():
        assert parameter is own[key]
    used = {key for key, _ in case.captured.module.named_parameters()}
    unused = own.keys() - used
    assert not unused, unused
    for spec in case.captured.blocks:
        block = case.captured.module.get_submodule(spec.name)
        assert block is case.model.get_submodule(spec.name)


def test_training_the_graph_trains_the_model() -> None:
    model, inputs = models.plain()
    program = _captured((model, inputs))
    program.module(**inputs).square().sum().backward()
    assert model.embed.patch.weight.grad is not None
    assert model.blocks[0].attention.qkv.weight.grad is not None


@pytest.mark.parametrize("name", ["dit", "nested"])
def test_each_block_is_one_node_and_the_rest_is_aten(
    name: str, cases: Callable[..., Case]
) -> None:
    case = cases(name)
    called = [n.target for n in case.captured.graph.nodes if n.op == "call_module"]
    assert called == [spec.name for spec in case.captured.blocks]
    kinds = {type(n.target) for n in case.captured.graph.nodes if n.op == "call_function"}
    assert kinds <= {torch._ops.OpOverload, type(_same), type(len)}  # ATen, and getitem


def test_positional_and_keyword_calls_are_the_same(cases: Callable[..., Case]) -> None:
    case = cases("dit")
    given = case.inputs
    with torch.no_grad():
        expected = case.model(**given)
        found = case.captured.module(
            given["hidden_states"], given["timestep"], class_labels=given["class_labels"]
        )
    assert _same(found, expected)


def test_positional_examples_make_the_same_graph() -> None:
    model, inputs = models.joint()
    values = (inputs["x"], inputs["t"])
    findings = find_blocks(model, values, {"text": inputs["text"]})
    program = capture(
        model, values, {"text": inputs["text"]}, findings.blocks, sample=findings.sample
    )
    assert program.sample_input == "x"
    assert program.timestep_input == "t"
    with torch.no_grad():
        assert _same(program.module(**inputs), model(**inputs))


def test_run_flat_and_rebuild_call_take_placeholder_names(cases: Callable[..., Case]) -> None:
    case = cases("nested")
    signature = case.captured.signature
    assert list(signature.inputs) == ["inputs_x", "inputs_t", "inputs_conditions_0"]
    assert case.captured.sample_input == "inputs_x"
    call = rebuild_call(signature, case.captured.example)
    assert call["inputs"]["conditions"][0] is case.captured.example["inputs_conditions_0"]
    with torch.no_grad():
        flat = run_flat(case.captured, case.captured.example)
        expected = case.model(**case.inputs)
    assert len(flat) == 2
    assert _same(tuple(flat), tuple(expected))


def test_keyword_inputs_of_a_variadic_model_are_inputs(cases: Callable[..., Case]) -> None:
    case = cases("keyword")
    other = {**case.inputs, "t": case.inputs["t"] + 0.3}
    with torch.no_grad():
        expected = case.model(**other)
        assert _same(case.captured.module(**other), expected)
        assert not torch.equal(expected, case.model(**case.inputs))
        flat = run_flat(case.captured, case.captured.signature.tensors((), other))
    assert torch.equal(flat[0], expected)


def test_variadic_positional_inputs_are_refused_in_words() -> None:
    model, inputs = models.StarDiT().eval(), models.inputs_for()
    with pytest.raises(CaptureError, match=r"takes \*more; pass its inputs by keyword"):
        capture(model, (inputs["x"], inputs["t"]), {}, ())


def test_a_branch_on_data_is_a_capture_error() -> None:
    with pytest.raises(CaptureError) as caught:
        _captured(models.branch())
    assert "BranchDiT cannot be captured" in str(caught.value)
    assert "reads a number from its inputs" in str(caught.value)
    assert "branches on tensor values" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("wrong", [{"x": None}, {"y": torch.zeros(2)}, {}])
def test_inputs_that_do_not_fit_are_a_usage_error(wrong: dict[str, Any]) -> None:
    model, inputs = models.plain()
    with pytest.raises(UsageError, match=r"do not fit OwnDiT\.forward"):
        capture(model, (inputs["x"], inputs["x"], inputs["x"]), wrong, ())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"return_dict": False}, "return_dict is False, but the model was captured with True"),
        (
            {"cross_attention_kwargs": {"scale": 0.5}},
            r"cross_attention_kwargs is \{'scale': 0.5\}",
        ),
    ],
)
def test_a_constant_that_changes_is_refused(
    change: dict[str, Any], named: str, cases: Callable[..., Case]
) -> None:
    case = cases("dit")
    with pytest.raises(UsageError, match=named):
        case.captured.module(**case.inputs, **change)


def test_a_nested_constant_that_changes_is_refused(cases: Callable[..., Case]) -> None:
    case = cases("nested")
    with pytest.raises(
        UsageError, match=r"scale is 2\.0, but the model was captured with 1\.0"
    ):
        case.captured.module(**case.inputs, scale=2.0)
    pixart = cases("pixart")
    other = {**pixart.inputs, "added_cond_kwargs": {"resolution": 1, "aspect_ratio": None}}
    with pytest.raises(UsageError, match=r"added_cond_kwargs\['resolution'\] is 1, but"):
        pixart.captured.module(**other)


def test_a_constant_of_the_example_is_checked_not_its_default(
    cases: Callable[..., Case],
) -> None:
    case = cases("nested")
    given = {**case.inputs, "scale": 2.0}
    program = capture(case.model, (), given, case.findings.blocks)
    with torch.no_grad():
        assert _same(program.module(**given), case.model(**given))
        with pytest.raises(UsageError, match=r"scale is 1\.0, but"):
            program.module(**case.inputs)


def test_run_flat_refuses_missing_and_unknown_inputs(cases: Callable[..., Case]) -> None:
    case = cases("dit")
    tensors = dict(case.captured.example)
    label = tensors.pop("class_labels")
    for wrong in (tensors, {**tensors, "labels": label}):
        with pytest.raises(UsageError, match="the graph takes the inputs"):
            tensor_args(case.captured, wrong)


def test_refused_blocks_are_inlined_and_reported() -> None:
    program = _captured(models.twice())
    assert [refusal.block for refusal in program.refused] == ["blocks.0"]
    assert [n.target for n in program.graph.nodes if n.op == "call_module"] == ["blocks.1"]


def test_a_model_without_routable_blocks_still_captures_exactly() -> None:
    for example in (models.no_container(), models.convolution_throughout()):
        model, inputs = example
        program = _captured(example)
        with torch.no_grad():
            assert _same(program.module(**inputs), model(**inputs))
        assert not [n for n in program.graph.nodes if n.op == "call_module"]


@dataclasses.dataclass
class Packed:
    x: torch.Tensor


def test_an_input_that_is_no_plain_structure_is_refused() -> None:
    class PackedDiT(models.OwnDiT):
        def forward(self, packed: Packed, t: torch.Tensor) -> torch.Tensor:
            return super().forward(packed.x, t)

    inputs = models.inputs_for()
    model: nn.Module = PackedDiT().eval()
    words = r"given packed, which is a Packed; .* Wrap the model in a module"
    with pytest.raises(CaptureError, match=words):
        capture(model, (Packed(inputs["x"]), inputs["t"]), {}, ())


@dataclasses.dataclass(frozen=True)
class Pair:
    """A dataclass whose fields are not those that it was made with."""

    sample: torch.Tensor
    others: dict[str, Any]
    name: str = "pair"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample", self.sample * 2)


class PairDiT(models.OwnDiT):
    """Returns dataclasses in a tuple; one holds another."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        out = super().forward(x, t)
        return t * 2, Pair(out, {"packed": Packed(out + 1), "none": None})


class DataNumpyDiT(PairDiT):
    """The same where only recording helps."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        two = float(torch.tensor([x.shape[1]]).numpy()[0])
        return super().forward(x * two, t)


@pytest.mark.parametrize("kind", [PairDiT, DataNumpyDiT])
def test_plain_dataclasses_are_returned_as_they_are(kind: type[models.OwnDiT]) -> None:
    model, inputs = kind().eval(), models.inputs_for()
    program = _captured((model, inputs))
    with torch.no_grad():
        (doubled, found), (_, expected) = program.module(**inputs), model(**inputs)
        flat = run_flat(program, program.example)
    assert torch.equal(doubled, inputs["t"] * 2)
    assert type(found) is Pair
    assert type(found.others["packed"]) is Packed
    assert found.others["none"] is None
    assert found.name == "pair"
    assert torch.equal(found.sample, expected.sample)
    assert torch.equal(found.others["packed"].x, expected.others["packed"].x)
    assert [tuple(t.shape) for t in flat] == [(2,), (2, 2, 6, 6), (2, 2, 6, 6)]
    assert not model._forward_hooks


class FixedBatchDiT(models.OwnDiT):
    """Builds a Python list of the batch's length, which fixes the batch without a word."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        shift = torch.tensor([0.5] * x.shape[0], dtype=x.dtype)
        return super().forward(x + shift[:, None, None, None], t)


def test_a_batch_that_the_model_fixes_is_said_to_be_fixed() -> None:
    model, inputs = FixedBatchDiT().eval(), models.inputs_for()
    program = _captured((model, inputs))
    assert not program.dynamic_batch
    one = {name: tensor[:1] for name, tensor in inputs.items()}
    program = capture(model, (), one, program.blocks)
    assert not program.dynamic_batch
    with torch.no_grad():
        assert torch.equal(program.module(**one), model(**one))


class InPlaceDiT(models.OwnDiT):
    """Fills a mask in place: a write whose result nobody reads is not dead code."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(1, 2, 6, 6)
        mask[:, :, 2:] = 1
        return super().forward(x * mask, t)


class ReadBetweenDiT(models.OwnDiT):
    """Reads a table before and after it is filled, and another into which an input is written."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        table, rows = torch.zeros(1, 2, 6, 6), torch.zeros(2, 2)
        before = x + table
        table[:, :, 2:] = 1
        rows[:, 0] = t
        return super().forward(before * table + rows[:, :, None, None], t)


class AutocastOffDiT(models.OwnDiT):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            angles = (t[:, None] * 3).sin()
        return super().forward(x + angles[:, :, None, None], t)


class AutocastOnDiT(models.OwnDiT):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            angles = self.embed.time(t[:, None])
        return super().forward(x, t) + angles.float().mean()


class SameNamesDiT(models.OwnDiT):
    """A block keyword has the name of a model input."""

    def __init__(self) -> None:
        class Named(models.Block):
            def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
                return super().forward(x, t)

        super().__init__(block=Named)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        tokens, condition = self.embed(x, t)
        for block in self.blocks:
            tokens = block(x=tokens, t=condition)
        return self.image(tokens) + x.shape[0] * 0.0


@pytest.mark.parametrize("kind", [InPlaceDiT, ReadBetweenDiT, AutocastOffDiT, SameNamesDiT])
def test_awkward_forwards_are_captured_exactly(kind: type[models.OwnDiT]) -> None:
    model, inputs = kind().eval(), models.inputs_for()
    program = _captured((model, inputs))
    assert len([n for n in program.graph.nodes if n.op == "call_module"]) == 2
    other = {"x": torch.randn(2, 2, 6, 6), "t": torch.tensor([0.4, 0.6])}
    with torch.no_grad():
        for call in (inputs, other, inputs):
            assert torch.equal(program.module(**call), model(**call))


def test_a_table_that_is_filled_in_place_is_a_constant() -> None:
    program = _captured((InPlaceDiT().eval(), models.inputs_for()))
    assert not [node for node in program.graph.nodes if is_write(node)]
    program = _captured((ReadBetweenDiT().eval(), models.inputs_for()))
    assert [node for node in program.graph.nodes if is_write(node)]


def test_autocast_inside_the_model_is_refused() -> None:
    with pytest.raises(CaptureError, match="switches autocast on for cpu"):
        _captured((AutocastOnDiT().eval(), models.inputs_for()))


class Flexible(nn.Module):
    """Attention that compiles itself, in two blocks."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            q, k, v = self.qkv(x + t[:, None, None]).chunk(3, dim=-1)
            mixed = flex_attention(q[:, None], k[:, None], v[:, None])[:, 0]
            return x + self.out(mixed)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block() for _ in range(2)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, t)
        return x


@pytest.mark.filterwarnings("ignore")
def test_what_fails_under_our_modes_does_not_fail_ever_after() -> None:
    """Dynamo remembers what it could not trace, for the whole process. And the refusal says what to call instead."""
    model = Flexible().eval()
    inputs = {"x": torch.randn(2, 8, 16), "t": torch.rand(2)}
    with torch.no_grad():
        expected = model(**inputs)
        dcr.inspect(model, inputs)
        with pytest.raises(
            UnsupportedModelError, match=r"calls flex_attention.*scaled_dot_product"
        ):
            dcr.route(model, inputs)
        assert torch.equal(model(**inputs), expected)


class NoisyDiT(models.OwnDiT):
    """Draws in forward."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x), t)


class CountingDiT(models.OwnDiT):
    """Runs its blocks at every other call, as caches over sampling steps do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.moved: Tensor | float = 0.0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        tokens, condition = self.embed(x, t)
        if self.calls % 2 == 0:
            return self.image(tokens + self.moved)
        before = tokens
        for block in self.blocks:
            tokens = block(tokens, condition)
        self.moved = tokens - before
        return self.image(tokens)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (NoisyDiT(), "called twice with the same inputs, gives two outputs"),
        (CountingDiT(), r"runs blocks\.\d at one call and leaves it out at another.*TeaCache"),
    ],
)
def test_a_model_that_is_no_function_of_its_inputs_is_refused(
    model: nn.Module, words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        dcr.route(model.eval(), models.inputs_for())
    assert "baked into" not in str(caught.value)
    plan = dcr.inspect(model, models.inputs_for())
    assert re.search(words, str(plan.error))


def test_attention_and_other_ops_draw_nothing_and_a_draw_need_not_show() -> None:
    class Unused(models.OwnDiT):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            torch.randn_like(x)
            return super().forward(x, t)

    assert draws(["aten.add.Tensor", "aten.randn_like.default"])
    assert draws(["aten.bernoulli.p"])
    assert not draws(["aten.add.Tensor", "flex_attention", "prim.device.default"])
    assert not draws(["aten._scaled_dot_product_flash_attention_for_cpu.default"])
    assert not draws(dcr.inspect(*models.plain()).ops)
    inputs = models.inputs_for()
    for model, differs in ((NoisyDiT(), True), (Unused(), False)):
        assert differs_from_itself(model.eval(), (), inputs) == differs
    assert dcr.inspect(Unused().eval(), inputs).error is None


def test_a_refused_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """PyTorch prints a whole graph before the error of a branch on values."""

    class Guarded(models.OwnDiT):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if torch.isnan(x).any():
                raise ValueError("not a number")
            return super().forward(x, t)

    with pytest.raises(CaptureError, match="a branch or a size, which no graph can follow"):
        dcr.route(Guarded().eval(), models.inputs_for())
    assert capfd.readouterr() == ("", "")


class Adapter(nn.Module):
    """What a user wraps a model in that takes more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.model = models.OwnDiT()

    def forward(self, x: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(x, **inputs)


def test_inputs_may_come_as_other_keywords() -> None:
    inputs = models.inputs_for()
    model = Adapter().eval()
    program = _captured((model, inputs))
    assert list(program.signature.inputs) == list(inputs)  # called what the caller calls them
    assert program.timestep_input == "t"
    with torch.no_grad():
        assert torch.equal(program.module(**inputs), model(**inputs))


class Conditioned(models.OwnDiT):
    """Two inputs that would be called alike, and keys that are no identifiers."""

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Any], cond_text: Tensor) -> Tensor:  # type: ignore[override]
        tokens, condition = self.embed(x, t + cond["time step"])
        condition = condition + cond["text"] + cond["a.b"][0] * cond["lambda"] - 2 * cond_text
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.image(tokens)


def test_inputs_have_distinct_names_whatever_their_keys() -> None:
    def text(seed: int) -> Tensor:
        return models.randn(2, 16, seed=seed)

    inputs = models.inputs_for(4)
    inputs["cond"] = {
        "text": text(1),
        "time step": torch.rand(2),
        "lambda": text(2),
        "a.b": [text(3)],
        "a_b": [text(4)],
    }
    inputs["cond_text"] = text(5)
    model = Conditioned(side=4).eval()
    routed = dcr.route(model, inputs)
    assert dict(routed.program.signature.inputs) == {
        "x": ("x",),
        "t": ("t",),
        "cond_text_2": ("cond", "text"),
        "cond_time_step": ("cond", "time step"),
        "cond_lambda": ("cond", "lambda"),
        "cond_a_b_0": ("cond", "a.b", 0),
        "cond_a_b_0_2": ("cond", "a_b", 0),
        "cond_text": ("cond_text",),
    }
    assert routed.program.sample_input == "x"
    frozen = dcr.freeze(routed, keep_ratio=1.0)[0]
    with torch.no_grad():
        for graph in (routed, frozen):
            assert _same(graph(**inputs), model(**inputs))


def test_keywords_of_python_become_names() -> None:
    assert list(
        input_names([("kwargs", "lambda"), ("kwargs", "9")], ["kwargs"], "kwargs")
    ) == [
        "lambda_",
        "_9",
    ]


@pytest.mark.parametrize("name", ["code", "graph", "meta", "routers", "program", "selectors"])
def test_a_name_that_graphs_have_themselves_is_refused(name: str) -> None:
    model, inputs = models.plain(depth=1)
    setattr(model, name, nn.Parameter(torch.ones(1)) if name == "meta" else nn.Linear(2, 2))
    with pytest.raises(CaptureError, match=f"has attributes called {name}, .*Rename"):
        dcr.route(model, inputs)
    assert f"called {name}," in str(dcr.inspect(model, inputs).error)


class AnyShape(nn.Module):
    """Convolves to tokens of any picture; the graph has the sizes of one in its views."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = models.OwnDiT(side=4)
        self.patch, self.time = nn.Conv2d(2, 16, 1), nn.Linear(1, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        condition = self.time(t[:, None])
        tokens = self.patch(x).flatten(2).transpose(1, 2)  # (B, N, C)
        for block in self.inner.blocks:
            tokens = block(tokens, condition)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


def test_sizes_and_types_that_were_not_captured_are_refused() -> None:
    model, inputs = AnyShape().eval(), models.inputs_for(4)
    inputs["x"] = models.randn(2, 2, 2, 8)
    routed = dcr.route(model, inputs)
    frozen = dcr.freeze(routed, keep_ratio=0.5)[0]
    wrong = [
        {"x": inputs["x"].transpose(2, 3)},
        {"x": inputs["x"].double()},
        {"x": inputs["x"][0]},
        {"t": None},
    ]
    for graph in (routed, frozen):
        for other in wrong:
            with pytest.raises(
                UsageError, match=r"graph was captured with float32 of shape"
            ) as error:
                graph(**{**inputs, **other})
            assert error.value.code == "DCR-U021"
        more = {name: torch.cat([value, value]) for name, value in inputs.items()}
        assert graph(**more).shape == (4, 16, 2, 8)


def test_a_graph_that_checks_its_inputs_can_be_exported_and_compiled() -> None:
    model, inputs = models.plain(depth=1, side=4)[0], models.inputs_for(4)
    frozen = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)[0]
    with torch.no_grad():
        expected = frozen(**inputs)
        exported = torch.export.export(frozen, (), inputs, strict=False).module()
        assert _same(exported(**inputs), expected)
        compiled = torch.compile(frozen, backend="eager", fullgraph=True)
        assert _same(compiled(**inputs), expected)
