"""``dcr.remove``: the model comes back as it was, whatever was done with its routed graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import diffcr_compile as dcr
from diffcr_compile.config import make_config
from diffcr_compile.errors import UsageError
from tests import models

SHORT = {
    "routing": {"buckets": 2, "multiple_of": 8},
    "rollouts": {"trajectories": 2, "steps": 2, "batch": 2},
    "calibration": {"steps": 4, "batch": 2},
}


def described(model: nn.Module) -> dict[str, Any]:
    """All that may differ: modules by identity, what hangs on them, switches, bits, gradients."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "modules": {
            name: (
                id(module),
                type(module),
                module.training,
                sorted(vars(module)),
                [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")],
            )
            for name, module in model.named_modules()
        },
        "tensors": {
            name: (
                id(t),
                t.detach().clone().numpy().tobytes(),
                t.requires_grad,
                t.grad is None,
            )
            for name, t in tensors.items()
        },
    }


def test_routing_freezing_and_running_leave_nothing_on_the_model() -> None:
    model, inputs = models.tiny_flux()
    before = described(model)
    routed = dcr.route(model, inputs)
    frozen = dcr.freeze(routed, keep_ratio=0.5)
    frozen[0](**inputs)
    assert described(model) == before  # there is nothing to undo
    assert dcr.remove(routed) is model
    assert dcr.remove(frozen[0]) is model
    assert dcr.remove(copy.deepcopy(routed)) is model
    assert described(model) == before


@pytest.mark.parametrize("train", ["router", "all"])
def test_after_calibration_the_model_is_as_it_was(train: str) -> None:
    model, inputs = models.tiny_dit()
    model.transformer_blocks[1].train()  # a switch of the user's own
    model.pos_embed.requires_grad_(False)
    before = described(model)
    routed = dcr.route(model, inputs)
    config = make_config({**SHORT, "calibration": {**SHORT["calibration"], "train": train}})
    dcr.calibrate(routed, budget="70%", config=config)
    routed.train()
    assert dcr.remove(routed) is model
    assert described(model) == before


def test_changed_weights_are_named_and_may_be_accepted() -> None:
    model, inputs = models.tiny_dit()
    routed = dcr.route(model, inputs)
    optimizer = torch.optim.SGD(routed.parameters(), lr=0.1)
    routed(**inputs)[0].square().mean().backward()
    optimizer.step()
    with pytest.raises(
        UsageError, match=r"weights of DiTTransformer2DModel were changed.*pos_embed"
    ) as e:
        dcr.remove(routed)
    assert e.value.code == "DCR-U050"
    assert dcr.remove(routed, accept_changes=True) is model
    assert all(p.grad is None for p in model.parameters())


def test_a_replaced_weight_is_a_change_and_a_gradient_of_the_users_own_is_kept() -> None:
    model, inputs = models.tiny_dit()
    model.proj_out_2.weight.grad = torch.ones_like(model.proj_out_2.weight)
    routed = dcr.route(model, inputs)
    assert dcr.remove(routed) is model
    assert model.proj_out_2.weight.grad is not None
    model.proj_out_2.weight = nn.Parameter(model.proj_out_2.weight.detach().clone())
    with pytest.raises(UsageError, match=r"1 of \d+ weights.*proj_out_2\.weight"):
        dcr.remove(routed)


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected a graph from dcr\.route"):
        dcr.remove(models.tiny_dit()[0])


def test_the_text_of_a_graph_says_what_each_node_is_for() -> None:
    """Golden: the lines of one block, as a reader of ``print_readable`` sees them."""
    model, inputs = models.tiny_dit()
    frozen = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)[0]
    text = frozen.print_readable(print_output=False)
    lines = [line.split(";")[0].strip() for line in text.splitlines()]
    start = next(
        i for i, line in enumerate(lines) if line.startswith("transformer_blocks_1_logits")
    )
    shown = [line.split("(")[0] for line in lines[start : start + 5]]
    assert shown == [
        "transformer_blocks_1_logits = self.transformer_blocks_1_router",
        "transformer_blocks_1_index = diffcr_compile_routing_select_tokens",
        "transformer_blocks_1_kept = diffcr_compile_routing_gather_tokens",
        "transformer_blocks_1 = getattr",
        "transformer_blocks_1_scatter = diffcr_compile_routing_scatter_tokens",
    ]
    assert "32, False)" in lines[start + 1]  # K is an integer in the text
