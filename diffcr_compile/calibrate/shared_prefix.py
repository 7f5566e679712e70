"""Many runs of one graph that differ from some block on: what comes before that block runs once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from diffcr_compile.program import Program, flat_tensors


class SharedPrefix(fx.Interpreter):
    """Goes through a graph once, and runs what is left of it as often as it is asked to.

    It holds those values only that something ahead still reads. Where a run writes into one of them in place, they are made anew.

    Args:
        program: whose graph it is; its modules may change between two runs.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.module)
        self._nodes = list(program.graph.nodes)
        self._at = 0
        self._inputs: tuple[Tensor, ...] = ()

    def begin(self, inputs: Iterable[Tensor]) -> None:
        """Stand behind the last input; `inputs` are in placeholder order."""
        self._inputs = tuple(inputs)
        self.env, self.args_iter, self._at = {}, iter(self._inputs), 0
        last = max(n for n, node in enumerate(self._nodes) if node.op == "placeholder")
        self.go_to(self._nodes[last + 1])

    def go_to(self, node: fx.Node) -> None:
        """Run everything before `node`, which must not lie behind."""
        while self._nodes[self._at] is not node:
            self._step(self._nodes[self._at])
            self._at += 1

    def rest(self) -> list[Tensor]:
        """The graph's output tensors, run from here; it stands here afterwards."""
        held, here = self.env, self._nodes[self._at]
        tensors = [v for v in pytree.tree_leaves(list(held.values())) if isinstance(v, Tensor)]
        written = [tensor._version for tensor in tensors]
        self.env = dict(held)
        try:
            for node in self._nodes[self._at : -1]:
                self._step(node)
            found = flat_tensors(self.run_node(self._nodes[-1]))
        finally:
            self.env = held
        if written != [tensor._version for tensor in tensors]:
            self.begin(self._inputs)
            self.go_to(here)
        return found

    def _step(self, node: fx.Node) -> None:
        value: Any = self.run_node(node)
        self.env[node] = value
        for read_no_more in self.user_to_last_uses.get(node, ()):
            del self.env[read_no_more]
