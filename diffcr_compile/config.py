"""Every setting of a compilation, with its default, unit and range. Unknown keys are refused."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from diffcr_compile.data_files import short
from diffcr_compile.did_you_mean import did_you_mean
from diffcr_compile.errors import UsageError

ExportPrecision = Literal["fp32", "fp16", "bf16", "int8"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RoutingConfig(_Section):
    """How blocks are routed."""

    gate: Literal["straight_through", "paper"] = Field(
        default="straight_through", description="how a router's score enters the forward value"
    )
    router: Literal["linear", "random"] = Field(
        default="linear",
        description="'random' is the control: every token is as likely as any other",
    )
    shortcut_rank: int = Field(
        default=0,
        ge=0,
        description="tokens that bypass a block take a linear map of this rank instead, fitted and trained with the "
        "routers; 0: they stay what they are",
    )
    granularity: Literal["auto", "block", "mlp"] = Field(
        default="auto",
        description="what is routed: whole blocks; their token-wise parts, such as feed-forwards; "
        "or parts only where the whole block is refused",
    )
    include: tuple[str, ...] = Field(
        default=(),
        description="blocks that may be routed, by name or as re:<regular expression>; empty for all",
    )
    exclude: tuple[str, ...] = Field(
        default=(), description="blocks that stay dense, written like those of include"
    )
    share_index: int = Field(
        default=1,
        ge=1,
        description="consecutive blocks that work on the same tokens: routed once",
    )
    buckets: int = Field(default=4, ge=1, le=64, description="timestep buckets of equal width")
    timestep_low: float | None = Field(
        default=None,
        description="smallest value of the model's timestep input; null for 0, and of a pipeline for what its steps say",
    )
    timestep_high: float | None = Field(
        default=None,
        description="largest value of the model's timestep input; null for 1000, and of a pipeline for what its steps say",
    )
    multiple_of: int = Field(default=16, ge=1, description="kept tokens are multiples of this")
    min_keep_ratio: float = Field(
        default=0.125, gt=0, le=1, description="smallest keep ratio of a block"
    )
    skip_blocks: bool = Field(
        default=False,
        description="a block may also be skipped altogether in a timestep bucket (keep ratio 0)",
    )
    max_keep_ratio: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="a block that would keep more than this keeps all: routing costs about as much as it saves",
    )
    fuse_adapters: bool = Field(
        default=False,
        description="adapters (LoRA) on the model are fused into a copy of its weights; else they are refused",
    )

    @property
    def timestep_range(self) -> tuple[float, float]:
        """Smallest and largest value of the model's timestep input, where no pipeline's steps say it."""
        low, high = self.timestep_low, self.timestep_high
        return 0.0 if low is None else low, 1000.0 if high is None else high


class RolloutConfig(_Section):
    """Teacher rollouts: the dense sampler's states and outputs, the default training data."""

    trajectories: int = Field(default=192, ge=1, description="sampled images")
    steps: int = Field(default=20, ge=1, description="sampling steps of each trajectory")
    substeps: int = Field(
        default=1,
        ge=1,
        description="steps of the dense model for each of these; above 1 the routed model learns to get in one "
        "step where the dense one gets in so many, and is for sampling in rollouts.steps steps only",
    )
    batch: int = Field(default=32, ge=1, description="trajectories that run together")
    pipeline_runs: int = Field(
        default=16, ge=1, description="runs of a pipeline, where the model comes with one"
    )
    max_gib: float = Field(
        default=8.0,
        gt=0,
        description="memory and disk that the records of these runs may take",
    )


