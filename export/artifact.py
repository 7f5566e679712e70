"""FROZEN programs -> an artifact on disk, checked against ONNX Runtime before it gets a manifest."""

from __future__ import annotations

import contextlib
import datetime
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from diffcr_compile.durable import (
    PARTIAL_SUFFIX,
    atomic_write_bytes,
    disk_error,
    force_folder,
    write_json_atomic,
)
from diffcr_compile.errors import UsageError
from diffcr_compile.export.activation_memory import write_activations
from diffcr_compile.export.bisect import write_block_values
from diffcr_compile.export.bucket_graphs import BucketGraphs
from diffcr_compile.export.checks import Checks, check_valid
from diffcr_compile.export.device.script import write_script
from diffcr_compile.export.golden import golden_path, write_golden
from diffcr_compile.export.lint import lint_file, refuse
from diffcr_compile.export.manifest_rows import (
    bucket_rows,
    constant_rows,
    output_specs,
    parity_section,
    schedule_of,
    tensor_specs,
    versions,
)
from diffcr_compile.export.onnx_model import (
    export_graph,
    onnx_from_program,
)
from diffcr_compile.export.precision import HalfSettings, half_graphs
from diffcr_compile.export.profiles_graph import tensorrt_topk
from diffcr_compile.export.weights import WEIGHTS_FILE, WeightsWriter, write_shared_weights
from diffcr_compile.full_float32 import full_float32
from diffcr_compile.manifest import MANIFEST_FILE, Manifest, hash_files, write_manifest
from diffcr_compile.planning.targets import Target
from diffcr_compile.program import Program, Stage, evaluating, run_flat
from diffcr_compile.progress import Progress

InputsFor = Callable[[int], Mapping[str, Tensor]]
Export = Callable[[Program], tuple[onnx.ModelProto, dict[str, str]]]
# A protobuf message cannot be larger.
MAX_MESSAGE_BYTES = (1 << 31) - 1
_STAGING = f".export{PARTIAL_SUFFIX}"


@full_float32()  # answers of FROZEN on CUDA are what every executor is held to
def export_artifact(
    frozen: Sequence[Program],
    folder: Path,
    *,
    model_info: Mapping[str, Any],
    inputs_for: InputsFor | None = None,
    timestep_input: str | None,
    sample_input: str | None,
    budget: Mapping[str, Any],
    parity_tolerance: float = 1e-4,
    progress: Progress | None = None,
    targets: Sequence[Target] = (),
    describe: Callable[[Path], None] | None = None,
    profiles: bool = True,
    half: HalfSettings | None = None,
) -> Manifest:
    """Write onnx/, golden/, model/*.json, build_on_device.sh and, last, manifest.json.

    All is made and checked in a folder aside; an artifact that is already there stays whole until
    the new one has passed.

    Args:
        frozen: one program per timestep bucket, in order.
        folder: made if it does not exist. Other files in its model/ get into the manifest.
        model_info: name, revision and parameters, for the manifest.
        inputs_for: golden inputs of a bucket; by default the program's example with the timestep
            in the middle of the bucket.
        timestep_input: which input chooses the bucket; None is for one bucket only.
        sample_input: which input is the noisy sample; None if it is not known.
        budget: metric, asked and reached, for the manifest.
        parity_tolerance: largest allowed absolute difference of ONNX Runtime from FROZEN.
        progress: called with (buckets done, buckets).
        targets: devices that must take every graph.
        describe: writes more files into the model/ of the folder that it is given.
        profiles: also write the graphs of several buckets, for engines with optimization profiles.
        half: matrix products and attention in half precision, and how it is checked; None for float32.

    Raises:
        UsageError: the programs are not the buckets of one schedule, or an input is unknown.
        UnsupportedModelError: a graph cannot be said in ONNX.
        TargetError: a target does not take a graph.
        AccuracyError: a bucket differs from FROZEN by more than the tolerance.
        ResourceError: the disk is full or cannot be written.
    """
    _check_programs(frozen, timestep_input, sample_input)
    inputs_for = inputs_for or _middle_inputs(frozen[0], timestep_input)
    made = None if half is None else half_graphs(frozen, half, inputs_for)
    with _staging(folder) as staging:
        topk = tensorrt_topk(targets) if profiles else None
        graphs, shared = _write_graphs(
            frozen,
            staging,
            inputs_for,
            progress,
            profiles,
            topk,
            made.export if made else None,
        )
        write_activations(staging, graphs)
        every = [*graphs, *(row["onnx"] for row in shared)]
        _suit(staging, every, targets, tuple(b.name for b in frozen[0].blocks))
        checks = Checks(staging, parity_tolerance, half, made)
        rows = [checks.bucket(graphs[bucket], bucket) for bucket in range(len(frozen))]
        golden = [golden_path(bucket) for bucket in range(len(frozen))]
        write_block_values(staging, graphs, golden, checks.values, checks.runnable)
        shared_rows = [parity for row in shared for parity in checks.shared(row, frozen[0])]
        if describe is not None:
            describe(staging)
        _publish(staging, folder)
    manifest = Manifest(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        model=dict(model_info),
        versions=versions(),
        inputs=tensor_specs(frozen[0].example),
        outputs=output_specs(folder),
        timestep_input=timestep_input,
        sample_input=sample_input,
        buckets=bucket_rows(frozen[0], graphs),
        weights=f"onnx/{WEIGHTS_FILE}",
        schedule=schedule_of(frozen[0])["kept_tokens"],
        num_tokens=schedule_of(frozen[0])["num_tokens"],
        budget=dict(budget),
        parity=parity_section(
            rows, shared_rows, (*made.rows, *checks.widened) if made else ()
        ),
        files=hash_files(folder),
        stages={"freeze": "done", "export": "done", "validate": "done"},
        constants=constant_rows(frozen[0]),
        profile_graphs=shared,
        precision=made.to_json() if made else {"type": "fp32"},
    )
    write_script(folder, manifest)
    write_manifest(folder, manifest)
    return manifest


