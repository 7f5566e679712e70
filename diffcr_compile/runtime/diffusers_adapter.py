"""A compiled model in the place of a pipeline's own: ``pipe.transformer = CompiledDenoiser(...)``.

This file alone of the runtime needs torch; nothing else in it imports it.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime.constants import constant_to_json
from diffcr_compile.runtime.runner import Runner

_RETURN_DICT = "return_dict"
_OUTPUT = "diffusers.models.modeling_outputs.Transformer2DModelOutput"


def class_of_diffusers(name: str, base: str) -> Any:
    """A class that an artifact names, if it is one of diffusers'; no other code is imported for an artifact.

    Args:
        name: dotted, as the artifact has it.
        base: name of a class that it must come from.

    Raises:
        ArtifactError: it is no such class.
    """
    module, _, attribute = name.rpartition(".")
    if re.fullmatch(r"diffusers(\.\w+)*", module, re.ASCII):
        with contextlib.suppress(ImportError):
            found = getattr(importlib.import_module(module), attribute, None)
            if isinstance(found, type) and any(b.__name__ == base for b in found.__mro__[1:]):
                return found
    raise ArtifactError(
        f"the artifact names {name!r}, which is no {base} of the diffusers that is installed. Code that an "
        "artifact names is not imported. Install the version that it was made with, or do not use it.",
        code="DCR-A015",
    )


class Backend(Protocol):
    """What runs the graphs: ONNX Runtime or TensorRT through :class:`Runner`, or torch."""

    manifest: Manifest

    def run_tensors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """One step; tensors as the manifest lists them, outputs on their device."""


class CompiledDenoiser(nn.Module):
    """Called like the model that it replaces; runs the artifact.

    Args:
        artifact: the artifact's folder, or a runner.
        dense: the model that it was compiled from. Only its config, dtype, device and the order of
            its parameters are kept; it may be freed afterwards.
        output: dotted name of the dataclass that the model's forward returns.
        splits_batch: a call with twice the batch that was built runs in two halves: guided and unguided.
        options: of :class:`Runner`, if a folder is given.

    Raises:
        UsageError: a call does not fit the signature of the model's forward, or has other shapes, other inputs,
            or other values of what is fixed in the graphs, than the artifact was built for.
    """

    config: Any  # the dense model's

    def __init__(
        self,
        artifact: str | os.PathLike[str] | Runner | Backend,
        dense: Any,
        *,
        output: str = _OUTPUT,
        splits_batch: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(artifact, (str, os.PathLike)):
            artifact = Runner(artifact, **options)
        self.runner = artifact
        self.config = dense.config
        self.dtype: torch.dtype = dense.dtype
        self.register_buffer("_device", torch.empty(0, device=dense.device), persistent=False)
        self._signature = _with_return_dict(inspect.signature(dense.forward))
        self._wanted = {
            spec["name"]: (tuple(spec["shape"]), np.dtype(spec["dtype"]))
            for spec in self.runner.manifest.inputs
        }
        self._output, self._splits_batch = output, splits_batch

    @property
    def device(self) -> torch.device:
        """Where a pipeline should make its tensors; what the artifact runs on is the runner's affair."""
        found: torch.device = self.get_buffer("_device").device
        return found

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Pipelines name their guidance branches for caching libraries; there is nothing to cache."""
        yield

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One step; what the dense model's forward takes, and ``return_dict`` where it has none."""
        call = self._bound(args, kwargs)
        return_dict = call.pop(_RETURN_DICT)
        given = dict(_flat(call))
        self._check_constants(given)
        parts = [self._run(part) for part in self._parts(self._tensors(given))]
        outputs = tuple(
            pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            for pieces in zip(*parts, strict=True)
        )
        if not return_dict:
            return outputs
        if len(outputs) > 1:
            raise UsageError(
                f"the model has {len(outputs)} outputs; call it with return_dict=False for a tuple"
            )
        return self._output_class()(outputs[0])

    def fits(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call has the inputs and shapes that were built."""
        wanted = {name: shape for name, (shape, _) in self._wanted.items()}
        given = dict(_flat(self._bound(args, kwargs)))
        return all(
            {name: tuple(self._prepared(name, t).shape) for name, t in part.items()} == wanted
            for part in self._parts(self._tensors(given))
        )

    def agrees(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call says of what is fixed in the graphs what they were built with."""
        return self._other(dict(_flat(self._bound(args, kwargs)))) is None

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name, defaults filled in; inputs that are missing are refused later, by name."""
        try:
            bound = self._signature.bind_partial(*args, **kwargs)
        except TypeError as error:
            raise UsageError(
                f"the call does not fit the model's forward({', '.join(self._signature.parameters)}): {error}. "
                f"This artifact was built for {self.built()}",
                code="DCR-U020",
            ) from error
        bound.apply_defaults()
        return dict(bound.arguments)

    def _tensors(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            name: leaf
            for name, leaf in given.items()
            if isinstance(leaf, Tensor) and name not in self.runner.manifest.constants
        }

    def _output_class(self) -> Any:
        return class_of_diffusers(self._output, "BaseOutput")

    def _run(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        ready = {name: self._prepared(name, tensor) for name, tensor in tensors.items()}
        self._check_shapes(ready)
        if not isinstance(self.runner, Runner):
            return self.runner.run_tensors(ready)
        found = self.runner(**{n: _array(n, tensor) for n, tensor in ready.items()})
        device = next(iter(tensors.values())).device
        return tuple(
            torch.from_numpy(output).to(device)
            for output in (found if isinstance(found, tuple) else (found,))
        )

    def _parts(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The call itself, or its two halves if it has twice the batch and the artifact says so."""
        sample = self.runner.manifest.sample_input
        if not self._splits_batch or sample not in tensors or sample not in self._wanted:
            return [tensors]
        built = self._wanted[sample][0][0]
        if tuple(tensors[sample].shape[:1]) != (2 * built,):
            return [tensors]
        halves: list[dict[str, Tensor]] = [{}, {}]
        for name, tensor in tensors.items():
            shape = self._wanted[name][0] if name in self._wanted else ()
            doubled = bool(shape) and tensor.ndim > 0 and tensor.shape[0] == 2 * shape[0]
            pieces = tensor.chunk(2) if doubled else (tensor, tensor)
            for half, piece in zip(halves, pieces, strict=True):
                half[name] = piece
        return halves

    def _check_constants(self, given: Mapping[str, Any]) -> None:
        """Refuse a call that says something else about an argument that is fixed in the graphs."""
        if (name := self._other(given)) is not None:
            said, built = self._said(given).get(name), self.runner.manifest.constants.get(name)
            raise UsageError(
                f"{name} is {said!r}, but the artifact was built with {built!r}, and "
                "a graph cannot change it; compile again with the value you need",
                code="DCR-U023",
            )

    def _other(self, given: Mapping[str, Any]) -> str | None:
        """The first argument of a call that is fixed in the graphs to another value."""
        said, built = self._said(given), self.runner.manifest.constants
        fixed = [n for n in {**said, **built} if n not in self._wanted and n != _RETURN_DICT]
        return next((name for name in fixed if said.get(name) != built.get(name)), None)

    def _said(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What a call says about all that is no input of the graphs, in the form of the manifest."""
        return {
            name: constant_to_json(
                leaf.detach().cpu().numpy() if isinstance(leaf, Tensor) else leaf
            )
            for name, leaf in given.items()
            if name in self.runner.manifest.constants
            or not isinstance(leaf, Tensor)  # the runner refuses unknown tensors
        }

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse what was not built, and say what was, in the words of a pipeline."""
        missing = [name for name in self._wanted if name not in tensors]
        unknown = [name for name in tensors if name not in self._wanted]
        if missing or unknown:
            raise UsageError(
                f"inputs missing: {missing}, unknown: {unknown}. This artifact was built for "
                f"{self.built()}",
                code="DCR-U020",
            )
        for name, tensor in tensors.items():
            wanted = self._wanted[name][0]
            if tuple(tensor.shape) != wanted:
                raise UsageError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {wanted}: this "
                    f"{self._what_differs(name, tuple(tensor.shape))} was not built, and graphs are static. "
                    f"This artifact was built for {self.built()}. Compile again with pipeline inputs of "
                    "the size you need.",
                    code="DCR-U021",
                )

    def _what_differs(self, name: str, found: tuple[int, ...]) -> str:
        """Batch, resolution or sequence length."""
        wanted = self._wanted[name][0]
        if len(found) != len(wanted):
            return "number of axes"
        axes = [i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b]
        if axes[0] == 0:
            return "batch"
        if name == self.runner.manifest.sample_input and len(wanted) > 3:
            return "number of channels" if axes[0] == 1 else "resolution"
        return "sequence length" if axes[0] == 1 else "size"

    def built(self) -> str:
        """What the artifact was built for, in words."""
        specs = ", ".join(
            f"{n} {dtype}{list(shape)}" for n, (shape, dtype) in self._wanted.items()
        )
        sample = self.runner.manifest.sample_input
        if sample not in self._wanted:
            return specs
        shape = self._wanted[sample][0]
        split = ", and twice that in two halves" if self._splits_batch else ""
        return (
            f"batch {shape[0]}{split}, samples of {' x '.join(map(str, shape[1:]))}: {specs}"
        )

    def _prepared(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as the artifact takes it: a timestep for the whole batch becomes one per sample."""
        if name not in self._wanted:  # refused below, with what it takes
            return tensor
        shape, dtype = self._wanted[name]
        if name == self.runner.manifest.timestep_input and tensor.numel() == 1:
            tensor = tensor.reshape(()).expand(shape)  # whatever axes it has, it is one number
        if tensor.is_floating_point() and dtype.kind == "f":
            # numpy has no bfloat16; between float types a pipeline's choice is not an error
            tensor = tensor.to(getattr(torch, dtype.name))
        return tensor


class SeveralResolutions(nn.Module):
    """Artifacts of one model at several resolutions or batch sizes, called as one: the shapes of a call choose.

    So do arguments that are fixed in the graphs, such as a height and a width beside packed tokens.

    Args:
        denoisers: one per artifact; what a pipeline asks of a transformer is answered by the first.

    Raises:
        UsageError: a call has shapes or fixed arguments that no artifact was built for; lists what was built.
    """

    def __init__(self, denoisers: Sequence[CompiledDenoiser]) -> None:
        super().__init__()
        if not denoisers:
            raise UsageError("several resolutions need at least one artifact, none was given")
        self.denoisers = tuple(denoisers)
        self._modules_of = nn.ModuleList(denoisers)  # for .to() and .children()
        self.config, self.dtype = denoisers[0].config, denoisers[0].dtype
        self.cache_context = denoisers[0].cache_context

    @property
    def device(self) -> torch.device:
        """See :attr:`CompiledDenoiser.device`."""
        return self.denoisers[0].device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One step, by the first artifact that was built for these shapes."""
        fitting = [d for d in self.denoisers if d.fits(args, kwargs)]
        if fitting:
            agreeing = (d for d in fitting if d.agrees(args, kwargs)) if fitting[1:] else ()
            # where none agrees, the first refuses and says what is fixed to something else
            return next(iter(agreeing), fitting[0])(*args, **kwargs)
        sizes = "; ".join(denoiser.built() for denoiser in self.denoisers)
        raise UsageError(
            f"these shapes were not built, and graphs are static. Built were: {sizes}. Compile one more with "
            "pipeline inputs of the size you need, learned_from= one of these.",
            code="DCR-U021",
        )


def _with_return_dict(signature: inspect.Signature) -> inspect.Signature:
    """The signature with the argument that chooses between a tuple and an output class."""
    if _RETURN_DICT in signature.parameters:
        return signature
    added = inspect.Parameter(_RETURN_DICT, inspect.Parameter.KEYWORD_ONLY, default=True)
    parameters = [*signature.parameters.values(), added]
    return signature.replace(parameters=sorted(parameters, key=lambda p: p.kind))


def _array(name: str, tensor: Tensor) -> Any:
    if tensor.is_meta:
        return tensor  # it has no values; the runner says so in words
    try:
        # numpy knows no lazy conjugate and no lazy minus
        return tensor.detach().cpu().resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError) as error:
        raise UsageError(
            f"{name} is {tensor.dtype}, {tensor.layout}, which numpy cannot hold ({error}). Pass it dense, in the type that the "
            "artifact was built for",
            code="DCR-U021",
        ) from error


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
