"""Which diffusion transformers the compiler supports: every model of the zoo through every step.

    python -m benchmarks.supported_models                  # an hour on two CPU cores
    python -m benchmarks.supported_models --smoke          # three models, checks that it runs
    python -m benchmarks.supported_models --only Name      # anew; then --resume for the whole table
    python -m benchmarks.supported_models --partial        # also while files of the zoo are missing

Each model runs in a process of its own, at both of its sizes and with inputs of two seeds:
dense → captured → routed, all tokens kept → half of them kept, against a slow reference → permutation
of tokens → ONNX Runtime → TensorRT-RTX engine for SM86, built without a GPU. A failure is recorded with
its step and ends nothing else. A run over the whole zoo writes ``benchmarks/results/supported_models.json``
and ``docs/supported_models.md``; any other leaves both in the ``--work`` folder.

The reference (first half of this file) runs the user's own model eagerly with hooks on its blocks. Of the
package it knows the roles of the blocks' arguments and the routers' weights, nothing else.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.capture import capture
from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.legality import find_blocks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/supported_models.json"
DOCUMENT = ROOT / "docs/supported_models.md"
KEEP_RATIO = 0.5
# Relative L2. fp32 rounding through a few blocks stays below 1e-5; one wrong token is 1e-2.
PARITY = 1e-4
ONNX_PARITY = 1e-3
# Of a block's change to its stream, in float64; blocks that compute in fp32 inside reach 1e-6.
PERMUTATION = 1e-4
# Closer scores than this at the border between kept and bypassed may fall either way in fp32.
NEAR_TIE = 1e-5
# A process may take this many times its processor time before it counts as hanging.
WAITING = 10
STEPS = ("captured", "routed", "all_kept", "parity", "permutation", "onnx", "rtx")
VERSIONS = ("diffcr-compile", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime")
RTX = "tensorrt-rtx-cu12"

# ---------------------------------------------------------------------- the slow reference


def rebuilt(tree: Any, edit: Callable[[tuple[Any, ...], Any], Any], path: Any = ()) -> Any:
    """A copy of nested tuples, lists and dicts with ``edit(path, leaf)`` in place of each leaf."""
    if isinstance(tree, dict):
        return {key: rebuilt(value, edit, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [rebuilt(value, edit, (*path, place)) for place, value in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return edit(path, tree)


def at(tree: Any, path: Sequence[Any]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of an output, in order; the output classes of diffusers are dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tree.values()
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = vars(tree).values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [tensor for child in tree for tensor in tensors(child)]


def rows_of(kept: Tensor, start: int, num_tokens: int, length: int) -> Tensor:
    """Rows of an axis of `length` that stay: the image tokens `kept`, and all other tokens."""
    return torch.cat(
        [torch.arange(start), start + kept, torch.arange(start + num_tokens, length)]
    )


def picked(leaf: Tensor, axis: int, kept: Tensor, role: Any, num_tokens: int) -> Tensor:
    rows = rows_of(kept, role.start, num_tokens, leaf.shape[axis])
    return leaf[(slice(None),) * axis + (rows,)]


def roles_of(spec: Any, path: Any) -> list[Any]:
    return [role for role in (spec.stream, *spec.aligned) if role.path == path]


def sample_by_sample(
    forward: Callable[..., Any], tree: Any, spec: Any, kept: Tensor
) -> list[Any]:
    """Outputs of the block, run on one sample and its kept tokens after the other."""
    batch = len(kept)

    def run(sample: int) -> Any:
        def cut(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            roles = roles_of(spec, path)
            is_table = any(role.axis == 0 or not role.batched for role in roles)
            if leaf.ndim and leaf.shape[0] == batch and not is_table:
                leaf = leaf[sample : sample + 1]
            for role in roles:
                leaf = picked(leaf, role.axis, kept[sample], role, spec.num_tokens)
            return leaf

        args, kwargs = rebuilt(tree, cut)
        return forward(*args, **kwargs)

    return [run(sample) for sample in range(batch)]


def batch_at_once(
    forward: Callable[..., Any], tree: Any, spec: Any, kept: Tensor
) -> list[Any]:
    """The same for a block that does not run on one sample: all of them in one call."""

    def cut(path: Any, leaf: Any) -> Any:
        for role in roles_of(spec, path):
            if not role.batched:
                leaf = picked(leaf, role.axis, kept[0], role, spec.num_tokens)
            elif role.axis == 0:  # a table without a batch axis: a copy for each sample
                leaf = torch.stack([picked(leaf, 0, k, role, spec.num_tokens) for k in kept])
            else:
                samples = leaf if len(leaf) == len(kept) else [leaf[0]] * len(kept)
                leaf = torch.stack(
                    [
                        picked(one, role.axis - 1, k, role, spec.num_tokens)
                        for one, k in zip(samples, kept, strict=True)
                    ]
                )
        return leaf

    args, kwargs = rebuilt(tree, cut)
    return [forward(*args, **kwargs)]


def put_back(results: list[Any], stream: Tensor, spec: Any, kept: Tensor) -> Any:
    """A block's outputs, whole again: bypassed tokens are those of the stream."""

    def join(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        parts = [at(result, path) for result in results]
        if tuple(path) != tuple(spec.output):
            # batch 1 says that the output has a batch axis; anything else is the same each time
            joined = len(parts) > 1 and leaf.ndim > 0 and len(leaf) == 1
            return torch.cat(parts) if joined else leaf
        whole = stream.clone()
        for sample, processed in enumerate(torch.cat(parts)):
            rows = rows_of(kept[sample], spec.stream.start, spec.num_tokens, stream.shape[1])
            whole[sample, rows] = processed
        return whole

    return rebuilt(results[0], join)


def slow_block(
    forward: Callable[..., Any], tree: Any, dense: Any, spec: Any, weight: Tensor, kept: int
) -> tuple[Any, float]:
    """(what the block returns with only its `kept` best tokens processed, distance to a tie).

    The way to run it is the first that gives the block's own `dense` output with every token kept.
    """
    stream: Tensor = at(tree, spec.stream.path)
    first, num_tokens = spec.stream.start, spec.num_tokens
    scores = torch.stack([s[first : first + num_tokens].float() @ weight for s in stream])
    if any(not role.batched for role in spec.aligned):  # one choice for the whole batch
        scores = scores.mean(0, keepdim=True).expand(len(stream), -1)
    ranked = scores.sort(dim=1, descending=True, stable=True)
    distance = float("inf")
    if kept < num_tokens:
        border = ranked.values[:, kept - 1] - ranked.values[:, kept]
        distance = float((border / scores.abs().amax(1).clamp_min(1e-30)).min())
    every = torch.arange(num_tokens).expand(len(stream), -1)
    problems = []
    for run in (sample_by_sample, batch_at_once):
        try:
            whole = put_back(run(forward, tree, spec, every), stream, spec, every)
            if relative(tensors(whole), tensors(dense)) > PARITY:
                problems.append(f"{run.__name__} does not give the dense output")
                continue
            best = ranked.indices[:, :kept]
            return put_back(run(forward, tree, spec, best), stream, spec, best), distance
        except Exception as error:  # noqa: BLE001 - the user's block may raise anything
            problems.append(f"{run.__name__}: {first_line(error)}")
    raise RuntimeError(f"the reference cannot run {spec.name}: {'; '.join(problems)}")


@contextlib.contextmanager
def slowly_routed(
    model: nn.Module, specs: Iterable[Any], weights: Mapping[str, Tensor], ratio: float
) -> Iterator[list[float]]:
    """Hooks on the blocks of `model` while the context lasts; yields each block's distance to a tie."""
    distances: list[float] = []
    handles = []

    def add(spec: Any, block: nn.Module) -> None:
        calls: list[Any] = []

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(rebuilt((args, kwargs), cloned))

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            kept = round(ratio * spec.num_tokens)
            result, distance = slow_block(
                block.forward, calls.pop(), output, spec, weights[spec.name], kept
            )
            distances.append(distance)
            return result

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))

    try:
        for spec in specs:
            add(spec, model.get_submodule(spec.name))
        yield distances
    finally:
        for handle in handles:
            handle.remove()


