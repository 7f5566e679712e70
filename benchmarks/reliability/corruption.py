"""Corrupted artifacts: every one must be refused with a documented code, and nothing else may happen.

    python -m benchmarks.reliability.corruption --count 2000 --out results.json

Systematic: each file missing, empty, truncated, extended, swapped, a folder, a link; each key of the
manifest missing or of another type; paths out of the folder; ONNX files that read other files or use other
operators, with the manifest's hashes made to fit. Random: a flipped bit anywhere, seeded.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from diffcr_compile.error_cases import CASES
from diffcr_compile.errors import ArtifactError
from diffcr_compile.manifest import (
    MANIFEST_FILE,
    hash_files,
    read_manifest,
    write_manifest,
)
from diffcr_compile.runtime import load

CHECKED = ("onnx", "golden", "model")
WRONG_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    1 << 70,
    0.5,
    "x",
    "",
    [],
    {},
    [[]],
    {"a": {}},
)
Damage = Callable[[Path], None]


@dataclasses.dataclass(frozen=True)
class Corruption:
    """One way to damage a copy of an artifact."""

    name: str
    apply: Damage


def systematic(artifact: Path) -> Iterator[Corruption]:
    """Every kind of damage, once at each place where it can be."""
    names = [*hash_files(artifact), MANIFEST_FILE]
    for name in names:
        size = (artifact / name).stat().st_size
        yield Corruption(f"missing {name}", lambda f, n=name: (f / n).unlink())
        yield Corruption(f"empty {name}", lambda f, n=name: (f / n).write_bytes(b""))
        yield Corruption(f"folder {name}", lambda f, n=name: _folder(f / n))
        yield Corruption(f"link out {name}", lambda f, n=name: _link_out(f / n))
        yield Corruption(f"longer {name}", lambda f, n=name: _append(f / n, b"\0"))
        for share in (0.01, 0.25, 0.5, 0.75, 0.99):
            cut = int(size * share)
            yield Corruption(f"cut {name} at {cut}", lambda f, n=name, c=cut: _cut(f / n, c))
        other = names[(names.index(name) + 1) % len(names)]
        yield Corruption(
            f"swap {name} {other}", lambda f, a=name, b=other: _swap(f / a, f / b)
        )
    for folder in CHECKED:
        yield Corruption(
            f"extra {folder}", lambda f, d=folder: _append(f / d / "more.bin", b"x")
        )
    yield from _manifests(artifact)
    yield from _graphs(artifact)


def _manifests(artifact: Path) -> Iterator[Corruption]:
    data = json.loads((artifact / MANIFEST_FILE).read_text())

    def edited(edit: Callable[[dict[str, Any]], Any]) -> Damage:
        def apply(folder: Path) -> None:
            changed = json.loads((folder / MANIFEST_FILE).read_text())
            edit(changed)
            (folder / MANIFEST_FILE).write_text(json.dumps(changed, indent=1) + "\n")

        return apply

    for key in data:
        yield Corruption(f"manifest without {key}", edited(lambda d, k=key: d.pop(k)))
        for value in WRONG_VALUES:
            yield Corruption(
                f"manifest {key} = {value!r:.20}",
                edited(lambda d, k=key, v=value: d.__setitem__(k, v)),
            )
    yield Corruption("manifest with more", edited(lambda d: d.__setitem__("more", 1)))
    for text in ("null", "[]", "3", '"x"', "{}", "NaN", "[" * 100_000, '{"a":' * 50_000, "\ufeff{}",
                 '{"schema_version": 3, "schema_version": 3}', "9" * 5000):  # fmt: skip
        yield Corruption(
            f"manifest is {text:.12}",
            lambda f, t=text: (f / MANIFEST_FILE).write_text(t) and None,
        )
    yield Corruption(
        "manifest is no utf-8",
        lambda f: (f / MANIFEST_FILE).write_bytes(b"\xff\xfe{}") and None,
    )
    for path in (
        "../secret",
        "/etc/passwd",
        "onnx/../../x",
        "C:\\x",
        "onnx\\x",
        "report/x",
        "onnx",
    ):
        for key in ("onnx", "golden"):
            yield Corruption(f"bucket {key} {path}", rewritten(_bucket(key, path)))
        yield Corruption(f"weights {path}", rewritten(lambda d, p=path: {"weights": p}))
        yield Corruption(f"file {path}", rewritten(_listed(path)))
    for key in ("low", "high"):
        for value in (None, "x", [], 1e400, -1e400):
            yield Corruption(f"bucket {key} {value!r}", rewritten(_bucket(key, value)))
    for key in ("name", "dtype", "shape"):
        for value in (None, 3, "x", [], [-1], ["a"], [1 << 60], {}):
            yield Corruption(f"input {key} {value!r}", rewritten(_input(key, value)))


def rewritten(edit: Callable[[dict[str, Any]], dict[str, Any]]) -> Damage:
    """A manifest that is whole in itself and says something else: its checksum is made to fit."""

    def apply(folder: Path) -> None:
        manifest = read_manifest(folder)
        changes = edit(json.loads(json.dumps(dataclasses.asdict(manifest))))
        try:
            write_manifest(folder, dataclasses.replace(manifest, **changes))
        except ValueError:  # infinity is no JSON: as somebody else's writer would put it
            text = json.dumps(dataclasses.asdict(dataclasses.replace(manifest, **changes)))
            (folder / MANIFEST_FILE).write_text(text)

    return apply


def _bucket(key: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda d: {"buckets": [{**d["buckets"][0], key: value}, *d["buckets"][1:]]}


def _input(key: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda d: {"inputs": [{**d["inputs"][0], key: value}, *d["inputs"][1:]]}


def _listed(path: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda d: {"files": {**d["files"], path: {"sha256": "0" * 64, "bytes": 0}}}


def _graphs(artifact: Path) -> Iterator[Corruption]:
    """ONNX files that an attacker made, with hashes that fit."""

    def changed(edit: Callable[[onnx.ModelProto], None]) -> Damage:
        def apply(folder: Path) -> None:
            path = folder / read_manifest(folder).buckets[0]["onnx"]
            model = onnx.load(str(path), load_external_data=False)
            edit(model)
            path.write_bytes(model.SerializeToString())
            manifest = read_manifest(folder)
            write_manifest(folder, dataclasses.replace(manifest, files=hash_files(folder)))

        return apply

    def external(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
        def edit(model: onnx.ModelProto) -> None:
            tensor = next(t for t in model.graph.initializer if t.external_data)
            entry = next((e for e in tensor.external_data if e.key == key), None)
            entry = entry or tensor.external_data.add()
            entry.key, entry.value = key, value

        return edit

    def huge(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        del tensor.dims[:]
        tensor.dims.extend([1 << 30, 1 << 30])

    def negative(model: onnx.ModelProto) -> None:
        next(t for t in model.graph.initializer if t.external_data).dims[0] = -1

    def claimed(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer.add()
        tensor.name, tensor.data_type = "huge", onnx.TensorProto.FLOAT
        tensor.dims.extend([1 << 20, 1 << 10])

    def nested(model: onnx.ModelProto) -> None:
        graph = model.graph
        for _ in range(20):
            node = graph.node.add()
            node.op_type = "If"
            attribute = node.attribute.add()
            attribute.name, attribute.type = "then_branch", onnx.AttributeProto.GRAPH
            graph = attribute.g
            graph.name = "inner"

    edits: dict[str, Callable[[onnx.ModelProto], None]] = {
        **{f"location {v}": external("location", v) for v in
           ("../weights.bin", "/etc/passwd", "", "sub/weights.bin", "bucket_00.onnx", "weights.bin\0")},
        **{f"{k} {v}": external(k, v) for k in ("offset", "length") for v in
           ("-1", "99999999999", "1e3", "0x10", "", "9" * 40, "٣")},
        "huge dims": huge, "negative dims": negative, "claimed data": claimed, "nested": nested,
        "custom operator": lambda m: setattr(m.graph.node[0], "domain", "com.attacker"),
        "contrib operator": lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"),
        "opset of a domain": lambda m: m.opset_import.append(onnx.helper.make_opsetid("evil", 1)),
        "function": lambda m: m.functions.add() and None,
        "no graph": lambda m: m.ClearField("graph"),
        "string weights": lambda m: setattr(m.graph.initializer[0], "data_type", 8),
        "unknown type": lambda m: setattr(m.graph.initializer[0], "data_type", 99),
        "sparse weights": lambda m: m.graph.sparse_initializer.add() and None,
    }  # fmt: skip
    for name, edit in edits.items():
        yield Corruption(f"graph: {name}", changed(edit))


def flips(artifact: Path, count: int, seed: int) -> Iterator[Corruption]:
    """A flipped bit in any file, files chosen evenly."""
    generator = random.Random(seed)
    names = [*hash_files(artifact), MANIFEST_FILE]
    sizes = {name: (artifact / name).stat().st_size for name in names}
    for number in range(count):
        name = names[number % len(names)]
        place, bit = generator.randrange(sizes[name]), generator.randrange(8)
        yield Corruption(
            f"flip {name} {place}.{bit}", lambda f, n=name, p=place, b=bit: _flip(f / n, p, b)
        )


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link_out(path: Path) -> None:
    target = path.parent.parent.parent / f"outside_{path.name}"
    shutil.copy(path, target)
    path.unlink()
    path.symlink_to(target)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def _cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def _swap(one: Path, two: Path) -> None:
    a, b = one.read_bytes(), two.read_bytes()
    one.write_bytes(b)
    two.write_bytes(a)


def _flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def outcome(folder: Path, inputs: dict[str, Any], expected: np.ndarray) -> str:
    """The code that a damaged artifact is refused with, or what else happened."""
    try:
        found = load(folder, threads=1)(**inputs)
    except ArtifactError as error:
        return error.code if error.code in CASES else f"undocumented code {error.code}"
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        return f"not refused in words: {type(error).__name__}: {str(error)[:80]}"
    return "loaded: same output" if np.array_equal(found, expected) else "loaded: WRONG OUTPUT"


def run(artifact: Path, inputs: dict[str, Any], count: int, seed: int = 0) -> dict[str, Any]:
    """Damage copies of an artifact in `count` ways, or in all systematic ones if these are more."""
    started = time.monotonic()
    expected = load(artifact, threads=1)(**inputs)
    normal = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ways = list(systematic(artifact))
    ways += flips(artifact, max(0, count - len(ways)), seed)
    outcomes: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for way in ways:
            work = Path(scratch) / "work"
            copy = work / "artifact"
            shutil.copytree(artifact, copy)
            way.apply(copy)
            found = outcome(copy, inputs, expected)
            outcomes[found] += 1
            if not found.startswith("DCR-A"):
                wrong.append(f"{way.name}: {found}")
            shutil.rmtree(work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "corruptions": len(ways), "refused": len(ways) - len(wrong), "codes": dict(sorted(outcomes.items())),
        "wrong": wrong, "memory_peak_over_normal": round(peak / normal, 3), "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def main() -> None:
    from benchmarks.reliability.cases import tiny_artifact

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        artifact, inputs = tiny_artifact(Path(folder) / "artifact")
        result = run(artifact, inputs, arguments.count, arguments.seed)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
