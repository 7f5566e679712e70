"""What hangs on a model that a graph would lose or apply twice: adapters, hooks, offloading.

A graph is cut out of the modules' own computation. Whatever others put around it at run time (a cache
that skips blocks, a hook that moves weights, an adapter that may be switched off) is either missing in
the graph or frozen into it, so it is refused by name, with the call that takes it off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from diffcr_compile.copied import copied
from diffcr_compile.errors import UnsupportedModelError

SHOWN = 3
_WRAPPERS = ("DistributedDataParallel", "DataParallel")
_SHARDED = ("FSDPModule", "FullyShardedDataParallel")
_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
}


def prepared(model: nn.Module, fuse_adapters: bool = False) -> nn.Module:
    """The model as it may be captured: itself, or a copy with its adapters fused into the weights.

    Args:
        model: the user's model; it is not changed.
        fuse_adapters: fuse adapters on a copy instead of refusing them.

    Raises:
        UnsupportedModelError: something is attached that a graph would lose; names it and the fix.
    """
    for check in (
        _check_parallel,
        _check_offload,
        _check_libraries,
        _check_scripted,
        _check_weight_norm,
        _check_hooks,
        _check_compiled,
        _check_forward,
    ):
        check(model)
    layers = _adapter_layers(model)
    if not layers and not getattr(model, "peft_config", None):
        return model
    if not fuse_adapters:
        _refuse_adapters(model, layers)
    return _fused(model)


@contextlib.contextmanager
def checkpointing_off(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing is off while the context lasts: a graph cannot hold it."""
    switched = [
        m for m in model.modules() if getattr(m, "gradient_checkpointing", None) is True
    ]
    for module in switched:
        module.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def _check_parallel(model: nn.Module) -> None:
    """Wrappers that split the batch or the weights over processes."""
    kinds = {name: {c.__name__ for c in type(m).__mro__} for name, m in model.named_modules()}
    sharded = [name for name, classes in kinds.items() if classes.intersection(_SHARDED)]
    sharded += [n for n, p in model.named_parameters() if type(p).__name__ == "DTensor"]
    if sharded:
        raise UnsupportedModelError(
            f"the weights of {type(model).__name__} are sharded over processes (FSDP), around {_some(sharded)}; "
            "a graph needs them whole. Pass the model before it is sharded. Several GPUs are joined by "
            "starting the whole command under torchrun, each with the whole model (docs/training.md); "
            "calibration.shard: true shares out what is trained, checkpointing and precision: bf16 take less memory.",
            code="DCR-M002",
        )
    wrapped = [name for name, classes in kinds.items() if classes.intersection(_WRAPPERS)]
    if wrapped:
        raise UnsupportedModelError(
            f"{_some(wrapped)} is wrapped in {type(model.get_submodule(wrapped[0])).__name__}; pass what is "
            "inside (model.module). The calibration itself shares its work between the processes of "
            "torchrun (docs/training.md).",
            code="DCR-M002",
        )


def _check_offload(model: nn.Module) -> None:
    """Weights that are partly not there are moved in by somebody; a whole model on meta is a dry run."""
    tensors = dict(model.named_parameters())
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta and len(meta) < len(tensors):
        raise UnsupportedModelError(
            f"{len(meta)} of {len(tensors)} weights of {type(model).__name__} are on the meta device "
            f"({_some(meta)}): they are offloaded. Load the model without device_map and without "
            "offloading (pipe.remove_all_hooks(), model.to(device)), then try again.",
            code="DCR-M002",
        )
    found = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if found:
        kind = type(model.get_submodule(found[0])._hf_hook).__name__
        raise UnsupportedModelError(
            f"accelerate has put a hook ({kind}) around {_some(found)}, for offloading or for a "
            "device_map; a graph would lose it. Take it off with pipe.remove_all_hooks() (or "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)) and model.to(device).",
            code="DCR-M002",
        )


def _check_libraries(model: nn.Module) -> None:
    """The hook registry of diffusers: caches, casting, group offloading."""
    found = []
    for name, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        found += [(name, hook) for hook in getattr(registry, "hooks", {})]
    if not found:
        return
    hooks = sorted({hook for _, hook in found})
    if any("layerwise" in hook or "autocast" in hook for hook in hooks):
        fix = "load the model anew without enable_layerwise_casting(): it has no way back"
    elif any("offload" in hook for hook in hooks):
        fix = "load the model anew without enable_group_offload(), and model.to(device)"
    else:
        fix = (
            "model.disable_cache(), or for each name model._diffusers_hook.remove_hook(name, "
            "recurse=True)"
        )
    raise UnsupportedModelError(
        f"hooks of diffusers are on {type(model).__name__}: {', '.join(hooks)}, around "
        f"{_some([name for name, _ in found])}. A graph would lose what they do. Take them off: {fix}.",
        code="DCR-M002",
    )


def _check_scripted(model: nn.Module) -> None:
    """Modules that torch.jit made: their code is TorchScript's, which torch.export does not read."""
    found = _names_of(model, torch.jit.ScriptModule)
    if found:
        raise UnsupportedModelError(
            f"torch.jit.script or torch.jit.trace was called on {_some(found)}, and TorchScript cannot be captured. "
            "Build the model of its Python classes and load the same state_dict() into it. Functions that are "
            "scripted may stay.",
            code="DCR-M002",
        )


