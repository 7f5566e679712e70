"""Classifier-free guidance and the batch of the graphs: ``export.cfg``.

A pipeline that guides calls its denoiser twice per image, usually as one batch of twice the size. Graphs
are static, so this choice is built in, and it is the user's: nothing is doubled silently.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from diffcr_compile.calibrate.pipelines import PipelineRuns
from diffcr_compile.config import ExportConfig
from diffcr_compile.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How guidance was built in.

    Attributes:
        cfg: ``batched``, ``separate`` or ``none``.
        images: images that one step of the graphs denoises.
        batch: batch of the graphs.
    """

    cfg: str
    images: int
    batch: int

    def to_json(self) -> dict[str, Any]:
        """For the recipe."""
        return dataclasses.asdict(self)


def guidance_of(
    runs: PipelineRuns | None, config: ExportConfig, batch: int
) -> Guidance | None:
    """What the settings make of the calls of a pipeline, or of a model's example inputs.

    Args:
        runs: the pipeline; None for a model.
        config: the ``export`` section.
        batch: of the recorded calls, or of the example inputs.

    Returns:
        None where nothing is said and nothing is doubled.

    Raises:
        UsageError: the pipeline guides in one batch and ``export.cfg`` is not set, or says otherwise.
    """
    images = batch if runs is None or runs.images is None else runs.images
    passes = batch // images
    if config.cfg is None:
        if passes > 1:
            raise _undecided(batch, images)
        return None
    if config.cfg == "batched":
        if runs is None:
            passes = 2
            images = batch // 2
        if passes < 2 or (runs is None and batch % 2):
            raise UsageError(
                f"export.cfg is batched, but the denoiser is called with batch {batch} for {images} "
                "image(s): the guided and the unguided half are not in one batch. Switch guidance on in the "
                "pipeline's inputs (guidance_scale above 1), or set export.cfg=separate.",
                code="DCR-U055",
            )
        return Guidance("batched", images, batch)
    if config.cfg == "none" and passes > 1:
        raise UsageError(
            f"export.cfg is none, but the pipeline guides: batch {batch} for {images} image(s). Switch "
            "guidance off in the pipeline's inputs (guidance_scale: 1), or set export.cfg to batched or "
            "separate.",
            code="DCR-U055",
        )
    if passes > 2:
        raise UsageError(
            f"the pipeline calls the denoiser with batch {batch} for {images} image(s), {passes} passes; only "
            "two can be run separately. Set export.cfg=batched.",
            code="DCR-U055",
        )
    return Guidance(config.cfg, images, images)


def graph_batch(guidance: Guidance | None, config: ExportConfig) -> int | None:
    """Batch of the static graphs; None leaves that of the example."""
    if config.batch is not None or guidance is None:
        return config.batch
    return guidance.batch


def _undecided(batch: int, images: int) -> UsageError:
    return UsageError(
        f"the pipeline guides: it calls its denoiser with batch {batch} for {images} image(s), the guided and "
        "the unguided half in one. Graphs are static, so say which you want with export.cfg (--set "
        f"export.cfg=...): batched builds graphs of batch {batch}; separate builds batch {images} and runs the "
        "halves one after the other, with half the memory, and also without guidance; none is for a pipeline "
        "with guidance switched off.",
        code="DCR-U055",
    )
