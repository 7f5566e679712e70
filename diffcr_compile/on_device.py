"""The command line of ``diffcr_runtime.pyz``: what a device does without the compiler.

Standard library, numpy, TensorRT and cuda-python only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcr_compile.durable import disk_errors_in_words
from diffcr_compile.engine_plan import ENGINE_MODES, LAYOUT_REASONS
from diffcr_compile.errors import INTERRUPTED, ArtifactError, DiffCRError
from diffcr_compile.manifest import read_manifest, verify_artifact

# Written by ``diffcr pack``: the target that the artifact was packed for, and the mode that suits it.
DEVICE_FILE = "device.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is that of ``diffcr``."""
    options = _parser().parse_args(arguments)
    try:
        with disk_errors_in_words(options.folder):
            status: int = options.run(options)
    except DiffCRError as error:
        print(f"{type(error).__name__} {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. What is finished is kept; run the same again.", file=sys.stderr)
        return INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="diffcr_runtime.pyz", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("doctor", _doctor, "say which command will fail on this device, and why"),
        (
            "build",
            _build,
            "build engines with TensorRT and compare them with the golden outputs",
        ),
        ("check", _check, "compare engines that are there, also those of build_on_device.sh"),
        ("validate", _validate, "compare ONNX Runtime with the golden outputs"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("folder", nargs="?", type=Path, default=Path(), help="the artifact")
        verb.set_defaults(run=run)
        if name == "build":
            verb.add_argument("--mode", choices=("profiles", "per_bucket"))
            verb.add_argument(
                "--workspace", type=int, help="scratch memory of a tactic, in MB"
            )
        if name == "doctor":
            verb.add_argument("--json", action="store_true")
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from diffcr_compile.device_doctor import as_json, examine_device

    folder: Path | None = options.folder
    if folder != Path():
        read_manifest(options.folder)  # whoever names an artifact wants to know about that one
    elif not (options.folder / "manifest.json").is_file():
        folder = None
    findings = examine_device(folder)
    if options.json:
        print(as_json(findings))
        return 0
    for finding in findings:
        print(f"{finding.level:8}{finding.name}: {finding.found}")
        if finding.consequence:
            print(f"        {finding.consequence}")
        if finding.remedy:
            print(f"        -> {finding.remedy}")
    return 0


def _build(options: argparse.Namespace) -> int:
    from diffcr_compile.engine_plan import plan_engines
    from diffcr_compile.export.device.builder import build_engines
    from diffcr_compile.export.device.check import check_engines, tolerance_of
    from diffcr_compile.export.device.job import BuildSettings
    from diffcr_compile.runtime.open_engines import open_device

    manifest = read_manifest(options.folder)
    here = open_device()[2]
    packed = _packed_for(options.folder)
    mode = options.mode or packed.get("mode", "per_bucket")
    plan = plan_engines(manifest, mode, packed.get("layout", "pinned"))
    print(f"building for {here}, mode {mode}")
    settings = BuildSettings(workspace_mb=options.workspace)
    built = build_engines(options.folder, manifest, plan, here, settings, _progress)
    tolerance = tolerance_of(manifest)
    _say(check_engines(options.folder, manifest, built.folder, here.runtime, tolerance))
    return 0


def _check(options: argparse.Namespace) -> int:
    from diffcr_compile.export.device.check import check_here

    _say(check_here(options.folder, read_manifest(options.folder)))
    return 0


def _validate(options: argparse.Namespace) -> int:
    from diffcr_compile.validate import validate_artifact

    verify_artifact(options.folder, read_manifest(options.folder))
    for row in validate_artifact(options.folder):
        print(
            f"bucket {row['bucket']}: relative L2 {row['rel_l2']:.1e}, max {row['max_abs']:.1e}"
        )
    print("every file matches the manifest, every bucket its golden outputs")
    return 0


def _packed_for(folder: Path) -> dict[str, Any]:
    """What ``diffcr pack`` wrote about the target; nothing where the artifact was not packed.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = folder / DEVICE_FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, expected an object")
        for key, known in (("mode", ENGINE_MODES), ("layout", tuple(LAYOUT_REASONS))):
            if key in found and found[key] not in known:
                raise ValueError(
                    f"{key} is {str(found[key])[:40]!r}, expected one of {list(known)}"
                )
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is damaged: {error}. Unpack the zip again, or make it anew with diffcr pack."
        ) from error
    return found


def _progress(what: str, done: int, steps: int) -> None:
    print(f"{what} {done}/{steps}", file=sys.stderr)


def _say(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        print(
            f"bucket {row['bucket']}: relative L2 {row['rel_l2']:.1e}, cosine {row['cosine']:.6f}, "
            f"allowed {row['tolerance']:.0e}"
        )
    print("every timestep bucket gives its golden outputs; the engines may be used")


if __name__ == "__main__":
    sys.exit(main())