def cloned(_: Any, leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def permutation_errors(
    model: nn.Module, inputs: dict[str, Any], specs: Sequence[Any]
) -> dict[str, float]:
    """Block -> how far "permuted tokens in" is from "permuted tokens out", as share of its change."""
    calls: dict[str, Any] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name] = rebuilt((args, kwargs), cloned)

        return record

    handles = [
        model.get_submodule(spec.name).register_forward_pre_hook(
            recorder(spec.name), with_kwargs=True
        )
        for spec in specs
    ]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    generator = torch.Generator().manual_seed(11)
    return {
        spec.name: _permutation_error(
            model.get_submodule(spec.name), calls[spec.name], spec, generator
        )
        for spec in specs
    }


def _permutation_error(
    block: nn.Module, tree: Any, spec: Any, generator: torch.Generator
) -> float:
    block = copy.deepcopy(block).double()
    for value in block.parameters():  # a gate of zero would hide what it gates
        if value.numel() > 1 and bool((value == value.flatten()[0]).all()):
            value.data += 0.2 * torch.randn(value.shape, generator=generator).double()
    tree = rebuilt(tree, doubled)
    stream: Tensor = at(tree, spec.stream.path)
    orders = [torch.randperm(spec.num_tokens, generator=generator) for _ in stream]
    if any(not role.batched for role in spec.aligned):
        orders = [orders[0]] * len(orders)
    order = torch.stack(orders)
    expected = block(*tree[0], **tree[1])
    found = batch_at_once(block, tree, spec, order)[0]
    errors = []

    def compare(path: Any, leaf: Any) -> None:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return
        other, change = at(found, path), leaf
        if tuple(path) == tuple(spec.output):
            change = leaf - stream
            leaf = torch.stack(
                [
                    picked(s, 0, o, spec.stream, spec.num_tokens)
                    for s, o in zip(leaf, order, strict=True)
                ]
            )
        errors.append(float((other - leaf).abs().max() / change.abs().max().clamp_min(1e-30)))

    rebuilt(expected, compare)
    return max(errors)


