"""JSON and YAML that anybody may have written: whatever is wrong with a file comes out as one error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

# What the parsers raise for some text: dates and numbers that are none, depth, keys that cannot be keys.
_TROUBLE = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
)
_LONGEST = 300


class _UniqueKeys(yaml.SafeLoader):
    """A key that is given twice is an error, not the last of the two: the other one would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, yaml.Node] = {}
        for key, _ in node.value:
            # what is merged in from an anchor may be overridden
            name = None if key.tag == "tag:yaml.org,2002:merge" else key.value
            if isinstance(name, str) and seen.setdefault(name, key) is not key:
                lines = seen[name].start_mark.line + 1, key.start_mark.line + 1
                raise yaml.YAMLError(
                    f"{name!r} is given twice, in line {lines[0]} and in line {lines[1]}"
                )
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """What a text says; JSON is YAML. Tags that make objects are refused, and keys that are given twice.

    Raises:
        ValueError: it is no YAML; in few words.
    """
    try:
        return _UniqueKeys(text).get_single_data()
    except _TROUBLE as error:
        raise ValueError(_short(error)) from error


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        ValueError: it is no YAML in UTF-8; in few words.
        OSError: it cannot be read.
    """
    return parse_yaml(_text(path))


def read_json(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        ValueError: it is no JSON in UTF-8; in few words.
        OSError: it cannot be read.
    """
    try:
        return json.loads(_text(path))
    except RecursionError as error:
        raise ValueError(_short(error)) from error


def short(value: object, limit: int = 80) -> str:
    """How a value looks, cut: what was found belongs into a message, a whole file does not."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8")


def _short(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
