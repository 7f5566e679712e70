"""The stages of :func:`diffcr_compile.compile` that leave something on disk, and take it up again."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffcr_compile.budgets import budget_costs
from diffcr_compile.calibrate.data import Conditions
from diffcr_compile.calibrate.distributed import Ranks
from diffcr_compile.calibrate.loop import CalibrationResult
from diffcr_compile.calibrate.lora import adapted_layers
from diffcr_compile.calibrate.samplers import Sampler, sampler_identity
from diffcr_compile.calibrate.trained import own_weights
from diffcr_compile.config import CompileConfig
from diffcr_compile.data_files import read_json
from diffcr_compile.drift import trajectory_drift
from diffcr_compile.durable import (
    disk_errors_in_words,
    write_json_atomic,
)
from diffcr_compile.errors import ArtifactError
from diffcr_compile.export.artifact import export_dense
from diffcr_compile.export.parity import Parity
from diffcr_compile.guidance import Guidance
from diffcr_compile.importance import token_importance
from diffcr_compile.manifest import Manifest, read_manifest, verify_artifact
from diffcr_compile.planning.targets import find_targets
from diffcr_compile.program import Program, is_routing_weight
from diffcr_compile.schedule import CostTable, KeepRatios, TokenSchedule
from diffcr_compile.stages import (
    Data,
    Event,
    export_programs,
    half_settings,
    learn,
    sampling_states,
    teacher_states,
)
from diffcr_compile.tensor_file import write_tensors
from diffcr_compile.workspace import Workspace, fingerprint


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Everything that the report speaks about."""

    name: str
    dense: Program
    routed: Program
    frozen: tuple[Program, ...]
    costs: CostTable
    result: CalibrationResult
    manifest: Manifest
    ladder: tuple[Parity, ...]


def calibrated(
    space: Workspace,
    key: str,
    rollouts_key: str,
    routed: Program,
    data: Data,
    budget: float,
    config: CompileConfig,
    sampler: Sampler,
    conditions: Conditions | None,
    progress: Event | None,
    ranks: Ranks,
) -> CalibrationResult:
    """Rollouts and calibration, or their result from an earlier run; the others' part is :func:`take_part`."""
    weights, summary = (
        space.folder / "model/routed.safetensors",
        space.folder / "model/calibration.json",
    )
    finished = space.finished("calibrate", key) and weights.exists() and summary.exists()
    if finished:
        ranks.total(1.0)
        try:
            load_trained(routed, weights, config)
            return _result_from_json(read_json(summary), routed, config)
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise ArtifactError(
                f"what was calibrated cannot be read from {weights} and {summary} ({type(error).__name__}: {error}); they were "
                "changed from outside. Delete both, and run the same command again: it takes them from the last saved state.",
                code="DCR-A000",
            ) from error
    folder = space.subfolder("calibration")
    with space.stage("rollouts", rollouts_key):
        ranks.total(0.0)  # there is something to learn
        states = teacher_states(
            routed, data, config, sampler, conditions, folder, progress, ranks, rollouts_key
        )
    with space.stage("calibrate", key):
        result = learn(routed, states, config, budget, folder, key, progress, ranks)
        space.subfolder("model")
        save_trained(routed, weights, config)
        write_json_atomic(summary, _result_to_json(result))
    return result


def take_part(
    out: Path,
    rollouts_key: str,
    routed: Program,
    data: Data,
    budget: float,
    config: CompileConfig,
    sampler: Sampler,
    conditions: Conditions | None,
    ranks: Ranks,
) -> None:
    """What a rank other than 0 does in a compilation, until rank 0 has finished it."""
    calibrated_before = ranks.total(0.0) > 0
    if not calibrated_before:
        folder = out / "calibration"
        states = teacher_states(
            routed, data, config, sampler, conditions, folder, None, ranks, rollouts_key
        )
        learn(routed, states, config, budget, ranks=ranks)
    ranks.wait_for_leader()


@contextlib.contextmanager
def workspace_of(out: Path, ranks: Ranks) -> Iterator[Workspace]:
    """The output folder for rank 0, which alone writes there; a passing one for the others."""
    with disk_errors_in_words(out):
        if ranks.leads:
            with Workspace(out) as space:
                yield space
            return
        with tempfile.TemporaryDirectory() as folder, Workspace(Path(folder) / "rank") as own:
            yield own


def keep_schedule(space: Workspace, frozen: Program) -> None:
    """The schedule alone, where a compilation stops before the export; the export writes the same file."""
    assert frozen.schedule is not None
    write_json_atomic(space.subfolder("model") / "schedule.json", frozen.schedule.to_json())


