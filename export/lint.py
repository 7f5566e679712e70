"""Check an ONNX file against what a target takes, before anything is built on the device.

Findings of the severity "error" make a build or a session fail; a "warning" is a known bug of the
target that the graph may meet, a type that is computed in less, or one that the documented list of an
operator lacks: those lists are stricter than the parsers (ScatterND and Equal of truth values, Clip
and CumSum of integers build with TensorRT-RTX 1.7).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import onnx

from diffcr_compile.errors import ArtifactError, TargetError, UsageError
from diffcr_compile.export.onnx_facts import GraphFacts, Node, read_facts
from diffcr_compile.manifest import MANIFEST_FILE, read_manifest, verify_artifact
from diffcr_compile.planning.target_files import KnownBug, Spelling
from diffcr_compile.planning.targets import Target

Severity = Literal["error", "warning"]
STANDARD = ("", "ai.onnx")
MOST_ELEMENTS = 2**31 - 1
_NODE_MAP = "model/node_map.json"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One rule that one kind of operator of a file breaks.

    Attributes:
        file: the ONNX file, relative to the artifact if it is in one.
        target: name of the target.
        rule: ``opset``, ``ir``, ``domain``, ``operator``, ``type``, ``dtype``, ``topk``, ``rank``,
            ``memory``, ``known-bug:<id>``, or the id of a forbidden spelling.
        operator: ONNX operator; ``graph``, ``input`` or ``weights`` where it is none.
        count: how many of them.
        reason: what is wrong and what the target takes.
        blocks: block, module or line of the outer graph -> how many there; "" where nobody knows.
        severity: ``error`` or ``warning``.
    """

    file: str
    target: str
    rule: str
    operator: str
    count: int
    reason: str
    blocks: Mapping[str, int]
    severity: Severity

    @property
    def where(self) -> str:
        """The blocks in a few words."""
        named = [name for name in self.blocks if name]
        rest = len(named) - 3
        return ", ".join(named[:3]) + (f" and {rest} more" if rest > 0 else "")

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "blocks": dict(self.blocks)}


@dataclasses.dataclass(frozen=True)
class _Hit:
    rule: str
    operator: str
    reason: str
    severity: Severity = "error"
    origin: str = ""


def lint(path: Path, targets: Sequence[Target]) -> list[Finding]:
    """Everything that the targets do not take of an artifact's graphs, or of one ONNX file.

    Raises:
        UsageError: there is neither.
        ArtifactError: a graph is missing or no ONNX, or a file of the artifact was changed.
    """
    if path.is_file():
        return lint_file(path, targets)
    if not (path / MANIFEST_FILE).is_file():
        raise UsageError(f"{path} is neither an ONNX file nor the folder of an artifact")
    manifest = read_manifest(path)
    # what fits a target here must be what is built there
    verify_artifact(path, manifest, only=("onnx", "model"))
    origins = _node_maps(path)
    findings = []
    rows = (*manifest.buckets, *manifest.profile_graphs)
    for graph in dict.fromkeys(row["onnx"] for row in rows):
        found = lint_file(path / graph, targets, origins.get(graph), tuple(manifest.schedule))
        findings += [dataclasses.replace(finding, file=graph) for finding in found]
    return findings


def lint_file(
    path: Path,
    targets: Sequence[Target],
    origins: Mapping[str, str] | None = None,
    blocks: Iterable[str] = (),
) -> list[Finding]:
    """Findings of one ONNX file, errors first.

    Args:
        path: the file.
        targets: each is checked.
        origins: ONNX node name -> module name, as in ``model/node_map.json``.
        blocks: names of routed blocks, to say "block" where a module inside it is meant.
    """
    facts = read_facts(path, dict(origins or {}))
    names = sorted(blocks, key=len, reverse=True)
    return [finding for target in targets for finding in _grouped(facts, target, names)]


def over_files(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that differ only in their file, added up; the file is then ""."""
    merged: dict[tuple[str, str, str, str], Finding] = {}
    for finding in findings:
        key = (finding.target, finding.rule, finding.operator, finding.reason)
        blocks = dict(merged[key].blocks) if key in merged else {}
        for name, count in finding.blocks.items():
            blocks[name] = blocks.get(name, 0) + count
        merged[key] = dataclasses.replace(
            finding, file="", count=sum(blocks.values()), blocks=blocks
        )
    return list(merged.values())


def refuse(findings: Sequence[Finding]) -> None:
    """Raise TargetError if there is an error among the findings; names each rule."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    lines = [
        f"  {f.target}, {f.file}: {f.count} × {f.operator} ({f.rule}): {f.reason}"
        + (f" [{f.where}]" if f.where else "")
        for f in errors
    ]
    raise TargetError("the target does not take these graphs:\n" + "\n".join(lines))


