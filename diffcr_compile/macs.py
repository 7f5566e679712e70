"""What a schedule costs, counted on the real graph: linear layers, QK and AV products, routers, shortcuts.

A MAC is one multiply-add of a matrix product or convolution; element-wise work is not counted,
as usual. Gathers and scatters have no MACs, so the bytes they move are reported beside them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffcr_compile.blocks import BlockSpec, get_leaf, leaves
from diffcr_compile.cut import cut_arguments
from diffcr_compile.data_dependent import DATA_DEPENDENT, needs_values
from diffcr_compile.dynamo_state import forgotten_failures
from diffcr_compile.errors import UnsupportedModelError, UsageError
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.program import Program, Stage, selector_name, shortcut_name, tensor_args
from diffcr_compile.routing import Selection
from diffcr_compile.schedule import CostTable
from diffcr_compile.shortcut import macs_per_token


def keep_levels(
    num_tokens: int,
    multiple_of: int,
    min_keep_ratio: float,
    max_keep_ratio: float = 1.0,
    *,
    skip: bool = False,
) -> tuple[int, ...]:
    """Allowed kept tokens of a block: multiples of `multiple_of` between the two ratios, and N.

    With `skip` also 0: the block is not run at all.
    """
    least, most = max(1, min_keep_ratio * num_tokens), max_keep_ratio * num_tokens
    levels = [k for k in range(multiple_of, num_tokens, multiple_of) if least <= k <= most]
    return (*([0] if skip else []), *levels, num_tokens)


def levels_of_blocks(
    program: Program,
    multiple_of: int,
    min_keep_ratio: float,
    max_keep_ratio: float = 1.0,
    *,
    skip_blocks: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Allowed kept tokens of every block, see :func:`measure_costs`."""
    return {
        spec.name: keep_levels(
            spec.num_tokens,
            multiple_of,
            min_keep_ratio,
            max_keep_ratio,
            skip=skip_blocks and spec.removable,
        )
        for spec in program.blocks
    }


def measure_costs(
    program: Program,
    multiple_of: int,
    min_keep_ratio: float,
    max_keep_ratio: float = 1.0,
    *,
    skip_blocks: bool = False,
    shortcut_rank: int = 0,
    mode: FakeTensorMode | None = None,
) -> CostTable:
    """Count the MACs of every block at every allowed number of kept tokens, on fake tensors.

    Args:
        program: CAPTURED or ROUTED.
        multiple_of: kept tokens are multiples of this.
        min_keep_ratio: smallest keep ratio of a block, in (0, 1].
        max_keep_ratio: largest keep ratio below 1.0.
        skip_blocks: blocks that can be removed may also keep no token at all.
        shortcut_rank: of the shortcuts that a CAPTURED program is going to have; a ROUTED one has its own.
        mode: the mode of the program's tensors if they are fake already.

    Raises:
        UnsupportedModelError: sizes in the graph depend on values.
        UsageError: a block does not run with one of the numbers of tokens.
    """
    levels = levels_of_blocks(
        program, multiple_of, min_keep_ratio, max_keep_ratio, skip_blocks=skip_blocks
    )
    counter = flop_counter()
    shortcuts = _shortcut_macs(program, shortcut_rank)
    interpreter = _BlockCounter(program, levels, counter, shortcuts)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with (
            kept_caches(program.module),
            forgotten_failures(),
            mode,
            torch.no_grad(),
            counter,
        ):
            interpreter.run(
                *(mode.from_tensor(t) for t in tensor_args(program, program.example))
            )
    except DATA_DEPENDENT as error:
        raise UnsupportedModelError(
            f"the costs cannot be counted: {needs_values(error)}"
        ) from error
    batch = program.batch
    outer = (counter.get_total_flops() - interpreter.inside) / 2 / batch
    return CostTable(
        levels=levels,
        per_level={
            name: tuple(m / 2 / batch for m in macs)
            for name, macs in interpreter.flops.items()
        },
        routing={
            spec.name: tuple(
                _routing_macs(spec, k, shortcuts[spec.name]) for k in levels[spec.name]
            )
            for spec in program.blocks
        },
        moved_bytes={
            spec.name: tuple(
                _moved_bytes(spec, k, has_shortcut=shortcuts[spec.name] > 0)
                for k in levels[spec.name]
            )
            for spec in program.blocks
        },
        outer=outer,
    )


