"""Torch: eager, recorded as a CUDA graph, compiled by inductor, and both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.engines import Engine, UnavailableError
from diffcr_compile.program import flat_tensors

WARM_UP = 3


def make(name: str, module: nn.Module, call: Mapping[str, Tensor]) -> Engine:
    """A module in one of ``cases.TORCH``."""
    on_cuda = next(iter(call.values())).is_cuda
    if name in ("cuda_graph", "compile_cuda_graph") and not on_cuda:
        raise UnavailableError("CUDA graphs need a CUDA device")
    if name == "eager":
        return _called(lambda: module(**call))
    if name == "cuda_graph":
        return _recorded(module, call)
    return _compiled(module, call, on_cuda, graphs=name == "compile_cuda_graph")


def forget_compiled() -> None:
    """Drop compiled code of earlier cases: Dynamo's limit on recompiling counts all models of a class."""
    torch._dynamo.reset()


def _called(
    function: Callable[[], Any], before: Callable[[], None] = lambda: None, *remarks: str
) -> Engine:
    kept: list[Any] = [None]

    @torch.no_grad()
    def run() -> None:
        before()
        kept[0] = function()

    return Engine(run, lambda: flat_tensors(kept[0]), remarks)


def _recorded(module: nn.Module, call: Mapping[str, Tensor]) -> Engine:
    """All launches of a call as one: what is left is the work of the GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(WARM_UP):
            module(**call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = module(**call)
    return Engine(graph.replay, lambda: flat_tensors(output))


def _compiled(
    module: nn.Module, call: Mapping[str, Tensor], on_cuda: bool, graphs: bool
) -> Engine:
    backend = "inductor" if on_cuda else "eager"  # a CPU may have no compiler
    mode = "reduce-overhead" if graphs else None
    compiled = torch.compile(module, fullgraph=True, dynamic=False, backend=backend, mode=mode)
    before = torch.compiler.cudagraph_mark_step_begin if graphs else lambda: None
    return _called(lambda: compiled(**call), before, f"backend {backend}")
