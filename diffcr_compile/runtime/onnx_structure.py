"""Is an ONNX file one of ours? Looked at before ONNX Runtime opens it, without the onnx package.

The manifest's hashes say that a file is the one that was written. This looks at the file itself, so that
an artifact whose manifest was rewritten too cannot make the runtime read files outside of it, load
custom operators, or take weights from beyond the end of the file. Who can rewrite a whole artifact can
still change what it computes: sign it where that matters.

Only the wire format of protobuf is read, and of it only what is checked: https://protobuf.dev/programming-guides/encoding
and the field numbers of onnx.proto (IR version 10).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcr_compile.errors import ArtifactError

MAX_BYTES = 1 << 28
MAX_DEPTH = 8  # graphs inside of attributes
STANDARD = ("", "ai.onnx")
# Bytes of an element by onnx.TensorProto.DataType; strings and types of less than a byte are not ours.
ITEM_BYTES = {
    1: 4,
    2: 1,
    3: 1,
    4: 2,
    5: 2,
    6: 4,
    7: 8,
    9: 1,
    10: 2,
    11: 8,
    12: 4,
    13: 8,
    16: 2,
}
EXTERNAL = 1
_AGAIN = "Copy the artifact again, or make it anew with diffcr compile."


class _DamagedError(Exception):
    """What is wrong, in words."""


def check_onnx(path: Path, weights: Path, inputs: Sequence[Mapping[str, Any]]) -> None:
    """Raise unless `path` is an ONNX graph of standard operators with all its weights in `weights`.

    Args:
        path: the ONNX file.
        weights: the one file beside it that it may read.
        inputs: name, dtype and shape of the inputs that it must have, in order.

    Raises:
        ArtifactError: it is no such file; says why.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ArtifactError(
            f"{path} has {size} bytes, more than the {MAX_BYTES} of a graph without weights. "
            f"{_AGAIN}",
            code="DCR-A007",
        )
    try:
        found = _check_model(memoryview(path.read_bytes()), weights)
        # A complex tensor goes in as pairs of real numbers.
        wanted = [
            (i["name"], [*i["shape"], *([2] if i["dtype"].startswith("complex") else [])])
            for i in inputs
        ]
        if found != wanted:
            raise _DamagedError(f"its inputs are {found}, the manifest says {wanted}")
    except (_DamagedError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path} is not a graph of this artifact: {error}. {_AGAIN}", code="DCR-A007"
        ) from None


def _check_model(data: memoryview, weights: Path) -> list[tuple[str, list[int]]]:
    """Names and shapes of the inputs."""
    graphs, inputs = 0, []
    for field, value in _fields(data):
        if field == 7:
            graphs += 1
            _check_graph(_bytes(value), weights, 0)
            inputs += [_input(_bytes(v)) for f, v in _fields(_bytes(value)) if f == 11]
        elif field == 8:
            domain = next((_text(v) for f, v in _fields(_bytes(value)) if f == 1), "")
            _check_domain(domain)
        elif field == 25:
            raise _DamagedError("it defines functions of its own")
    if graphs != 1:
        raise _DamagedError(f"it holds {graphs} graphs")
    return inputs


def _input(data: memoryview) -> tuple[str, list[int]]:
    """Name and shape of a ValueInfoProto; -1 is an axis of no fixed length."""
    name, shape = "", []
    for field, value in _fields(data):
        if field == 1:
            name = _text(value)
        elif field == 2:
            tensor = next(
                (_bytes(v) for f, v in _fields(_bytes(value)) if f == 1), memoryview(b"")
            )
            axes = next((_bytes(v) for f, v in _fields(tensor) if f == 2), memoryview(b""))
            for _, axis in _fields(axes):
                sizes = [_number(v) for f, v in _fields(_bytes(axis)) if f == 1]
                shape.append(sizes[0] if sizes else -1)
    return name, shape


def _check_graph(data: memoryview, weights: Path, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _DamagedError(f"graphs are nested more than {MAX_DEPTH} deep")
    for field, value in _fields(data):
        if field == 1:
            _check_node(_bytes(value), weights, depth)
        elif field == 5:
            _check_tensor(_bytes(value), weights)
        elif field == 15:
            raise _DamagedError("it has sparse weights")


def _check_node(data: memoryview, weights: Path, depth: int) -> None:
    for field, value in _fields(data):
        if field == 7:
            _check_domain(_text(value))
        elif field == 5:
            for inner, content in _fields(_bytes(value)):
                if inner in (5, 10):
                    _check_tensor(_bytes(content), weights)
                elif inner in (6, 11):
                    _check_graph(_bytes(content), weights, depth + 1)
                elif inner in (22, 23):
                    raise _DamagedError("it has sparse weights")


def _check_domain(domain: str) -> None:
    if domain not in STANDARD:
        raise _DamagedError(
            f"it uses operators of the domain {domain!r}, which are not standard ones"
        )


def _check_tensor(data: memoryview, weights: Path) -> None:
    elements, kind, raw, external, location = 1, 0, None, {}, 0
    for field, value in _fields(data):
        if field == 1:
            for size in [value] if isinstance(value, int) else _varints(value):
                if size >= 1 << 31:  # negative numbers are the largest ones
                    raise _DamagedError(f"a tensor has an axis of {size}")
                elements *= size
        elif field == 2:
            kind = _number(value)
        elif field == 9:
            raw = len(_bytes(value))
        elif field == 13:
            entry = {f: _text(v) for f, v in _fields(_bytes(value))}
            external[entry.get(1, "")] = entry.get(2, "")
        elif field == 14:
            location = _number(value)
    if kind not in ITEM_BYTES:
        raise _DamagedError(f"a tensor has the element type {kind}")
    wanted = elements * ITEM_BYTES[kind]
    if location == EXTERNAL or external:
        _check_external(external, wanted, weights)
    elif raw is not None and raw != wanted:
        raise _DamagedError(f"a tensor of {wanted} bytes has {raw}")
    elif raw is None and wanted > 8 * len(data):
        raise _DamagedError(f"a tensor of {wanted} bytes stands in {len(data)}")


def _check_external(external: dict[str, str], wanted: int, weights: Path) -> None:
    if external.get("location") != weights.name:
        raise _DamagedError(
            f"its weights lie in {external.get('location')!r}, expected {weights.name!r}"
        )
    numbers = []
    for key, default in (("offset", "0"), ("length", str(wanted))):
        text = external.get(key, default)
        if not (text.isascii() and text.isdigit() and len(text) < 20):
            raise _DamagedError(f"the {key} of a tensor in {weights.name} is {text!r}")
        numbers.append(int(text))
    offset, length = numbers
    if length != wanted:
        raise _DamagedError(f"a tensor of {wanted} bytes takes {length} of {weights.name}")
    if offset + length > weights.stat().st_size:
        raise _DamagedError(
            f"a tensor ends at byte {offset + length}, after the end of {weights.name}"
        )


# ------------------------------------------------------------------------------- the wire format


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a message: a number, or the bytes of what has a length."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise _DamagedError("it is no protobuf message")
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise _DamagedError("it is no protobuf message")
        if at + length > len(data):
            raise _DamagedError("it ends in the middle of a message")
        yield number, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _DamagedError("it ends in the middle of a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _DamagedError("it has a number of more than 10 bytes")


def _varints(value: memoryview) -> Iterator[int]:
    at = 0
    while at < len(value):
        number, at = _varint(value, at)
        yield number


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _DamagedError("a number stands where a message is expected")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _DamagedError("a message stands where a number is expected")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)).decode("utf-8")