class CalibrationConfig(_Section):
    """The short fine-tune that learns routers and keep ratios."""

    steps: int = Field(
        default=240,
        ge=0,
        description="training steps; 0 is the training-free mode: routers in closed form, and keep "
        "ratios from a table of measured errors",
    )
    batch: int = Field(
        default=24, ge=1, description="states per step, all of one timestep bucket"
    )
    train: Literal["ratio", "router", "lora", "all"] = Field(
        default="all",
        description="ratios only; routers and ratios; or these and low-rank adapters in the routed "
        "blocks, merged at the end; or these and all weights",
    )
    lora_rank: int = Field(default=16, ge=1, description="rank of the adapters (train: lora)")
    block_outputs: float = Field(
        default=0.0,
        ge=0,
        description="weight in the loss of each routed block's relative squared error against the "
        "dense block; 0 compares the model's output only",
    )
    checkpointing: bool = Field(
        default=False,
        description="routed blocks run again in the backward instead of keeping what they computed: "
        "less memory, about a third more time, the same numbers",
    )
    shard: bool = Field(
        default=False,
        description="with several processes: each holds a share of every routed block's weights, gradients, moments and "
        "moving averages (FSDP); train: all",
    )
    ratios: Literal["gradient", "errors", "uniform"] = Field(
        default="gradient",
        description="where keep ratios come from: gradients, while the budget falls; a table of "
        "measured errors, solved before the first step; or one for all (Mixture-of-Depths)",
    )
    resolves: int | None = Field(
        default=None,
        ge=0,
        le=8,
        description="how often the schedule is solved again over errors measured on the model as trained "
        "by then, the last time before the steps that settle it; null: once with `ratios: errors`, where some steps "
        "come before and some settle it, else never. With `ratios: gradient` at most once, where learning ends; not with "
        "`ratios: uniform`",
    )
    ratios_per: Literal["block_and_bucket", "block", "bucket"] = Field(
        default="block_and_bucket",
        description="what has a keep ratio of its own: every block in every timestep bucket (the paper's "
        "-LT), every block (-L), or every timestep bucket (-T); the last two with `ratios: gradient`",
    )
    estimator: Literal["boundary", "two_bin"] = Field(
        default="boundary",
        description="gradient of the keep ratios: one forward, or the paper's two",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="of the training step's matrix products (autocast); weights, routers and loss stay fp32. "
        "Many times slower than fp32 on a CPU without bfloat16 instructions",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="of the matrices inside the routed blocks; everything else has AdamW",
    )
    lr_weights: float = Field(
        default=4e-4, gt=0, description="learning rate of the model's weights"
    )
    lr_router: float = Field(default=1e-3, gt=0, description="learning rate of the routers")
    lr_ratio: float = Field(
        default=0.02, gt=0, description="size of a typical step of a keep ratio"
    )
    ramp: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="share of the steps in which the budget falls from 1",
    )
    settle: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="share of the steps that train at the final schedule",
    )
    ema: float = Field(
        default=0.98, ge=0, lt=1, description="decay of the moving average of trained weights"
    )
    rank_timeout: float = Field(
        default=600.0,
        gt=0,
        description="seconds that one process of several waits for the others",
    )
    seed: int = Field(
        default=0, ge=0, lt=2**32, description="of routers, batches, rollouts and adapters"
    )
    save_every: int = Field(default=20, ge=1, description="steps between resumable states")

    @property
    def learn_steps(self) -> int:
        """Steps before those that settle the schedule."""
        return self.steps - round(self.settle * self.steps)

    @property
    def from_errors(self) -> bool:
        """Whether the schedule is solved over measured errors; without steps nothing else can tell."""
        return self.ratios == "errors" or (self.steps == 0 and self.ratios == "gradient")

    @property
    def resolve_steps(self) -> frozenset[int]:
        """Before which steps, from 0, the schedule is solved again over measured errors."""
        times, last = self.resolves, self.learn_steps
        if times is None:
            times = int(self.from_errors)
        found = {round(last * (i + 1) / times) for i in range(times)}
        if self.ratios == "gradient":  # before that there is no schedule to solve again
            found &= {last}
        if self.ratios == "uniform":
            found = set()
        return frozenset(step for step in found if 0 < step < self.steps)

    @model_validator(mode="after")
    def _schedules_are_solved_as_often_as_asked(self) -> CalibrationConfig:
        possible = len(self.resolve_steps)
        if self.resolves is not None and possible < self.resolves:
            raise ValueError(
                f"resolves: {self.resolves} asks to solve the schedule again so often, and with ratios: {self.ratios}, "
                f"steps: {self.steps} and settle: {self.settle:g} it happens {possible} times. It takes steps before it and "
                "steps that settle it, one of these for each time; with ratios: gradient it happens once, with uniform "
                "never. Lower resolves, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _trained_weights_are_sharded(self) -> CalibrationConfig:
        if self.shard and self.train != "all":
            raise ValueError(
                f"shard: true shares out weights that are trained, and with train: {self.train} the blocks' weights are those "
                "of your own model, which stays whole. Set train: all, or shard: false"
            )
        return self

    @model_validator(mode="after")
    def _only_gradients_are_tied(self) -> CalibrationConfig:
        learned = self.ratios == "gradient" and self.steps > 0
        if self.ratios_per != "block_and_bucket" and not learned:
            raise ValueError(
                f"ratios_per: {self.ratios_per} is for keep ratios that are learned; set ratios: gradient and "
                "steps above 0, or leave ratios_per out"
            )
        return self


class BudgetConfig(_Section):
    """What the budget is a share of."""

    metric: Literal["macs", "latency"] = Field(
        default="macs",
        description="MACs, counted on the graph; or latency, from a measured table",
    )
    table: str | None = Field(
        default=None,
        description="with latency: the file that `diffcr bench MODEL --table` wrote, here or on the device",
    )
    fit: Literal["measured", "isotonic"] = Field(
        default="measured",
        description="measured times as they are; or, for each block, the nearest that never rise as tokens "
        "get fewer",
    )

    @model_validator(mode="after")
    def _table_fits_metric(self) -> BudgetConfig:
        if (self.metric == "latency") != (self.table is not None):
            raise ValueError(
                "metric: latency and table: FILE belong together; diffcr bench MODEL --table FILE "
                "measures one"
            )
        return self


class ExportConfig(_Section):
    """ONNX files."""

    batch: int | None = Field(
        default=None,
        ge=1,
        description="batch size of the static graphs; null is the example's",
    )
    cfg: Literal["batched", "separate", "none"] | None = Field(
        default=None,
        description="classifier-free guidance: both halves in one batch; one after the other; or none. To be "
        "said wherever a pipeline guides",
    )
    parity_tolerance: float = Field(
        default=1e-4, gt=0, description="largest absolute difference ONNX - FROZEN"
    )
    precision: ExportPrecision = Field(
        default="fp32",
        description="type of matrix products and attention; the residual stream, norms, modulation and routers "
        "stay fp32, and so do blocks whose values would overflow fp16. bf16 has the range of fp32 and 3 bits less than "
        "fp16, leaves convolutions in fp32, and has no kernels on ONNX Runtime's CPU. int8 is fp16 with the linear "
        "layers of tokens in int8, calibrated by NVIDIA ModelOpt (the extra int8)",
    )
    precision_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="largest relative L2 from fp32, on every state tried; null for 5e-3 of fp16, 4e-2 of bf16 and 8e-2 of int8",
    )
    profiles: bool = Field(
        default=True,
        description="also one graph for several timestep buckets, for a TensorRT engine that holds the "
        "weights once and has one optimization profile per bucket",
    )
    target: tuple[str, ...] | None = Field(
        default=None,
        description="devices that every graph must suit, by name or YAML file (docs/targets.md): their "
        "limits shape the graphs, and what they do not take is refused; null for none",
    )


