"""Every model in a process of its own, which may crash or hang as it likes."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.supported_models.record import code_hash, first_line
from benchmarks.supported_models.settings import ROOT
from benchmarks.supported_models.table import verdict

# A process may take this many times its processor time before it counts as hanging.
WAITING = 10
VERSIONS = ("diffcr-compile", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime")
RTX = "tensorrt-rtx-cu12"


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
