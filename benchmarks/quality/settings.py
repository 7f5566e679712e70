"""What is compared, under which budgets, and how it is sampled."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffcr_compile.config import CompileConfig, make_config

BUDGETS = (0.6, 0.42, 0.8)
SEEDS = (0, 1, 2)
SAMPLES = 2000
# Lengths of training, as shares of the samples of the full one: all of them, a quarter, and as many as the package's
# own calibration sees by default (240 steps of 24).
FULL, QUARTER, BY_DEFAULT = 1.0, 1 / 4, 9 / 64
# Sampling steps of the regimes. Multiples of the number of timestep buckets, so that every bucket holds
# equally many steps and a schedule costs in the loop what the solver says.
FEW_STEPS, MANY_STEPS = 8, 20
# Steps of the dense model alone, to find out from where on it can simply leave steps out.
DENSE_STEPS = (4, 5, 6, 12)

OURS: dict[str, dict[str, Any]] = {
    "routing": {"skip_blocks": True},
    "calibration": {
        "steps": 640,
        "batch": 64,
        "precision": "bf16",
        "optimizer": "muon",
        "lr_weights": 1.2e-3,
        "ratios": "gradient",
        "resolves": 0,
    },
}
FROM_ERRORS = {"calibration": {"ratios": "errors", "resolves": 1}}
# Blocks either keep all tokens or are left out, per timestep bucket, over measured errors.
WHOLE_BLOCKS = {"routing": {"multiple_of": 256, "skip_blocks": True}, **FROM_ERRORS}
TWO_BINS = "ours, two bins"
TRAINING_FREE_SHORTCUTS = "training-free, shortcuts"
ROUTED: dict[str, dict[str, dict[str, Any]]] = {
    "ours": {},
    "ratios from measured errors": FROM_ERRORS,
    "uniform (Mixture-of-Depths)": {
        "routing": {"skip_blocks": False},
        "calibration": {"ratios": "uniform"},
    },
    TWO_BINS: {"calibration": {"estimator": "two_bin"}},
    "random router": {"routing": {"router": "random"}},
    "blocks dropped": WHOLE_BLOCKS,
    "ours, a fifth of the steps": {},
    "training-free": {},
    TRAINING_FREE_SHORTCUTS: {"routing": {"shortcut_rank": 16}},
}
# Keep ratios are learned in the first three tenths of the steps, not six, and the rest trains at the final schedule.
EARLY = "ours, settled early"
ROUTED[EARLY] = {"calibration": {"settle": 0.7}}
# No block keeps less in any bucket, as early gradients ask for more uneven ratios than a long training wants.
FLOOR = "ours, keep ratios from 0.45"
ROUTED[FLOOR] = {"routing": {"min_keep_ratio": 0.45, "skip_blocks": False}}
EARLY_FLOOR = "ours, settled early, keep ratios from 0.45"
ROUTED[EARLY_FLOOR] = {**ROUTED[EARLY], **ROUTED[FLOOR]}
# Bypassed tokens take a linear map.
SHORTCUTS = "ours, shortcuts"
ROUTED[SHORTCUTS] = ROUTED[TRAINING_FREE_SHORTCUTS]
ERRORS_SHORTCUTS = "ratios from measured errors, shortcuts"
ROUTED[ERRORS_SHORTCUTS] = {**ROUTED[SHORTCUTS], **FROM_ERRORS}
# Trained towards the dense model's own sampling in smaller steps (``rollouts.substeps``) in the place of images.
DISTILLED = ", steps distilled"
ROUTED |= {
    name + DISTILLED: ROUTED[name]
    for name in (
        "ours",
        TWO_BINS,
        "uniform (Mixture-of-Depths)",
        "blocks dropped",
        "random router",
        "ratios from measured errors",
        EARLY,
        FLOOR,
        EARLY_FLOOR,
        SHORTCUTS,
        ERRORS_SHORTCUTS,
    )
}
# Other settings of ours, each where it says something.
OTHER_SETTINGS = tuple(
    name + DISTILLED
    for name in (TWO_BINS, EARLY, FLOOR, EARLY_FLOOR, SHORTCUTS, ERRORS_SHORTCUTS)
)
# Share of the training steps that all others have.
STEP_SHARES = {
    "ours, a fifth of the steps": 0.2,
    "training-free": 0.0,
    TRAINING_FREE_SHORTCUTS: 0.0,
}
# These are the same however long the others are trained.
UNTRAINED = (
    "dense",
    "dense, fewer steps",
    "steps reuse blocks",
    "tokens merged (2-D ToMe)",
    "training-free",
    TRAINING_FREE_SHORTCUTS,
)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the comparison is; ``--smoke`` makes it tiny."""

    samples: int = SAMPLES
    seeds: tuple[int, ...] = SEEDS
    budgets: tuple[float, ...] = BUDGETS
    few: int = FEW_STEPS
    many: int = MANY_STEPS
    dense_steps: tuple[int, ...] = DENSE_STEPS
    calibration_steps: int = OURS["calibration"]["steps"]
    batch: int = OURS["calibration"]["batch"]
    # Of the true velocity in what the routed variants learn, see states.py.
    true_share: float = 1.0
    # Of the dense model's sampling where steps are distilled: images, and its steps for one of the few.
    trajectories: int = 1024
    substeps: int = 4
    device: str = "cpu"

    @property
    def states(self) -> int:
        """As many as a calibration draws, so that hardly any is seen often."""
        return self.calibration_steps * self.batch

    def trained_for(self, share: float) -> Scale:
        """The same with a share of the training's samples: its root of the steps, and of their size."""
        root = share**0.5
        return dataclasses.replace(
            self,
            calibration_steps=round(root * self.calibration_steps),
            batch=round(root * self.batch),
        )


SMOKE = Scale(
    samples=20,
    seeds=(0,),
    budgets=(0.6,),
    few=4,
    many=4,
    dense_steps=(2, 4),
    calibration_steps=4,
    batch=4,
    trajectories=2,
)


def config(variant: str, seed: int, scale: Scale) -> CompileConfig:
    """The settings of one of the variants in `ROUTED`."""
    data = {
        name: {**section, **ROUTED[variant].get(name, {})} for name, section in OURS.items()
    }
    steps = round(STEP_SHARES.get(variant, 1) * scale.calibration_steps)
    data["calibration"].update(seed=seed, batch=scale.batch, steps=steps)
    return make_config(data)
