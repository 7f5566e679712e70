"""Token-wise parts of a block, such as its feed-forward, as routing units of their own.

A block that mixes tokens by their position (a convolution, a window) cannot run on some of them, but its
token-wise parts can. A part may be routed if

1. it is *token-wise*: some tokens alone come out as they do among all (``Trial.apartness``);
2. it is *added*: the block adds its output to the stream, times a gate at most. A token then bypasses
   it by having nothing added;
3. its image tokens are known: those that move with the image while all other blocks are the identity and
   all other parts that could carry the image elsewhere return zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import BlockSpec, Path, TokenAxis, get_leaf, leaves, map_leaves
from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.float64 import Float64Mode
from diffcr_compile.lively import lively_copy, lively_tree
from diffcr_compile.outside import Outside
from diffcr_compile.recorded import (
    Call,
    IllegalError,
    check_static,
    fresh,
    output_tensors,
    run_recorded,
)
from diffcr_compile.residual import Pairs, is_float, noise, shrink
from diffcr_compile.streams import Moved, image_stream, moved_on
from diffcr_compile.trial import Trial, short

# With all weights shrunk by 2^20 what is not an addition is off by that much, or by everything.
MAX_ADDITION_ERROR = 1e-3
_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclasses.dataclass(frozen=True)
class PartFindings:
    """The parts of one block that may be routed, and why the others may not."""

    parts: tuple[BlockSpec, ...]
    reasons: Mapping[str, str]

    def moved(self, block: str, other: str) -> PartFindings:
        """The same for another block of the same structure."""
        return PartFindings(
            tuple(spec.moved(block, other) for spec in self.parts), self.reasons
        )


@dataclasses.dataclass(frozen=True)
class _TokenWise:
    """A part that works on each token by itself; names and paths as in ``BlockSpec``."""

    stream: Path
    output: Path
    aligned: tuple[TokenAxis, ...]
    error: float


def find_parts(
    blocks: Mapping[str, nn.Module],
    calls: Mapping[str, Sequence[Call]],
    outside: Outside,
) -> dict[str, PartFindings]:
    """Look for parts that may be routed in each block; blocks without any image token are left out.

    Args:
        blocks: blocks whose parts are wanted.
        calls: how each of them is called, on real inputs.
        outside: the model around all of its blocks.
    """
    try:
        before = outside.before[0]
        after = outside.identity(outside.changed(slice(None)))[0]
        first = outside.identity(outside.changed(slice(1)))[0] if outside.size > 1 else None
    except Exception:  # noqa: BLE001 - a block whose output is no input cannot be an identity
        return {}
    _check_always_runs([n for n in blocks if n in calls], [before, after, first or before])
    found = {}
    for name, module in blocks.items():
        if len(calls.get(name, ())) != 1 or not _moves(before[name][0], after[name][0]):
            continue
        runs = (before[name][0], after[name][0], first[name][0] if first else None)
        try:
            found[name] = _Parts(name, module, calls[name][0], outside).find(runs)
        except IllegalError as reason:
            parts = [inner for inner, _ in part_candidates(module)]
            found[name] = PartFindings((), dict.fromkeys(parts, str(reason)))
    return found


def _check_always_runs(names: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> None:
    """Every block that ran once must run at every call."""
    lost = [name for name in names if any(name not in run for run in runs)]
    if lost:
        raise UnsupportedModelError(
            f"the model runs {lost[0]} at one call and leaves it out at another: it skips blocks by a rule of its own, "
            "such as a cache that counts steps (TeaCache), stochastic depth or a branch on values. A static graph runs "
            "the same blocks at every call; switch that off."
        )


def _moves(one: Call, two: Call) -> bool:
    others = dict(leaves(two.tree))
    return any(
        is_float(leaf) and not torch.equal(leaf, others[path])
        for path, leaf in leaves(one.tree)
    )


def part_candidates(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Outermost submodules with more than one layer that can be called."""
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        if isinstance(child, _LISTS):
            yield from part_candidates(child, f"{full}.")
        elif _num_layers(child) > 1:
            yield full, child


