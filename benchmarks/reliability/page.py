"""docs/reliability.md from what the hard tests found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Found = Mapping[str, Any]


def page(found: Found) -> str:
    """The document."""
    parts = (
        _head(found), _kills(found["kills"]), _faults(found["faults"]), _corruption(found["corruption"]),
        _modules(found["modules"]), _load(found["load"], found["long_run"]), _determinism(found["determinism"]), _REST,
    )  # fmt: skip
    return "\n".join(parts)


# What ends in other digits with another number of threads, see the page.
SUMS = {"golden/blocks.json"}


def _head(found: Found) -> str:
    faults, called, long = found["faults"], found["load"], found["long_run"]
    compared = found["determinism"]["processes"] + found["determinism"]["threads"]
    rows = [
        ("kills of a compilation at distinct points, then the same command again",
         f"{found['kills']['kills']} of {found['kills']['points']} points", len(found["kills"]["wrong"])),
        ("a disk that is full, read-only or broken at one event, then the same command again",
         f"{sum(faults['faults'].values())} of {faults['points']} faults", len(faults["wrong"])),
        ("corrupted artifacts", found["corruption"]["corruptions"], len(found["corruption"]["wrong"])),
        ("random models through every stage, routed and refused blocks mixed", found["modules"]["models"],
         len(found["modules"]["wrong"])),
        (f"calls of one runner from {called['threads']} threads, mixed timestep buckets",
         called["calls"] * called["threads"], called["wrong_outputs"]),
        ("steps of one calibration, with a checkpoint every 5", long["steps"], 0),
        ("comparisons of artifacts, byte by byte, sums apart (see below)", len(compared),
         sum(bool(_files(c["different"]) - SUMS) for c in compared)),
    ]  # fmt: skip
    table = "\n".join(f"| {what} | {count} | {wrong} |" for what, count, wrong in rows)
    return f"""# Reliability

What was tried, and what came out. Made by `python -m benchmarks.reliability` on {found["date"]}
([reliability.json](../benchmarks/results/reliability.json)); change the script, not this page. `make test` runs a short form of
each, `make soak` the full one.

| tried | count | wrong |
|---|---|---|
{table}
"""


def _kills(found: Found) -> str:
    verbs = ", ".join(f"{verb} {count}" for verb, count in found["by_verb"].items())
    return f"""## Kills

The command line is killed just before it opens a file of the artifact for writing, renames or deletes one, makes or
deletes a folder, forces a file or a folder to the disk, or goes on to the next step of rollouts, calibration or export
({found["before_an_event"]} kills, SIGKILL); or by the kernel in the middle of a write ({found["inside_a_write"]}). Killed were: {verbs}.
After {found["not_loadable"]} of them the folder did not load; after the others the artifact was whole already. No file was ever torn under its
final name. The same command again ended with the same sha256 of every file and the same schedule as an undisturbed run,
and left nothing unfinished behind.

The runs are forks of a process that is past the capture, and conversions to ONNX are kept by a fingerprint of the
program and its weights, so that a kill costs seconds (`benchmarks/reliability/prepared.py`).
"""


def _faults(found: Found) -> str:
    kinds, outcomes = (
        found["faults"],
        ", ".join(f"{k} {v}" for k, v in found["outcomes"].items()),
    )
    disk = (
        "a tmpfs of its own"
        if found["mounted"]
        else "a limit on the size of files, as nothing could be mounted"
    )
    return f"""## Full, read-only and broken disks

At {kinds["answer"]} events the system answered "no space left", "read-only file system" or "permission denied", in turn; at {kinds["read"]}
a file could not be read ("input/output error"); from {kinds["full"]} files on the disk was full for real ({disk}); and before
{found["read_only_stages"]} verbs the disk had become read-only. Outcomes: {outcomes} ("went on": what failed was a help, not the result, and
the result was right). Every refusal was `DCR-R001` with exit 5, or said which file is damaged with exit 7 where a read
failed; a full disk with what was needed and what was free; never a traceback. Every file under its final name was afterwards what it
was when the fault came, and the same command went on to the same hashes once the disk was well.

