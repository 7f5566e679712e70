"""One calibration for several resolutions: what an artifact has learned, in the same model at another size.

A router scores one token at a time and a keep ratio is a share, so neither knows how many tokens there are. The
schedule is solved anew, over what each block costs at the new size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from diffcr_compile.calibrate.loop import CalibrationResult
from diffcr_compile.config import CompileConfig, RoutingConfig
from diffcr_compile.errors import UsageError
from diffcr_compile.manifest import read_manifest, verify_artifact
from diffcr_compile.program import Program
from diffcr_compile.rebuild import put_learned, read_schedule, rebuild
from diffcr_compile.recipe import read_recipe
from diffcr_compile.schedule import CostTable, TokenSchedule
from diffcr_compile.solver import solve_schedule
from diffcr_compile.tensor_file import write_tensors


@dataclasses.dataclass(frozen=True)
class Learned:
    """What an artifact has learned.

    Attributes:
        folder: the artifact.
        path: its routers, and the weights that calibration changed.
        schedule: kept tokens per block and timestep bucket, at the size that it was calibrated at.
        routing: the settings of the routing, which routers and weights belong to.
    """

    folder: Path
    path: Path
    schedule: TokenSchedule
    routing: RoutingConfig


def read_learned(folder: Path) -> Learned:
    """What an artifact has learned, after every file was checked.

    Raises:
        ArtifactError: it is damaged, unfinished or has no recipe.
    """
    verify_artifact(folder, read_manifest(folder))
    recipe = read_recipe(folder)
    return Learned(
        folder,
        folder / recipe.learned,
        read_schedule(folder),
        RoutingConfig(**recipe.routing),
    )


def with_routing_of(learned: Learned, config: CompileConfig) -> CompileConfig:
    """The same settings, but routed as the artifact is.

    Raises:
        UsageError: the settings ask for another routing.
    """
    there = learned.routing.model_dump()
    asked = config.routing.model_dump(include=config.routing.model_fields_set)
    other = {name: value for name, value in asked.items() if value != there[name]}
    if other:
        words = ", ".join(
            f"routing.{n} is {v!r} here and {there[n]!r} there" for n, v in other.items()
        )
        raise UsageError(
            f"routers and ratios are taken from {learned.folder}, which is routed in another way: {words}. "
            "Leave these settings out, or calibrate anew without learned_from=.",
            code="DCR-U057",
        )
    return config.with_section("routing", learned.routing, str(learned.folder))


def carry_over(
    learned: Learned,
    model: nn.Module,
    routed: Program,
    costs: CostTable,
    budget: float,
    timesteps: Sequence[float] | None,
    weights: Path,
) -> CalibrationResult:
    """Put into a ROUTED program what an artifact of the same model has learned, and solve its schedule.

    Args:
        learned: from :func:`read_learned`.
        model: the dense model, with the weights that the artifact was compiled from.
        routed: the same model with other example inputs: another resolution or batch size.
        costs: what its blocks cost.
        budget: share of its dense cost in (0, 1], a mean over the sampling steps.
        timesteps: of a sampling run at this size; None for as many steps in each timestep bucket as when the artifact was made.
        weights: file that gets what was learned.

    Returns:
        A result without history, in the timestep buckets of the artifact.

    Raises:
        UsageError: the artifact was compiled from another model, other blocks are routed at this size, or a timestep bucket has no
            sampling step any more.
        BudgetError: the budget cannot be reached at this size.
    """
    rebuild(learned.folder, model)  # refuses a model that does not give the golden outputs
    blocks = tuple(spec.name for spec in routed.blocks)
    there = tuple(learned.schedule.kept_tokens)
    if blocks != there:
        different = sorted({*blocks} ^ {*there}) or "the same blocks in another order"
        raise UsageError(
            f"with these example inputs other blocks are routed than in {learned.folder}: {different}. "
            "Calibrate anew without learned_from=.",
            code="DCR-U057",
        )
    buckets = learned.schedule.buckets
    if timesteps is not None:
        buckets = buckets.weighted_by(timesteps)
    write_tensors(weights, put_learned(learned.path, routed))
    ratios = learned.schedule.ratios()
    schedule = solve_schedule(ratios, costs, buckets, budget)
    return CalibrationResult(ratios, schedule, costs, (), {})