def flop_counter() -> FlopCounterMode:
    """Counts floating-point operations, two per MAC, on real or fake tensors."""
    aten = torch.ops.aten
    missing_in_torch = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten.mv: _mv_flops,
        aten.addbmm: _addbmm_flops,
        aten._trilinear: _trilinear_flops,
        aten._grouped_mm: _grouped_mm_flops,
    }
    return _OpByOp(display=False, custom_mapping=missing_in_torch)


class _OpByOp(FlopCounterMode):
    """While it counts, torch's own attention and encoder layers run op by op.

    In evaluation they are one fused op each, of which the counter knows nothing: 0 MACs.
    """

    def __enter__(self) -> _OpByOp:
        self._had_fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *failure: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(self._had_fast_path)
        super().__exit__(*failure)  # type: ignore[no-untyped-call]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _mv_flops(matrix: Sequence[int], _: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _addbmm_flops(_: Any, left: Sequence[int], right: Sequence[int], **__: Any) -> int:
    return 2 * math.prod(left) * right[-1]


def _trilinear_flops(
    one: Sequence[int],
    two: Sequence[int],
    three: Sequence[int],
    expand_1: Any,
    expand_2: Any,
    expand_3: Any,
    *_: Any,
    **__: Any,
) -> int:
    """Of nn.Bilinear: the product of all three, before it is summed."""
    shapes: list[list[int]] = []
    for shape, axes in ((one, expand_1), (two, expand_2), (three, expand_3)):
        expanded = list(shape)
        for axis in axes:
            expanded.insert(axis, 1)
        shapes.append(expanded)
    return int(2 * math.prod(max(sizes) for sizes in zip(*shapes, strict=True)))