def _node_maps(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / _NODE_MAP
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: export the artifact again")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not _are_node_maps(found):
            raise ValueError("it does not map graphs to names of nodes and modules")
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} cannot be read: {error}. Copy the artifact again, or make it anew with diffcr compile."
        ) from error
    maps: dict[str, dict[str, str]] = found
    return maps


def _are_node_maps(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(nodes, dict) and all(isinstance(origin, str) for origin in nodes.values())
        for nodes in found.values()
    )


def _grouped(facts: GraphFacts, target: Target, blocks: Sequence[str]) -> list[Finding]:
    groups: dict[_Hit, dict[str, int]] = {}
    for hit in _hits(facts, target):
        places = groups.setdefault(dataclasses.replace(hit, origin=""), {})
        block = _block(hit.origin, blocks)
        places[block] = places.get(block, 0) + 1
    found = [
        Finding(
            facts.path.name,
            target.name,
            hit.rule,
            hit.operator,
            sum(places.values()),
            hit.reason,
            places,
            hit.severity,
        )
        for hit, places in groups.items()
    ]
    return sorted(found, key=lambda finding: finding.severity != "error")


def _block(origin: str, blocks: Sequence[str]) -> str:
    """The block that a module or a line of the outer graph belongs to; itself if to none."""
    for name in blocks:  # the longest first
        line = name.replace(".", "_").replace("-", "_")
        if origin in (name, line) or origin.startswith((f"{name}.", f"{line}_")):
            return name
    return origin


def _hits(facts: GraphFacts, target: Target) -> Iterator[_Hit]:
    yield from _header(facts, target)
    yield from _memory(facts, target)
    yield from _dtypes(facts, target)
    for node in facts.nodes:
        yield from _operator(node, target)
        yield from _top_k(node, target)
        yield from _rank(node, target)
        for spelling in target.forbidden:
            if node.proto.op_type in spelling.ops and _breaks(node, spelling):
                yield _hit(node, spelling.id, spelling.reason)
    yield from _known_bugs(facts, target)


def _hit(node: Node, rule: str, reason: str, severity: Severity = "error") -> _Hit:
    return _Hit(rule, node.proto.op_type, reason, severity, node.origin)


def _header(facts: GraphFacts, target: Target) -> Iterator[_Hit]:
    low, high = target.min_opset or 0, target.max_opset
    if facts.opset and (facts.opset < low or (high is not None and facts.opset > high)):
        yield _Hit(
            "opset",
            "graph",
            f"opset {facts.opset}, {target.runtime} is known to read {low} to {high}",
        )
    if target.max_ir is not None and facts.ir > target.max_ir:
        yield _Hit(
            "ir",
            "graph",
            f"IR version {facts.ir}, {target.runtime} reads up to {target.max_ir}",
        )


def _memory(facts: GraphFacts, target: Target) -> Iterator[_Hit]:
    if target.memory_bytes is not None and facts.weight_bytes > target.memory_bytes:
        yield _Hit(
            "memory",
            "weights",
            f"{facts.weight_bytes / 1e9:.1f} GB of weights, the device has "
            f"{target.memory_bytes / 1e9:.0f} GB{' for all' if target.unified_memory else ''}",
        )


def _dtypes(facts: GraphFacts, target: Target) -> Iterator[_Hit]:
    """Types of the graph's inputs, of its weights and of what nodes make."""
    for kind, _ in facts.inputs.values():
        yield from _dtype(kind, "input", "", target)
    for kind in facts.weight_types.values():
        yield from _dtype(kind, "weights", "", target)
    for node in facts.nodes:
        for kind in set(node.output_types):
            yield from _dtype(kind, node.proto.op_type, node.origin, target)


def _dtype(kind: str | None, operator: str, origin: str, target: Target) -> Iterator[_Hit]:
    if kind is None or kind in (*target.dtypes, *target.other_types):
        return
    if kind in target.cast_down:
        reason = f"{kind} is computed in float32 by {target.runtime}"
        yield _Hit("dtype", operator, reason, "warning", origin)
        return
    reason = f"{kind}, {target.name} computes in {', '.join(target.dtypes)}"
    yield _Hit("dtype", operator, reason, "error", origin)


