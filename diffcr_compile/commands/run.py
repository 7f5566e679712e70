"""``diffcr run``: samples from an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson, DryRun, Folder
from diffcr_compile.commands.terminal import print_json, say
from diffcr_compile.errors import UsageError


def register(app: App) -> None:
    """Add the verb."""
    app.verb("run", ("out/", "out/ --images grid.png --count 40 --seed 1"))(run)


def run(
    out: Folder,
    images: Annotated[Path, typer.Option(help="where the samples go (PNG)")] = Path(
        "samples.png"
    ),
    count: Annotated[int, typer.Option(min=1, help="how many samples")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="sampling steps")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="of the noise")] = 0,
    backend: Annotated[
        Literal["onnxruntime", "tensorrt"],
        typer.Option(help="tensorrt: this device's engines, of diffcr build"),
    ] = "onnxruntime",
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Sample with an artifact of the reference model, on ONNX Runtime or this device's engines."""
    import diffcr_compile as dcr
    from diffcr_compile.bench import batch_of
    from diffcr_compile.reference.demo import NAME, sample_images
    from diffcr_compile.report import write_sample_sheet

    runner = dcr.load(out, backend=backend)
    if runner.manifest.model["name"] != NAME:
        raise UsageError(
            f"diffcr run samples the reference model; {out} holds {runner.manifest.model['name']!r}. "
            "Use diffcr_compile.load() and your own sampler.",
            code="DCR-U030",
        )
    if not dry_run:
        pictures, _ = sample_images(runner, count, steps, batch_of(runner.manifest), seed)
        write_sample_sheet(pictures, images)
    if as_json:
        print_json({"images": str(images), "count": count, "written": not dry_run})
    else:
        say(f"would write {count} samples to {images}" if dry_run else str(images))