def _check_weight_norm(model: nn.Module) -> None:
    """The older weight_norm and spectral_norm, which compute a weight in a hook."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            kind = type(hook).__module__.removeprefix("torch.nn.utils.")
            if kind in ("weight_norm", "spectral_norm"):
                found.setdefault(kind, []).append(name)
    if found:
        kind, names = next(iter(found.items()))
        raise UnsupportedModelError(
            f"torch.nn.utils.{kind} computes the weights of {_some(names)} in a hook, which a graph loses. Either make "
            f"them plain weights, with torch.nn.utils.remove_{kind}(module) for each, or use "
            f"torch.nn.utils.parametrizations.{kind}, which is captured.",
            code="DCR-M002",
        )


def _check_hooks(model: nn.Module) -> None:
    """Hooks of torch; whether one has an effect cannot be seen from outside."""
    found = [
        f"{kind} {_origin(hook)} on {name or 'the model itself'}"
        for name, module in model.named_modules()
        for attribute, kind in _HOOKS.items()
        for hook in getattr(module, attribute).values()
    ]
    if found:
        raise UnsupportedModelError(
            f"{len(found)} hooks are on modules of {type(model).__name__}: {_some(found, '; ')}. "
            "Whether they change what the model computes cannot be told, and a graph loses them. Call "
            ".remove() on the handle that register_forward_hook or register_forward_pre_hook returned, "
            "or switch off the library (cache, profiler) that put them there.",
            code="DCR-M002",
        )


def _check_compiled(model: nn.Module) -> None:
    """``torch.compile(module)``, which stands in the place of a module with another forward."""
    found = _names_of(model, OptimizedModule)
    if found:
        raise UnsupportedModelError(
            f"torch.compile was called on {_some(found)}, and its graph cannot be captured once more. Give the "
            "module as it was before: `._orig_mod` of each of them. An artifact may be used under torch.compile "
            "afterwards, with backend='diffcr'.",
            code="DCR-M002",
        )


def _check_forward(model: nn.Module) -> None:
    """``module.forward = ...`` on one object, as libraries that cache do it."""
    found = [
        f"{name or 'the model itself'} (by {_origin(vars(module)['forward'])})"
        for name, module in model.named_modules()
        if "forward" in vars(module) and not _is_own(module)
    ]
    if found:
        raise UnsupportedModelError(
            f"forward was replaced on single modules: {_some(found)}. Libraries that cache or patch a "
            "model do so. Switch the library off (`del module.forward` restores the class's own), or "
            "load the model anew.",
            code="DCR-M002",
        )


def _is_own(module: nn.Module) -> bool:
    """What diffusers' registry leaves behind when its hooks are removed: the method itself, bound."""
    own = vars(module)["forward"]
    same_function = getattr(own, "__func__", None) is getattr(type(module), "forward", None)
    return same_function and getattr(own, "__self__", None) is module


def _adapter_layers(model: nn.Module) -> list[str]:
    """Names of the layers that wrap another one with low-rank (or other) adapters."""
    return [
        name
        for name, module in model.named_modules()
        if (hasattr(module, "lora_A") and hasattr(module, "lora_B"))
        or (hasattr(module, "merge") and hasattr(module, "active_adapters"))
    ]


def _refuse_adapters(model: nn.Module, layers: Sequence[str]) -> None:
    where = f"on {_some(layers)}" if layers else "in its peft_config"
    raise UnsupportedModelError(
        f"{type(model).__name__} has adapters (LoRA) {where}. A graph has one set of weights, so fuse "
        "them first: pipe.fuse_lora() and pipe.unload_lora_weights(), or model.merge_and_unload() of "
        "peft; or set routing.fuse_adapters: true, which fuses them on a copy.",
        code="DCR-M002",
    )


def _fused(model: nn.Module) -> nn.Module:
    fused = copied(model)
    for name in _adapter_layers(fused):
        layer: Any = fused.get_submodule(name)
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else None
        if base is None:
            base = getattr(layer, "base_layer", None)
        if not isinstance(base, nn.Module) or not _can_settle(layer):
            raise UnsupportedModelError(
                f"the adapter layer {name} ({type(layer).__name__}) has no {_settling(layer)}() and base_layer, so "
                "it cannot be fused here; fuse it with the library that made it, or take it off",
                code="DCR-M002",
            )
        _settle(layer)
        fused.set_submodule(name, base)
    if hasattr(fused, "peft_config"):
        del fused.peft_config
    return fused


def _is_off(layer: Any) -> bool:
    """Whether the adapters of a layer are switched off, so that it computes what its base layer does."""
    return getattr(layer, "disable_adapters", False) is True


def _can_settle(layer: Any) -> bool:
    if _is_off(layer) and not getattr(layer, "merged", False):
        return True
    return callable(getattr(layer, _settling(layer), None))


def _settling(layer: Any) -> str:
    """The method that brings the base layer's weights to what the layer computes with."""
    return "unmerge" if _is_off(layer) else "merge"


def _settle(layer: Any) -> None:
    """Make the base layer's weights those that the layer computes with: adapters that are off are not in them."""
    if bool(getattr(layer, "merged", False)) == _is_off(layer):
        getattr(layer, _settling(layer))()


def _origin(function: Callable[..., Any]) -> str:
    """Library and name of a function, as far as they are known."""
    inner = getattr(function, "func", function)  # functools.partial
    module = getattr(inner, "__module__", None) or type(inner).__module__
    name = getattr(inner, "__qualname__", None) or type(inner).__qualname__
    return f"{module}.{name}"


def _names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def _some(names: Sequence[str], separator: str = ", ") -> str:
    shown = [name or "the model itself" for name in names[:SHOWN]]
    rest = f"{separator}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(shown) + rest
