"""The image stream of each block: which input is denoised, where it arrives, and what it becomes.

All of it is found by changing something in front of the blocks or in their place, and looking at what
moves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcr_compile.blocks import Path, get_leaf, leaves, map_leaves
from diffcr_compile.recorded import Call, IllegalError, output_tensors, run_recorded
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


# What models call the noisy sample: an image to edit, or another condition, may have its shape.
SAMPLE_NAMES = ("sample", "hidden_states", "x", "x_t", "z", "z_t", "latents", "noisy_latents")


def sample_input(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Path:
    """The input that is denoised, () if none can be told from the others.

    In this order: a float tensor of the output's shape, among several the one that is called as samples
    usually are, else the first; one that differs from it in one axis; the
    only float tensor with more than two axes; codes (integers) of the output's batch and sides.
    """
    result = next(output_tensors(output), None)
    tensors = [
        (path, leaf)
        for path, leaf in leaves((tuple(args), dict(kwargs)))
        if isinstance(leaf, Tensor)
    ]
    floats = [(path, leaf) for path, leaf in tensors if leaf.is_floating_point()]
    wide = [(path, leaf) for path, leaf in floats if leaf.ndim >= 3]
    if result is None:
        return wide[0][0] if wide else ()
    alike = [p for p, leaf in floats if leaf.ndim >= 2 and leaf.shape == result.shape]
    if alike:
        return next((path for path in alike if path[-1] in SAMPLE_NAMES), alike[0])
    for path, leaf in wide:
        if leaf.ndim == result.ndim:
            differing = sum(a != b for a, b in zip(leaf.shape, result.shape, strict=True))
            if differing <= 1:
                return path
    for path, leaf in tensors:
        is_code = not (leaf.is_floating_point() or leaf.is_complex()) and leaf.ndim >= 2
        if is_code and leaf.shape in _without_channels(result.shape):
            return path
    return wide[0][0] if len(wide) == 1 else ()


def _without_channels(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """A shape with one axis left out, not the batch."""
    return [(*shape[:axis], *shape[axis + 1 :]) for axis in range(1, len(shape))]


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


@dataclasses.dataclass(frozen=True)
class Moved:
    """What moves in one block's arguments when the image does, all blocks being the identity.

    Attributes:
        tokens: argument (B, L, C) -> positions on axis 1 that move.
        rows: the same on axis 0.
        first_sample: both (rows, tokens) when the image of the first sample alone changes; None if
            there is but one sample.
        pairs: which input for which output; None if nobody has looked.
        outside: what else can be found out about the model around the blocks.
    """

    tokens: Mapping[Path, Tensor]
    rows: Mapping[Path, Tensor]
    first_sample: Mapping[Path, tuple[Tensor, Tensor]] | None
    pairs: Pairs | None
    outside: Outside


def moved_positions(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    candidates: Mapping[str, nn.Module],
    sample: Path,
    pairs: Mapping[str, Pairs] | None = None,
) -> dict[str, Moved]:
    """Per block: which positions of its arguments depend on the image, blocks being identity."""
    if not sample:
        return {}
    outside = Outside(model, (tuple(args), dict(kwargs)), candidates, sample, pairs or {})
    try:
        before = outside.before[0]
        after = outside.identity(outside.changed(slice(None)))[0]
        first = outside.identity(outside.changed(slice(1)))[0] if outside.size > 1 else None
    except Exception:  # noqa: BLE001 - a block whose output is no input cannot be an identity
        return {}
    found: dict[str, Moved] = {}
    for name in before:
        moved = moved_on(before[name][0], after[name][0])
        found[name] = Moved(
            tokens={path: axes[1] for path, axes in moved.items()},
            rows={path: axes[0] for path, axes in moved.items()},
            first_sample=moved_on(before[name][0], first[name][0]) if first else None,
            pairs=(pairs or {}).get(name),
            outside=outside,
        )
    return found


def moved_on(before: Call, after: Call) -> dict[Path, tuple[Tensor, Tensor]]:
    """Per argument of three axes: which rows of axis 0, and of axis 1, differ."""
    others = dict(leaves(after.tree))
    found = {}
    for path, leaf in leaves(before.tree):
        if is_float(leaf) and leaf.ndim == 3:
            differs = (leaf != others[path]).any(2)
            found[path] = (differs.any(1), differs.any(0))
    return found


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

        def zeros(name: str, tree: Any, output: Any) -> Any:
            pairs = self.pairs.get(name) or first_come(tree, output)
            return map_leaves(
                output, lambda path, leaf: torch.zeros_like(leaf) if path in pairs else leaf
            )

        try:
            with torch.no_grad():
                one, two = (
                    run_recorded(self.model, args, kwargs, self.candidates, zeros)
                    for args, kwargs in (self.tree, self.changed(slice(None)))
                )
        except Exception:  # noqa: BLE001 - the user's model may raise anything
            return frozenset()
        names = list(one[0])
        reached = []
        for name in names:
            call, other = one[0][name][0], two[0][name][0]
            pairs = self.pairs.get(name) or first_come(call.tree, call.output)
            reached.append(
                any(
                    not torch.equal(get_leaf(call.tree, path), get_leaf(other.tree, path))
                    for path in pairs.values()
                )
            )
        outputs = zip(output_tensors(one[1]), output_tensors(two[1]), strict=True)
        reached.append(any(not torch.equal(a, b) for a, b in outputs))
        return frozenset(name for name, past in zip(names, reached[1:], strict=True) if past)

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


def image_stream(
    call: Call, moved: Moved | None, pairs: Pairs | None = None
) -> tuple[Path, Path, tuple[int, int]]:
    """(path in the call, path in the output, (start, num_tokens)) of the image stream.

    Args:
        call: a call of the block.
        moved: which of its arguments follow the image.
        pairs: which input for which output; those of `moved`, or first come first served, without.
    """
    if moved is None:
        raise IllegalError(
            "it does not run when the other blocks are replaced by the identity"
        )
    results = [(path, leaf) for path, leaf in leaves(call.output) if isinstance(leaf, Tensor)]
    if not results:
        raise IllegalError(
            f"its output is {type(call.output).__name__}, with no tensor in a tuple or list"
        )
    if pairs is None:
        pairs = moved.pairs if moved.pairs is not None else first_come(call.tree, call.output)
    sources = {
        out: source for out, source in pairs.items() if is_float(get_leaf(call.tree, source))
    }
    if not sources:
        shapes = [tuple(leaf.shape) for _, leaf in results]
        raise IllegalError(
            f"no input has the shape of its output {shapes}, so a token cannot bypass it"
        )
    streams = [
        (sources[out], out)
        for out, _ in results
        if out in sources and sources[out] in moved.tokens and moved.tokens[sources[out]].any()
    ]
    if not streams:
        shapes = sorted({tuple(get_leaf(call.tree, path).shape) for path in sources.values()})
        raise IllegalError(
            f"no image token reaches it in a (batch, tokens, channels) stream; its streams are {shapes}"
        )
    if len(streams) > 1:
        raise IllegalError(f"it carries {len(streams)} image streams; one is needed")
    path, output_path = streams[0]
    _check_batch_axis(path, moved, tuple(get_leaf(call.tree, path).shape))
    where = moved.tokens[path].nonzero().flatten()
    start, count = int(where[0]), len(where)
    if int(where[-1]) - start + 1 != count:
        raise IllegalError(
            f"its {count} image tokens are not contiguous ({start} to {int(where[-1])})"
        )
    if count < 2:
        raise IllegalError(f"its stream has {count} image token")
    return path, output_path, (start, count)


def _check_batch_axis(path: Path, moved: Moved, shape: tuple[int, ...]) -> None:
    """The first sample alone must move fewer rows of axis 0, and the same ones of axis 1."""
    if moved.first_sample is None:
        return
    rows, tokens = moved.first_sample[path]
    if torch.equal(rows, moved.rows[path]) and not torch.equal(tokens, moved.tokens[path]):
        raise IllegalError(
            f"axis 1 of its stream {shape} runs along the samples of the batch and not, or not only, "
            "along tokens: the stream must be (batch, tokens, channels), with the batch first"
        )
