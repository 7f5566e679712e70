"""The packages that CI installs: each with a hash, all of them, and a bill of materials that is the same each time."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK = (ROOT / "requirements-ci.txt").read_text(encoding="utf-8")
# CPython 3.11 on x86-64 Linux, which the list is for
THERE = {
    "python_version": "3.11", "python_full_version": "3.11.0", "platform_machine": "x86_64", "sys_platform": "linux",
    "implementation_name": "cpython", "platform_python_implementation": "CPython", "extra": "",
}  # fmt: skip


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def locked() -> dict[str, tuple[str, list[str]]]:
    """Name -> version and hashes, read by a rule of its own: what does not fit it is an error."""
    joined = LOCK.replace(" \\\n", " ")
    found = {}
    for line in joined.splitlines():
        if line.startswith("#"):
            continue
        entry = re.fullmatch(
            r"([a-z0-9-]+)==([^ +]+)((?: +--hash=sha256:[0-9a-f]{64})+)", line
        )
        assert entry, line
        found[entry[1]] = (entry[2], re.findall(r"sha256:(\w+)", entry[3]))
    return found


def test_the_list_has_every_pin_with_its_version_and_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = {
        tool("lock").canonical(pin.name): next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(THERE)
    }
    assert {name: version for name, (version, _) in locked().items()} == here


def test_only_torch_has_more_than_one_build() -> None:
    assert {name for name, (_, hashes) in locked().items() if len(hashes) > 1} == {"torch"}
    assert len(locked()["torch"][1]) == 2  # of PyPI, and for the CPU alone


def test_no_address_is_in_the_list() -> None:
    assert "://" not in LOCK
    assert "file:" not in LOCK


def report(version: str, digest: str | None) -> dict[str, Any]:
    archive = {"hashes": {"sha256": digest}} if digest else {}
    info = {"url": "https://somewhere/a.whl", "archive_info": archive}
    own = {
        "metadata": {"name": "diffcr_compile", "version": "1"},
        "download_info": {"url": "file:///x"},
    }
    return {
        "install": [
            {"metadata": {"name": "A_b", "version": version}, "download_info": info},
            own,
        ]
    }


def test_builds_of_one_version_are_put_together() -> None:
    lock = tool("lock")
    pins = lock.pinned(
        [report("1.0", "a" * 64), report("1.0+cpu", "b" * 64), report("1.0", "a" * 64)]
    )
    assert pins == {"a-b": ("1.0", {"a" * 64, "b" * 64})}
    wanted = f"a-b==1.0 \\\n    --hash=sha256:{'a' * 64} \\\n    --hash=sha256:{'b' * 64}\n"
    assert lock.text(pins) == lock.HEAD + wanted


@pytest.mark.parametrize("other", [report("2.0", "b" * 64), report("1.0", None)])
def test_reports_that_disagree_or_lack_a_hash_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a-b"):
        tool("lock").pinned([report("1.0", "a" * 64), other])


def test_the_bill_of_materials_is_whole_and_the_same_each_time(tmp_path: Path) -> None:
    texts = []
    for seed in ("1", "2"):
        path = tmp_path / f"sbom_{seed}.json"
        subprocess.run(
            [sys.executable, str(ROOT / ".ci" / "sbom.py"), str(path)],
            check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    bill = json.loads(texts[0])
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["name"] == "diffcr-compile"
    names = {part["name"] for part in bill["components"]}
    assert {
        "torch",
        "numpy",
        "onnx",
        "onnxruntime",
        "safetensors",
        "pyyaml",
        "pydantic",
        "jinja2",
    } <= names
    refs = [part["bom-ref"] for part in bill["components"]]
    assert len(refs) == len(set(refs))
    known = {*refs, bill["metadata"]["component"]["bom-ref"]}
    for row in bill["dependencies"]:
        assert row["ref"] in known
        assert set(row["dependsOn"]) <= known
    assert {row["ref"] for row in bill["dependencies"]} == known


def test_ci_may_do_nothing_that_it_need_not() -> None:
    text = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for word in (
        "sudo",
        "curl",
        "wget",
        "git push",
        "docker",
        "chmod",
        "--privileged",
        "TOKEN",
        "SECRET",
    ):
        assert word not in text, word
