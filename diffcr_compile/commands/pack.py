"""``diffcr pack``: one zip for a device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffcr_compile.commands.app import App
from diffcr_compile.commands.options import AsJson, Folder
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
    as_json: AsJson = False,
) -> None:
    """Pack an artifact with a runtime that needs no torch, for a device; verifies every file first."""
    from diffcr_compile.pack import pack as write
    from diffcr_compile.planning.targets import find_target

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
