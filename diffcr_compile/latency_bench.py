"""Measure a model's latency table here, or write the kit that measures it on another machine."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from diffcr_compile.block_graphs import BlockGroup, block_groups, fingerprint_of, frozen_at
from diffcr_compile.config import RoutingConfig
from diffcr_compile.durable import write_json_atomic
from diffcr_compile.export.onnx_model import onnx_from_program
from diffcr_compile.export.weights import write_shared_weights
from diffcr_compile.macs import levels_of_blocks
from diffcr_compile.manifest import sha256_file
from diffcr_compile.program import Program, evaluating, rebuild_call
from diffcr_compile.progress import Progress
from diffcr_compile.runtime.block_bench import KIT_FILE, onnxruntime_backend, open_kit
from diffcr_compile.runtime.latency import (
    MOST_ROUNDS,
    SCHEMA_VERSION,
    STABILITY,
    MeasuredGroup,
    Run,
    Subject,
    measure,
)

BackendName = Literal["onnxruntime", "torch"]
WEIGHTS = "weights.bin"


def measure_latency(
    routed: Program,
    config: RoutingConfig,
    name: str,
    *,
    backend: BackendName = "onnxruntime",
    device: str = "cpu",
    threads: int | None = None,
    stability: float = STABILITY,
    most_rounds: int = MOST_ROUNDS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The latency table of a ROUTED program on this machine.

    Args:
        routed: all tokens kept; for ``torch`` on ``cuda`` it must lie there.
        config: which numbers of kept tokens are allowed.
        name: of the model, for the record.
        backend: ONNX Runtime on the exported graphs, or torch on the graphs as they are.
        device: ``cpu`` or ``cuda``.
        threads: inside an operator; None for the backend's default.
        stability: see ``runtime.latency.measure``.
        most_rounds: likewise.
        progress: called with (groups done, all groups).
    """
    if backend == "torch":
        subject = _torch_subject(routed, config, name, device)
        before = torch.get_num_threads()
        facts = {"name": "torch", "device": device, "threads": threads or before}
        try:
            torch.set_num_threads(threads or before)
            return measure(subject, facts, stability, most_rounds, progress)
        finally:
            torch.set_num_threads(before)
    with tempfile.TemporaryDirectory() as folder:
        write_kit(routed, config, name, Path(folder))
        subject = open_kit(Path(folder), device, threads)
        facts = onnxruntime_backend(device, threads)
        table = measure(subject, facts, stability, most_rounds, progress)
        del subject  # its sessions hold the files open
    return table


def write_kit(routed: Program, config: RoutingConfig, name: str, folder: Path) -> None:
    """Write the graphs of every block at every level, and of the whole model, over one weights file."""
    groups = _groups(routed, config)
    programs: dict[str, Program] = {}
    rows = []
    for number, group in enumerate(groups):
        graphs = {}
        for kept in _measured_levels(group):
            file = f"block_{number:02d}_{kept:05d}.onnx"
            programs[file] = group.at(kept)
            graphs[str(kept)] = _graph_row(file, programs[file])
        rows.append({"blocks": list(group.blocks), "graphs": graphs})
    check = _check_column(groups)
    dense, other = _dense(routed), frozen_at(routed, check)
    programs |= {"dense.onnx": dense, "check.onnx": other}
    folder.mkdir(parents=True, exist_ok=True)
    models = {file: onnx_from_program(program) for file, program in programs.items()}
    write_shared_weights(models, folder, WEIGHTS)
    kit = {
        "schema_version": SCHEMA_VERSION,
        "model": _model_facts(routed, groups, name),
        "weights": WEIGHTS,
        "groups": rows,
        "dense": _graph_row("dense.onnx", dense),
        "check": {**_graph_row("check.onnx", other), "kept_tokens": check},
        "files": {file: sha256_file(folder / file) for file in (*models, WEIGHTS)},
    }
    write_json_atomic(folder / KIT_FILE, kit)


def _torch_subject(routed: Program, config: RoutingConfig, name: str, device: str) -> Subject:
    groups = _groups(routed, config)
    measured = [
        MeasuredGroup(
            group.blocks,
            {kept: _torch_run(group.at(kept), device) for kept in _measured_levels(group)},
        )
        for group in groups
    ]
    check = _check_column(groups)
    return Subject(
        _model_facts(routed, groups, name),
        measured,
        _torch_run(_dense(routed), device),
        _torch_run(frozen_at(routed, check), device),
        check,
    )


def _torch_run(program: Program, device: str) -> Run:
    call = rebuild_call(program.signature, program.example)

    def run() -> None:
        with torch.inference_mode(), evaluating(program.module):
            program.module(**call)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def _groups(routed: Program, config: RoutingConfig) -> tuple[BlockGroup, ...]:
    levels = levels_of_blocks(
        routed,
        config.multiple_of,
        config.min_keep_ratio,
        config.max_keep_ratio,
        skip_blocks=config.skip_blocks,
    )
    return block_groups(routed, levels)


def _measured_levels(group: BlockGroup) -> list[int]:
    return [kept for kept in group.levels if kept > 0]


def _dense(routed: Program) -> Program:
    return frozen_at(routed, {spec.name: spec.num_tokens for spec in routed.blocks})


def _check_column(groups: tuple[BlockGroup, ...]) -> dict[str, int]:
    """Every block at a level in the middle, below all tokens where there is one."""
    return {
        block: levels[(len(levels) - 1) // 2]
        for group in groups
        for levels in [_measured_levels(group)]
        for block in group.blocks
    }


def _model_facts(routed: Program, groups: tuple[BlockGroup, ...], name: str) -> dict[str, Any]:
    return {
        "name": name,
        "fingerprint": fingerprint_of(routed, groups),
        "batch": routed.batch,
    }


def _graph_row(file: str, program: Program) -> Mapping[str, Any]:
    inputs = [
        {
            "name": name,
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
        }
        for name, tensor in program.example.items()
    ]
    return {"onnx": file, "inputs": inputs}
