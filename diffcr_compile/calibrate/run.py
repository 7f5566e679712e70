"""One calibration under way: how it starts, what a step does, and what is needed to go on."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from diffcr_compile.calibrate.block_outputs import BlockOutputs
from diffcr_compile.calibrate.data import TeacherStates, batched_inputs
from diffcr_compile.calibrate.distributed import Ranks
from diffcr_compile.calibrate.ratio_search import RatioSearch
from diffcr_compile.calibrate.sharded_tensors import is_sharded, whole
from diffcr_compile.calibrate.state import load_state, save_state
from diffcr_compile.calibrate.trained import (
    REMEDY,
    TrainedParameters,
    learning_mode,
    routing_parameters,
)
from diffcr_compile.calibrate.warm_start import warm_start
from diffcr_compile.calibrate.writes_in_place import writes_in_place_in_words
from diffcr_compile.config import CalibrationConfig
from diffcr_compile.errors import AccuracyError
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.blend_two_bins import BlendTwoBins
from diffcr_compile.program import Program, run_flat
from diffcr_compile.progress import Progress

WARM_START_STATES = 128


class StepGraphs:
    """A program in the forms in which steps run it, over the same modules.

    Attributes:
        settled: at a fixed schedule.
        learning: while keep ratios are learned; the `two_bin` estimator needs a second branch then.
        block_outputs: compares what blocks put out with the dense model's, if the loss asks for it.
    """

    def __init__(
        self, program: Program, dense: Program | None, config: CalibrationConfig
    ) -> None:
        self.block_outputs = BlockOutputs(program, dense) if dense else None
        self.settled = self.block_outputs.student if self.block_outputs else program
        self.learning = (
            run_passes(self.settled, [BlendTwoBins()])
            if config.estimator == "two_bin"
            else self.settled
        )


class Run:
    """One calibration under way."""

    def __init__(
        self,
        program: Program,
        graphs: StepGraphs,
        states: TeacherStates,
        by_bucket: list[Tensor],
        config: CalibrationConfig,
        search: RatioSearch,
        ranks: Ranks,
        measuring: Progress | None = None,
    ) -> None:
        self.states = states.where(program)
        self.program, self.graphs, self.by_bucket = program, graphs, by_bucket
        self.config, self.search, self.ranks = config, search, ranks
        self.measuring = measuring
        self.trained = TrainedParameters(program, config)
        self.sharded = any(map(is_sharded, program.module.parameters()))
        self.batched = batched_inputs(program)
        self.history: list[dict[str, float]] = []
        self.explained: dict[str, float] = {}
        self.done = 0
        self.keeps_states = False

    def begin(self, folder: Path | None, key: str) -> None:
        """Take up the state that rank 0 finds, or start anew; all ranks go on from rank 0's."""
        self.keeps_states = (
            self.ranks.total(float(folder is not None and self.ranks.leads)) > 0
        )
        saved = load_state(folder, key) if folder and self.ranks.leads else None
        own: dict[str, Tensor] = {}
        if self.ranks.total(1.0 if saved else 0.0) == 0:
            self.start()
            if self.ranks.count == 1:
                return
            tensors, facts = self.state(key)
            # a rank's shares are nobody else's to say
            own = {n: t for n, t in tensors.items() if is_sharded(t)}
            saved = {n: t for n, t in tensors.items() if n not in own}, facts
        tensors, facts = self.ranks.from_leader(*(saved or ({}, {})), self.trained.share)
        self.restore({**own, **tensors}, facts)

    def start(self) -> None:
        """Routers and shortcuts in closed form; a schedule from measured errors where ratios are not learned."""
        chosen = self._some_states(max(1, WARM_START_STATES // len(self.by_bucket)))
        self.search.learner.keep_all()
        self.explained = warm_start(
            self.program, self.states, torch.cat(chosen), self.config.batch
        )
        self.trained.forget_averages()
        if self.config.from_errors:
            self._solve_by_errors(0)

    def _solve_by_errors(self, step: int) -> None:
        self._seed(step)  # a random router draws while it is measured
        few = self._some_states(self.config.batch)
        self.search.solve_by_errors(self.program, self.states, few, self.measuring)
        # Errors measured on different devices differ in the last digits; a schedule must not.
        self.search.restore(*self.ranks.from_leader(*self.search.state()))

    def train_step(self, step: int) -> dict[str, float]:
        """One update of everything that is trained; returns the step's record."""
        if self.search.ends_learning(step):
            self.search.solve()
        if self.search.solves_again(step):
            self._solve_by_errors(step)
        bucket = step % len(self.by_bucket)
        between = self.search.set_up(step, bucket)
        loss = self._loss(
            step, bucket, self.graphs.learning if between else self.graphs.settled
        )
        whole_loss = self._checked(step, self.ranks.total(loss.item()))
        if loss.requires_grad:  # with train: ratio nothing learns at a fixed schedule
            with writes_in_place_in_words():
                loss.backward()  # type: ignore[no-untyped-call]
        self._sum_gradients(step, self.search.learner.blends if between else [])
        self.trained.update(step)
        self.search.update(bucket)
        return {
            "step": step + 1,
            "bucket": bucket,
            "loss": whole_loss,
            "budget": self.search.target(step),
            "reached": self.search.reached,
            "mean_keep_ratio": float(self.search.learner.values.mean()),
        }

    def together(self) -> contextlib.AbstractContextManager[None]:
        """Around all that asks other ranks for their shares of the weights: one that is gone is told as such."""
        return self.ranks.exchanging() if self.sharded else contextlib.nullcontext()

    def save(self, folder: Path | None, key: str) -> None:
        """Leave a state from which the same calibration goes on; rank 0 does, of all ranks' shares."""
        writes = folder is not None and self.ranks.leads
        if not (writes or (self.sharded and self.keeps_states)):
            return
        tensors, facts = self.state(key)
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            with self.together():
                put_together = whole(tensor)
            if writes:  # a copy: safetensors refuses tied parameters, which share memory
                found[name] = put_together.to("cpu", copy=True)
        if folder is not None and writes:
            save_state(folder, found, facts)

    def state(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that is needed to go on: tensors and JSON-able facts."""
        ratios, found = self.search.state()
        # The warm start is part of the result even where routers are not trained.
        routers = {
            f"router.{n}": p.detach() for n, p in routing_parameters(self.program).items()
        }
        facts = {
            "key": key,
            "done": self.done,
            "history": self.history,
            "explained": self.explained,
            **found,
        }
        return {**self.trained.state(), **routers, **ratios}, facts

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """The reverse of :meth:`state`."""
        for name, parameter in routing_parameters(self.program).items():
            parameter.copy_(tensors[f"router.{name}"])
        self.trained.restore(tensors)
        self.search.restore(tensors, facts)
        self.done = facts["done"]
        self.history, self.explained = facts["history"], facts["explained"]

    def _loss(self, step: int, bucket: int, program: Program) -> Tensor:
        """How far the program is from the dense model on this rank's share of a step's batch.

        (seed, step) draws the batch. Summed over the ranks it is the mean over the whole batch.
        """
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        rows = self.by_bucket[bucket]
        chosen = rows[torch.randint(len(rows), (self.config.batch,), generator=generator)]
        mine, weight = self.ranks.share(chosen)
        inputs, answer = self.states.take(mine, self.batched)
        learning_mode(program.module)
        self._seed(step)
        with torch.autocast(
            answer.device.type,
            torch.bfloat16,
            enabled=self.config.precision == "bf16",
            cache_enabled=not self.sharded,  # it would hold every block's weights at once
        ):
            output = run_flat(program, inputs)[0]
            loss = mse_loss(output.float(), answer.float())
            if outputs := self.graphs.block_outputs:
                loss = loss + self.config.block_outputs * outputs.distance(inputs)
        return loss * weight

    def _seed(self, step: int) -> None:
        """(seed, step) decides what random routers draw, on each rank something else."""
        seed = self.config.seed * 1_000_003 + step
        torch.manual_seed(seed * self.ranks.count + self.ranks.rank)

    def _checked(self, step: int, loss: float) -> float:
        if not math.isfinite(loss):
            raise AccuracyError(
                f"calibration step {step + 1}: the loss is {loss}. {REMEDY}", code="DCR-Q010"
            )
        return loss

    def _sum_gradients(self, step: int, blends: list[Tensor]) -> None:
        self.ranks.sum_gradients([*self.trained.parameters.values(), *blends])
        for blend in blends:
            if blend.grad is not None and not math.isfinite(float(blend.grad)):
                raise AccuracyError(
                    f"calibration step {step + 1}: the gradient of a keep ratio is NaN or infinite. "
                    f"{REMEDY}",
                    code="DCR-Q010",
                )

    def _some_states(self, each: int) -> list[Tensor]:
        """Indices of `each` states of every timestep bucket, always the same."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return [
            rows[torch.randint(len(rows), (each,), generator=generator)]
            for rows in self.by_bucket
        ]