def _operator(node: Node, target: Target) -> Iterator[_Hit]:
    op, domain = node.proto.op_type, node.proto.domain
    if domain not in STANDARD:
        yield _hit(node, "domain", f"of the domain {domain!r}, which {target.runtime} lacks")
        return
    if target.operators is None:
        if not onnx.defs.has(op):
            yield _hit(node, "operator", "no operator of the ONNX standard")
        return
    if op not in target.operators:
        if not any(
            op in spelling.ops for spelling in target.forbidden
        ):  # it has its own reason
            yield _hit(node, "operator", f"{target.runtime} has no importer for it")
        return
    kind = node.input_types[0] if node.input_types else None
    # a type that nothing there takes is found by the rule on types of values
    known = (*target.dtypes, *target.other_types)
    if kind in known and kind not in target.operators[op]:
        allowed = ", ".join(target.operators[op])
        reason = f"{kind} as its first input, the list of {target.importer} has {allowed}"
        yield _hit(node, "type", f"{reason}; some build all the same, try it", "warning")


def _top_k(node: Node, target: Target) -> Iterator[_Hit]:
    if node.proto.op_type != "TopK" or target.max_topk is None or not node.output_shapes:
        return
    shape, axis = node.output_shapes[0], _attribute(node, "axis", -1)
    kept = shape[int(axis)] if shape else None
    if kept is None:
        reason = f"K is not known before the build; at most {target.max_topk} builds"
        yield _hit(node, "topk", reason, "warning")
    elif kept > target.max_topk:
        yield _hit(
            node,
            "topk",
            f"K = {kept}, {target.runtime} builds up to {target.max_topk}: freeze for this target",
        )


def _rank(node: Node, target: Target) -> Iterator[_Hit]:
    most = max((len(shape) for shape in node.output_shapes if shape), default=0)
    if target.max_rank is not None and most > target.max_rank:
        yield _hit(
            node, "rank", f"a tensor of {most} axes, {target.runtime} has {target.max_rank}"
        )


def _breaks(node: Node, spelling: Spelling) -> bool:
    """Whether every condition of a forbidden spelling that is given holds."""
    conditions = []
    if spelling.attribute is not None:
        value = _attribute(node, spelling.attribute, None)
        strange = spelling.allowed is not None and value not in spelling.allowed
        conditions.append(value is not None and (spelling.present or strange))
    if spelling.types:
        conditions.append(bool(node.input_types) and node.input_types[0] in spelling.types)
    if spelling.output_types:
        conditions.append(node.output_types[0] in spelling.output_types)
    if spelling.constant_inputs:
        given = {i for i, name in enumerate(node.proto.input) if name}
        conditions.append(bool(given & set(spelling.constant_inputs) - node.constant_inputs))
    if spelling.max_outputs is not None:
        named = [i for i, name in enumerate(node.proto.output) if name]
        conditions.append(max(named, default=-1) >= spelling.max_outputs)
    return all(conditions)


def _attribute(node: Node, name: str, default: Any) -> Any:
    for attribute in node.proto.attribute:
        if attribute.name == name:
            value = onnx.helper.get_attribute_value(attribute)
            return value.decode() if isinstance(value, bytes) else value
    return default


def _known_bugs(facts: GraphFacts, target: Target) -> Iterator[_Hit]:
    for bug in target.bugs:
        if _meets(facts, bug):
            reason = f"{bug.effect} ({', '.join(bug.threads)}): {bug.remedy}"
            yield _Hit(f"known-bug:{bug.id}", "graph", reason, "warning")


def _meets(facts: GraphFacts, bug: KnownBug) -> bool:
    if bug.when is None:  # it says nothing about this graph rather than another
        return False
    shapes = [
        shape for node in facts.nodes for shape in node.output_shapes if shape is not None
    ]
    if bug.when == "dynamic_shapes":
        return any(shape is None or None in shape for _, shape in facts.inputs.values())
    if bug.when == "large_tensors":
        return any(None not in s and math.prod(s) > MOST_ELEMENTS for s in shapes)  # type: ignore[arg-type]
    made = {kind for node in facts.nodes for kind in node.output_types}
    return bug.when in made | set(facts.weight_types.values())
