"""What hangs on a model: refused by name with the fix, fused when asked, and nothing left changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import diffcr_compile as dcr
from diffcr_compile.attachments import checkpointing_off, prepared
from diffcr_compile.config import RoutingConfig
from diffcr_compile.errors import UnsupportedModelError
from tests import models, pipelines
from tests.conftest import equal


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return pipelines.flux()[0].transformer


class LoraLinear(nn.Module):
    """What peft's layers look like from outside: base_layer, lora_A, lora_B, merge, merged, disable_adapters."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict(
            {"style": nn.Linear(base_layer.in_features, rank, bias=False)}
        )
        self.lora_B = nn.ModuleDict(
            {"style": nn.Linear(rank, base_layer.out_features, bias=False)}
        )
        self.active_adapters = ["style"]
        self.merged = self.disable_adapters = False

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        out: Tensor = self.base_layer(x)
        return (
            out
            if self.merged or self.disable_adapters
            else out + self.lora_B["style"](self.lora_A["style"](x))
        )

    @torch.no_grad()
    def merge(self) -> None:
        self.base_layer.weight += self.lora_B["style"].weight @ self.lora_A["style"].weight
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        self.base_layer.weight -= self.lora_B["style"].weight @ self.lora_A["style"].weight
        self.merged = False


def with_lora(model: nn.Module) -> nn.Module:
    for name in [n for n, m in model.named_modules() if n.endswith(("to_q", "to_v"))]:
        model.set_submodule(name, LoraLinear(model.get_submodule(name)))  # type: ignore[arg-type]
    return model


def test_a_plain_model_is_passed_on_as_it_is(model: Any) -> None:
    assert prepared(model) is model


def test_adapters_are_refused_with_the_fix() -> None:
    dit, inputs = models.DIFFUSERS["dit"]()
    adapted = with_lora(copy.deepcopy(dit))
    words = r"transformer_blocks\.0\.attn1\.to_q.*fuse_lora\(\).*merge_and_unload"
    with pytest.raises(UnsupportedModelError, match=words):
        dcr.route(adapted, inputs)
    plan = dcr.inspect(adapted, inputs)  # raises nothing
    assert plan.error is not None
    assert re.search(words, plan.error)
    assert plan.next_command() is None
    assert words[:10].replace("\\", "") in str(plan)


def test_adapters_are_refused_by_compile_before_anything_is_written(tmp_path: Any) -> None:
    dit, inputs = models.DIFFUSERS["dit"]()
    with pytest.raises(UnsupportedModelError, match="adapters"):
        dcr.compile(with_lora(copy.deepcopy(dit)), tmp_path / "out", example_inputs=inputs)
    assert not (tmp_path / "out").exists()


