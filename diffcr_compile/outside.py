"""A model around its blocks: their calls recorded, and what it does with what they hand on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import Path, get_leaf, leaves, map_leaves
from diffcr_compile.tensor_bytes import tensor_bytes
from diffcr_compile.recorded import Call, IllegalError, output_tensors, run_edited, run_recorded
from diffcr_compile.residual import Pairs, first_come, identity_output, is_float


def record_calls(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    candidates: Mapping[str, nn.Module],
    *,
    identity: bool,
    pairs: Mapping[str, Pairs] | None = None,
) -> tuple[dict[str, list[Call]], Any]:
    """Run the model and record every call of a candidate, in running order.

    Args:
        model: in evaluation mode.
        args: positional inputs.
        kwargs: keyword inputs.
        candidates: modules to watch, by name.
        identity: each candidate returns its inputs instead of its outputs.
        pairs: per candidate, which input for which output; first come first served without.
    """

    def bypass(name: str, tree: Any, output: Any) -> Any:
        return identity_output(tree, output, (pairs or {}).get(name))

    return run_recorded(model, args, kwargs, candidates, bypass if identity else None)


def _perturbed(leaf: Tensor, samples: slice) -> Tensor:
    """Other values at every position of some samples: noise on numbers, another one of the codes."""
    if leaf.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        changed = leaf + torch.randn(leaf.shape, generator=generator).to(leaf)
    else:
        codes, places = torch.unique(leaf, return_inverse=True)
        if len(codes) == 1:  # all masked: any other code will do
            codes = torch.cat([codes, (codes - 1).abs()])
        changed = codes.roll(-1)[places].view_as(leaf)
    mixed = leaf.clone()
    mixed[samples] = changed[samples]
    return mixed


def _digest(tensor: Tensor) -> bytes:
    """Tells values apart in 32 bytes: the streams of all blocks of a large model are a gigabyte."""
    return hashlib.sha256(tensor_bytes(tensor + 0)).digest()  # -0.0 is 0.0


class Outside:
    """Experiments on the model around its blocks, each made when it is first asked for."""

    def __init__(
        self,
        model: nn.Module,
        tree: tuple[tuple[Any, ...], dict[str, Any]],
        candidates: Mapping[str, nn.Module],
        sample: Path,
        pairs: Mapping[str, Pairs],
    ) -> None:
        self.model, self.tree, self.candidates = model, tree, candidates
        self.sample, self.pairs = sample, pairs
        self._read: dict[tuple[str, Path], bool] = {}

    @property
    def size(self) -> int:
        """Samples in the batch."""
        return int(get_leaf(self.tree, self.sample).shape[0])

    def changed(self, samples: slice) -> Any:
        """The inputs with another image."""
        return map_leaves(
            self.tree,
            lambda path, leaf: _perturbed(leaf, samples) if path == self.sample else leaf,
        )

    def identity(self, tree: Any) -> tuple[dict[str, list[Call]], Any]:
        """Run with every block bypassed."""
        args, kwargs = tree
        return record_calls(
            self.model, args, kwargs, self.candidates, identity=True, pairs=self.pairs
        )

    @functools.cached_property
    def before(self) -> tuple[dict[str, list[Call]], Any]:
        return self.identity(self.tree)

    @functools.cached_property
    def bypassed(self) -> frozenset[str]:
        """Blocks that the image gets past without going through them.

        All blocks return zeros. If the image still reaches the stream of the next one, or the model's
        output behind the last, the model adds the block's output to something itself.
        """
        try:
            with torch.no_grad():
                one, image = self._with_zeros(self.tree)
                two, other = self._with_zeros(self.changed(slice(None)))
        except Exception:  # noqa: BLE001 - the user's model may raise anything
            return frozenset()
        reached = [*(one[name] != two[name] for name in one), image != other]
        return frozenset(name for name, past in zip(one, reached[1:], strict=True) if past)

    def _with_zeros(self, tree: Any) -> tuple[dict[str, list[bytes]], list[bytes]]:
        """All blocks return zeros: the streams that reach each of them in running order, and the model's output."""
        streams: dict[str, list[bytes]] = {}

        def zeros(name: str, call: Call) -> Any:
            pairs = self.pairs.get(name) or first_come(call.tree, call.output)
            found = [_digest(get_leaf(call.tree, path)) for path in pairs.values()]
            streams.setdefault(name, found)
            return map_leaves(
                call.output, lambda path, leaf: torch.zeros_like(leaf) if path in pairs else leaf
            )

        args, kwargs = tree
        output = run_edited(self.model, args, kwargs, self.candidates, zeros)
        return streams, [_digest(tensor) for tensor in output_tensors(output)]

    def adds(self, name: str, output: Path) -> bool:
        """Whether the model adds a block's output to the stream that goes past it, and nothing else.

        All blocks return zeros, but for this one and a neighbour: what one has more, the other has
        less. That shows nowhere behind both of them if and only if their outputs are added up.
        """
        calls = self.before[0]
        shape = get_leaf(calls[name][0].output, output).shape
        names = list(calls)
        place = names.index(name)
        neighbours = [names[i] for i in (place - 1, place + 1) if 0 <= i < len(names)]
        generator = torch.Generator().manual_seed(4)
        more = torch.randn(shape, generator=generator)

        def run(added: Mapping[str, float]) -> list[Tensor]:
            def edit(other: str, tree: Any, result: Any) -> Any:
                factor = added.get(other, 0.0)
                return map_leaves(
                    result,
                    lambda _, leaf: (
                        (more * factor).to(leaf)
                        if is_float(leaf) and leaf.shape == shape
                        else torch.zeros_like(leaf)
                        if isinstance(leaf, Tensor)
                        else leaf
                    ),
                )

            with torch.no_grad():
                result = run_recorded(
                    self.model, *self.tree, candidates=self.candidates, edit=edit
                )[1]
            return [t for t in output_tensors(result) if is_float(t)]

        def away(one: list[Tensor], two: list[Tensor]) -> float:
            return max(
                float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
                for a, b in zip(one, two, strict=True)
            )

        try:
            still, alone = run({}), run({name: 1.0})
            return any(
                away(run({name: 1.0, other: -1.0}), still) <= 1e-3 * away(alone, still)
                for other in neighbours
            )
        except Exception:  # noqa: BLE001 - the user's model may raise anything
            return False

    def is_read(self, name: str, output: Path) -> bool:
        """Whether anybody reads a block's output at that path.

        NaN in its place shows somewhere; in the place of whole numbers, others do.
        """
        if (name, output) not in self._read:
            self._read[name, output] = self._shows(name, output)
        return self._read[name, output]

    def _shows(self, name: str, output: Path) -> bool:
        def spoil(other: str, tree: Any, result: Any) -> Any:
            result = identity_output(tree, result, self.pairs.get(other))
            if other != name:
                return result
            return map_leaves(
                result,
                lambda path, leaf: (
                    _spoilt(leaf) if path == output and isinstance(leaf, Tensor) else leaf
                ),
            )

        shown = get_leaf(self.before[0][name][0].output, output)
        try:
            with torch.no_grad():
                calls, result = run_recorded(
                    self.model, *self.tree, candidates=self.candidates, edit=spoil
                )
        except Exception:  # noqa: BLE001 - the user's model looks at it, and may raise anything
            return True
        differs = _other_nans if is_float(shown) else _other_values
        before, expected = self.before
        seen = [(result, expected)] + [
            (call.tree, before[other][index].tree)
            for other, found in calls.items()
            for index, call in enumerate(found)
        ]
        return any(
            differs(a, b)
            for found, wanted in seen
            for a, b in zip(output_tensors(found), output_tensors(wanted), strict=True)
        )


def _other_nans(found: Tensor, wanted: Tensor) -> bool:
    nans = (torch.isnan(found), torch.isnan(wanted))
    return found.is_floating_point() and not torch.equal(*nans)


def _other_values(found: Tensor, wanted: Tensor) -> bool:
    """Whether anything is not what it was; NaN is NaN."""
    if found.shape != wanted.shape:
        return True
    return not bool(((found == wanted) | ((found != found) & (wanted != wanted))).all())


def _spoilt(leaf: Tensor) -> Tensor:
    """NaN; 0 and 1 in the place of whole numbers, so that they still pick rows of a table."""
    return torch.full_like(leaf, torch.nan) if is_float(leaf) else (leaf == 0).to(leaf)
