"""How one candidate is looked at, from its recorded call to the roles of its arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from diffcr_compile.blocks import BlockSpec, Path, StreamView, TokenAxis, get_leaf, leaves
from diffcr_compile.outside import Outside, record_calls
from diffcr_compile.parts import PartFindings, find_parts
from diffcr_compile.recorded import Call, IllegalError, check_static, output_tensors
from diffcr_compile.residual import Pairs, is_float, residual_pairs
from diffcr_compile.streams import Moved, image_stream, sample_input
from diffcr_compile.trial import Trial
from diffcr_compile.views import guess_view


class Examiner:
    """How candidates are looked at. A dry run has a quicker way (``planning/dry_run.py``).

    One examiner is for one model and one set of example inputs.
    """

    _recorded: tuple[Any, tuple[Mapping[str, list[Call]], Any]] | None = None

    def prepared(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        candidates: Mapping[str, nn.Module],
    ) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        """The model that is run, and its candidates."""
        return model, candidates

    def views(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        candidates: Mapping[str, nn.Module],
    ) -> dict[str, StreamView]:
        """How candidates are shown whose streams are not batch first, see ``views.py``."""
        return guess_views(args, kwargs, *self.recorded(model, args, kwargs, candidates))

    def recorded(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        candidates: Mapping[str, nn.Module],
    ) -> tuple[Mapping[str, list[Call]], Any]:
        """The calls of the candidates and the output of one forward, which is asked for twice where nothing is turned."""
        key = (model, dict(candidates))
        if self._recorded is None or self._recorded[0] != key:
            self._recorded = (
                key,
                record_calls(model, args, kwargs, candidates, identity=False),
            )
        return self._recorded[1]

    def pairs(self, name: str, module: nn.Module, call: Call) -> Pairs:
        """See ``residual.residual_pairs``."""
        return residual_pairs(module, call)

    def examine(
        self,
        name: str,
        module: nn.Module,
        calls: Sequence[Call],
        moved: Moved | None,
        known: Sequence[BlockSpec],
    ) -> BlockSpec:
        """See :func:`examine`."""
        return examine(name, module, calls, moved, known)

    def parts(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        wanted: Mapping[str, nn.Module],
        every: Mapping[str, nn.Module],
        sample: Path,
    ) -> dict[str, PartFindings]:
        """See ``parts.find_parts``.

        Args:
            model: the whole model.
            args: its positional inputs.
            kwargs: its keyword inputs.
            wanted: blocks whose parts are wanted.
            every: all blocks of the model.
            sample: path of the noisy sample.
        """
        calls, _ = record_calls(model, args, kwargs, wanted, identity=False)
        every = {name: module for name, module in every.items() if name not in wanted}
        pairs = {n: self.pairs(n, wanted[n], recorded[0]) for n, recorded in calls.items()}
        outside = Outside(
            model, (tuple(args), dict(kwargs)), {**every, **wanted}, sample, pairs
        )
        return find_parts(wanted, calls, outside)


def guess_views(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    calls: Mapping[str, Sequence[Call]],
    output: Any,
) -> dict[str, StreamView]:
    """The layouts of candidates that are called once and whose streams are not batch first.

    Args:
        args: positional inputs of the model.
        kwargs: its keyword inputs.
        calls: its calls of the candidates.
        output: its output.
    """
    sample = sample_input(args, kwargs, output)
    if not sample:
        return {}
    batch = int(get_leaf((tuple(args), dict(kwargs)), sample).shape[0])
    guesses = {
        n: guess_view(recorded[0], batch)
        for n, recorded in calls.items()
        if len(recorded) == 1
    }
    return {name: view for name, view in guesses.items() if view is not None}


def examine(
    name: str,
    module: nn.Module,
    calls: Sequence[Call],
    moved: Moved | None,
    known: Sequence[BlockSpec],
) -> BlockSpec:
    """The roles of one candidate's arguments, or IllegalError."""
    if len(calls) != 1:
        raise IllegalError(
            f"it is called {len(calls)} times per forward; a routed block runs once"
        )
    call = calls[0]
    if call.fault:
        raise IllegalError(call.fault)
    pairs = moved.pairs if moved is not None else None
    if pairs is None and moved is not None:
        pairs = residual_pairs(module, call)
    stream, output, span = image_stream(call, moved, pairs)
    assert moved is not None
    assert pairs is not None
    source: Tensor = get_leaf(call.tree, stream)
    start, num_tokens = span
    axis = TokenAxis(stream, 1, start)
    unread = frozenset(
        path
        for path, leaf in leaves(call.output)
        if isinstance(leaf, Tensor)
        and (path not in pairs or not is_float(leaf))
        and not moved.outside.is_read(name, path)
    )
    trial = Trial(module, call, axis, output, num_tokens, unread)
    wanted = _alike(known, call, stream) or ()
    aligned, error = trial.smallest_alignment(wanted)
    aligned = trial.per_sample(aligned)
    trial.check_counts(aligned)
    check_static(module, call)
    # In this order: what gets past is found out once for all blocks, a residual in each by itself.
    is_branch = name in moved.outside.bypassed and not trial.has_own_residual()
    if is_branch and not moved.outside.adds(name, output):
        raise IllegalError(
            "it has no residual of its own, and the model does more with its output than to add it to "
            "a stream, so it is not known what a token would get that bypasses it; move the residual "
            "into the block"
        )
    outputs = list(output_tensors(call.output))
    return BlockSpec(
        name=name,
        stream=axis,
        output=output,
        aligned=aligned,
        num_tokens=num_tokens,
        width=source.shape[2],
        shares_index=any(not leaf.batched for leaf in aligned),
        removable=len(outputs) == 1 and num_tokens == source.shape[1],
        error=error,
        bypass="zeros" if is_branch else "stream",
    )


def _alike(
    known: Sequence[BlockSpec], call: Call, stream: Path
) -> tuple[TokenAxis, ...] | None:
    """Roles of an earlier block that has all these arguments: worth trying first."""
    present = {path for path, _ in leaves(call.tree)}
    for spec in reversed(known):
        if spec.stream.path == stream and all(leaf.path in present for leaf in spec.aligned):
            return spec.aligned
    return None
