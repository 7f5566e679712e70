"""From all tokens kept to a schedule under the budget: what the keep ratios are at each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcr_compile.calibrate.data import TeacherStates
from diffcr_compile.calibrate.error_table import measure_errors, relative_errors
from diffcr_compile.calibrate.ratios import RatioLearner
from diffcr_compile.config import CalibrationConfig
from diffcr_compile.program import Program
from diffcr_compile.progress import Progress
from diffcr_compile.schedule import KeepRatios, TokenSchedule
from diffcr_compile.solver import solve_least, solve_schedule


class RatioSearch:
    """Holds the ratios while they are looked for, and the schedule once it is found.

    Attributes:
        learner: the real ratios and the program's selectors.
        schedule: the integers; None until they are solved for.
        learned: the real ratios that they were made from; None until then.
        reached: share of the dense MACs that the last step ran at.
    """

    def __init__(
        self, learner: RatioLearner, config: CalibrationConfig, budget: float
    ) -> None:
        self.learner, self.config, self.budget = learner, config, budget
        self.schedule: TokenSchedule | None = None
        self.learned: KeepRatios | None = None
        self.reached = 1.0
        self.learn_steps = config.learn_steps

    def solves_again(self, step: int) -> bool:
        """Whether the schedule is to be solved anew, over measured errors, before this step."""
        return self.schedule is not None and step in self.config.resolve_steps

    def target(self, step: int) -> float:
        """The budget of a step: it falls from 1 to what was asked, and stays there."""
        return 1 - (1 - self.budget) * self._progress(step)

    def set_up(self, step: int, bucket: int) -> bool:
        """Put every selector where this step wants it.

        Returns:
            Whether K lies between two levels, so that there is a gradient for the ratios.
        """
        target = self.target(step)
        if self.schedule is None:
            self.learner.project(target)
        elif self._progress(step) < 1:  # solved before the first step: lead the model there
            self.learner.approach(self.schedule.ratios().values, target)
        else:
            self._settle(self.schedule)
            self.learner.keep(self.schedule, bucket)
            return False
        self.learner.attach(bucket)
        self.reached = self.learner.cost()
        return True

    def update(self, bucket: int) -> None:
        """Move the ratios along the gradients of this step, if they are still looked for."""
        if self.schedule is None and self.config.ratios == "gradient":
            self.learner.step(bucket, self.config.lr_ratio)

    def ends_learning(self, step: int) -> bool:
        """Whether the ratios have been learned for as long as the settings say."""
        return step >= self.learn_steps and self.schedule is None

    def solve(self) -> None:
        """Make the present ratios integers, exactly under the budget."""
        self.learner.project(self.budget)
        self.learned = self.learner.ratios()
        self._settle(
            solve_schedule(self.learned, self.learner.costs, self.learner.buckets, self.budget)
        )

    def solve_by_errors(
        self,
        program: Program,
        states: TeacherStates,
        chosen: list[Tensor],
        progress: Progress | None = None,
    ) -> None:
        """Measure what fewer tokens cost in accuracy, and take the best schedule for the budget.

        The first time all other blocks keep all tokens while one is measured; later they keep what
        the present schedule says, and the model is the one trained so far.

        Args:
            program: ROUTED, routers warm-started.
            states: where inputs and the dense model's outputs are taken from.
            chosen: per timestep bucket, the indices of the states to use.
            progress: called with (errors measured, errors to measure).
        """
        costs = self.learner.costs
        errors = measure_errors(program, states, chosen, costs, self.schedule, progress)
        if self.schedule is None:
            errors = relative_errors(errors, costs)
        self._settle(solve_least(errors, costs, self.learner.buckets, self.budget))
        self.learned = self.learner.ratios()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that is needed to go on: tensors and JSON-able facts."""
        tensors = {
            "ratios": torch.from_numpy(self.learner.values),
            "momentum": torch.from_numpy(self.learner.momentum),
        }
        if self.learned is not None:
            tensors["learned"] = torch.from_numpy(self.learned.values)
        return tensors, {"schedule": self.schedule.to_json() if self.schedule else None}

    def go_back(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """To a state of the same search, before a schedule was found too."""
        self.schedule = self.learned = None
        self.restore(tensors, facts)

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """The reverse of :meth:`state`."""
        self.learner.values = tensors["ratios"].numpy()
        self.learner.momentum = tensors["momentum"].numpy()
        if facts["schedule"]:
            self.schedule = TokenSchedule.from_json(facts["schedule"])
            self.learned = KeepRatios(self.learner.names, tensors["learned"].numpy())
            self.reached = self.learner.cost()

    def _progress(self, step: int) -> float:
        """How far the budget has come down, 1 when it is what was asked."""
        return min(1.0, (step + 1) / max(1.0, self.config.ramp * self.learn_steps))

    def _settle(self, schedule: TokenSchedule) -> None:
        self.schedule = schedule
        self.learner.values = schedule.ratios().values
        self.reached = self.learner.cost()
