"""One model through every step, at both of its sizes and with inputs of two seeds."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import diffcr_compile as dcr
from benchmarks.supported_models.record import Record, code_hash
from benchmarks.supported_models.reference import (
    equal,
    other_inputs,
    permutation_errors,
    relative,
    slowly_routed,
    tensors,
)
from benchmarks.supported_models.settings import (
    KEEP_RATIO,
    NEAR_TIE,
    ONNX_PARITY,
    PARITY,
    PERMUTATION,
)
from diffcr_compile.capture import capture
from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.legality import find_blocks


def run_model(model: Any, path: Path, skip_rtx: bool) -> dict[str, Any]:
    """Every step for both sizes of a model; the entry of the table."""
    entry: dict[str, Any] = {
        "name": model.name, "kind": model.kind, "refused": model.refused, "code": code_hash(),
        "rtx": not skip_rtx, "running": None, "sizes": [],
    }  # fmt: skip
    record = Record(path, entry)
    started = time.monotonic()
    with torch.no_grad():
        for size in (0, 1):
            record.begin(size)
            _run_size(model, record, skip_rtx)
    entry["all_seconds"] = round(time.monotonic() - started, 1)
    entry["finished"] = True
    record.write()
    return entry


def _run_size(zoo_model: Any, record: Record, skip_rtx: bool) -> None:
    found = record.size
    runs: list[tuple[str, dict[str, Any], Any]] = []
    with record.step("dense"):
        model, inputs = zoo_model.build(found["size"])
        runs = _dense_runs(model, inputs)
    if not runs:
        return
    if found["size"] == 0:
        with record.step("inspect"):
            dcr.inspect(model, inputs)  # whatever it finds, it raises nothing
    routed = None
    with record.step("routed"):
        try:
            routed = dcr.route(model, inputs)
        except UnsupportedModelError as error:
            found["refusal"] = error.message
            raise
    if routed is not None:
        _routed_steps(record, model, routed, runs, skip_rtx)
        return
    with record.step("captured"):
        findings = find_blocks(model, (), inputs)  # what inspect says only in words
        found["candidates"] = len(findings.blocks) + len(findings.refused)
        found["not_routed"] = {r.block: r.reason for r in findings.refused}
        program = capture(
            model, (), inputs, findings.blocks, findings.refused, findings.sample
        )
        _check_captured(record, program.module, runs)


def _routed_steps(
    record: Record, model: nn.Module, routed: Any, runs: Any, skip_rtx: bool
) -> None:
    found, program = record.size, routed.program
    found["units"] = [spec.name for spec in program.blocks]
    found["num_tokens"] = sorted({spec.num_tokens for spec in program.blocks})
    found["not_routed"] = {refusal.block: refusal.reason for refusal in program.refused}
    found["candidates"] = len(found["units"]) + len(found["not_routed"])
    record.require("routed", bool(found["units"]), "no unit is routed")
    with record.step("captured"):  # with every block full, the captured graph is left
        _check_captured(record, dcr.freeze(routed, keep_ratio=1.0)[0], runs)
    with record.step("all_kept"):
        same = [label for label, given, dense in runs if equal(routed(**given), dense)]
        record.require("all_kept", len(same) == 2, f"bit-equal for {same or 'no inputs'} only")
    frozen = None
    with record.step("parity"):
        frozen = dcr.freeze(routed, keep_ratio=KEEP_RATIO)[0]
        found["parity"] = _check_parity(record, model, routed, frozen, runs)
    with record.step("permutation"):
        errors = permutation_errors(model, runs[1][1], program.blocks)
        found["permutation"] = {"checked": len(errors), "worst": max(errors.values())}
        wrong = {name: f"{e:.0e}" for name, e in errors.items() if not e < PERMUTATION}
        record.require("permutation", not wrong, f"{len(wrong)} units mix tokens: {wrong}")
    onnx_bytes = None
    if frozen is not None:
        with record.step("onnx"):
            onnx_bytes = _check_onnx(record, frozen, runs)
    if onnx_bytes is not None and not skip_rtx:
        with record.step("rtx"):
            started = time.monotonic()
            engine = _rtx_engine(onnx_bytes)
            seconds = round(time.monotonic() - started, 2)
            found["rtx"] = {"bytes": len(engine), "seconds": seconds}
            record.require("rtx", len(engine) > 0, "the engine is empty")


def _dense_runs(
    model: nn.Module, inputs: dict[str, Any]
) -> list[tuple[str, dict[str, Any], Any]]:
    """(label, inputs, dense output) for the example and for inputs of another seed."""
    runs = []
    for label, given in (("example", inputs), ("other seed", other_inputs(inputs))):
        output = model(**copy.deepcopy(given))
        _check_dense(model, given, output)
        runs.append((label, given, output))
    if equal(runs[0][2], runs[1][2]):
        raise ValueError("inputs of another seed give the same dense output")
    return runs


def _check_dense(model: nn.Module, inputs: dict[str, Any], output: Any) -> None:
    if not tensors(output):
        raise ValueError(f"the output is a {type(output).__name__} without tensors")
    if not all(bool(t.isfinite().all()) for t in tensors(output) if t.is_floating_point()):
        raise ValueError("the dense output has values that are not finite")
    if not equal(model(**copy.deepcopy(inputs)), output):
        raise ValueError("the dense model gives another output when it is called again")


def _check_captured(record: Record, graph: Callable[..., Any], runs: Any) -> None:
    same = [label for label, given, dense in runs if equal(graph(**given), dense)]
    record.require("captured", len(same) == 2, f"bit-equal for {same or 'no inputs'} only")


def _check_parity(
    record: Record, model: nn.Module, routed: Any, frozen: Any, runs: Any
) -> dict[str, Any]:
    """FROZEN at half the tokens against the slow reference, for both inputs."""
    result: dict[str, Any] = {}
    for label, given, dense in runs:
        for attempt in range(3):
            weights = {
                name: next(router.parameters()).detach()[0]
                for name, router in routed.routers.items()
            }
            with slowly_routed(model, routed.program.blocks, weights, KEEP_RATIO) as distances:
                expected = tensors(model(**copy.deepcopy(given)))
            error = relative(tensors(frozen(**given)), expected)
            if error < PARITY or min(distances) > NEAR_TIE:
                break
            _draw_routers(routed, attempt)  # two scores were equal but for rounding
        effect = relative(expected, tensors(dense))
        result[label] = {
            "error": error, "effect": effect, "attempt": attempt, "distance": min(distances),
        }  # fmt: skip
        # without an effect of its own, a reference agrees with everything
        passed = error < PARITY and effect > 100 * error and effect > PARITY
        record.require(
            "parity",
            passed and len(distances) == len(routed.program.blocks),
            f"{label}: error {error:.1e}, dropping tokens changes {effect:.1e}, "
            f"closest scores {min(distances):.1e} apart, {len(distances)} blocks ran",
        )
    return result


def _draw_routers(routed: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for router in routed.routers.values():
        for value in router.parameters():
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(value.shape[-1] ** -0.5 * drawn)


def _check_onnx(record: Record, frozen: Any, runs: Any) -> bytes:
    import onnxruntime

    from diffcr_compile.export.onnx_model import onnx_from_program
    from diffcr_compile.runtime.complex_inputs import as_graph_input

    data: bytes = onnx_from_program(frozen.program).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    record.size["onnx"] = {"bytes": len(data)}
    for label, given, _ in runs:
        named = frozen.program.signature.tensors((), given)
        feed = {i.name: as_graph_input(named[i.name].numpy()) for i in session.get_inputs()}
        error = relative(session.run(None, feed), tensors(frozen(**given)))
        record.size["onnx"][label] = error
        record.require("onnx", error < ONNX_PARITY, f"{label}: relative error {error:.1e}")
    return data


def _rtx_engine(data: bytes) -> bytes:
    from diffcr_compile.export.rtx_build import build_rtx_engine

    return build_rtx_engine(data, "SM86")