def export_dense(captured: Program, path: Path) -> None:
    """Write the dense model as one ONNX file with its weights inside, as a baseline.

    Beyond the 2 GiB that one ONNX file can hold, the weights lie beside it.
    """
    model = onnx_from_program(captured)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size > MAX_MESSAGE_BYTES // 2:
        write_shared_weights({path.name: model}, path.parent, f"{path.stem}.weights.bin")
    else:
        atomic_write_bytes(path, model.SerializeToString(deterministic=True))
    check_valid(path)


def _check_programs(
    frozen: Sequence[Program], timestep_input: str | None, sample_input: str | None
) -> None:
    if not frozen:
        raise UsageError("there is nothing to export: no FROZEN program was given")
    schedule = frozen[0].schedule
    for number, program in enumerate(frozen):
        if program.stage != Stage.FROZEN or program.schedule is None:
            raise UsageError(
                f"program {number} is {program.stage.name}, export needs FROZEN ones (dcr.freeze)"
            )
        if program.bucket != number or program.schedule != schedule:
            raise UsageError(
                f"program {number} is bucket {program.bucket} of its schedule; give every bucket "
                "of one schedule, in order"
            )
    assert schedule is not None
    if len(frozen) != len(schedule.buckets):
        raise UsageError(
            f"{len(frozen)} programs for a schedule of {len(schedule.buckets)} timestep buckets"
        )
    for role, name in (("timestep_input", timestep_input), ("sample_input", sample_input)):
        if name is not None and name not in frozen[0].example:
            raise UsageError(f"{role} is {name!r}, the inputs are {list(frozen[0].example)}")
    if timestep_input is None and len(frozen) > 1:
        raise UsageError(
            f"{len(frozen)} timestep buckets, but no input is known to be the timestep. Name it "
            "timestep in the model's forward, or freeze with one bucket."
        )


def _write_graphs(
    frozen: Sequence[Program],
    staging: Path,
    inputs_for: InputsFor,
    progress: Progress | None,
    profiles: bool,
    max_topk: int | None,
    half_export: Export | None,
) -> tuple[list[str], list[dict[str, Any]]]:
    """Write graphs, weights, golden files and maps; each bucket's path, and the graphs of several."""
    finished = 0

    def done(bucket: int) -> None:
        nonlocal finished
        finished += 1
        _write_golden(frozen[bucket], staging, bucket, inputs_for(bucket))
        if progress is not None:
            progress(finished, len(frozen))

    with WeightsWriter(staging / "onnx" / WEIGHTS_FILE) as writer:
        graphs = BucketGraphs(
            frozen,
            staging,
            writer,
            half_export or (lambda program: export_graph(program, writer)),
            profiles,
            half_export is None,
            max_topk,
        )
        graphs.write(done)
    write_json_atomic(staging / "model/node_map.json", graphs.nodes)
    write_json_atomic(staging / "model/schedule.json", schedule_of(frozen[0]))
    return [graphs.paths[bucket] for bucket in range(len(frozen))], graphs.rows


def _write_golden(
    program: Program, staging: Path, bucket: int, inputs: Mapping[str, Tensor]
) -> None:
    with evaluating(program.module), torch.no_grad():
        outputs = run_flat(program, inputs)
    write_golden(staging, bucket, inputs, outputs)


def _middle_inputs(program: Program, timestep_input: str | None) -> InputsFor:
    """The example's inputs, with the timestep in the middle of the bucket if there are several."""
    assert program.schedule is not None
    ranges = program.schedule.buckets.ranges()

    def inputs(bucket: int) -> Mapping[str, Tensor]:
        if timestep_input is None or len(ranges) == 1:  # the example lies in the only bucket
            return program.example
        example = program.example[timestep_input]
        middle = sum(ranges[bucket]) / 2
        if not example.is_floating_point():
            middle = round(middle)
        return {**program.example, timestep_input: torch.full_like(example, middle)}

    return inputs


def _suit(
    staging: Path, graphs: Sequence[str], targets: Sequence[Target], blocks: Sequence[str]
) -> None:
    """Raise TargetError if a graph has what a target does not take."""
    maps = json.loads((staging / "model/node_map.json").read_text(encoding="utf-8"))
    for graph in dict.fromkeys(graphs if targets else ()):
        refuse(lint_file(staging / graph, targets, maps[graph], blocks))


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for unfinished work; it is gone afterwards."""
    staging = folder / _STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, folder: Path) -> None:
    """Put the new files in place of old ones; without a manifest the folder is no artifact."""
    (folder / MANIFEST_FILE).unlink(missing_ok=True)
    force_folder(folder)  # no manifest outlives the files that it speaks of
    for name in ("onnx", "golden"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (staging / name).replace(folder / name)
    (folder / "model").mkdir(exist_ok=True)
    for path in (staging / "model").iterdir():
        path.replace(folder / "model" / path.name)
    force_folder(folder / "model")
    force_folder(folder)
