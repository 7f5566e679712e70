"""``diffcr show``: what an artifact keeps where."""

from __future__ import annotations

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson, Folder
from diffcr_compile.commands.schedule_table import print_schedule
from diffcr_compile.commands.terminal import console, print_json


def register(app: App) -> None:
    """Add the verb."""
    app.verb("show", ("out/", "out/ --json"))(show)


def show(out: Folder, as_json: AsJson = False) -> None:
    """Print an artifact's schedule: kept tokens of each block in each timestep bucket. Writes nothing."""
    from diffcr_compile.manifest import read_manifest

    manifest = read_manifest(out)
    if as_json:
        print_json({"schedule": manifest.schedule, "buckets": manifest.buckets})
        return
    ranges = [(b["low"], b["high"]) for b in manifest.buckets]
    print_schedule(manifest.schedule, manifest.num_tokens, ranges)
    unit = {"macs": "MACs"}.get(manifest.budget["metric"], manifest.budget["metric"])
    asked, reached = manifest.budget["asked"], manifest.budget["reached"]
    if asked is not None and reached is not None:
        console.print(f"budget: {asked:.1%} of the dense {unit} asked, {reached:.2%} reached")
