"""The experiments on one block: permute its image tokens, take some of them away, see what follows.

The block runs in float64 on its recorded inputs. What is off (a gate at zero, a LayerScale at 1e-5) is
switched on first: it may be on after training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import Path, TokenAxis, get_leaf, leaves, map_leaves, show_path
from diffcr_compile.cut import cut_arguments
from diffcr_compile.errors import one_line
from diffcr_compile.float64 import Float64Mode
from diffcr_compile.lively import lively_copy, lively_tree, partly_masked
from diffcr_compile.recorded import Call, IllegalError, fresh
from diffcr_compile.residual import SHRINK, gain, shrink
from diffcr_compile.routing import gather_tokens

# In float64 legal blocks come out between 0 and 1e-14, illegal ones between 0.001 and 2, because weak
# parameters are strengthened before (measured over the transformer classes of diffusers 0.42).
MAX_PERMUTATION_ERROR = 1e-9
# The same for a block that runs in its own precision only.
MAX_OWN_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}
# Above this, a run that rounds to float32 here and there says enough.
SURELY_WRONG = 1e-2
# How many combinations of argument axes are tried before a block is refused.
MAX_COMBINATIONS = 256


class Trial:
    """Runs a copy of one block on its recorded inputs, permuted or cut.

    Args:
        module: the block; it is not changed.
        call: how it was called.
        stream: where its image stream is.
        output: where it is in the output.
        num_tokens: image tokens.
        unread: outputs that nobody reads, which may be anything.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        stream: TokenAxis,
        output: Path,
        num_tokens: int,
        unread: Set[Path] = frozenset(),
    ) -> None:
        self.stream, self.output, self.num_tokens = stream, output, num_tokens
        self.unread: Set[Path] = unread
        self._handed: Set[Path] = frozenset()
        source: Tensor = get_leaf(call.tree, stream.path)
        self.batch, self.length = source.shape[0], source.shape[1]
        self.generator = torch.Generator().manual_seed(1)
        tree = lively_tree(call.tree, stream.path, self.generator)
        partly = partly_masked(tree, {num_tokens, self.length} - {1}, self.generator)
        if partly is None or not self._runs_on(partly, module, call, source.dtype):
            self._begin(tree, module, call, source.dtype)
        self.rough: Any = None
        self.unread |= self._handed - {output}
        self._errors: dict[tuple[TokenAxis, ...], float] = {}

    def _begin(self, tree: Any, module: nn.Module, call: Call, own: torch.dtype) -> None:
        """Take these arguments for the trial, and run the block on them once."""
        self.block, self.tree, self.wide = lively_copy(module), tree, True
        self.allowed = MAX_PERMUTATION_ERROR
        self._choose_precision(module, call, own)

    def _runs_on(self, tree: Any, module: nn.Module, call: Call, own: torch.dtype) -> bool:
        """Whether the block takes these arguments, and answers in numbers."""
        try:
            self._begin(tree, module, call, own)
        except IllegalError:
            return False
        answers = [leaf for _, leaf in leaves(self.reference) if isinstance(leaf, Tensor)]
        return all(bool(answer.isfinite().all()) for answer in answers)

    def _choose_precision(self, module: nn.Module, call: Call, own: torch.dtype) -> None:
        """Float64 throughout; with float32 where the block asks for it; or its own, as it is.

        The second is for ops that no dispatch mode can follow, the third for kernels of one precision.
        """
        failures = []
        for precision in ("float64", "about float64", str(own).removeprefix("torch.")):
            if precision == "about float64":
                self.wide, self.allowed = False, MAX_OWN_ERROR[torch.float32]
            elif precision != "float64":
                if own not in MAX_OWN_ERROR:
                    continue
                self.allowed = MAX_OWN_ERROR[own]
                self._as_given(module, call)
            try:
                self.reference = self._run(self.tree)
            except Exception as error:  # noqa: BLE001 - the user's block may raise anything
                failures.append(f"in {precision}: {short(error)}")
            else:
                return
        raise IllegalError(f"it does not run on other numbers, {'; '.join(failures)}")

    def _as_given(self, module: nn.Module, call: Call) -> None:
        """Numbers of the types that the block and its arguments have."""
        given = dict(leaves(call.tree))
        self.tree = map_leaves(
            self.tree,
            lambda path, leaf: (
                leaf.to(given[path].dtype) if isinstance(leaf, Tensor) else leaf
            ),
        )
        for parameter, original in zip(
            self.block.parameters(), module.parameters(), strict=True
        ):
            parameter.data = parameter.data.to(original.dtype)
        for buffer, given_buffer in zip(self.block.buffers(), module.buffers(), strict=True):
            buffer.data = given_buffer.detach().clone()

    def _run(self, tree: Any) -> Any:
        if not self.wide:
            return self._plain(tree)
        with Float64Mode():
            return self._plain(tree)

    def _plain(self, tree: Any) -> Any:
        args, kwargs = fresh(tree)
        output = self.block(*args, **kwargs)
        self._handed = _handed_through((args, kwargs), output)  # these copies, not the tree's
        return output

    def has_own_residual(self) -> bool:
        """Whether the stream is in the output, with something added to it."""
        shrink(self.block)
        try:
            return gain(self._run, self.tree, self.stream.path).get(self.output, 0.0) > 0.25
        finally:
            shrink(self.block, SHRINK)

    # ------------------------------------------------------------------- roles of the arguments

    def options(self, *, joint: bool) -> list[list[TokenAxis]]:
        """Per argument axis that could run along tokens: the ways in which it could.

        Args:
            joint: also axes along the image tokens and those of another argument together.
        """
        lengths = {self.num_tokens: [0]}
        lengths.setdefault(self.length, [self.stream.start])
        if joint:
            for size in self._token_counts():  # text tokens may come first, or last
                lengths.setdefault(self.num_tokens + size, [size, 0])
                start = self.stream.start
                lengths.setdefault(self.length + size, [size + start, start])
        found = []
        for path, leaf in leaves(self.tree):
            if not isinstance(leaf, Tensor) or path == self.stream.path:
                continue
            for axis, size in enumerate(leaf.shape):
                # axis 0 may have the size of the batch by accident, so both are tried
                batched = (
                    (True, False)
                    if axis > 0 and leaf.shape[0] in (1, self.batch)
                    else (False,)
                )
                starts = lengths.get(size, [])
                ways = [
                    TokenAxis(path, axis, s, b) for s, b in itertools.product(starts, batched)
                ]
                if ways:
                    found.append(ways)
        return found

    def _token_counts(self) -> list[int]:
        """Tokens of the other arguments: axis 1 of three."""
        sizes = [
            leaf.shape[1]
            for path, leaf in leaves(self.tree)
            if isinstance(leaf, Tensor)
            and leaf.is_floating_point()
            and leaf.ndim == 3
            and path != self.stream.path
        ]
        return list(dict.fromkeys(sizes))

    def _attempts(self) -> Iterator[tuple[TokenAxis, ...]]:
        """Sets of token-aligned arguments to try, the likely ones first."""
        plain, joint = self.options(joint=False), self.options(joint=True)
        each = [plain] if joint == plain else [plain, joint]
        for options in each:
            yield from itertools.islice(itertools.product(*options), MAX_COMBINATIONS)
        # An argument that has the size by accident must be left out, so smaller sets follow.
        for options in each:
            fewer = (
                chosen
                for size in range(1, len(options))
                for subset in itertools.combinations(options, size)
                for chosen in itertools.product(*subset)
            )
            yield from itertools.islice(fewer, MAX_COMBINATIONS)

    def smallest_alignment(
        self, first_try: tuple[TokenAxis, ...]
    ) -> tuple[tuple[TokenAxis, ...], float]:
        """The smallest set of token-aligned arguments that makes the block legal.

        Raises:
            IllegalError: there is none.
        """
        failure: str | None = None
        tried: set[tuple[TokenAxis, ...]] = set()
        for aligned in itertools.chain([first_try, ()], self._attempts()):
            if aligned in tried:
                continue
            tried.add(aligned)
            failure = self.failure(aligned)
            if failure is None:
                return self._without_needless(aligned)
            if len(tried) == 1 and self._is_random():
                raise IllegalError(
                    "it is random, also in evaluation mode: two runs on equal inputs differ. Give "
                    "dropout training=self.training, and take noise as an input"
                )
            if len(tried) == 1 and self.wide:  # hundreds may follow, nearly all of them wrong
                with contextlib.suppress(Exception):  # only what is slower then
                    self.rough = self._plain(self.tree)
        raise IllegalError(str(failure))

    def _without_needless(
        self, aligned: tuple[TokenAxis, ...]
    ) -> tuple[tuple[TokenAxis, ...], float]:
        for leaf in aligned:
            fewer = tuple(other for other in aligned if other != leaf)
            if self.failure(fewer) is None:
                aligned = fewer
        return aligned, self._errors[aligned]

    def failure(self, aligned: tuple[TokenAxis, ...]) -> str | None:
        """Why the block is not legal with these token-aligned arguments, or None."""
        try:
            error = self._errors[aligned] = self.permutation_error(aligned)
        except Exception as problem:  # noqa: BLE001 - the user's block may raise anything
            return f"it does not run with permuted tokens: {short(problem)}"
        if not error <= self.allowed:
            return (
                f"permuting its image tokens does not permute its output (relative error {error:.1e}, "
                f"allowed {self.allowed:.0e}): it mixes tokens by their position"
            )
        kept = max(1, self.num_tokens // 2)
        index = self._orders(aligned)[:, :kept]
        try:
            found = self._run(self._cut(aligned, index))
        except Exception as problem:  # noqa: BLE001
            return f"it does not run on {kept} of {self.num_tokens} tokens: {short(problem)}"
        result: Tensor = get_leaf(found, self.output)
        expected = self.length - self.num_tokens + kept
        if result.shape[1] != expected:
            return f"given {expected} tokens it returns {result.shape[1]}"
        return self._resized(found, kept)

    def _resized(self, found: Any, kept: int) -> str | None:
        """What is wrong with an output beside the stream that has other sizes on fewer tokens."""
        whole = dict(leaves(self.reference))
        for path, leaf in leaves(found):
            if not isinstance(leaf, Tensor) or path == self.output or path in self.unread:
                continue
            before = tuple(whole[path].shape)
            if leaf.shape != before:
                return (
                    f"its output{_keys(path)} has shape {tuple(leaf.shape)} on {kept} of "
                    f"{self.num_tokens} tokens and {before} on all of them, and only its stream can be "
                    "put back among all tokens; return it from the model, not from the block"
                )
        return None

    def permutation_error(self, aligned: tuple[TokenAxis, ...]) -> float:
        """Largest relative deviation from "permuted tokens in, permuted tokens out"."""
        order = self._orders(aligned)
        tree = self._cut(aligned, order)
        if (
            self.rough is not None
        ):  # a wrong alignment, and there may be hundreds, is found out faster
            error = self._error(self._plain(tree), self.rough, order)
            if not error <= SURELY_WRONG:
                return error
        return self._error(self._run(tree), self.reference, order)

    def _is_random(self) -> bool:
        """Whether one more run on the same inputs gives something else."""
        order = torch.arange(self.num_tokens).expand(self.batch, -1)
        return not self._error(self._run(self.tree), self.reference, order) <= self.allowed

    def _error(self, found: Any, reference: Any, order: Tensor) -> float:
        expected = map_leaves(reference, lambda p, leaf: self._permuted(p, leaf, order))
        pairs = zip(leaves(found), leaves(expected), strict=True)
        errors = [
            _away(a, b)
            for (path, a), (_, b) in pairs
            if isinstance(b, Tensor) and path not in self.unread
        ]
        return max(errors, default=float("inf"))

    def apartness(self, aligned: tuple[TokenAxis, ...]) -> float:
        """Largest relative deviation from "some tokens alone come out as they do among all".

        About 0 for what works on each token by itself, such as a feed-forward.
        """
        index = self._orders(aligned)[:, : max(1, self.num_tokens // 2)]
        found: Tensor = get_leaf(self._run(self._cut(aligned, index)), self.output)
        whole: Tensor = get_leaf(self.reference, self.output)
        expected = self._permuted(self.output, whole, index)
        away = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        return float(away)

    def check_counts(self, aligned: tuple[TokenAxis, ...]) -> None:
        """Refuse a block that reads a number which may be its number of tokens.

        Such a number stays when tokens go, and the block would, without a word, take other tokens for
        image tokens. Whether it counts tokens or has their number by accident cannot be told.

        Raises:
            IllegalError: on fewer tokens the output depends on an integer argument equal to N or L.
        """
        kept = max(1, self.num_tokens // 2)
        gone = self.num_tokens - kept
        tree = self._cut(aligned, self._orders(aligned)[:, :kept])
        for path, leaf in leaves(self.tree):
            if type(leaf) is not int or leaf not in (self.num_tokens, self.length):
                continue
            fewer = map_leaves(tree, lambda p, v: v - gone if p == path else v)  # noqa: B023
            if self._outcome(fewer) != self._outcome(tree):
                raise IllegalError(
                    f"{show_path(path)} is {leaf}, the number of its tokens, and what it makes of {kept} "
                    "of them depends on that number; let it read the number from the shape of its stream"
                )

    def _outcome(self, tree: Any) -> Any:
        """Digest of the outputs, or the error."""
        try:
            result = self._run(tree)
        except Exception as error:  # noqa: BLE001 - the user's block may raise anything
            return short(error)
        # as text, in which NaN equals NaN
        return [
            f"{tuple(leaf.shape)} {leaf.sum().item()!r} {leaf.abs().sum().item()!r}"
            for _, leaf in leaves(result)
            if isinstance(leaf, Tensor)
        ]

    def per_sample(self, aligned: tuple[TokenAxis, ...]) -> tuple[TokenAxis, ...]:
        """The same roles with an index of its own for each sample, if the block allows it.

        It does if it takes tables without a batch axis also with one.
        """
        own = tuple(dataclasses.replace(leaf, batched=True) for leaf in aligned)
        if self.batch == 1 or own == aligned:
            return aligned
        return aligned if self.failure(own) is not None else own

    def _orders(self, aligned: tuple[TokenAxis, ...]) -> Tensor:
        """Random orders of the tokens, (B, N): one per sample, or one for all if tables need it.

        With one for all, a block that mixes samples (a temporal fold) would pass for legal, and
        so would a table whose leading axis has the size of the batch by accident.
        """
        shared = any(not leaf.batched for leaf in aligned)
        orders = [
            torch.randperm(self.num_tokens, generator=self.generator)
            for _ in range(1 if shared else self.batch)
        ]
        return torch.stack(orders).expand(self.batch, -1)

    def _permuted(self, path: Path, leaf: Any, order: Tensor) -> Any:
        if path != self.output:
            return leaf
        return gather_tokens(leaf, order, 1, self.stream.start, self.num_tokens, batched=True)

    def _cut(self, aligned: tuple[TokenAxis, ...], index: Tensor) -> Any:
        return cut_arguments(self.tree, (self.stream, *aligned), index, self.num_tokens)


def _handed_through(tree: Any, output: Any) -> set[Path]:
    """Outputs that are an input itself; the graph takes the input in their place, uncut."""
    given = {id(leaf) for _, leaf in leaves(tree) if isinstance(leaf, Tensor)}
    return {path for path, leaf in leaves(output) if id(leaf) in given}


def _away(found: Tensor, expected: Tensor) -> float:
    """Relative error; numbers that are not rounded, such as positions, are equal or wrong."""
    if not (expected.is_floating_point() or expected.is_complex()):
        return 0.0 if torch.equal(found, expected) else float("inf")
    scale = expected.abs().max().clamp_min(1e-30)
    return float(((found - expected).abs().max() / scale).item())


def _keys(path: Path) -> str:
    return "".join(f"[{key!r}]" for key in path)


def short(error: BaseException) -> str:
    """An error as part of a reason for refusing a block."""
    return one_line(error, limit=160)
