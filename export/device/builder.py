"""All engines of an artifact: one process each, resumable, described by a sidecar."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Collection
from pathlib import Path

from diffcr_compile.durable import PARTIAL_SUFFIX
from diffcr_compile.engine_plan import EnginePlan, plan_engines
from diffcr_compile.errors import ArtifactError
from diffcr_compile.export.device.job import BuildJob, BuildSettings, job_key
from diffcr_compile.export.device.processes import build_in_process
from diffcr_compile.export.device.trtexec import (
    BOARD_FILE,
    MADE_FROM_FILE,
    MODE_FILE,
    UNCHECKED,
)
from diffcr_compile.folder_lock import locked
from diffcr_compile.manifest import Manifest, sha256_file, verify_artifact
from diffcr_compile.progress import PhaseProgress
from diffcr_compile.runtime.device import Device
from diffcr_compile.runtime.engine_files import (
    ENGINES,
    PlanFile,
    Sidecar,
    graphs_hash,
    made_from,
    plan_file,
    read_plan_file,
    take_ok_back,
    write_sidecar,
)


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build left.

    Attributes:
        folder: of the engines.
        sidecar: of them.
        kept: names of engines that an earlier build had finished.
    """

    folder: Path
    sidecar: Sidecar
    kept: tuple[str, ...]


def build_engines(
    artifact: Path,
    manifest: Manifest,
    plan: EnginePlan,
    device: Device,
    settings: BuildSettings,
    progress: PhaseProgress | None = None,
) -> Built:
    """Build the engines of a plan that are not there yet, one process each, and write their sidecar.

    Killed or interrupted, the same call goes on at the engine that it was in.

    Args:
        artifact: the artifact's folder.
        manifest: of it.
        plan: which engines.
        device: that they are built on, or for.
        settings: how.
        progress: called with (engine and phase, steps done, steps).

    Raises:
        ArtifactError: a graph or the weights are not those of the manifest.
        UsageError: another build or check is at work in the same folder.
        ResourceError: a build was killed, or the folder cannot be written.
        UnsupportedModelError: TensorRT refuses a graph.
    """
    verify_artifact(artifact, manifest, only=("onnx",))
    folder = artifact / ENGINES / device.folder
    with locked(folder):
        for leftover in folder.glob(f"*{PARTIAL_SUFFIX}"):
            leftover.unlink()
        files, kept = _build_each(
            artifact, graphs_hash(manifest), plan, folder, device, settings, progress
        )
        sidecar = Sidecar(
            device=device,
            made_from=made_from(manifest),
            plan=plan,
            files=files,
            settings=dataclasses.asdict(settings),
            ahead_of_time=settings.compute_capability is not None,
            created=_now(),
        )
        write_sidecar(folder, sidecar)
        _remove_others(folder, files)
    return Built(folder, sidecar, kept)


def _build_each(
    artifact: Path,
    origin: str,
    plan: EnginePlan,
    folder: Path,
    device: Device,
    settings: BuildSettings,
    progress: PhaseProgress | None,
) -> tuple[dict[str, PlanFile], tuple[str, ...]]:
    """The file of each engine, and the names of those that were there already."""
    files: dict[str, PlanFile] = {}
    kept = []
    for spec in plan.engines:
        key = job_key(
            origin,
            spec.onnx,
            spec.bounds(),
            dataclasses.asdict(device),
            dataclasses.asdict(settings),
        )
        job = BuildJob(
            spec, artifact.resolve(), folder.resolve(), device.runtime, settings, key
        )
        found = job.finished()
        if found is not None:
            kept.append(spec.name)
        else:
            take_ok_back(folder)  # before the first plan is another one, not when all are
        files[spec.name] = found or build_in_process(job, _named(progress, spec.name))
    return files, tuple(kept)


def _remove_others(folder: Path, names: Collection[str]) -> None:
    """Engines of an earlier build in another mode: nothing would use them, and a board has little space."""
    for path in folder.glob(f"*{plan_file('')}"):
        if path.name.removesuffix(plan_file("")) not in names:
            path.unlink()


def adopt_unchecked(artifact: Path, manifest: Manifest, device: Device) -> Built | None:
    """Put what ``build_on_device.sh`` built into the folder of this device, with a sidecar; not yet checked.

    The files stay where they are too, as links, so that the script finds them when it is run again.

    Returns:
        None if it built nothing.

    Raises:
        ArtifactError: engines are missing or damaged, or were built by the script of another artifact
            or on another board.
        UsageError: a build or a check is at work in the folder of this device.
    """
    source = artifact / UNCHECKED
    if not (source / MODE_FILE).is_file():
        return None
    _check_origin(source, manifest, device)
    mode, _, layout = _written(source / MODE_FILE).partition(" ")
    plan = plan_engines(manifest, mode, layout)  # type: ignore[arg-type]  # it refuses other words
    names = [plan_file(spec.name) for spec in plan.engines]
    for name in names:
        _check_sum(source / name)
    folder = artifact / ENGINES / device.folder
    with locked(folder):
        take_ok_back(folder)
        for name in names:
            _put(source / name, folder / name)
        files = {s.name: read_plan_file(folder / plan_file(s.name)) for s in plan.engines}
        settings = {"built_by": "trtexec"}
        sidecar = Sidecar(device, made_from(manifest), plan, files, settings, False, _now())
        write_sidecar(folder, sidecar)
        _remove_others(folder, files)
        (source / MODE_FILE).unlink()
    return Built(folder, sidecar, ())


def _check_origin(source: Path, manifest: Manifest, device: Device) -> None:
    """Raise ArtifactError unless the script was written for this artifact and ran on this board."""
    found = _written(source / MADE_FROM_FILE)
    if found != made_from(manifest):
        whose = (
            f"for the artifact {found[:12]}"
            if found
            else "for an artifact that it does not name"
        )
        raise ArtifactError(
            f"{source} was built by a build_on_device.sh {whose}, this one is {made_from(manifest)[:12]}. Run sh "
            f"build_on_device.sh in {source.parent.parent} again; engines of the same graphs are kept.",
            code="DCR-A012",
        )
    board = _written(source / BOARD_FILE)
    if board != device.board:
        raise ArtifactError(
            f"{source} was built on the board {board or 'without a name'}, this is {device}: an engine runs only "
            f"where it was built. Run sh build_on_device.sh in {source.parent.parent} here.",
            code="DCR-A010",
        )


def _written(path: Path) -> str:
    """What the script wrote into a file, without the end of the line; "" if there is none."""
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def _put(source: Path, target: Path) -> None:
    """A second name of a file; where the file system has no links, its new name."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        source.replace(target)


def _check_sum(plan: Path) -> None:
    """Raise ArtifactError unless a plan is the one that the script finished."""
    recorded = plan.with_name(plan.name + ".sha256")
    if plan.is_file() and recorded.is_file():
        wanted = recorded.read_text(encoding="utf-8").split()[:1]
        if wanted == [sha256_file(plan)]:
            return
    raise ArtifactError(
        f"{plan} is missing or is not the file that build_on_device.sh finished. Run that again; "
        "finished engines are kept.",
        code="DCR-A011",
    )


def _named(progress: PhaseProgress | None, engine: str) -> PhaseProgress | None:
    if progress is None:
        return None
    return lambda phase, done, steps: progress(f"{engine}: {phase}", done, steps)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
