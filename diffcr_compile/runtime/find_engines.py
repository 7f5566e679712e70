"""The engines of an artifact for this device, or a refusal that says what is there instead."""

from __future__ import annotations

from pathlib import Path

from diffcr_compile.errors import ArtifactError
from diffcr_compile.manifest import Manifest
from diffcr_compile.runtime.device import Device
from diffcr_compile.runtime.engine_files import (
    ENGINES,
    OK_FILE,
    SIDECAR,
    Sidecar,
    check_plans,
    is_checked,
    made_from,
    read_sidecar,
    rebuild,
)


def find_engines(
    artifact: Path, manifest: Manifest, here: Device, verify: bool = True
) -> tuple[Path, Sidecar]:
    """Folder and sidecar of engines that may run here.

    Args:
        artifact: the artifact's folder.
        manifest: of it.
        here: this device.
        verify: compare the hash of every plan with its sidecar.

    Raises:
        ArtifactError: there are none, or those there are were built for another device or TensorRT,
            from other graphs, were changed, or were never compared with the golden outputs.
    """
    folder = artifact / ENGINES / here.folder
    if not (folder / SIDECAR).is_file():
        raise none_for(artifact, here)
    sidecar = checked_sidecar(folder, manifest, here, verify)
    if not is_checked(folder, sidecar):
        raise ArtifactError(
            f"the engines in {folder} were never compared with the golden outputs on a device: "
            f"{OK_FILE} is missing or is about other engines. Compare them here: diffcr validate "
            f"{artifact} --level engine. {rebuild(artifact)}",
            code="DCR-A013",
        )
    return folder, sidecar


def checked_sidecar(
    folder: Path, manifest: Manifest, here: Device, verify: bool = True
) -> Sidecar:
    """The sidecar of engines that belong to the artifact and to this device, checked or not.

    Raises:
        ArtifactError: as :func:`find_engines`, but for ``engine.ok.json``; or they were built ahead of time.
    """
    artifact = folder.parent.parent
    sidecar = read_sidecar(folder)
    if sidecar.ahead_of_time:
        raise ArtifactError(
            f"the engines in {folder} were built ahead of time and never compared with the golden outputs on "
            f"the device that built them: there was none. They show that the graphs build. {rebuild(artifact)}",
            code="DCR-A013",
        )
    differs = sidecar.device.differs_from(here)
    if differs:
        raise _of_another(folder, sidecar, here, differs)
    if sidecar.made_from != made_from(manifest):
        raise ArtifactError(
            f"the engines in {folder} were made of other graphs or weights than this artifact's, or for other "
            f"timestep buckets, kept tokens, inputs or outputs. {rebuild(artifact)}",
            code="DCR-A012",
        )
    buckets = sum(len(p.buckets) for e in sidecar.plan.engines for p in e.profiles)
    if buckets != len(manifest.buckets):
        raise ArtifactError(
            f"the engines in {folder} are for {buckets} timestep buckets, the artifact has "
            f"{len(manifest.buckets)}. {rebuild(artifact)}",
            code="DCR-A012",
        )
    if verify:
        check_plans(folder, sidecar)
    return sidecar


def _of_another(folder: Path, sidecar: Sidecar, here: Device, differs: str) -> ArtifactError:
    return ArtifactError(
        f"the engines in {folder} were built for {sidecar.device}; this is {here}: {differs} differs, "
        f"and an engine runs only where it was built. {rebuild(folder.parent.parent)}",
        code="DCR-A010",
    )


def none_for(artifact: Path, here: Device) -> ArtifactError:
    """The words for an artifact without engines for this device."""
    others = sorted(path.parent.name for path in (artifact / ENGINES).glob(f"*/{SIDECAR}"))
    if not others:
        return ArtifactError(
            f"{artifact} has no engines for {here}. {rebuild(artifact)}", code="DCR-A009"
        )
    return ArtifactError(
        f"{artifact} has no engines for {here}, only those in {', '.join(others)}; an engine runs only "
        f"where it was built. {rebuild(artifact)}",
        code="DCR-A010",
    )
