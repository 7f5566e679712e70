"""What the devices that graphs are made for can and cannot do, from the files in ``export/targets``.

Every fact there was read in a source or tried, as said beside it; what is not known is left out. No
speed of a device is stated, because none was measured on one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcr_compile.did_you_mean import did_you_mean
from diffcr_compile.errors import UsageError
from diffcr_compile.planning.target_files import (
    SHIPPED,
    ImporterFile,
    KnownBug,
    Spelling,
    TargetFile,
    read_facts,
    read_list,
)

# What routing adds to a block in the exported graph. Gemm is the router's.
ROUTING_OPS = ("Gemm", "TopK", "Gather", "ScatterND")
_RUNTIMES = {
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT-RTX",
    "onnxruntime": "ONNX Runtime",
}


class Target(TargetFile):
    """A device with its runtime, and their limits.

    Attributes:
        name: as on the command line.
        aliases: other names for it.
        device: what people call it.
        engine: which runtime it is.
        version: of the runtime; the oldest, if several are meant.
        importer: what reads ONNX there.
        sm: CUDA compute capabilities as integers (87 is 8.7); none without a GPU.
        memory_bytes: of the device, the smallest module of that name; None if it varies.
        unified_memory: the GPU shares it with the host.
        dtypes: floating types that run there, best known first.
        fused_attention: floating types whose attention is one kernel that keeps no score matrix.
        build_memory: peak memory of an engine build / bytes of weights; None where nothing is built.
        profile_layout: how ``profiles`` engines are laid out: ``pinned`` where kernels are chosen at build
            for given lengths, ``spanning`` where the runtime specialises them for the lengths it meets.
        macs_per_byte: MACs done in the time in which a byte is moved; None where nobody measured it.
        remarks: what else one should know before a build.
        min_opset, max_opset: ONNX opsets that are known to be read; None for no known bound.
        max_ir: newest ONNX IR version that is known to be read.
        max_rank: most axes of a tensor.
        max_topk: largest K of a TopK; None without a limit.
        operators: ONNX operator -> types of its first input; None for all standard operators.
        other_types: types of tensors that are no floating ones.
        cast_down: types that are read, and computed in less.
        forbidden: spellings that are refused although the operator is read.
        bugs: wrong results that are known of this version on these compute capabilities.
    """

    min_opset: int | None = None
    max_opset: int | None = None
    max_ir: int | None = None
    max_rank: int | None = None
    max_topk: int | None = None
    operators: Mapping[str, tuple[str, ...]] | None = None
    other_types: tuple[str, ...] = ()
    cast_down: tuple[str, ...] = ()
    forbidden: tuple[Spelling, ...] = ()
    bugs: tuple[KnownBug, ...] = ()

    @property
    def runtime(self) -> str:
        """What runs the graph there: ``TensorRT 10.3``."""
        return f"{_RUNTIMES[self.engine]} {self.version}"

    @property
    def importer_ops(self) -> frozenset[str] | None:
        """ONNX operators that are known to be read; None for all standard ones."""
        return None if self.operators is None else frozenset(self.operators)

    def unknown_ops(self, ops: Iterable[str]) -> tuple[str, ...]:
        """Those ONNX ops that the target is not known to read, each once, sorted."""
        return () if self.operators is None else tuple(sorted(set(ops) - set(self.operators)))

    def troubles(self, aten_ops: Iterable[str]) -> dict[str, str]:
        """Those ATen ops (``aten.cumsum.default``) whose export is a problem here, and why."""
        trouble = {op: f"{s.op}: {s.reason}" for s in self.forbidden for op in s.aten}
        found = {op: trouble.get(op.rpartition(".")[0]) for op in aten_ops}
        return {op: why for op, why in found.items() if why}

    def limits(self) -> str:
        """One line for people."""
        parts = [
            f"opset <= {self.max_opset}" if self.max_opset else None,
            f"IR <= {self.max_ir}" if self.max_ir else None,
            f"TopK K <= {self.max_topk}" if self.max_topk else None,
            f"types {', '.join(self.dtypes)}",
        ]
        return ", ".join(part for part in parts if part)


def find_target(name: str, folder: Path | None = None) -> Target:
    """A target by its name or alias, or from the YAML file that `name` is the path of.

    Args:
        name: ``jetson-orin-nx``, or ``boards/mine.yaml``.
        folder: a folder or file with more targets; theirs win over the shipped ones.

    Raises:
        UsageError: there is none of that name; lists those there are.
    """
    if name.endswith((".yaml", ".yml")):
        return read_targets(Path(name))[0]
    known = all_targets(folder)
    for target in known:
        if name == target.name or name in target.aliases:
            return target
    names = [n for target in known for n in (target.name, *target.aliases)]
    raise UsageError(
        f"there is no target {name!r}{did_you_mean(name, names)}. The targets are {', '.join(names)}, "
        "or the path of a YAML file",
        code="DCR-U027",
    )


def all_targets(folder: Path | None = None) -> tuple[Target, ...]:
    """The shipped targets, after those of `folder`, a folder or file of the user's."""
    own = read_targets(folder) if folder is not None else ()
    taken = {target.name for target in own}
    return (*own, *(target for target in _shipped() if target.name not in taken))