Python's view of the disk is what is disturbed: what ONNX Runtime and safetensors read by themselves is not.
"""


def _corruption(found: Found) -> str:
    codes = ", ".join(f"{code} {count}" for code, count in found["codes"].items())
    return f"""## Corruption

Every file missing, empty, cut at five places, longer, swapped with another, a folder, or a link out of the artifact; every key of the
manifest missing or of another type; paths out of the folder; ONNX files with other domains, functions, sparse or
misplaced weights and huge shapes under hashes that fit; and flipped bits at random places. Refused with: {codes}. Peak memory was
{found["memory_peak_over_normal"]} of what loading a whole artifact takes. The same happens with every load, before ONNX Runtime sees a file.
Readers of manifests, schedules, recipes, settings, targets, latency tables, engine records and tensors are fuzzed besides
(`tests/test_corrupted_inputs.py`): only documented errors come out.

What this does not promise: hashes and checksum tell damage and carelessness, not a person who may rewrite the whole
artifact. Such a person cannot make the runtime read other files or load operators or code of their own, but can change what a graph
computes. Sign the folder where that matters.
"""


def _modules(found: Found) -> str:
    return f"""## Random models

{f"Tried on {found['date']}: " if "date" in found else ""}{found["blocks"]["legal"]} blocks that treat tokens alike and {found["blocks"]["illegal"]} that do not, in {found["models"]} models with arguments in either
order, masks, tables, tuples and two layouts. Every block of the first kind was routed, every one of the second refused with
a reason; routed models equalled the dense one bit for bit with all tokens kept, a slow reference on half of them within
1e-4, and ONNX Runtime agreed within 1e-4.
"""


def _load(called: Found, long: Found) -> str:
    return f"""## Load and long runs

Outputs of all threads were those of one thread, bit for bit; resident memory grew by {called["memory_growth"]:.2%} after a warm-up.

A calibration of {long["steps"]} steps with {long["checkpoints"]} checkpoints: resident memory grew by {long["memory_growth"]:.2%} after the first fifth of
the steps, {long["bytes_per_step"]:.0f} bytes a step. The history that the report draws is {long["history_bytes_per_step"]:.0f} bytes a step; it and the model
are all that a checkpoint holds ({long["state_bytes"]:,} bytes at the end), each replacing the one before.
"""


def _determinism(found: Found) -> str:
    def row(each: Found, how: str) -> str:
        if each["different"]:
            names = ", ".join(f"`{name}`" for name in sorted(_files(each["different"])))
            return f"* {each['model']}, {how}: differs in {names}, all else is equal"
        return f"* {each['model']}, {how}: {each['files']} files and the manifest are equal"

    rows = [
        row(each, f"compiled in {each['processes']} processes") for each in found["processes"]
    ]
    rows += [
        row(each, f"calibrated once, exported with {', '.join(each['threads'])} threads")
        for each in found["threads"]
    ]
    listed = "\n".join(rows)
    return f"""## Determinism

The same inputs, seed, versions and number of threads give the same bytes: schedule, ONNX files, weights, golden outputs and
manifest, but for `created` and with it the manifest's checksum. The processes that are compared have other seeds of Python's
hashes, other folders, locales and time zones, and assertions off.

{listed}

Where it cannot be so: golden outputs and the marks of blocks beside them (`golden/`) are sums, and a larger model run with another
number of threads splits these otherwise, so their last digits, and with them their hashes, differ. A calibration with another number of threads, on another CPU or another device ends with weights that
differ in their last digits, because sums of floating-point numbers are split otherwise; nothing is made slower to hide that.
Times in the report and in `stages.json` are measurements. TensorRT chooses kernels by measuring, so its engines differ
from build to build; they are compared with the golden outputs instead.
"""


def _files(different: list[str]) -> set[str]:
    """The files of a list of differences; that their hashes differ too goes without saying."""
    return {line.rpartition(": ")[2] for line in different} - {"files", "manifest"}


_REST = """## Supply chain

CI installs every package by the sha256 of its file (`requirements-ci.txt`); `make sbom` writes a bill of materials; `make audit` asks
pip-audit about known vulnerabilities and fails where it cannot reach a database, which a machine with a package mirror only cannot:
see [contributing](../CONTRIBUTING.md) and [security](../SECURITY.md).
"""