def _grouped_mm_flops(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Of experts: every row of the left is multiplied with the matrix of its group."""
    return 2 * math.prod(left) * right[-1]


def _routing_macs(spec: BlockSpec, kept_tokens: int, shortcut_macs: int) -> float:
    """Of the router, one dot product per token, and of the shortcut. Where all tokens are kept neither is left.

    A block that is skipped has no router, but its shortcut stays.
    """
    per_token = spec.width if _is_routed(spec, kept_tokens) else 0
    if kept_tokens < spec.num_tokens:
        per_token += shortcut_macs
    return float(spec.num_tokens * per_token)


def _shortcut_macs(program: Program, shortcut_rank: int) -> dict[str, int]:
    """Of the shortcut of each block, for one token."""
    made = program.module.shortcuts
    planned = shortcut_rank if program.stage == Stage.CAPTURED else 0
    ranks = {name: shortcut.down.out_features for name, shortcut in made.items()}
    return {
        spec.name: macs_per_token(spec.width, ranks.get(spec.name, planned))
        for spec in program.blocks
    }


def _is_routed(spec: BlockSpec, kept_tokens: int) -> bool:
    return 0 < kept_tokens < spec.num_tokens


def moved_rows(spec: BlockSpec, kept_tokens: int, *, has_shortcut: bool = False) -> int:
    """Rows of the stream that are read and written to route a block.

    The gather reads and writes K rows; the scatter copies the stream and overwrites K rows of it. A shortcut reads and
    writes the whole stream once more.
    """
    return 4 * kept_tokens + (4 if has_shortcut else 2) * spec.num_tokens


def _moved_bytes(spec: BlockSpec, kept_tokens: int, *, has_shortcut: bool) -> float:
    """Of the stream alone, in fp32. Of a skipped block its shortcut is left."""
    if _is_routed(spec, kept_tokens):
        rows = moved_rows(spec, kept_tokens, has_shortcut=has_shortcut)
    else:
        rows = 2 * spec.num_tokens if has_shortcut and kept_tokens == 0 else 0
    return 4.0 * spec.width * rows


def _structure(block: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """Equal for two calls that run the same layers on the same shapes."""
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    inputs = tuple(
        (path, tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf))
        for path, leaf in leaves((tuple(args), dict(kwargs)))
    )
    return (type(block), shapes, inputs)


class _BlockCounter(fx.Interpreter):
    """Runs the graph with all tokens kept, and each block at each of its levels on the side."""

    def __init__(
        self,
        program: Program,
        levels: Mapping[str, Sequence[int]],
        counter: FlopCounterMode,
        shortcut_macs: Mapping[str, int],
    ) -> None:
        super().__init__(program.module)
        self.specs = {spec.name: spec for spec in program.blocks}
        self.selectors = {selector_name(name) for name in self.specs}
        self.shortcuts = {shortcut_name(name) for name in self.specs}
        self.shortcut_macs = shortcut_macs
        self.levels = levels
        self.counter = counter
        self.flops: dict[str, list[float]] = {}
        self.inside = 0
        self.known: dict[Any, list[float]] = {}  # blocks of equal structure cost the same

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.selectors:
            return Selection(None, None)
        if target in self.shortcuts:  # all tokens are kept, so nobody reads it
            return args[0]
        if target not in self.specs:
            return super().call_module(target, args, kwargs)
        before = self.counter.get_total_flops()
        result = super().call_module(target, args, kwargs)
        # layers of the same shapes may be put together in another way: linear attention here, softmax there
        whole = self.counter.get_total_flops() - before
        spec = self.specs[target]
        key = (
            spec.num_tokens,
            self.levels[target],
            whole,
            *_structure(self.module.get_submodule(target), args, kwargs),
        )
        if key not in self.known:
            self.known[key] = self._at_levels(spec, args, kwargs)
        self.flops[target] = self.known[key]
        self.inside += self.counter.get_total_flops() - before
        return result

    def _at_levels(self, spec: BlockSpec, args: Any, kwargs: Any) -> list[float]:
        """FLOPs of block, router and shortcut at every level.

        Linear layers cost a * K and attention b * K^2, so three counts give all levels; a fourth
        checks that, and a block that costs otherwise is counted level by level.
        """
        levels = self.levels[spec.name]
        running = [kept for kept in levels if kept > 0]
        batch = int(get_leaf((args, kwargs), spec.stream.path).shape[0])

        def count(kept: int) -> float:
            return self._block_flops(spec, args, kwargs, kept)

        blocks = [0.0] * (len(levels) - len(running)) + _at_each(running, count)
        shortcut = self.shortcut_macs[spec.name]
        around = [2 * batch * _routing_macs(spec, kept, shortcut) for kept in levels]
        return [block + routing for block, routing in zip(blocks, around, strict=True)]

    def _block_flops(self, spec: BlockSpec, args: Any, kwargs: Any, kept: int) -> float:
        stream: Tensor = get_leaf((args, kwargs), spec.stream.path)
        index = stream.new_zeros((stream.shape[0], kept), dtype=torch.int64)
        cut_args, cut_kwargs = cut_arguments(
            (tuple(args), dict(kwargs)), (spec.stream, *spec.aligned), index, spec.num_tokens
        )
        before = self.counter.get_total_flops()
        try:
            super().call_module(spec.name, cut_args, cut_kwargs)
        except DATA_DEPENDENT:
            raise
        except Exception as error:  # whatever a user's module raises
            raise UsageError(
                f"{spec.name} does not run with {kept} of its {spec.num_tokens} tokens ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}). Raise routing.min_keep_ratio until every "
                "number of tokens is enough for it",
                code="DCR-U080",
            ) from error
        return float(self.counter.get_total_flops() - before)


def _at_each(levels: Sequence[int], count: Callable[[int], float]) -> list[float]:
    """``count`` of every level, from four of them where these lie on a parabola."""
    if len(levels) > 4:
        points = [levels[0], levels[len(levels) // 2], levels[-1]]
        curve = np.polynomial.Polynomial.fit(points, [count(k) for k in points], 2)
        check = levels[1]
        if abs(float(curve(check)) - count(check)) <= 1e-6 * count(check):
            return [float(round(float(curve(kept)))) for kept in levels]
    return [count(kept) for kept in levels]
