"""One forward of a model on fake tensors, and what it shows of its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from diffcr_compile.blocks import TokenAxis, get_leaf, leaves, map_leaves
from diffcr_compile.candidates import block_candidates
from diffcr_compile.cut import cut_arguments
from diffcr_compile.dynamo_state import forgotten_failures
from diffcr_compile.errors import one_line
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.macs import flop_counter
from diffcr_compile.planning.copies import to_fake
from diffcr_compile.planning.op_trace import OpTrace, buffer_contents
from diffcr_compile.recorded import Call, Given
from diffcr_compile.views import shown

Tree = tuple[tuple[Any, ...], dict[str, Any]]


class FakeRun:
    """One forward on fake tensors: the calls of the candidates, their traces and MACs."""

    def __init__(
        self,
        model: nn.Module,
        twin: nn.Module,
        tree: Tree,
        mode: FakeTensorMode,
        names: Sequence[str] | None = None,
    ) -> None:
        self.mode = mode
        self.batch = max(
            (t for _, t in leaves(tree) if isinstance(t, Tensor)), key=_axes
        ).shape[0]
        names = [n for n, _ in block_candidates(twin)] if names is None else names
        self.modules = {name: twin.get_submodule(name) for name in names}
        self.contents = {n: buffer_contents(model.get_submodule(n)) for n in names}
        self.calls: dict[str, list[Call]] = {}
        self.digests: dict[str, str] = {}
        self.macs: dict[str, float] = {}
        self._halves: dict[Any, str] = {}
        self.trace, self.counter = OpTrace(), flop_counter()
        args, kwargs = map_leaves(tree, lambda _, leaf: to_fake(leaf, mode))
        handles = [h for name in names for h in self._watch(name)]
        try:
            with (
                kept_caches(twin),
                forgotten_failures(),
                torch.no_grad(),
                mode,
                self.counter,
                self.trace,
            ):
                self.output = twin(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        self.total_macs = self.counter.get_total_flops() / 2 / self.batch

    def _watch(self, name: str) -> Iterator[Any]:
        flops = 0
        given = Given((), {})

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal flops, given
            given = Given(args, kwargs)
            flops = self.counter.get_total_flops()
            self.trace.start(module, (args, kwargs), self.contents[name])

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self.digests[name] = self.trace.stop(output)
            spent = (self.counter.get_total_flops() - flops) / 2 / self.batch
            self.macs[name] = self.macs.get(name, 0.0) + spent
            call = Call(given.tree, output, given.fault(args, kwargs))
            self.calls.setdefault(name, []).append(call)

        module = self.modules[name]
        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after, with_kwargs=True)

    def digest_of_half(self, name: str, axes: tuple[TokenAxis, ...], num_tokens: int) -> str:
        """Trace of a block on half of its image tokens, or why it does not run on them."""
        key = (name, axes, num_tokens)
        if key not in self._halves:  # the tried block is compared with many
            with kept_caches(self.modules[name]):
                self._halves[key] = self._trace_half(name, axes, num_tokens)
        return self._halves[key]

    def _trace_half(self, name: str, axes: tuple[TokenAxis, ...], num_tokens: int) -> str:
        tree, trace = self.calls[name][0].tree, OpTrace()
        stream = get_leaf(tree, axes[0].path)
        shape = (stream.shape[0], max(1, num_tokens // 2))  # samples may be folded with frames
        try:
            with torch.no_grad(), self.mode:
                index = torch.zeros(shape, dtype=torch.int64, device=stream.device)
                args, kwargs = cut_arguments(tree, axes, index, num_tokens)
                trace.start(self.modules[name], (args, kwargs), self.contents[name])
                with trace:
                    output = shown(self.modules[name])(*args, **kwargs)
                return trace.stop(output)
        except Exception as error:  # noqa: BLE001 - the user's block may raise anything
            return short(error)


def _axes(tensor: Tensor) -> int:
    return tensor.ndim


def short(error: BaseException) -> str:
    """An error as part of a sentence."""
    return one_line(error, limit=300)
