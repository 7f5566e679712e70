"""``diffcr pack``: one zip for a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson, DryRun, Folder
from diffcr_compile.commands.terminal import note, print_json, say

EXAMPLES = ("out/ -o model.zip", "out/ -o model.zip --target jetson-agx-orin@jp6.2")


def register(app: App) -> None:
    """Add the verb."""
    app.verb("pack", EXAMPLES)(pack)


def pack(
    out: Folder,
    zip_: Annotated[Path, typer.Option("--output", "-o", help="the zip")] = Path("device.zip"),
    target: Annotated[
        str | None, typer.Option(help="device whose mode build_on_device.sh builds")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Pack an artifact with a runtime that needs no torch, for a device; verifies every file first."""
    from diffcr_compile.pack import pack as write
    from diffcr_compile.planning.targets import find_target

    if dry_run:
        _announce(out, zip_, as_json)
        return
    packed = write(out, zip_, find_target(target) if target else None)
    if as_json:
        print_json(
            {
                "path": str(packed.path),
                "files": list(packed.files),
                "left_out": list(packed.left_out),
                "mode": packed.mode,
                "bytes": packed.path.stat().st_size,
            }
        )
        return
    if packed.left_out:
        note(f"left out, for a device does not need it: {', '.join(packed.left_out)}")
    say(f"{packed.path}: {packed.path.stat().st_size / 1e6:.1f} MB, mode {packed.mode}")
    say("on the device: unzip it, then python3 diffcr_runtime.pyz doctor .")


def _announce(out: Path, zip_: Path, as_json: bool) -> None:
    """The dry run: check the artifact, say what would be written."""
    from diffcr_compile.manifest import read_manifest, verify_artifact

    manifest = read_manifest(out)
    verify_artifact(out, manifest)
    if as_json:
        print_json({"path": str(zip_), "files": sorted(manifest.files), "written": False})
        return
    say(f"would pack {len(manifest.files)} checked files of {out} and the runtime into {zip_}")