def _num_layers(module: nn.Module) -> int:
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


class _Parts:
    """The parts of one block."""

    def __init__(self, name: str, block: nn.Module, call: Call, outside: Outside) -> None:
        self.name, self.block, self.call, self.outside = name, block, call, outside
        every = {
            inner: module
            for inner, module in block.named_modules()
            if inner and not isinstance(module, _LISTS) and _num_layers(module) > 1
        }
        self.calls: dict[str, list[Call]]
        try:
            self.calls, _ = run_recorded(block, *call.tree, candidates=every, edit=None)
        except Exception as error:  # the user's block may raise anything
            raise IllegalError(
                f"its block does not run a second time on what it was given: {short(error)}"
            ) from error

    def find(self, runs: tuple[Call, Call, Call | None]) -> PartFindings:
        """Try the outermost parts, and what is inside of those that are refused.

        Args:
            runs: the block's call while all blocks are the identity; the same with another image, and
                with another image in the first sample only.
        """
        reasons: dict[str, str] = {}
        wise: dict[str, _TokenWise] = {}
        carriers: dict[
            str, nn.Module
        ] = {}  # a norm is none: without it nothing would move at all
        waiting = list(part_candidates(self.block))
        while waiting:
            inner, module = waiting.pop(0)
            part = None
            try:
                part = self._token_wise(inner, module)
                self._check_added(inner, part)
                wise[inner] = part
                carriers[inner] = module
            except IllegalError as reason:
                reasons[inner] = str(reason)
                waiting += part_candidates(module, f"{inner}.")
                if part is None:
                    carriers[inner] = module
        parts = []
        for inner, part in wise.items():
            try:
                parts.append(self._spec(inner, part, self._moved(inner, carriers, runs)))
            except IllegalError as reason:
                reasons[inner] = str(reason)
        order = list(self.calls)
        parts.sort(key=lambda spec: order.index(spec.name.removeprefix(f"{self.name}.")))
        return PartFindings(tuple(parts), reasons)

    def _token_wise(self, inner: str, module: nn.Module) -> _TokenWise:
        """How the part works on each token by itself, or IllegalError."""
        calls = self.calls.get(inner, [])
        if len(calls) != 1:
            raise IllegalError(f"it is called {len(calls)} times per forward")
        call = calls[0]
        if call.fault:
            raise IllegalError(call.fault)
        check_static(module, call)
        reason = "no input has the shape of its output"
        for output, result in leaves(call.output):
            if not is_float(result) or result.ndim != 3:
                continue
            for stream, given in leaves(call.tree):
                if not _is_like(given, result):
                    continue
                try:
                    return _tried(module, call, stream, output, result.shape[1])
                except IllegalError as problem:
                    reason = str(problem)
        raise IllegalError(reason)

    def _check_added(self, inner: str, part: _TokenWise) -> None:
        """The block's output must follow the part's, element by element and in proportion."""
        shape = get_leaf(self.calls[inner][0].output, part.output).shape
        generator = torch.Generator().manual_seed(5)
        try:
            block = lively_copy(self.block)
            tree = lively_tree(self.call.tree, (), generator)
            shrink(block)
            like = torch.empty(shape, device=next(block.parameters()).device)
            changes = [noise(like, generator) for _ in range(2)]
            changes = [c.sign() * (0.5 + c.abs()) for c in changes]
            still = _with_change(block, inner, part.output, tree, None)
            moved = [_with_change(block, inner, part.output, tree, c) for c in changes]
        except Exception as error:
            raise IllegalError(
                f"its block does not run with it changed: {short(error)}"
            ) from error
        for path, leaf in still.items():
            if leaf.shape != shape:
                continue
            one, two = ((run[path] - leaf) / c for run, c in zip(moved, changes, strict=True))
            size = one.abs().max()
            if size > 0 and (one - two).abs().max() <= MAX_ADDITION_ERROR * size:
                return
        raise IllegalError("its block does not add its output to a stream")

    def _moved(
        self,
        inner: str,
        carriers: Mapping[str, nn.Module],
        runs: tuple[Call, Call, Call | None],
    ) -> Moved:
        """What of the part's input moves with the image while no other part carries it anywhere."""

        def still(name: str, tree: Any, output: Any) -> Any:
            if name == inner:
                return None
            return map_leaves(
                output, lambda _, leaf: torch.zeros_like(leaf) if is_float(leaf) else leaf
            )

        watched = {**carriers, inner: self.block.get_submodule(inner)}
        # what is around the part is not in its way
        watched = {n: m for n, m in watched.items() if not inner.startswith(f"{n}.")}
        found: list[Call | None] = []
        for run in runs:
            if run is None:
                found.append(None)
                continue
            try:
                calls = run_recorded(self.block, *run.tree, candidates=watched, edit=still)[0]
            except Exception as error:
                raise IllegalError(
                    f"its block does not run without its other parts: {short(error)}"
                ) from error
            found.append(calls[inner][0])
        before, after, first = found
        assert before is not None
        assert after is not None
        moved = moved_on(before, after)
        return Moved(
            tokens={path: axes[1] for path, axes in moved.items()},
            rows={path: axes[0] for path, axes in moved.items()},
            first_sample=moved_on(before, first) if first is not None else None,
            pairs=None,
            outside=self.outside,
        )

    def _spec(self, inner: str, part: _TokenWise, moved: Moved) -> BlockSpec:
        call = self.calls[inner][0]
        pairs: Pairs = {part.output: part.stream}
        stream, output, (start, num_tokens) = image_stream(call, moved, pairs)
        source: Tensor = get_leaf(call.tree, stream)
        return BlockSpec(
            name=f"{self.name}.{inner}",
            stream=TokenAxis(stream, 1, start),
            output=output,
            aligned=tuple(dataclasses.replace(axis, start=start) for axis in part.aligned),
            num_tokens=num_tokens,
            width=source.shape[2],
            shares_index=any(not axis.batched for axis in part.aligned),
            removable=len(list(output_tensors(call.output))) == 1
            and num_tokens == source.shape[1],
            error=part.error,
            bypass="zeros",
        )