def doubled(_: Any, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_complex():
        return leaf.to(torch.complex128)
    return leaf.double() if leaf.is_floating_point() else leaf


def relative(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Norm of the difference over the norm of what was expected, all tensors as one vector."""
    shapes = [[tuple(t.shape) for t in side] for side in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"outputs of shapes {shapes[0]}, expected {shapes[1]}")
    got, want = (
        torch.cat([torch.as_tensor(t).double().flatten() for t in s])
        for s in (found, expected)
    )
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def equal(found: Any, expected: Any) -> bool:
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def other_inputs(inputs: dict[str, Any], seed: int = 77) -> dict[str, Any]:
    """Inputs of another seed: float data drawn anew, per-sample scalars (timesteps) exchanged.

    Tensors of whole numbers, such as masks and position ids, stay.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = [(t.ndim, len(t)) for t in tensors(inputs) if t.ndim]
    batch = max(sizes)[1]

    def draw(_: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.is_complex():
            return leaf
        if leaf.ndim == 1 and len(leaf) == batch:
            return leaf.flip(0)
        if leaf.ndim < 2 or not leaf.is_floating_point() or bool((leaf == leaf.round()).all()):
            return leaf
        noise = torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        return leaf.mean() + leaf.std() * noise

    return rebuilt(inputs, draw)


# -------------------------------------------------------------------------------- one model


class Record:
    """What is known about one model so far, on disk after every step, so that a crash loses nothing."""

    def __init__(self, path: Path, entry: dict[str, Any]) -> None:
        self.path, self.entry = path, entry
        self.size: dict[str, Any] = {}

    def begin(self, size: int) -> None:
        self.size = {"size": size, "passed": {}, "failures": [], "seconds": {}}
        self.entry["sizes"].append(self.size)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Run one step; what it raises is recorded and goes no further."""
        self.entry["running"] = name
        self.write()
        started = time.monotonic()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - every failure belongs into the table
            self.fail(name, first_line(error))
            self.size["passed"][name] = False
        self.size["seconds"][name] = round(time.monotonic() - started, 2)
        self.entry["running"] = None
        self.write()

    def fail(self, step: str, error: str) -> None:
        self.size["failures"].append({"step": step, "error": error})

    def require(self, step: str, passed: bool, otherwise: str) -> None:
        """Record whether a step holds; what was recorded before it can only be spoiled."""
        self.size["passed"][step] = passed and self.size["passed"].get(step, True)
        if not passed:
            self.fail(step, otherwise)

    def write(self) -> None:
        self.path.write_text(json.dumps(self.entry, indent=1) + "\n")


def first_line(error: BaseException) -> str:
    """Type and first line of an error, short and without the folders of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if (
        len(lines) > 1
        and lines[0].endswith((":", "."))
        and isinstance(error, UnsupportedModelError)
    ):
        lines[0] = " ".join(lines[:2])  # the first says that, the second why
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return re.sub(r"(?<![\w./])/(?:[\w.@+-]+/)+", "", text)[:400]


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
            found["refusal"] = str(error)
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


# -------------------------------------------------------------------------------- the table


def verdict(entry: Mapping[str, Any]) -> str:
    """``supported``, ``refused`` (rightly), ``wrong`` (refusal missing or with other words) or ``failed``."""
    sizes = entry["sizes"]
    if entry["refused"] is not None:
        rightly = len(sizes) == 2 and not any(size.get("units") for size in sizes)
        for size in sizes:  # dcr.route must have refused it, in words
            said = " ".join([size.get("refusal", ""), *size.get("not_routed", {}).values()])
            rightly &= "refusal" in size and entry["refused"].lower() in said.lower()
        return "refused" if rightly else "wrong"
    wanted = [step for step in STEPS if step != "rtx" or entry["rtx"]]
    clean = not any(size["failures"] for size in sizes)
    return "supported" if clean and all(holds(entry, step) for step in wanted) else "failed"


def holds(entry: Mapping[str, Any], step: str) -> bool:
    """Whether a step passed at both sizes."""
    sizes = entry["sizes"]
    return len(sizes) == 2 and all(size["passed"].get(step) is True for size in sizes)


def summarise(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts and percentages over the given entries."""
    count = len(entries)
    rows: dict[str, Any] = {"models": count}
    for step in STEPS:
        passed = sum(holds(entry, step) for entry in entries)
        rows[step] = {
            "models": passed,
            "percent": round(100 * passed / count, 1) if count else 0.0,
        }
    rows["verdicts"] = dict(sorted(Counter(verdict(entry) for entry in entries).items()))
    checks = [
        size["permutation"] for e in entries for size in e["sizes"] if "permutation" in size
    ]
    rows["permutation_checks"] = sum(check["checked"] for check in checks)
    rows["permutation_worst"] = max((check["worst"] for check in checks), default=0.0)
    return rows


TITLES = {
    "captured": "captured exactly", "routed": "at least one routed unit",
    "all_kept": "bit-equal at keep ratio 1.0", "parity": "parity at keep ratio 0.5",
    "permutation": "tokens of every routed unit may be permuted",
    "onnx": "ONNX Runtime agrees with FROZEN", "rtx": "TensorRT-RTX engine for SM86 is built",
}  # fmt: skip
COLUMNS = (
    "class", "kind", "captured exactly", "routed units", "bit-equal at 1.0", "parity at 0.5",
    "ONNX parity", "RTX build SM86", "verdict", "reasons for each no",
)  # fmt: skip


def markdown(report: Mapping[str, Any]) -> str:
    """The document, made from nothing but the JSON."""
    environment, entries = report["environment"], report["models"]
    machine = ", ".join(f"{name} {value}" for name, value in environment.items())
    lines = [
        "# Supported models", "",
        "Made by `python -m benchmarks.supported_models`; do not edit. Tiny models with random weights, each at",
        "two token counts and with inputs of two seeds; a step counts when it passes at all of them. Parity is the",
        "relative L2 error against a slow reference that shares no code with the package; tolerances: parity",
        f"{PARITY:.0e}, ONNX Runtime {ONNX_PARITY:.0e}, permutation {PERMUTATION:.0e}, all others exact.", "",
        f"{report['date']}: {machine}.", "",
    ]  # fmt: skip
    if len({entry["code"] for entry in entries}) > 1:
        lines += ["**Rows were made by different versions of the code.** Run it anew.", ""]
    tables = (
        ("Token-denoising classes of diffusers", [e for e in entries if e["kind"] != "handwritten"]),
        ("Handwritten models", [e for e in entries if e["kind"] == "handwritten"]),
    )  # fmt: skip
    for title, rows in tables:
        if rows:
            lines += [f"## {title}", "", *_summary_lines(rows), "", *_table(rows), ""]
    return "\n".join(lines)


def _summary_lines(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    summary = summarise(entries)
    lines = [f"| of {summary['models']} models | passed | share |", "|---|---|---|"]
    for step in STEPS:
        if step == "rtx" and not all(entry["rtx"] for entry in entries):
            continue
        passed = summary[step]
        lines.append(f"| {TITLES[step]} | {passed['models']} | {passed['percent']} % |")
    verdicts = ", ".join(f"{count} {name}" for name, count in summary["verdicts"].items())
    checks, worst = summary["permutation_checks"], summary["permutation_worst"]
    lines += ["", f"Verdicts: {verdicts}.", ""]
    lines += [f"Permutation checks with fresh inputs: {checks}, largest error {worst:.0e}."]
    return lines


def _table(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for entry in sorted(entries, key=lambda e: (e["kind"], e["name"])):
        cells = [
            entry["name"], entry["kind"], _cell(entry, "captured"), _units(entry),
            _cell(entry, "all_kept"),
            _cell(entry, "parity", lambda s: max(r["error"] for r in s["parity"].values())),
            _cell(entry, "onnx", lambda s: max(s["onnx"]["example"], s["onnx"]["other seed"])),
            _cell(entry, "rtx") if entry["rtx"] else "not run", verdict(entry), _reasons(entry),
        ]  # fmt: skip
        lines.append("| " + " | ".join(_plain(cell) for cell in cells) + " |")
    return lines


def _cell(
    entry: Mapping[str, Any], step: str, figure: Callable[[Any], float] | None = None
) -> str:
    if holds(entry, step):
        return "yes" if figure is None else f"{max(figure(s) for s in entry['sizes']):.0e}"
    passed = [str(s["size"]) for s in entry["sizes"] if s["passed"].get(step)]
    return f"size {passed[0]} only" if passed else "no"


def _units(entry: Mapping[str, Any]) -> str:
    counts = [
        f"{len(size.get('units', ()))} of {size.get('candidates', '?')}"
        for size in entry["sizes"]
        if "units" in size or "candidates" in size
    ]
    return ", ".join(dict.fromkeys(counts)) or "0"


def _reasons(entry: Mapping[str, Any]) -> str:
    """Failed steps, then why units are not routed; the same reason of many units once."""
    steps: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    for failure in (f for size in entry["sizes"] for f in size["failures"]):
        key = _shape(failure["error"])
        steps.setdefault(key, {})[failure["step"]] = True
        texts.setdefault(key, failure["error"])
    shown = [f"{', '.join(steps[key])}: {text}" for key, text in texts.items()]
    refusals = [r for s in entry["sizes"] for r in s.get("not_routed", {}).values()]
    counts = Counter(_shape(reason) for reason in refusals)
    first = {_shape(reason): reason for reason in reversed(refusals)}
    sizes = max(sum("not_routed" in size for size in entry["sizes"]), 1)
    shown += [f"{-(-n // sizes)} not routed: {first[key][:140]}" for key, n in counts.items()]
    return "; ".join(text[:220] for text in shown)


def _shape(text: str) -> str:
    return re.sub(r"\d[\d.e+-]*", "#", text)[:90]


def _plain(text: str) -> str:
    """Text that markdown leaves alone in a table."""
    for sign in "|<>`*[]":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


# --------------------------------------------------------------------------------- the run


def load_models(partial: bool) -> tuple[dict[str, Any], list[str]]:
    """The zoo, and what is wrong with it; with `partial` its missing or broken files are left out."""
    package = importlib.import_module("tests.zoo")
    problems = []
    for file in package._FILES:
        try:
            importlib.import_module(f"tests.zoo.{file}")
        except Exception as error:  # noqa: BLE001 - somebody may be writing that file
            problems.append(f"tests/zoo/{file}.py: {first_line(error)}")
    if problems and not partial:
        raise SystemExit(
            "the zoo is not complete:\n  " + "\n  ".join(problems)
            + "\n--partial leaves these files out"
        )  # fmt: skip
    return dict(package.ZOO), problems


def code_hash() -> str:
    """Of everything that a row depends on in this repository."""
    digest = hashlib.sha256()
    folders = ("diffcr_compile", "passes", "export", "tests/zoo", "benchmarks")
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def environment(rtx: bool) -> dict[str, str]:
    """Versions and the kind of machine; no names of machines or folders."""
    found = {"python": platform.python_version()}
    for package in (*VERSIONS, *([RTX] if rtx else [])):
        found[package] = importlib.metadata.version(package)
    cpu = platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        cpu = names[0].strip() if names else cpu
    return {**found, "CPU": cpu, "cores": str(os.cpu_count())}


def run_in_process(name: str, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The entry of one model, from a process that may crash or hang as it likes."""
    path = args.work / f"{name}.json"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.supported_models", "--worker", name]
    command += ["--work", str(args.work), "--limit", str(args.limit)]
    command += ["--skip-rtx"] if args.skip_rtx else []
    threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
    ended = ""
    with (args.work / f"{name}.log").open("w") as log:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=log, timeout=WAITING * args.limit,
                check=False, env={"OMP_NUM_THREADS": threads, **os.environ},
            ).returncode  # fmt: skip
            if code == -signal.SIGXCPU:
                ended = f"not finished after {args.limit} s of processor time"
            elif code:
                ended = f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            ended = f"not finished after {WAITING * args.limit} s"
    entry: dict[str, Any] = {
        "name": name, "kind": model.kind, "refused": model.refused, "code": code_hash(),
        "rtx": not args.skip_rtx, "running": "start", "sizes": [],
    }  # fmt: skip
    if path.exists():
        entry = json.loads(path.read_text())
    if not entry.get("finished"):
        if not entry["sizes"]:
            entry["sizes"].append({"size": 0, "passed": {}, "failures": [], "seconds": {}})
        step = entry["running"] or "between steps"
        entry["sizes"][-1]["failures"].append(
            {"step": step, "error": ended or "it ended without a word"}
        )
        entry["sizes"][-1]["passed"][step] = False
        path.write_text(json.dumps(entry, indent=1) + "\n")
    return entry


def finished(path: Path, skip_rtx: bool) -> dict[str, Any] | None:
    """An entry of an earlier run that says all that this run wants to know."""
    if not path.exists():
        return None
    entry: dict[str, Any] = json.loads(path.read_text())
    return entry if entry.get("finished") and (skip_rtx or entry["rtx"]) else None


def run_all(models: Mapping[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    def one(name: str) -> dict[str, Any]:
        entry = finished(args.work / f"{name}.json", args.skip_rtx) if args.resume else None
        if entry is None:
            entry = run_in_process(name, models[name], args)
            failures = [f for size in entry["sizes"] for f in size["failures"]]
            print(f"{name}: {verdict(entry)}, {entry.get('all_seconds', '?')} s", flush=True)
            for failure in failures:
                print(f"    {failure['step']}: {failure['error'][:200]}", flush=True)
        return entry

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        try:
            return list(pool.map(one, models))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # interrupted: start no more
            raise


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="names of models")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--limit", type=int, default=900, help="processor seconds for one model"
    )
    parser.add_argument("--resume", action="store_true", help="keep finished entries")
    parser.add_argument("--smoke", action="store_true", help="three models")
    parser.add_argument("--skip-rtx", action="store_true", help="build no engines")
    parser.add_argument(
        "--partial", action="store_true", help="leave out files that are missing"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build/supported_models")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work = args.work.resolve() / ("smoke" if args.smoke else "")
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = parse()
    if args.worker:
        # processor time: a machine that is busy or suspended must not look like a model that hangs
        resource.setrlimit(resource.RLIMIT_CPU, (args.limit, args.limit + 5))
        models, _ = load_models(partial=True)  # whoever started this has complained already
        run_model(models[args.worker], args.work / f"{args.worker}.json", args.skip_rtx)
        return
    models, problems = load_models(args.partial)
    for problem in problems:
        print(f"left out: {problem}")
    unknown = sorted(set(args.only) - set(models))
    if unknown:
        raise SystemExit(f"the zoo has no {unknown}; it has {sorted(models)}")
    chosen = args.only or (list(models)[:3] if args.smoke else list(models))
    entries = run_all({name: models[name] for name in chosen}, args)
    whole = not (args.only or args.smoke or problems)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(not args.skip_rtx),
        "summary": summarise([e for e in entries if e["kind"] != "handwritten"]),
        "handwritten": summarise([e for e in entries if e["kind"] == "handwritten"]),
        "models": entries,
    }
    results = RESULTS if whole else args.work / RESULTS.name
    document = DOCUMENT if whole else args.work / DOCUMENT.name
    results.write_text(json.dumps(report, indent=1) + "\n")
    document.write_text(markdown(report))
    print(json.dumps({key: report[key] for key in ("summary", "handwritten")}, indent=1))


if __name__ == "__main__":
    main()
