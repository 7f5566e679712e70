"""One run of the comparison."""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Job:
    """One variant under one budget with one seed; the dense ones have budget 1.

    Attributes:
        variant: see ``variants.build``.
        budget: share of the dense MACs.
        seed: of the training and of the noise.
        steps: sampling steps of the dense model that the MACs are counted against.
        task: ``generation`` or ``inpainting``.
        training: share of the samples that the training of the comparison sees; see ``Scale.trained_for``.
    """

    variant: str
    budget: float
    seed: int
    steps: int
    task: str = "generation"
    training: float = 1.0

    @property
    def name(self) -> str:
        """Of its files."""
        words = re.sub(r"[^a-z0-9]+", "-", self.variant.lower()).strip("-")
        name = f"{words}_{round(100 * self.budget)}_{self.steps}steps_{self.seed}"
        if self.training < 1:
            name += f"_trained{round(100 * self.training)}"
        return name if self.task == "generation" else f"{self.task}_{name}"

    @property
    def dense(self) -> Job:
        """The dense model's samples of the same noise and steps."""
        return dataclasses.replace(self, variant="dense", budget=1.0, training=1.0)