def _is_like(given: Any, result: Tensor) -> bool:
    return is_float(given) and given.shape == result.shape and given.dtype == result.dtype


def _tried(
    module: nn.Module, call: Call, stream: Path, output: Path, length: int
) -> _TokenWise:
    trial = Trial(module, call, TokenAxis(stream, 1, 0), output, length)
    aligned, error = trial.smallest_alignment(())
    aligned = trial.per_sample(aligned)
    trial.check_counts(aligned)
    apart = trial.apartness(aligned)
    if not apart <= trial.allowed:
        raise IllegalError(
            "what it makes of a token depends on the other tokens (relative difference "
            f"{apart:.1e}, allowed {trial.allowed:.0e})"
        )
    return _TokenWise(stream, output, aligned, error)


def _with_change(
    block: nn.Module, inner: str, output: Path, tree: Any, change: Tensor | None
) -> dict[Path, Tensor]:
    """The block's outputs with `change` added to the part's output."""

    def add(_: nn.Module, __: Any, result: Any) -> Any:
        return map_leaves(result, lambda path, leaf: leaf + change if path == output else leaf)

    handle = (
        block.get_submodule(inner).register_forward_hook(add) if change is not None else None
    )
    try:
        with Float64Mode():
            args, kwargs = fresh(tree)
            result = block(*args, **kwargs)
    finally:
        if handle is not None:
            handle.remove()
    return {path: leaf for path, leaf in leaves(result) if is_float(leaf)}