def exported(
    space: Workspace,
    key: str,
    frozen: Sequence[Program],
    name: str,
    config: CompileConfig,
    progress: Event | None,
    timesteps: Sequence[float],
    sampler: Sampler | None,
    guidance: Guidance | None = None,
) -> Manifest:
    """The artifact, or the one of an earlier run; all but fp32 is tried on a sampling run of these timesteps."""
    tried = None  # only other precisions are tried on a sampling run
    if config.export.precision != "fp32":
        tried = [list(timesteps), sampler_identity(sampler) if sampler else None]
    targets = [target.model_dump(mode="json") for target in find_targets(config.export.target)]
    key = fingerprint(key, config.export.model_dump(), targets, tried)
    if space.finished("export", key) and (space.folder / "manifest.json").exists():
        manifest = read_manifest(space.folder)
        verify_artifact(space.folder, manifest)
        return manifest
    with space.stage("export", key):
        half = None
        if config.export.precision != "fp32":
            states = sampling_states(frozen, timesteps, sampler, config.calibration.seed)
            half = half_settings(frozen, config.export.precision, states)
            if config.export.precision_tolerance is not None:
                half = dataclasses.replace(half, tolerance=config.export.precision_tolerance)
        return export_programs(
            frozen,
            space.folder,
            name,
            config.export.parity_tolerance,
            progress,
            find_targets(config.export.target),
            learned="model/routed.safetensors",
            profiles=config.export.profiles,
            half=half,
            guidance=guidance.to_json() if guidance else None,
        )


def dense_exported(space: Workspace, key: str, dense: Program) -> Path:
    """The dense model's ONNX, the baseline of size and speed."""
    path = space.folder / "baseline/dense.onnx"
    if not (space.finished("baseline", key) and path.exists()):
        space.subfolder("baseline")
        with space.stage("baseline", key):
            export_dense(dense, path)
    return path


def reported(
    space: Workspace,
    compiled: Compiled,
    config: CompileConfig,
    speed: dict[str, Any],
    quality: dict[str, Any] | None,
    timesteps: Sequence[float],
) -> dict[str, Any]:
    from diffcr_compile.report import write_html, write_importance, write_keep_map
    from diffcr_compile.summary import build_report

    folder = space.subfolder("report")
    with space.stage("report", "always"):
        runs = compiled.manifest.runs_on_cpu
        drift = trajectory_drift(space.folder, timesteps) if runs else None
        seen = token_importance(compiled.frozen, timesteps)
        (folder / "importance.png").unlink(missing_ok=True)  # of an earlier run
        if seen is not None:
            write_importance(seen.samples, seen.shares, folder / "importance.png")
        report = build_report(compiled, config, speed, quality, space.folder, timesteps, drift)
        write_keep_map(report, folder / "keep_map.png")
    report["seconds"], report["peak_rss_bytes"] = space.seconds(), space.peak_rss_bytes()
    write_json_atomic(folder / "report.json", report)
    write_html(report, folder)
    return report


def _trained_tensors(routed: Program, config: CompileConfig) -> dict[str, Tensor]:
    train = config.calibration.train
    merged = {f"{n}.weight" for n in adapted_layers(routed)} if train == "lora" else set()
    return {
        name: p
        for name, p in routed.module.named_parameters()
        if train == "all" or name in merged or is_routing_weight(routed, name)
    }


def save_trained(routed: Program, path: Path, config: CompileConfig) -> None:
    """Write what a calibration changed; :func:`load_trained` puts it into the same program anew."""
    tensors = {n: t.detach().clone() for n, t in _trained_tensors(routed, config).items()}
    write_tensors(path, tensors)


@torch.no_grad()
def load_trained(routed: Program, path: Path, config: CompileConfig) -> None:
    if config.calibration.train in ("lora", "all"):
        own_weights(routed.module)
    saved = load_file(path)
    for name, parameter in _trained_tensors(routed, config).items():
        parameter.copy_(saved[name])


def _result_to_json(result: CalibrationResult) -> dict[str, Any]:
    return {
        "keep_ratios": result.keep_ratios.values.tolist(),
        "schedule": result.schedule.to_json(),
        # Without the clock: the same inputs, seed and versions give the same bytes.
        "history": [
            {name: value for name, value in record.items() if name != "seconds"}
            for record in result.history
        ],
        "explained": result.explained,
    }


def _result_from_json(
    data: Mapping[str, Any], routed: Program, config: CompileConfig
) -> CalibrationResult:
    schedule = TokenSchedule.from_json(data["schedule"])
    return CalibrationResult(
        KeepRatios(tuple(schedule.kept_tokens), np.array(data["keep_ratios"])),
        schedule,
        budget_costs(routed, config),
        tuple(data["history"]),
        dict(data["explained"]),
    )