def read_targets(path: Path) -> tuple[Target, ...]:
    """The targets in a YAML file, or in the YAML files of a folder.

    Importers and bugs are looked for beside the files, then among the shipped ones.

    Raises:
        UsageError: nothing is there, or a file is wrong; says which key.
    """
    if path.is_dir():
        folder, files = path, sorted(path.glob("*.y*ml"))
        if not files:
            raise UsageError(
                f"{path} has no YAML file; a target is described in one", code="DCR-U037"
            )
    else:
        folder, files = path.parent, [path]
    importers = _importers(SHIPPED) | _importers(folder)
    bugs = {bug.id: bug for place in (SHIPPED, folder) for bug in _bugs(place)}
    return tuple(
        _resolved(read_facts(TargetFile, file), file, importers, tuple(bugs.values()))
        for file in files
    )


def largest_topk(targets: Iterable[Target]) -> int | None:
    """The K of a TopK that all of them build; None without a limit."""
    limits = [target.max_topk for target in targets if target.max_topk is not None]
    return min(limits, default=None)


def find_targets(names: str | Sequence[str] | None) -> tuple[Target, ...]:
    """Several targets by name; one name and None stand for one and none."""
    return tuple(
        find_target(name) for name in ([names] if isinstance(names, str) else names or ())
    )


@functools.cache
def _shipped() -> tuple[Target, ...]:
    return read_targets(SHIPPED)


def _importers(folder: Path) -> dict[str, ImporterFile]:
    found = [
        read_facts(ImporterFile, file) for file in sorted(folder.glob("importers/*.y*ml"))
    ]
    return {importer.name: importer for importer in found}


def _bugs(folder: Path) -> tuple[KnownBug, ...]:
    files = sorted(folder.glob("bugs/*.y*ml"))
    return tuple(bug for file in files for bug in read_list(KnownBug, file))


def _resolved(
    target: TargetFile,
    file: Path,
    importers: Mapping[str, ImporterFile],
    bugs: Sequence[KnownBug],
) -> Target:
    chain = _chain(target.importer, file, importers)  # the oldest first
    operators: dict[str, tuple[str, ...]] = {}
    forbidden: dict[str, Spelling] = {}
    bounds: dict[str, Any] = {}
    for importer in chain:
        for group in importer.operators:
            operators |= dict.fromkeys(group.names.split(), group.types)
        for name in (*importer.removed, *importer.lifted):
            if name not in (operators if name in importer.removed else forbidden):
                raise UsageError(
                    f"importer {importer.name}: there is no {name!r} to take away"
                )
            (operators if name in importer.removed else forbidden).pop(name)
        forbidden |= {spelling.id: spelling for spelling in importer.forbidden}
        given = importer.model_dump(exclude_none=True)
        bounds |= {key: value for key, value in given.items() if key in _BOUNDS}
    facts: dict[str, Any] = {
        **target.model_dump(),
        **{_BOUNDS[key]: value for key, value in bounds.items()},
        "operators": operators or None,
        "forbidden": tuple(forbidden.values()),
        "bugs": tuple(b for b in bugs if b.concerns(target.engine, target.version, target.sm)),
    }
    return Target(**facts)


# key of an importer's file -> attribute of a target
_BOUNDS = {
    "min_opset": "min_opset",
    "max_opset": "max_opset",
    "max_ir": "max_ir",
    "max_rank": "max_rank",
    "max_topk": "max_topk",
    "integers": "other_types",
    "cast_down": "cast_down",
}


def _chain(
    name: str, file: Path, importers: Mapping[str, ImporterFile]
) -> tuple[ImporterFile, ...]:
    chain: list[ImporterFile] = []
    following: str | None = name
    while following is not None:
        if following not in importers:
            raise UsageError(
                f"{file}: there is no importer {following!r}{did_you_mean(following, importers)}"
            )
        if importers[following] in chain:
            raise UsageError(f"{file}: importer {following!r} extends itself", code="DCR-U037")
        chain.insert(0, importers[following])
        following = importers[following].extends
    return tuple(chain)