class RunConfig(_Section):
    """What is compiled; the same things as arguments of the command are stronger."""

    model: str | None = Field(
        default=None,
        description="demo, python:<module>:<factory> or diffusers:<folder>[#component]",
    )
    inputs: str | None = Field(
        default=None,
        description="safetensors with example inputs, or tensors of a pipeline's call",
    )
    pipeline_inputs: str | None = Field(
        default=None, description="YAML or JSON with the arguments of a pipeline's call"
    )
    budget: str | None = Field(
        default=None, description="share of the dense MACs, such as 60%"
    )
    learned_from: str | None = Field(
        default=None,
        description="artifact of the same model at another resolution or batch size, whose routers, ratios and "
        "weights are taken instead of a calibration",
    )


class CompileConfig(_Section):
    """All of it.

    Attributes:
        origins: dotted key -> where its value came from, for those that are not defaults.
    """

    run: RunConfig = RunConfig()
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origins(self) -> dict[str, str]:
        return self._origins

    def with_run(self, origin: str, **values: str | None) -> CompileConfig:
        """The same settings with these of the ``run`` section; None leaves a value."""
        given = {name: value for name, value in values.items() if value is not None}
        changed = self.model_copy(update={"run": self.run.model_copy(update=given)})
        changed._origins = {**self._origins, **{f"run.{name}": origin for name in given}}
        return changed

    def with_section(self, name: str, section: BaseModel, origin: str) -> CompileConfig:
        """The same settings with another section, all of which comes from `origin`."""
        changed = self.model_copy(update={name: section})
        keys = (f"{name}.{key}" for key in type(section).model_fields)
        changed._origins = {**self._origins, **dict.fromkeys(keys, origin)}
        return changed

    routing: RoutingConfig = RoutingConfig()
    rollouts: RolloutConfig = RolloutConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    budget: BudgetConfig = BudgetConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _steps_are_distilled_into_weights(self) -> CompileConfig:
        trained = self.calibration.train in ("lora", "all") and self.calibration.steps > 0
        if self.rollouts.substeps > 1 and not trained:
            raise ValueError(
                "rollouts.substeps above 1 asks weights to learn larger steps; set calibration.train to all or lora "
                "and calibration.steps above 0, or rollouts.substeps to 1"
            )
        return self


DEFAULT_BUDGET = "60%"


def parse_budget(budget: float | str) -> float:
    """``"60%"``, ``"0.6"`` or ``0.6`` -> 0.6, a share of the dense model's cost.

    Raises:
        UsageError: not a number, or not in (0, 1].
    """
    text = str(budget).strip()
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UsageError(
            f"budget must be like '60%' or 0.6, got {budget!r}", code="DCR-U014"
        ) from None
    if not 0 < value <= 1:
        raise UsageError(
            f"budget must be in (0%, 100%] of the dense model's cost, got {budget!r}; write '60%' or 0.6",
            code="DCR-U014",
        )
    return value


def make_config(data: dict[str, Any]) -> CompileConfig:
    """A config from nested dicts.

    Raises:
        UsageError: an unknown key or a value out of range; names each of them.
    """
    try:
        return CompileConfig.model_validate(data)
    except ValidationError as error:
        problems = error.errors()
        unknown = all(e["type"] == "extra_forbidden" for e in problems)
        raise UsageError(
            "the configuration is wrong: " + "; ".join(_problem(dict(e)) for e in problems),
            code="DCR-U009" if unknown else "DCR-U010",
        ) from None


def _problem(error: dict[str, Any]) -> str:
    """One finding of pydantic in words."""
    path = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        *parents, name = path
        section: Any = CompileConfig
        for parent in parents:
            section = section.model_fields[parent].annotation
        known = did_you_mean(name, section.model_fields)
        return f"there is no setting {'.'.join(path)}{known}"
    said = short(error["msg"], 200)[1:-1]
    if not path:  # settings of different sections that do not go together
        return said
    return f"{'.'.join(path)}: {said} (found {short(error['input'])})"
