"""Fully sharded training (FSDP, Zhao et al. 2023): every rank holds a share of each routed block's weights.

So does it of their gradients, of the optimizers' moments and of the moving averages. A block is put together from all
ranks just before it runs, in the forward and again in the backward, and let go of behind it. The graph is captured,
calibrated and frozen as ever: blocks are sharded when a calibration begins and whole again at its end.

What is not inside a routed block (embeddings, routers) is small and stays whole; so do single numbers.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from diffcr_compile.calibrate.distributed import Ranks, bit_sum
from diffcr_compile.calibrate.sharded_tensors import whole
from diffcr_compile.copied import copied
from diffcr_compile.errors import UsageError
from diffcr_compile.program import Program


@contextlib.contextmanager
def sharded_blocks(program: Program, ranks: Ranks) -> Iterator[None]:
    """The weights of a program's routed blocks are shared out among the ranks while the context lasts.

    Args:
        program: ROUTED, with weights of its own, the same on every rank. Should the context fail, these are gone. No graph may
            be made from it meanwhile: passes run blocks on tensors without numbers, and blocks ask other ranks for theirs.
        ranks: more than one.

    Raises:
        UsageError: there is one rank only, or no block whose weights nothing else uses; in the first step: a block writes to
            its own weights.
    """
    if ranks.count == 1:
        raise UsageError(
            "calibration.shard shares weights out among processes, and this is the only one: start the command "
            "under torchrun (docs/training.md), or set calibration.shard: false",
            code="DCR-U079",
        )
    # half a second to import, which nobody else should wait for
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(program.device.type, (ranks.count,))
    module = program.module
    whole_blocks: dict[str, nn.Module] = {}
    for name in _shardable(program):
        block = module.get_submodule(name)
        # there is no way back from a sharded module: another one around the same parameters waits for what is learned
        whole_blocks[name] = copied(block, {id(p): p for p in block.parameters()})
        _Watched(name, block)
        scalars = {p for p in block.parameters() if p.ndim == 0}  # cannot be split
        fully_shard(
            block, mesh=mesh, reshard_after_forward=True, ignored_params=scalars or None
        )
        for parameter in set(whole_blocks[name].parameters()) - scalars:
            parameter.data = parameter.data.new_empty(0)
    yield
    with ranks.exchanging():
        for name, block in whole_blocks.items():
            learned = module.get_submodule(name)
            for key, parameter in block.named_parameters():
                parameter.data = whole(learned.get_parameter(key).detach())
            module.set_submodule(name, block.train(learned.training))


class _Watched:
    """Two habits of blocks that FSDP would answer with wrong numbers; to be put on a block before FSDP is."""

    def __init__(self, name: str, block: nn.Module) -> None:
        self.name, self.bits, self.is_known = name, 0, False
        block.register_forward_pre_hook(self.before)
        block.register_forward_hook(self.after)

    def before(self, block: nn.Module, _: Any) -> None:
        """Its weights are whole by now."""
        if torch.is_grad_enabled() and not self.is_known:
            self.bits = sum(map(bit_sum, block.parameters()))

    def after(self, block: nn.Module, _: Any, output: Any) -> Any:
        """Its weights are whole still."""
        if torch.is_grad_enabled() and not self.is_known:
            self.is_known = True
            if self.bits != sum(map(bit_sum, block.parameters())):
                raise UsageError(
                    f"{self.name} writes to its own weights whenever it runs, as weights that are kept normalised do. It would "
                    "write to weights that are put together for the moment, and in vain: set calibration.shard: false",
                    code="DCR-U079",
                )
        # FSDP puts weights together for the backward by hooks on outputs, which a later write into a view would drop
        return tree_map_only(
            Tensor, lambda tensor: tensor.clone() if tensor._is_view() else tensor, output
        )


def _shardable(program: Program) -> list[str]:
    """Routed blocks with real parameters of one type that nothing else uses, be it another module or the graph itself."""
    module = program.module
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    found = []
    for spec in program.blocks:
        block = module.get_submodule(spec.name)
        own = Counter(id(p) for _, p in block.named_parameters(remove_duplicate=False))
        # FSDP takes one type, and sends no complex numbers
        kinds = {p.dtype for p in block.parameters()}
        alone = all(uses[p] == own[p] for p in own) and not program.reads_weights_of(spec.name)
        if alone and len(kinds) == 1 and all(kind.is_floating_point for kind in kinds):
            found.append(spec.name)
    if not found:
        raise UsageError(
            "calibration.shard shares out the weights of routed blocks, and this model has none whose weights are "
            "its own: all are used by other modules too, or by the graph, or are real numbers of several types. Set "
            "calibration.shard: false; checkpointing and precision: bf16 take less memory as well",
            code="DCR-U079",
        )
    return found
