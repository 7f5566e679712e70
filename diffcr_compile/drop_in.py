"""``DiffusersTransformer``: an artifact as a pipeline's transformer, from its folder alone."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.manifest import Manifest, read_manifest
from diffcr_compile.program import DiTGraph, flat_tensors, rebuild_call
from diffcr_compile.rebuild import rebuild
from diffcr_compile.recipe import RECIPE_FILE, Recipe, read_recipe
from diffcr_compile.runtime.diffusers_adapter import (
    Backend,
    CompiledDenoiser,
    SeveralResolutions,
    class_of_diffusers,
)
from diffcr_compile.runtime.runner import Runner
from diffcr_compile.schedule import TimestepBuckets


class FrozenGraphs:
    """FROZEN graphs in torch behind the drop-in transformer; the bucket is chosen by timestep value.

    Args:
        manifest: of the artifact.
        graphs: one per timestep bucket.
    """

    def __init__(self, manifest: Manifest, graphs: Sequence[DiTGraph]) -> None:
        self.manifest, self.graphs = manifest, tuple(graphs)
        rows = manifest.buckets
        self._buckets = TimestepBuckets(
            (rows[0]["low"], *(row["high"] for row in rows)),
            tuple(row["weight"] for row in rows),
        )

    @torch.no_grad()
    def run_tensors(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """One step.

        Raises:
            UsageError: the timesteps of the call belong to different buckets.
        """
        graph = self.graphs[self.bucket_of(tensors)]
        outputs = graph(**rebuild_call(graph.program.signature, tensors))
        return tuple(flat_tensors(outputs))

    def bucket_of(self, tensors: Mapping[str, Tensor]) -> int:
        """Index of the bucket of a call."""
        name = self.manifest.timestep_input
        if name is None or len(self.graphs) == 1:
            return 0
        found = {
            self._buckets.index_of(float(t)) for t in set(tensors[name].flatten().tolist())
        }
        if len(found) > 1:
            raise UsageError(
                f"{name} {tensors[name].tolist()} lies in the timestep buckets {sorted(found)}, but one "
                f"call runs one bucket. Split the call; the buckets (low, high] are "
                f"{self._buckets.ranges()}",
                code="DCR-U022",
            )
        return found.pop()


class DiffusersTransformer(CompiledDenoiser):
    """An artifact in the place of ``pipe.transformer``, see :meth:`from_artifact`.

    It has the dense model's ``config``, ``dtype`` and ``device``, takes the arguments of its ``forward`` and
    returns its output class, so schedulers, guidance and callbacks of the pipeline work as they are.
    """

    @classmethod
    def from_artifact(
        cls,
        folder: str | os.PathLike[str],
        *,
        backend: Literal["onnxruntime", "torch"] = "onnxruntime",
        model: nn.Module | None = None,
        **options: Any,
    ) -> DiffusersTransformer:
        """The drop-in transformer of an artifact.

        Args:
            folder: the artifact, compiled from a model or a pipeline of diffusers.
            backend: what runs the graphs. ``torch`` runs the FROZEN graphs around `model`.
            model: the dense model. For ``onnxruntime`` it is not needed, but where it is of a class that
                is not in diffusers.
            options: of :class:`diffcr_compile.runtime.Runner`: provider, threads, verify.

        Raises:
            ArtifactError: the artifact is damaged.
            UsageError: it does not come from diffusers, or `model` is not the one that it was made from.
        """
        path = Path(folder)
        recipe = read_recipe(path)
        if backend not in ("onnxruntime", "torch"):
            raise UsageError(f"backend must be 'onnxruntime' or 'torch', got {backend!r}")
        runner: Runner | Backend
        if backend == "torch":
            if model is None:
                raise UsageError(
                    "backend='torch' runs the graphs around the dense model: pass model=pipe.transformer",
                    code="DCR-U052",
                )
            if options:
                raise UsageError(
                    f"{', '.join(sorted(options))}: of ONNX Runtime, and backend='torch' runs where the model is; leave it out",
                    code="DCR-U052",
                )
            runner = FrozenGraphs(read_manifest(path), rebuild(path, model).frozen)
        else:
            runner = Runner(path, **options)
        guidance = recipe.guidance or {}
        return cls(
            runner,
            model if model is not None else _described(path, recipe),
            **({"output": recipe.output} if recipe.output else {}),
            splits_batch=guidance.get("cfg") == "separate",
        )

    @classmethod
    def from_artifacts(
        cls, folders: Sequence[str | os.PathLike[str]], **options: Any
    ) -> SeveralResolutions:
        """Artifacts of one model at several resolutions or batch sizes; the shapes of a call choose.

        Args:
            folders: made with ``learned_from`` of one another, or each calibrated by itself.
            options: see :meth:`from_artifact`.
        """
        return SeveralResolutions([cls.from_artifact(folder, **options) for folder in folders])


def _described(folder: Path, recipe: Recipe) -> Any:
    """What stands for the dense model: its config, its type, and the signature of its forward."""
    package = recipe.model_class.partition(".")[0]
    if recipe.config is None or package != "diffusers":
        raise UsageError(
            f"{folder} was compiled from {recipe.model_class}, which is no class of diffusers, and code that "
            "an artifact names is not imported. Pass the dense model as model=, or run it with dcr.load().",
            code="DCR-U052",
        )
    from diffusers.configuration_utils import FrozenDict

    forward = class_of_diffusers(recipe.model_class, "ModelMixin").forward
    described = types.SimpleNamespace(
        config=FrozenDict(recipe.config),
        dtype=_dtype(folder, recipe.dtype),
        device=torch.device("cpu"),
    )
    described.forward = types.MethodType(forward, described)  # its signature without self
    return described


def _dtype(folder: Path, name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if isinstance(found, torch.dtype):
        return found
    raise ArtifactError(
        f"{folder / RECIPE_FILE} says that the weights are {name[:40]!r}, which is no type of torch. Copy the "
        "artifact again, or make it anew.",
        code="DCR-A002",
    )