def test_adapters_are_fused_on_a_copy_when_asked() -> None:
    dit, inputs = models.DIFFUSERS["dit"]()
    adapted = with_lora(copy.deepcopy(dit)).eval()
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    with torch.no_grad():
        expected = adapted(**inputs).sample
        routed = dcr.route(adapted, inputs, RoutingConfig(fuse_adapters=True))
        found = routed(**inputs).sample
        plain = dit(**inputs).sample
    assert torch.allclose(found, expected, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3  # the adapters do something
    assert all(torch.equal(t, before[n]) for n, t in adapted.state_dict().items())
    assert isinstance(adapted.get_submodule("transformer_blocks.0.attn1.to_q"), LoraLinear)


@pytest.mark.parametrize("merged", [False, True])
def test_adapters_that_are_switched_off_are_not_fused(merged: bool) -> None:
    dit, inputs = models.DIFFUSERS["dit"]()
    adapted = with_lora(copy.deepcopy(dit)).eval()
    for layer in (m for m in adapted.modules() if isinstance(m, LoraLinear)):
        if merged:
            layer.merge()
        layer.disable_adapters = True
    fused = prepared(adapted, fuse_adapters=True)
    assert fused is not adapted
    assert not any(isinstance(m, LoraLinear) for m in fused.modules())
    with torch.no_grad():
        found, expected = fused(**inputs).sample, dit(**inputs).sample
    # merged and taken out again, weights keep a rounding
    assert torch.allclose(found, expected, atol=1e-5 if merged else 0.0)


def test_only_those_adapters_of_peft_that_are_on_are_fused() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.ModuleDict({"on": nn.Linear(4, 4), "off": nn.Linear(4, 4)})
    config = peft.LoraConfig(target_modules=["on", "off"], init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, copy.deepcopy(net))
    adapted["off"].enable_adapters(False)
    fused = prepared(adapted, fuse_adapters=True)
    assert torch.equal(fused["off"].weight, net["off"].weight)
    assert not torch.allclose(fused["on"].weight, net["on"].weight)
    x = torch.randn(3, 4)
    for name in net:
        assert torch.allclose(fused[name](x), adapted[name](x), atol=1e-6)


def test_an_adapter_that_cannot_be_taken_out_again_is_refused(model: Any) -> None:
    layer = LoraLinear(nn.Linear(2, 2))
    layer.merged = layer.disable_adapters = True
    layer.unmerge = None  # type: ignore[assignment]
    model.foreign = layer
    with pytest.raises(UnsupportedModelError, match=r"foreign .* has no unmerge"):
        prepared(model, fuse_adapters=True)


def test_an_adapter_that_cannot_be_merged_is_refused_also_when_fusing_is_asked(
    model: Any,
) -> None:
    layer = nn.Module()
    layer.lora_A, layer.lora_B = nn.Linear(2, 2), nn.Linear(2, 2)
    model.foreign = layer
    with pytest.raises(UnsupportedModelError, match=r"foreign \(Module\) has no merge"):
        prepared(model, fuse_adapters=True)


def test_a_peft_config_alone_is_refused(model: Any) -> None:
    model.peft_config = {"style": object()}
    with pytest.raises(UnsupportedModelError, match="peft_config"):
        prepared(model)


CACHES = {
    "first_block": (FirstBlockCacheConfig(threshold=0.1), "fbc_leader_block_hook"),
    "pyramid": (
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
        "pyramid_attention_broadcast",
    ),
    "faster": (
        FasterCacheConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
        "faster_cache_denoiser",
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_caches_of_diffusers_are_named_and_after_their_removal_all_is_well(
    name: str, model: Any
) -> None:
    config, hook = CACHES[name]
    model.enable_cache(config)
    with pytest.raises(UnsupportedModelError, match=rf"{hook}.*disable_cache\(\)"):
        prepared(model)
    model.disable_cache()
    assert prepared(model) is model


def test_layerwise_casting_is_refused(model: Any) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(UnsupportedModelError, match=r"layerwise_casting.*load the model anew"):
        prepared(model)


def test_group_offloading_is_refused(model: Any) -> None:
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(UnsupportedModelError, match=r"group_offloading.*enable_group_offload"):
        prepared(model)


def test_an_accelerate_hook_is_refused(model: Any) -> None:
    class AlignDevicesHook:
        pass

    model.transformer_blocks[0]._hf_hook = AlignDevicesHook()
    with pytest.raises(
        UnsupportedModelError,
        match=r"AlignDevicesHook.*transformer_blocks\.0.*remove_all_hooks",
    ):
        prepared(model)


def test_weights_partly_on_meta_are_refused_and_a_whole_model_on_meta_is_not(
    model: Any,
) -> None:
    whole = copy.deepcopy(model).to("meta")
    assert prepared(whole) is whole
    model.transformer_blocks[0].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"meta device \(transformer_blocks\.0"):
        prepared(model)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_a_hook_of_torch_is_refused_with_its_module_and_function(
    kind: str, model: Any
) -> None:
    def skip_some(*_: Any) -> None:
        return None

    handle = getattr(model.proj_out, f"register_{kind}")(skip_some)
    with pytest.raises(
        UnsupportedModelError, match=r"test_attachments.*skip_some on proj_out.*\.remove\(\)"
    ):
        prepared(model)
    handle.remove()
    assert prepared(model) is model


def test_a_replaced_forward_is_refused(model: Any) -> None:
    block = model.transformer_blocks[0]
    original = block.forward

    def cached_forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    block.forward = cached_forward
    with pytest.raises(
        UnsupportedModelError,
        match=r"transformer_blocks\.0 \(by .*cached_forward\).*del module",
    ):
        prepared(model)
    del block.forward
    assert prepared(model) is model


def test_gradient_checkpointing_is_off_for_the_capture_and_on_again(model: Any) -> None:
    runs = pipelines.flux()[0]
    runs.transformer = model
    model.enable_gradient_checkpointing()
    routed = dcr.route(runs, pipeline_inputs=pipelines.flux()[1])
    assert model.gradient_checkpointing
    with checkpointing_off(model):
        assert not model.gradient_checkpointing
    example = dict(routed.program.example)
    with torch.no_grad():
        dense = model(**example, return_dict=False, joint_attention_kwargs={})
        assert equal(routed(**example, return_dict=False, joint_attention_kwargs={}), dense)
    # training the graph goes through, gradients reach the user's weights
    routed(**example, return_dict=False, joint_attention_kwargs={})[0].sum().backward()
    assert model.proj_out.weight.grad is not None


def test_a_scripted_module_is_refused_and_a_scripted_function_is_not() -> None:
    model, inputs = models.plain()
    model.blocks[1].mlp = torch.jit.script(model.blocks[1].mlp)
    with pytest.raises(
        UnsupportedModelError, match=r"torch\.jit\.script.*blocks\.1\.mlp,.*state_dict"
    ):
        prepared(model)

    @torch.jit.script
    def shifted(x: Tensor, by: Tensor) -> Tensor:
        return x + by.unsqueeze(1)

    class Shifted(models.OwnDiT):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return super().forward(shifted(x.flatten(2), 0 * t[:, None]).view_as(x), t)

    model = Shifted().eval()
    with torch.no_grad():
        assert torch.equal(dcr.route(model, inputs)(**inputs), model(**inputs))


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_weights_that_a_hook_computes_are_refused_and_the_cures_work(kind: str) -> None:
    def made() -> tuple[Any, dict[str, Any], nn.Linear]:
        torch.manual_seed(0)
        model, inputs = models.plain()
        return model, inputs, model.blocks[0].mlp[0]

    model, inputs, layer = made()
    getattr(nn.utils, kind)(layer)
    model.eval()
    with pytest.raises(
        UnsupportedModelError,
        match=rf"nn\.utils\.{kind} .*blocks\.0\.mlp\.0 .*remove_{kind}.*parametrizations\.{kind}",
    ):
        dcr.route(model, inputs)
    getattr(nn.utils, f"remove_{kind}")(layer)
    same_by_parametrization, _, layer = made()
    getattr(nn.utils.parametrizations, kind)(layer)
    for cured in (model, same_by_parametrization.eval()):
        with torch.no_grad():
            assert torch.equal(dcr.route(cured, inputs)(**inputs), cured(**inputs))


# --------------------------------------------------------------------------- several processes


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone, which the wrappers want."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_is_refused(process_group: None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(UnsupportedModelError, match="sharded over processes") as caught:
        prepared(model)
    assert caught.value.code == "DCR-M002"
    assert "torchrun" in str(caught.value)


def test_a_wrapped_model_is_refused(process_group: None) -> None:
    model = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
    with pytest.raises(UnsupportedModelError, match=r"model\.module"):
        prepared(model)
    assert prepared(model.module) is model.module


def test_a_compiled_module_is_refused_with_the_way_back() -> None:
    model, _ = models.tiny_dit()
    with pytest.raises(UnsupportedModelError, match=r"the model itself.*_orig_mod"):
        prepared(torch.compile(model), False)
    part = copy.deepcopy(model)
    part.transformer_blocks[1] = torch.compile(part.transformer_blocks[1])
    with pytest.raises(UnsupportedModelError, match=r"transformer_blocks.1,.*_orig_mod"):
        prepared(part, False)
    part.transformer_blocks[1] = part.transformer_blocks[1]._orig_mod
    assert prepared(part, False) is part
