"""A process that has everything ready for the command line, and forks: a killed run costs seconds, not a minute.

What needs no disk is done once: imports, the capture, the routed program. The checks after each pass and the
timing of the sampling loop, which need none either, are left out in the forks. Conversions to ONNX, which are a pure
function of a program and most of a compilation's time, are kept by a fingerprint of the whole program, weights
included: a run that resumes to other weights or another graph has another fingerprint and is converted anew.
Everything that reads or writes the artifact is run as it is, by the command line's own ``main``.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import torch
from torch import fx

from benchmarks.reliability.cases import hand_model
from diffcr_compile import api, bench, budgets, cli
from diffcr_compile.config import CompileConfig, make_config
from diffcr_compile.export import artifact as artifact_module
from diffcr_compile.export.onnx_model import export_graph
from diffcr_compile.passes import base
from diffcr_compile.planning.targets import all_targets
from diffcr_compile.program import Program
from diffcr_compile.report import html
from diffcr_compile.stages import captured, routed_program

MODEL = "python:benchmarks.reliability.cases:hand_model"
SETTINGS = {
    "routing": {"buckets": 2, "multiple_of": 4},
    "rollouts": {"trajectories": 4, "steps": 4, "batch": 2},
    "calibration": {"steps": 8, "batch": 4, "save_every": 1},
}
BUDGET = "70%"


def settings() -> CompileConfig:
    """Settings of the small compilation."""
    return make_config(SETTINGS)


def compile_arguments(out: Path, verb: str = "compile") -> list[str]:
    """The command line of the small compilation, or of its first stage with ``calibrate``."""
    given = [
        f"--set={section}.{key}={value}"
        for section, values in SETTINGS.items()
        for key, value in values.items()
    ]
    return [verb, MODEL, "-o", str(out), "--budget", BUDGET, *given]


class Prepared:
    """Everything that needs no disk, made before any fork.

    Use it as a context: conversions are kept in a passing folder.
    """

    def __init__(self) -> None:
        config = settings()
        model, inputs = hand_model()
        self._dense = captured(model, inputs, config.routing, model)
        self._routed = routed_program(self._dense, config.routing, config.calibration.seed)
        self._template, self._time = html._template(), bench.best_sampling_loops
        self._costs = budgets.cost_table(self._routed, config.routing)
        _read_once()
        self._kept = Path(tempfile.mkdtemp(prefix="conversions"))
        self.scratch = Path(tempfile.mkdtemp(prefix="reliability"))

    def __enter__(self) -> Prepared:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._kept)
        shutil.rmtree(self.scratch)

    def command(
        self, arguments: Sequence[str], before: Callable[[], None] | None = None
    ) -> tuple[int, str]:
        """Exit status of a command line in a fork of this process, and what it printed.

        Args:
            arguments: what follows ``diffcr``.
            before: run in the fork first; it may set traps.
        """

        def work() -> None:
            with self._ready():
                sys.argv = ["diffcr", *arguments]
                if before is not None:
                    before()
                cli.main()

        return in_child(work)

    @contextlib.contextmanager
    def _ready(self) -> Iterator[None]:
        with (
            mock.patch.object(api, "captured", return_value=self._dense),
            mock.patch.object(api, "routed_program", return_value=self._routed),
            mock.patch.object(api, "cost_table", return_value=self._costs),
            mock.patch.object(budgets, "cost_table", return_value=self._costs),
            mock.patch.object(base, "verify"),
            mock.patch.object(bench, "best_sampling_loops", self._timed),
            mock.patch.object(html, "_template", return_value=self._template),
            mock.patch.object(artifact_module, "export_graph", self._converted),
            mock.patch.object(
                artifact_module,
                "onnx_from_program",
                lambda program: self._converted(program)[0],
            ),
        ):
            yield

    def _timed(self, *arguments: Any) -> dict[str, Any]:
        kept = self._kept / "timed.json"
        if not kept.exists():
            kept.write_text(json.dumps(self._time(*arguments)))
        found: dict[str, Any] = json.loads(kept.read_text())
        return found

    def _converted(self, program: Program, *_: Any) -> tuple[onnx.ModelProto, dict[str, str]]:
        """The graph with its weights inside; who asked for it moves them into the file of weights."""
        name = fingerprint(program)
        model, nodes = self._kept / f"{name}.onnx", self._kept / f"{name}.json"
        if not nodes.exists():
            made, places = export_graph(program)
            model.write_bytes(made.SerializeToString(deterministic=True))
            nodes.write_text(json.dumps(places))
        return onnx.load_from_string(model.read_bytes()), json.loads(nodes.read_text())


def _read_once() -> None:
    """Import what a compilation imports late, and read the descriptions of devices, which are kept."""
    for name in (
        "onnxruntime",
        "diffcr_compile.summary",
        "diffcr_compile.report",
        "diffcr_compile.bench",
    ):
        importlib.import_module(name)
    all_targets()


def fingerprint(program: Program) -> str:
    """sha256 over all that a conversion depends on: graphs, sizes, kept tokens, tensors."""
    digest = hashlib.sha256()
    module = program.module
    facts: list[Any] = [program.stage.name, program.bucket, dict(program.kept_inputs)]
    facts.append(program.schedule.to_json() if program.schedule else None)
    facts += [str(part.graph) for part in module.modules() if isinstance(part, fx.GraphModule)]
    facts += [
        repr(module),
        [(n, str(t.shape), str(t.dtype)) for n, t in program.example.items()],
    ]
    digest.update(json.dumps(facts, default=str).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def in_child(work: Callable[[], None]) -> tuple[int, str]:
    """Exit status of `work` in a fork of this process, negative the signal that ended it, and what it printed.

    What it prints comes through a pipe: a full disk must not silence it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            work()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:  # noqa: BLE001 - whatever it is, it is what is looked for
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said
