"""What a compilation is asked for, checked before hours of work: by the compilation itself and by its dry run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from diffcr_compile.arguments import check_choice
from diffcr_compile.budgets import budget_identity
from diffcr_compile.carry_over import Learned, read_learned, with_routing_of
from diffcr_compile.config import DEFAULT_BUDGET, CompileConfig, parse_budget
from diffcr_compile.planning.targets import find_targets
from diffcr_compile.runtime.backend import check_provider
from diffcr_compile.stages import even_buckets

Until = Literal["calibrate", "freeze", "export"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be compiled, as far as that is known without the model.

    Attributes:
        config: all settings, with what the arguments said in its ``run`` section.
        share: of the dense model's cost, in (0, 1].
        metered: what the budget counts; the content of a latency table.
        learned: what another artifact has learned, to be taken instead of a calibration.
    """

    config: CompileConfig
    share: float
    metered: str
    learned: Learned | None


def asked_for(
    config: CompileConfig,
    budget: float | str | None,
    learned_from: str | Path | None,
    until: Until | None = None,
) -> Asked:
    """Settings, budget, targets, timestep buckets, latency table, the other artifact and ONNX Runtime.

    Args:
        config: settings.
        budget: share of the dense model's cost; by default that of `learned_from`, or 60 %.
        learned_from: an artifact, or None.
        until: the last stage to run. Graphs are compared in ONNX Runtime from ``export`` on.

    Raises:
        UsageError, ArtifactError, EnvironmentMissingError: which of them is wrong or missing.
    """
    find_targets(config.export.target)
    if until is not None:
        check_choice("until", until, get_args(Until))
    if until not in ("calibrate", "freeze"):
        check_provider("cpu")
    learned = None if learned_from is None else read_learned(Path(learned_from))
    if learned is not None:
        config = with_routing_of(learned, config)
        config = config.with_run("argument", learned_from=str(learned_from))
        budget = learned.schedule.asked if budget is None else budget
    budget = DEFAULT_BUDGET if budget is None else budget
    share = parse_budget(budget)
    even_buckets(config.routing)  # refuses a range of timesteps that is none
    if config.run.budget is None:
        config = config.with_run("budget argument", budget=str(budget))
    return Asked(config, share, budget_identity(config.budget), learned)
