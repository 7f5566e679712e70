"""The command line: argument parsing, progress and exit codes; the work is in ``api.py``."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from diffcr_compile.commands.lint import lint
from diffcr_compile.errors import INTERRUPTED, DiffCRError, UsageError

app = typer.Typer(
    help="Compile a diffusion transformer into token-compressed static ONNX graphs.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

Out = Annotated[Path, typer.Option("--out", "-o", help="the artifact's folder")]
Budget = Annotated[str, typer.Option(help="share of the dense MACs, such as 60%")]
Config = Annotated[Path | None, typer.Option(help="YAML file with settings")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="one setting, such as calibration.steps=200")
]
Folder = Annotated[Path, typer.Argument(help="an artifact's folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
ModelName = Annotated[
    str,
    typer.Argument(
        help="demo, python:<module>:<factory>, or diffusers:<folder>[#component], a pipeline or a model"
    ),
]
Inputs = Annotated[
    Path | None,
    typer.Option(
        help="safetensors with example inputs, one tensor per argument; of a pipeline: of its call"
    ),
]
PipelineFile = Annotated[
    Path | None,
    typer.Option(
        "--pipeline-inputs",
        help="YAML or JSON with the arguments of a pipeline's call, or a list of such",
    ),
]
DEMO_TABLE_STAGES = ("rollouts", "calibrate", "export", "benchmark", "quality")


def main() -> None:
    """Run the command line; every error leaves with its documented exit code."""
    try:
        app(standalone_mode=False)
    except DiffCRError as error:
        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        command = " ".join(["diffcr", *sys.argv[1:]])
        errors.print(
            f"Interrupted. What is finished is kept; go on with:  {command}",
            markup=False,
            soft_wrap=True,
        )
        sys.exit(INTERRUPTED)
    except Exception as error:
        usage = getattr(error, "exit_code", None)  # click's own errors carry one
        if usage is None:
            raise
        if hasattr(error, "show"):
            error.show()
        sys.exit(usage)


app.command()(lint)


@app.command()
def demo(
    out: Out = Path("out"),
    budget: Budget = "60%",
    config: Config = None,
    set_: Settings = None,
    samples: Annotated[int, typer.Option(help="images for the quality metric")] = 400,
) -> None:
    """Compile the reference DiT that ships with the package: the whole job, on real input."""
    import diffcr_compile as dcr
    from diffcr_compile.reference import demo as reference

    settings = _settings(config, set_, reference.SETTINGS)
    inputs = reference.example_inputs()
    batch = settings.export.batch or len(inputs["timestep"])
    started = time.monotonic()
    with _progress() as progress:
        artifact = dcr.compile(
            reference.load_reference_dit(),
            out,
            example_inputs=inputs,
            budget=budget,
            config=settings,
            conditions=reference.draw_labels,
            evaluate=reference.quality_evaluation(samples, settings.rollouts.steps, batch),
            name=reference.NAME,
            progress=progress,
        )
    _print_report(artifact.report, out, time.monotonic() - started)


@app.command("compile")
def compile_(
    model: ModelName,
    out: Out = Path("out"),
    budget: Budget = "60%",
    config: Config = None,
    set_: Settings = None,
    inputs: Inputs = None,
    pipeline_inputs: PipelineFile = None,
) -> None:
    """Compile a model: capture, route, calibrate, freeze, export, validate, benchmark, report."""
    import diffcr_compile as dcr
    from diffcr_compile.sources import load_case

    if model == "demo":
        demo(out, budget, config, set_)
        return
    settings = _settings(config, set_)
    case = load_case(model, inputs, pipeline_inputs, settings.rollouts.steps)
    started = time.monotonic()
    with _progress() as progress:
        artifact = dcr.compile(
            case.model,
            out,
            example_inputs=case.inputs,
            budget=budget,
            config=settings,
            conditions=case.conditions,
            name=case.name,
            progress=progress,
        )
    _print_report(artifact.report, out, time.monotonic() - started)


@app.command()
def inspect(
    model: ModelName,
    inputs: Inputs = None,
    pipeline_inputs: PipelineFile = None,
    target: Annotated[
        str,
        typer.Option(help="device, such as jetson-orin-nx (docs/targets.md); or a YAML file"),
    ] = "onnxruntime-cpu",
    macs_per_byte: Annotated[
        float | None,
        typer.Option(help="MACs the device does in the time in which it moves a byte"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Dry run: what can be routed and why, what it brings and takes, what to run next."""
    import diffcr_compile as dcr
    from diffcr_compile.planning.plan_text import plan_text
    from diffcr_compile.sources import load_case

    case = load_case(model, inputs, pipeline_inputs)
    plan = dcr.inspect(case.model, case.inputs, target=target, macs_per_byte=macs_per_byte)
    given = str(inputs) if inputs else None
    source = f"{model} --pipeline-inputs {pipeline_inputs}" if pipeline_inputs else model
    if as_json:
        print(json.dumps(plan.to_json(source, given), indent=1))
        return
    console.print(
        plan_text(plan, case.name, source, given),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def validate(out: Folder, as_json: AsJson = False) -> None:
    """Check every file's hash and compare ONNX Runtime with the golden outputs of each bucket."""
    from diffcr_compile.validate import validate_artifact

    rows = validate_artifact(out)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("bucket", "max abs", "relative L2", "cosine", "NaN/Inf", "tolerance")
    for row in rows:
        table.add_row(
            str(row["bucket"]),
            f"{row['max_abs']:.1e}",
            f"{row['rel_l2']:.1e}",
            f"{row['cosine']:.9f}",
            str(row["non_finite"]),
            f"{row['tolerance']:.0e}",
        )
    console.print(table)
    console.print(f"{out}: every file matches the manifest, every bucket its golden outputs")


@app.command()
def bench(
    out: Folder,
    steps: Annotated[int, typer.Option(help="sampling steps")] = 20,
    repeats: Annotated[int, typer.Option(help="pairs of loops")] = 5,
    threads: Annotated[int | None, typer.Option(help="threads of ONNX Runtime")] = None,
    loops: Annotated[int, typer.Option(help="loops side by side")] = 1,
    as_json: AsJson = False,
) -> None:
    """Time sampling loops, dense against compressed, in turns.

    Without --threads: all cores in one loop, and a loop per core; the faster way of the dense model counts.
    """
    from diffcr_compile.bench import best_sampling_loops, sampling_loops
    from diffcr_compile.manifest import read_manifest

    buckets = read_manifest(out).buckets
    low, high = buckets[0]["low"], buckets[-1]["high"]
    timesteps = [high - (high - low) * i / steps for i in range(steps)]
    if threads is None and loops == 1:
        result = best_sampling_loops(out, timesteps, repeats)
    else:
        result = sampling_loops(out, timesteps, repeats, threads, loops)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for way in result.get("settings", [result]):
        conditions = way["conditions"]
        pairs = conditions["pair_ratios"]
        console.print(
            f"dense / compressed: {way['onnxruntime_cpu_loop']:.2f} x (median of {len(pairs)} pairs, "
            f"{min(pairs):.2f} to {max(pairs):.2f}; {steps} steps, batch {conditions['batch']}, "
            f"loops {conditions['loops']}, threads {conditions['threads']})"
        )


@app.command()
def report(out: Folder) -> None:
    """Write report.html anew from report.json and say where it is."""
    from diffcr_compile.report import write_html

    console.print(str(write_html(_read_report(out), out / "report")), markup=False)


@app.command()
def show(out: Folder, as_json: AsJson = False) -> None:
    """Print an artifact's schedule: kept tokens of each block in each timestep bucket."""
    from diffcr_compile.manifest import read_manifest

    manifest = read_manifest(out)
    if as_json:
        print(
            json.dumps({"schedule": manifest.schedule, "buckets": manifest.buckets}, indent=1)
        )
        return
    ranges = [f"{b['low']:g} to {b['high']:g}" for b in manifest.buckets]
    table = Table("block", *ranges, "of")
    for block, kept in manifest.schedule.items():
        table.add_row(block, *map(str, kept), str(manifest.num_tokens[block]))
    console.print(table)
    asked, reached = manifest.budget["asked"], manifest.budget["reached"]
    if asked is not None and reached is not None:
        console.print(f"budget: {asked:.1%} of the dense MACs asked, {reached:.2%} reached")


@app.command()
def run(
    out: Folder,
    images: Annotated[Path, typer.Option(help="where the samples go (PNG)")] = Path(
        "samples.png"
    ),
    count: Annotated[int, typer.Option(help="how many samples")] = 20,
    steps: Annotated[int, typer.Option(help="sampling steps")] = 20,
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
) -> None:
    """Sample with an artifact of the reference model, on ONNX Runtime."""
    import diffcr_compile as dcr
    from diffcr_compile.bench import batch_of
    from diffcr_compile.reference.demo import NAME, sample_images
    from diffcr_compile.report import write_sample_sheet

    runner = dcr.load(out)
    if runner.manifest.model["name"] != NAME:
        raise UsageError(
            f"diffcr run samples the reference model; {out} holds {runner.manifest.model['name']!r}. "
            "Use diffcr_compile.load() and your own sampler."
        )
    pictures, _ = sample_images(runner, count, steps, batch_of(runner.manifest), seed)
    console.print(str(write_sample_sheet(pictures, images)), markup=False)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say which packages are here and what will not work without the missing ones."""
    from diffcr_compile.doctor import examine

    rows = examine()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("package", "version", "needed for")
    for row in rows:
        table.add_row(row["name"], row["version"] or "[red]missing[/]", row["needed_for"])
    console.print(table)


def _settings(
    config: Path | None,
    assignments: list[str] | None,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    import yaml

    from diffcr_compile.config import load_config

    overrides: dict[str, Any] = {}
    for text in assignments or []:
        key, found, value = text.partition("=")
        if not found:
            raise UsageError(f"--set takes key=value, got {text!r}")
        overrides[key] = yaml.safe_load(value)
    return load_config(config, overrides, defaults)


def _read_report(out: Path) -> dict[str, Any]:
    path = out / "report/report.json"
    if not path.exists():
        raise UsageError(
            f"{path} does not exist; {out} was not finished by diffcr compile or demo"
        )
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """Bars on a terminal; elsewhere one plain line now and then."""
    if not console.is_terminal:
        yield _PlainLines()
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, count: int, figures: Mapping[str, Any]) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=count, figures="")
            bars.update(tasks[stage], completed=done, total=count, figures=_figures(figures))

        yield update


class _PlainLines:
    """Progress for logs: a line every ten seconds and at the end of each stage."""

    def __init__(self) -> None:
        self.last = 0.0
        self.started: dict[str, tuple[float, int]] = {}

    def __call__(self, stage: str, done: int, count: int, figures: Mapping[str, Any]) -> None:
        now = time.monotonic()
        began, first = self.started.setdefault(stage, (now, done))
        if now - self.last < 10 and done < count:
            return
        self.last = now
        left = (now - began) / max(done - first, 1) * (count - done)
        print(f"{stage} {done}/{count}  {_figures(figures)}  {left:.0f} s left", flush=True)


def _figures(figures: Mapping[str, Any]) -> str:
    if not figures:
        return ""
    return (
        f"loss {figures['loss']:.4f}  mean keep ratio {figures['mean_keep_ratio']:.3f}  "
        f"MACs {figures['reached']:.1%} of {figures['budget']:.1%}"
    )


def _print_report(report: Mapping[str, Any] | None, out: Path, seconds: float) -> None:
    assert report is not None
    table = Table("what", "found", "expected", "")
    for check in report["checks"]:
        mark = "[green]ok[/]" if check["passed"] else "[red]missed[/]"
        table.add_row(check["name"], check["found"], check["expected"], mark)
    quality = report["quality"]
    if quality:
        table.add_row(
            quality["metric"],
            f"{quality['compressed']:.2f} compressed, {quality['dense']:.2f} dense",
            f"lower is better, {quality['num_samples']} samples",
            "",
        )
    console.print(table)
    spent = ", ".join(
        f"{s} {report['seconds'][s]:.0f} s"
        for s in DEMO_TABLE_STAGES
        if s in report["seconds"]
    )
    console.print(f"{seconds:.0f} s ({spent})")
    console.print(f"report: {out / 'report/report.html'}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
