"""What the verbs of a compilation share: which model, with which settings, and how far."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcr_compile.commands.options import settings
from diffcr_compile.commands.progress import progress
from diffcr_compile.commands.terminal import note, say, terminal
from diffcr_compile.errors import UsageError

if TYPE_CHECKING:
    from diffcr_compile.api import Artifact
    from diffcr_compile.asked import Until
    from diffcr_compile.config import CompileConfig
    from diffcr_compile.planning.inspection import Plan
    from diffcr_compile.sources import Case


@dataclasses.dataclass(frozen=True)
class Job:
    """A compilation as the command line names it.

    Attributes:
        config: all settings; its ``run`` section says what is compiled.
        out: the artifact's folder.
    """

    config: CompileConfig
    out: Path

    @property
    def source(self) -> str:
        """MODEL."""
        assert self.config.run.model is not None
        return self.config.run.model

    def load(self) -> Case:
        """The model and its inputs."""
        from diffcr_compile.sources import load_case

        run = self.config.run
        return load_case(
            self.source,
            Path(run.inputs) if run.inputs else None,
            Path(run.pipeline_inputs) if run.pipeline_inputs else None,
            self.config.rollouts.steps,
            terminal.verbosity >= 0,
        )

    def compile(self, until: Until | None = None, **options: Any) -> tuple[Artifact, float]:
        """Run it, with progress; the artifact and the seconds that it took."""
        import diffcr_compile as dcr

        case, started = self.load(), time.monotonic()
        with progress() as event:
            artifact = dcr.compile(
                case.model,
                self.out,
                example_inputs=case.inputs,
                budget=self.config.run.budget,
                learned_from=self.config.run.learned_from,
                config=self.config,
                conditions=case.conditions,
                name=case.name,
                progress=event,
                until=until,
                **options,
            )
        return artifact, time.monotonic() - started

    def announce(self, stages: str, until: Until | None = None) -> None:
        """The dry run: what would be done and written, after a look at the model. Writes nothing."""
        from diffcr_compile.workspace import check_ours, read_records

        check_ours(self.out)
        finished = read_records(self.out)
        plan, budget = self._checked(until)
        done = [name for name in stages.split(", ") if name in finished]
        routed, refused = len(plan.blocks), len(plan.refused)
        say(f"would compile {self.source} into {self.out}, budget {budget}")
        say(f"{routed} blocks would be routed, {refused} stay dense")
        if plan.error:
            say(f"it cannot be compiled: {plan.error}")
        before = f" (finished before: {', '.join(done)})" if done else ""
        say(f"stages: {stages}{before}")
        say("nothing was written")

    def _checked(self, until: Until | None) -> tuple[Plan, str]:
        """What the compilation would find, and its budget, after all that it checks before it begins to work."""
        import diffcr_compile as dcr
        from diffcr_compile.asked import asked_for
        from diffcr_compile.guidance import guidance_of
        from diffcr_compile.opened import call_batch, open_model
        from diffcr_compile.schedule import check_budget

        run = self.config.run
        asked = asked_for(self.config, run.budget, run.learned_from, until)
        case = self.load()
        _, inputs, runs = open_model(case.model, case.inputs, None, None)
        guidance_of(runs, asked.config.export, call_batch(inputs))
        plan = dcr.inspect(case.model, case.inputs, asked.config.routing)
        # What a latency table promises for a model is known only where the model was routed.
        if plan.costs and asked.config.budget.metric == "macs":
            check_budget(plan.costs, asked.share)
        return plan, run.budget or f"that of {run.learned_from}"


def make_job(
    model: str | None,
    out: Path,
    config: Path | None,
    assignments: list[str] | None,
    budget: str | None,
    inputs: Path | None = None,
    pipeline_inputs: Path | None = None,
    learned_from: Path | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Job:
    """A job from the command line; what it does not say comes from the ``run`` section of the settings.

    Raises:
        UsageError: nobody names the model.
    """
    from diffcr_compile.config import DEFAULT_BUDGET

    chosen = settings(config, assignments, defaults).with_run(
        "flag",
        model=model,
        inputs=str(inputs) if inputs else None,
        pipeline_inputs=str(pipeline_inputs) if pipeline_inputs else None,
        budget=budget,
        learned_from=str(learned_from) if learned_from else None,
    )
    if chosen.run.budget is None and chosen.run.learned_from is None:
        chosen = chosen.with_run("default", budget=DEFAULT_BUDGET)
    if chosen.run.model is None:
        raise UsageError(
            "no MODEL: name it on the command line (demo, python:<module>:<factory> or diffusers:<folder>), "
            "or as run.model in the file of --config",
            code="DCR-U001",
        )
    return Job(chosen, out)


def job_of_folder(out: Path) -> Job:
    """The job that began in an artifact's folder.

    Raises:
        UsageError: none did, or it was begun in Python, where the model is.
    """
    from diffcr_compile.config_text import read_effective
    from diffcr_compile.workspace import EFFECTIVE_FILE

    path = out / EFFECTIVE_FILE
    config = read_effective(path) if path.exists() else None
    if config is None or config.run.model is None:
        raise UsageError(
            f"{path} {'names no model' if config else 'does not exist'}, so it is not known what to go on "
            "with. Begin with diffcr calibrate MODEL -o FOLDER; what was begun in Python goes on there.",
            code="DCR-U056",
        )
    return Job(config, out)


def say_done(artifact: Artifact, seconds: float, what: str, following: str) -> None:
    """One line for what was made, one for the command that goes on."""
    say(f"{what} in {seconds:.0f} s: {artifact.folder}")
    note(f"next: {following}")
