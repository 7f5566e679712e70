"""The hand-written models of the zoo: which may be routed, and what routing them computes.

Each model is either refused for its reason, or routed: bit-equal to the dense model while all tokens are
kept, and at keep ratio 0.5 equal to a reference that shares nothing with the compiler. The reference
runs the user's model with hooks on its blocks; what goes with the tokens of which block is written down
here by hand, as a reader of the model would say it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.config import RoutingConfig
from diffcr_compile.errors import DiffCRError, UnsupportedModelError
from tests.zoo import ZOO, handwritten

# Most of these tests are about whole blocks.
WHOLE = RoutingConfig(granularity="block")
MODELS = {name: model for name, model in ZOO.items() if model.kind == "handwritten"}
assert handwritten.__all__

# The frozen graph hands its tokens to a block best first, the reference in the order of their places:
# sums are taken in another order, fp32 rounding. A wrong token is off by 0.01 and more.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
# The same in bfloat16, which has 8 bits.
CLOSE_BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}


# ------------------------------------------------------------------------ the independent reference


@dataclasses.dataclass(frozen=True)
class Cut:
    """An argument of a block that has something for each image token.

    Attributes:
        at: the way to it from (args, kwargs).
        axes: its axes along tokens.
        first: place of the first image token on them.
        has_batch: its axis 0 is the batch (or 1, for a batch of any size).
    """

    at: tuple[int | str, ...]
    axes: tuple[int, ...] = (1,)
    first: int = 0
    has_batch: bool = True


@dataclasses.dataclass(frozen=True)
class Unit:
    """How a block is called; the default is ``x = block(x, c)`` with all tokens of the image.

    Attributes:
        stream: the way to the stream from (args, kwargs).
        output: the way to it in what the block returns.
        first: place of the first image token in the stream.
        cuts: what else is cut.
        shared: one choice for the whole batch, because a table without batch axis is cut.
        tokens: image tokens at the two sizes.
        sequence_first: the stream is (N, B, C).
        branch: the block has no residual of its own: a token that bypasses it adds nothing.
    """

    stream: tuple[int | str, ...] = (0, 0)
    output: tuple[int | str, ...] = ()
    first: int = 0
    cuts: tuple[Cut, ...] = ()
    shared: bool = False
    tokens: tuple[int, int] = (16, 36)
    sequence_first: bool = False
    branch: bool = False


def at(tree: Any, way: tuple[int | str, ...]) -> Any:
    for key in way:
        tree = tree[key]
    return tree


def swapped(tree: Any, way: tuple[int | str, ...], new: Any) -> Any:
    """A copy of nested tuples, lists and dicts with `new` at `way`."""
    if not way:
        return new
    if isinstance(tree, dict):
        return {**tree, way[0]: swapped(tree[way[0]], way[1:], new)}
    items = [swapped(v, way[1:], new) if i == way[0] else v for i, v in enumerate(tree)]
    return items if isinstance(tree, list) else tuple(items)


def some_rows(tensor: Tensor, axis: int, first: int, count: int, places: list[int]) -> Tensor:
    """Everything but the `count` image rows from `first` on, of which only `places` stay."""
    length = tensor.shape[axis]
    wanted = [*range(first), *(first + p for p in places), *range(first + count, length)]
    return torch.stack([tensor.select(axis, row) for row in wanted], dim=axis)


class Hooks:
    """Cuts what one block is given and puts back what it returns."""

    def __init__(self, unit: Unit, router: nn.Module, size: int, keep_ratio: float) -> None:
        self.unit, self.router = unit, router
        self.count = unit.tokens[size]
        self.kept = round(keep_ratio * self.count)

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        unit, call = self.unit, (args, kwargs)
        self.stream = self.layout(at(call, unit.stream))
        self.places = self.choose(self.stream[:, unit.first : unit.first + self.count])
        call = swapped(call, unit.stream, self.layout(self.cut(self.stream, (1,), unit.first)))
        for c in unit.cuts:
            call = swapped(call, c.at, self.cut(at(call, c.at), c.axes, c.first, c.has_batch))
        return call

    def after(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        unit, last = self.unit, self.unit.first + self.count
        made = self.layout(at(output, unit.output))
        whole = torch.zeros_like(self.stream) if unit.branch else self.stream.clone()
        for b, places in enumerate(self.places):
            whole[b, : unit.first] = made[b, : unit.first]
            whole[b, last:] = made[b, unit.first + self.kept :]
            for row, place in enumerate(places):
                whole[b, unit.first + place] = made[b, unit.first + row]
        return swapped(output, unit.output, self.layout(whole))

    def layout(self, stream: Tensor) -> Tensor:
        return stream.transpose(0, 1) if self.unit.sequence_first else stream

    def choose(self, image: Tensor) -> list[list[int]]:
        scores = self.router(image)
        if self.unit.shared:
            scores = scores.mean(0, keepdim=True).expand(len(image), -1)
        return [sorted(s.argsort(descending=True)[: self.kept].tolist()) for s in scores]

    def cut(
        self, tensor: Tensor, axes: tuple[int, ...], first: int, has_batch: bool = True
    ) -> Tensor:
        if not has_batch:
            assert self.unit.shared
            for axis in axes:
                tensor = some_rows(tensor, axis, first, self.count, self.places[0])
            return tensor
        samples = tensor.expand(len(self.places), *tensor.shape[1:])
        parts = []
        for sample, places in zip(samples, self.places, strict=True):
            for axis in axes:
                sample = some_rows(sample, axis - 1, first, self.count, places)
            parts.append(sample)
        return torch.stack(parts)


@contextlib.contextmanager
def hooked(
    model: nn.Module, units: Mapping[str, Unit], routers: Mapping[str, nn.Module], size: int
) -> Iterator[None]:
    """Half the tokens for each of the blocks in `units` while the context lasts."""
    handles = []
    try:
        for name, unit in units.items():
            hooks, block = Hooks(unit, routers[name], size, 0.5), model.get_submodule(name)
            handles += [
                block.register_forward_pre_hook(hooks.before, with_kwargs=True),
                block.register_forward_hook(hooks.after, with_kwargs=True),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


def flat(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    return [tensor for part in output for tensor in flat(part)]


# --------------------------------------------------------------------------------- what is right


def blocks(unit: Unit, count: int = 2, name: str = "blocks") -> dict[str, Unit]:
    return {f"{name}.{number}": unit for number in range(count)}


PLAIN = Unit()
FRONT = (1, "rope")
PAIR = tuple(Cut((*FRONT, i), (0,), has_batch=False) for i in (0, 1))
PAIR_BATCH = tuple(Cut((*FRONT, i)) for i in (0, 1))
DUAL = Unit(output=(1,))
TABLE = Unit(cuts=(Cut(FRONT, (0,), 5, has_batch=False),), shared=True)
SMALL = Unit(tokens=(4, 9))

# model -> every block that must be routed, and how it is called
ROUTED: dict[str, dict[str, Unit]] = {
    # order of the arguments
    "original_dit": blocks(PLAIN, 3),
    "condition_first": blocks(Unit(stream=(0, 1))),
    "text_first_argument": blocks(Unit(stream=(0, 1))),
    "condition_tokens_first": blocks(Unit(stream=(0, 1), cuts=(Cut((0, 0)),))),
    "embedding_first": blocks(Unit(stream=(0, 1), cuts=(Cut((0, 0)),))),
    "keywords_block": blocks(Unit(cuts=PAIR, shared=True)),
    "all_by_keyword": blocks(Unit(stream=(1, "hidden_states"))),
    # outputs
    "tuple_output": blocks(Unit(output=(0,))),
    "tuple_with_none": blocks(Unit(output=(0,))),
    "tuple_with_unused_weights": blocks(Unit(output=(0,))),
    "dict_in_and_out": blocks(Unit(stream=(0, 0, "streams", "x"), output=("streams", "x"))),
    # modulation of every token
    "per_token_modulation": blocks(Unit(cuts=tuple(Cut((0, i)) for i in (1, 2, 3)))),
    "timestep_per_token": blocks(Unit(cuts=(Cut((0, 1)),))),
    "modulation_stack": blocks(Unit(cuts=(Cut((0, 1), (2,), has_batch=False),), shared=True)),
    # masks
    "mask_of_keys": blocks(Unit(cuts=(Cut((0, 2)),))),
    "mask_of_pairs": blocks(Unit(cuts=(Cut((0, 2), (2, 3)),))),
    "mask_of_pairs_without_batch": blocks(
        Unit(cuts=(Cut((0, 2), (0, 1), has_batch=False),), shared=True)
    ),
    "bias_of_heads": blocks(Unit(cuts=(Cut((0, 2), (2, 3)),))),
    # rotary tables
    "rope_real": blocks(Unit(cuts=PAIR, shared=True)),
    "rope_real_stacked": blocks(Unit(cuts=(Cut(FRONT, (1,), has_batch=False),), shared=True)),
    "rope_real_batch": blocks(Unit(cuts=PAIR_BATCH)),
    "rope_complex": blocks(Unit(cuts=(Cut(FRONT, (0,), has_batch=False),), shared=True)),
    "rope_complex_batch": blocks(Unit(cuts=(Cut(FRONT),))),
    "rope_matrices": blocks(Unit(cuts=(Cut(FRONT, (2,)),))),
    "position_numbers": blocks(Unit(cuts=(Cut(FRONT),))),
    # types of numbers
    "float32_inside": blocks(PLAIN),
    "bfloat16": blocks(PLAIN, 1),
    # more than one stream
    "class_token": blocks(Unit(first=1)),
    "register_tokens": blocks(Unit(first=3)),
    "joint_text_first": blocks(Unit(first=5)),
    "joint_image_first": blocks(PLAIN),
    "joint_with_mask_and_table": blocks(
        Unit(first=5, cuts=(Cut((0, 2), first=5), Cut((0, 3), first=5)))
    ),
    "dual_streams": blocks(DUAL),
    "dual_streams_of_equal_length": blocks(DUAL),
    "dual_then_single": {
        "double_blocks.0": dataclasses.replace(TABLE, output=(1,)),
        **blocks(dataclasses.replace(TABLE, first=5), 2, "single_blocks"),
    },
    # long skips
    "long_skip_as_argument": {
        **blocks(PLAIN, 2, "down"),
        **blocks(Unit(cuts=(Cut((1, "skip")),)), 2, "up"),
    },
    "long_skip_outside": {f"{name}.0": Unit(first=1) for name in ("down", "middle", "up")},
    # stages
    "stages_of_lists": {**blocks(PLAIN, 2, "outer"), **blocks(SMALL, 2, "inner")},
    "stages_of_modules": {
        **blocks(PLAIN, 2, "stages.0.blocks"),
        **blocks(SMALL, 2, "stages.1.blocks"),
    },
    # how blocks are kept
    "shared_ends": {"blocks.1": PLAIN},
    "module_dict": {"blocks.first": PLAIN, "blocks.last": PLAIN},
    "sequential_of_pairs": blocks(Unit(stream=(0, 0, 0), output=(0,)), name="body"),
    "model_is_a_sequential": {"1": PLAIN, "2": PLAIN},
    "nested_lists": dict.fromkeys(("levels.0.0", "levels.0.1", "levels.1.0"), PLAIN),
    "list_by_property": blocks(PLAIN, name="net.backbone.layers"),
    "blocks_as_attributes": {"block_0": PLAIN, "block_1": PLAIN},
    "branches_without_residual": {
        f"layers.{i}.{j}": Unit(branch=True) for i in range(2) for j in range(2)
    },
    # how the model is called
    "dataclass_output": blocks(PLAIN),
    "gradient_checkpointing": blocks(PLAIN),
    "guidance_inside": blocks(PLAIN),
    # how tokens meet
    "linear_attention": blocks(PLAIN),
    "global_mean": blocks(PLAIN),
    "experts_top_one_dense": blocks(PLAIN),
    "experts_top_one_sparse": blocks(PLAIN),
    "experts_choose_tokens": blocks(PLAIN),
    "experts_choose_over_batch": blocks(PLAIN),
    "experts_with_fixed_places": blocks(PLAIN),
    "frames_folded_outside": {
        "blocks.0": PLAIN, "blocks.1": Unit(tokens=(3, 3)), "blocks.2": PLAIN,
    },
    "sequence_first": blocks(Unit(sequence_first=True)),
    "window_attention": {"blocks.0": PLAIN},
    # habits of writing
    "torch_encoder": blocks(PLAIN, name="encoder.layers"),
    "multihead_attention": blocks(PLAIN),
    "magnitude_preserving": blocks(PLAIN),
    "parametrized_weights": blocks(PLAIN),
    "scripted_modulation": blocks(PLAIN),
    "own_tensors_in_place": blocks(PLAIN),
    "mapped_over_the_batch": blocks(PLAIN),
    "own_autograd_function": blocks(PLAIN),
}  # fmt: skip

# Blocks of routed models that must stay dense, with words of the reason.
BESIDE: dict[str, dict[str, str]] = {
    "shared_ends": {"blocks.0": "called 2 times"},
    "window_attention": dict.fromkeys(("blocks.1", "blocks.2"), handwritten.POSITION),
}
# Blocks of the refused models; the words of the reason stand in the zoo.
REFUSED = {name: ("blocks.0", "blocks.1") for name, model in MODELS.items() if model.refused}
REFUSED["one_block_called_often"] = ("blocks.0",)

# Models whose arguments, streams or stages depend on the number of tokens in a way of their own.
BOTH_SIZES = (
    "mask_of_pairs", "joint_with_mask_and_table", "dual_then_single", "experts_choose_tokens",
)  # fmt: skip

# Token-wise parts of the blocks that are refused: routed in their place.
PARTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "tuple_with_read_weights", "frames_folded_inside", "weak_window_attention", "token_shift",
            "pooling", "causal_inside", "rotary_inside", "own_position_bias",
            "pinned_number_of_tokens", "hidden_table", "hidden_and_residual", "stream_in_place",
        ),
        ("blocks.0.mlp", "blocks.1.mlp"),
    ),
    "window_attention": ("blocks.1.mlp", "blocks.2.mlp"),
    # places are given out in the order of the tokens, but each expert works on each token by itself
    "experts_first_come_first_served": tuple(
        f"blocks.{block}.mlp.experts.{expert}" for block in (0, 1) for expert in range(3)
    ),
}  # fmt: skip

# What could be routed as ROUTED says, and is refused today, with words of the reason.
REFUSED_TODAY = {
    "experts_top_one_sparse": "depend on the values of tensors",
}

# What the compiler does today where it is wrong; a test that begins to pass must leave this list.
WRONG_TODAY: dict[str, str] = {}


def cases(names: Any, sizes: Any = lambda name: (0,)) -> list[Any]:
    """(name, size), expected to fail where the compiler is known to be wrong."""
    return [
        pytest.param(
            name,
            size,
            id=f"{name}-{size}",
            marks=[pytest.mark.xfail(strict=True, reason=WRONG_TODAY[name])]
            if name in WRONG_TODAY
            else [],
        )
        for name in names
        for size in sizes(name)
    ]


def test_every_model_is_either_routed_or_refused() -> None:
    assert set(ROUTED) | set(REFUSED) == set(MODELS)
    assert not set(ROUTED) & set(REFUSED)


@pytest.mark.parametrize(
    ("name", "size"),
    cases(
        [name for name in ROUTED if name not in REFUSED_TODAY],
        lambda name: (0, 1) if name in BOTH_SIZES else (0,),
    ),
)
def test_routed(name: str, size: int) -> None:
    units = ROUTED[name]
    model, inputs = MODELS[name].build(size)
    with torch.no_grad():
        output = model(**copy.deepcopy(inputs))
    routed = dcr.route(model, inputs, WHOLE)
    assert set(routed.routers) == set(units)
    refused = {refusal.block: refusal.reason for refusal in routed.program.refused}
    for block, words in BESIDE.get(name, {}).items():
        assert words in refused[block]
    with torch.no_grad():
        all_kept = routed(**inputs)
        assert type(all_kept) is type(output)
        assert all(
            torch.equal(a, b) for a, b in zip(flat(all_kept), flat(output), strict=True)
        )
        (frozen,) = dcr.freeze(routed, keep_ratio=0.5)
        found = flat(frozen(**inputs))
        with hooked(model, units, routed.routers, size):
            expected = flat(model(**inputs))
    close = CLOSE_BFLOAT16 if expected[0].dtype == torch.bfloat16 else CLOSE
    moved = 0.0
    for a, b, dense in zip(found, expected, flat(output), strict=True):
        torch.testing.assert_close(a, b, **close)
        moved = max(moved, float((b - dense).abs().max()))
    # the comparison has teeth: what it must tell apart is far outside of the tolerance
    assert moved > 5 * close["atol"] + 5 * close["rtol"] * float(flat(output)[0].abs().mean())


@pytest.mark.parametrize(("name", "size"), cases(REFUSED, lambda name: (0, 1)))
def test_refused(name: str, size: int) -> None:
    model, inputs = MODELS[name].build(size)
    with torch.no_grad():
        model(**inputs)
    with pytest.raises(UnsupportedModelError) as caught:
        dcr.route(model, inputs, WHOLE)
    lines = str(caught.value).splitlines()
    for block in REFUSED[name]:
        (line,) = [line for line in lines if line.strip().startswith(f"{block}:")]
        assert str(MODELS[name].refused) in line


@contextlib.contextmanager
def nothing_for_half(
    model: nn.Module, parts: tuple[str, ...], routers: Mapping[str, nn.Module]
) -> Iterator[None]:
    """Each part adds nothing to the half of its tokens that its router likes less."""
    handles = []

    def silence(router: nn.Module) -> Any:
        def after(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            result = torch.zeros_like(output)
            for sample, scores in enumerate(router(args[0])):
                best = scores.argsort(descending=True)[: len(scores) // 2]
                for token in best.tolist():
                    result[sample, token] = output[sample, token]
            return result

        return after

    try:
        for name in parts:
            handle = model.get_submodule(name).register_forward_hook(silence(routers[name]))
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_refused_blocks_are_routed(name: str) -> None:
    model, inputs = MODELS[name].build(0)
    routed = dcr.route(model, inputs)
    whole = ROUTED.get(name, {})
    assert set(routed.routers) == {*PARTS[name], *whole}
    specs = {spec.name: spec for spec in routed.program.blocks}
    assert {spec.bypass for n, spec in specs.items() if n in PARTS[name]} == {"zeros"}
    with torch.no_grad():
        dense = flat(model(**inputs))
        assert all(
            torch.equal(a, b) for a, b in zip(flat(routed(**inputs)), dense, strict=True)
        )
        (frozen,) = dcr.freeze(routed, keep_ratio=0.5)
        found = flat(frozen(**inputs))
        with (
            hooked(model, whole, routed.routers, 0),
            nothing_for_half(model, PARTS[name], routed.routers),
        ):
            expected = flat(model(**inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    moved = max(float((a - b).abs().max()) for a, b in zip(expected, dense, strict=True))
    assert moved > 5 * CLOSE["atol"] + 5 * CLOSE["rtol"] * float(dense[0].abs().mean())


def test_a_part_that_keeps_nothing_adds_nothing() -> None:
    model, inputs = MODELS["causal_inside"].build(0)
    routed = dcr.route(model, inputs)
    (frozen,) = dcr.freeze(routed, keep_ratio=0.0)
    assert not frozen.graph.find_nodes(op="call_module", target="blocks.0.mlp")
    with torch.no_grad():
        found = flat(frozen(**inputs))
        for block in ("blocks.0", "blocks.1"):
            model.get_submodule(f"{block}.mlp").register_forward_hook(
                lambda _, __, output: torch.zeros_like(output)
            )
        expected = flat(model(**inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", sorted(set(REFUSED) - set(PARTS)))
def test_what_has_no_part_either_is_refused_with_both_reasons(name: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        dcr.route(*MODELS[name].build(0))
    assert str(MODELS[name].refused) in str(caught.value)


def test_parts_alone_when_asked_for() -> None:
    """``granularity: mlp`` routes the token-wise parts of legal blocks, and not the blocks."""
    model, inputs = MODELS["original_dit"].build(0)
    routed = dcr.route(model, inputs, RoutingConfig(granularity="mlp"))
    assert set(routed.routers) == {f"blocks.{i}.mlp" for i in range(3)}
    with torch.no_grad():
        (frozen,) = dcr.freeze(routed, keep_ratio=0.5)
        found = flat(frozen(**inputs))
        with nothing_for_half(model, tuple(routed.routers), routed.routers):
            expected = flat(model(**inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize(
    "name", ["causal_inside", "one_block_called_often", "stream_is_a_grid"]
)
def test_inspect_says_the_same(name: str) -> None:
    plan = dcr.inspect(*MODELS[name].build(0), WHOLE)
    assert plan.blocks == ()
    assert plan.error is None
    assert set(plan.refused) == set(REFUSED[name])
    for reason in plan.refused.values():
        assert str(MODELS[name].refused) in reason


def test_the_original_dit_is_called_by_position() -> None:
    """``model(x, t, y)``: so are the example and the routed graph."""
    model, inputs = MODELS["original_dit"].build(0)
    call = (inputs["x"], inputs["t"], inputs["y"])
    routed = dcr.route(model, call)
    with torch.no_grad():
        assert torch.equal(routed(*call), model(*call))
        assert torch.equal(routed(*call[:2], y=call[2]), model(*call))


@pytest.mark.parametrize("name", REFUSED_TODAY)
def test_what_could_be_routed_and_is_not_is_refused_in_words(name: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        dcr.route(*MODELS[name].build(0), WHOLE)
    lines = str(caught.value).splitlines()
    for block in ROUTED[name]:
        (line,) = [text for text in lines if text.strip().startswith(f"{block}:")]
        assert REFUSED_TODAY[name] in line


def test_too_few_tokens_for_a_block_is_an_error_of_ours() -> None:
    """Six places per expert: eight tokens are enough, four are not, and the block is named."""
    routed = dcr.route(*MODELS["experts_with_fixed_places"].build(0))
    dcr.freeze(routed, keep_ratio=0.5)
    with pytest.raises(DiffCRError, match=r"blocks.0"):
        dcr.freeze(routed, keep_ratio=0.25)
