"""A compiled model in the place of a pipeline's own: ``pipe.transformer = CompiledDenoiser(...)``.

This file alone of the runtime needs torch; nothing else in it imports it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcr_compile.errors import UsageError
from diffcr_compile.runtime.constants import constant_to_json
from diffcr_compile.runtime.runner import Runner


class CompiledDenoiser(nn.Module):
    """Called like the model that it replaces; runs the artifact.

    Args:
        artifact: the artifact's folder, or a runner.
        dense: the model that it was compiled from. Only its config, dtype, device and the order of
            its parameters are kept; it may be freed afterwards.
        options: of :class:`Runner`, if a folder is given.

    Raises:
        UsageError: a call has other shapes, other inputs, or other values of what is fixed in the graphs,
            than the artifact was built for.
    """

    config: Any  # the dense model's

    def __init__(
        self, artifact: str | os.PathLike[str] | Runner, dense: Any, **options: Any
    ) -> None:
        super().__init__()
        self.runner = artifact if isinstance(artifact, Runner) else Runner(artifact, **options)
        self.config = dense.config
        self.dtype: torch.dtype = dense.dtype
        self.register_buffer("_device", torch.empty(0, device=dense.device), persistent=False)
        parameters = inspect.signature(dense.forward).parameters.values()
        self._names = [p.name for p in parameters]
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        self._wanted = {
            spec["name"]: (tuple(spec["shape"]), np.dtype(spec["dtype"]))
            for spec in self.runner.manifest.inputs
        }

    @property
    def device(self) -> torch.device:
        """Where a pipeline should make its tensors; what the artifact runs on is the runner's affair."""
        found: torch.device = self.get_buffer("_device").device
        return found

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Pipelines name their guidance branches for caching libraries; there is nothing to cache."""
        yield

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """One step; what the dense model's forward takes."""
        call = {**self._defaults, **dict(zip(self._names, args, strict=False)), **kwargs}
        given = dict(_flat(call))
        self._check_constants(given)
        tensors = {
            name: leaf
            for name, leaf in given.items()
            if isinstance(leaf, Tensor) and name not in self.runner.manifest.constants
        }
        arrays = {name: self._array(name, tensor) for name, tensor in tensors.items()}
        found = self.runner(**arrays)
        like = next(iter(tensors.values()))
        outputs = tuple(
            torch.from_numpy(output).to(like.device)
            for output in (found if isinstance(found, tuple) else (found,))
        )
        if not return_dict:
            return outputs
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        if len(outputs) > 1:
            raise UsageError(
                f"the model has {len(outputs)} outputs; call it with return_dict=False for a tuple"
            )
        return Transformer2DModelOutput(sample=outputs[0])

    def _check_constants(self, given: Mapping[str, Any]) -> None:
        """Refuse a call that says something else about an argument that is fixed in the graphs."""
        built = self.runner.manifest.constants
        said = {
            name: constant_to_json(
                leaf.detach().cpu().numpy() if isinstance(leaf, Tensor) else leaf
            )
            for name, leaf in given.items()
            if name in built
            or not isinstance(leaf, Tensor)  # the runner refuses unknown tensors
        }
        for name in {**said, **built}:
            if name in self._wanted or name == "return_dict":
                continue
            if said.get(name) != built.get(name):
                raise UsageError(
                    f"{name} is {said.get(name)!r}, but the artifact was built with {built.get(name)!r}, and "
                    "a graph cannot change it; compile again with the value you need",
                    code="DCR-U023",
                )

    def _array(self, name: str, tensor: Tensor) -> Any:
        """A tensor as the artifact takes it: a timestep for the whole batch becomes one per sample."""
        if name not in self._wanted:  # the runner refuses it, and says what it takes
            return tensor.detach().cpu().float().numpy()
        shape, dtype = self._wanted[name]
        if name == self.runner.manifest.timestep_input and tensor.numel() == 1:
            tensor = tensor.reshape(1, *tensor.shape[1:]) if tensor.ndim else tensor.reshape(1)
            tensor = tensor.expand(shape)
        if tensor.is_floating_point() and dtype.kind == "f":
            # numpy has no bfloat16; between float types a pipeline's choice is not an error
            tensor = tensor.to(getattr(torch, dtype.name))
        return tensor.detach().cpu().numpy()


def _flat(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Leaves with the names that a captured graph gives them."""
    if isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from _flat(item, (*path, str(key)))
    elif isinstance(tree, (list, tuple)):
        for index, item in enumerate(tree):
            yield from _flat(item, (*path, str(index)))
    else:
        yield "_".join(path), tree
