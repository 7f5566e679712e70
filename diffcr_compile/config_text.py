"""Settings as text: a commented file to start from, the merged one of a run, and the schema for editors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from diffcr_compile.config import CompileConfig
from diffcr_compile.config_file import load_config

SCHEMA_ID = "diffcr.schema.json"
_ORIGIN = re.compile(r"  (\w+): .*  # (.*)$")
_SECTIONS = {
    "run": "what is compiled: MODEL, its inputs and the budget; stronger on the command line",
    "routing": "which blocks are routed, and how",
    "rollouts": "the dense model's own sampling, from which is learned where no data are given",
    "calibration": "the short fine-tune that learns routers and keep ratios",
    "export": "ONNX files",
}


def effective_yaml(config: CompileConfig) -> str:
    """Every setting with its value and, as a comment, where that came from. It can be given to -c again."""
    lines = [
        "# Every setting of this run and where it came from: default, the settings file, --set, a flag, the",
        "# verb, or the config argument in Python. `diffcr compile -c` takes this file.",
    ]
    for section in type(config).model_fields:
        part: BaseModel = getattr(config, section)
        lines += ["", f"{section}:"]
        for name, value in part.model_dump(mode="json").items():
            given = "config argument" if name in part.model_fields_set else "default"
            origin = config.origins.get(f"{section}.{name}", given)
            lines.append(f"  {name}: {json.dumps(value)}  # {origin}")
    return "\n".join(lines) + "\n"


def read_effective(path: Path) -> CompileConfig:
    """The settings of a run that began earlier, with the origins that it wrote down."""
    config, section = load_config(path), ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.endswith(":") and not line.startswith((" ", "#")):
            section = line[:-1]
        elif found := _ORIGIN.match(line):
            config.origins[f"{section}.{found[1]}"] = found[2]
    return config


def commented_yaml(detected: Mapping[str, Any], notes: Sequence[str] = ()) -> str:
    """A settings file to edit: detected values are set, all others stand there as comments.

    Args:
        detected: dotted key -> value.
        notes: lines about the model for the head of the file.
    """
    lines = [f"# yaml-language-server: $schema={SCHEMA_ID}"]
    lines += ["# Made by `diffcr init`; `diffcr init --schema` writes the schema for editors."]
    lines += [f"# {note}" for note in notes]
    for section, model in _sections():
        lines += ["", f"# {_SECTIONS.get(section, section)}", f"{section}:"]
        for name, field in model.model_fields.items():
            key = f"{section}.{name}"
            default = _json(field.get_default(call_default_factory=True))
            text = f"{name}: {_json(detected[key]) if key in detected else default}"
            about = field.description or name
            lines.append(
                f"  {text}  # {about} (default {default})"
                if key in detected
                else f"  # {text}  # {about}"
            )
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """JSON Schema of a settings file."""
    schema = CompileConfig.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["$id"] = SCHEMA_ID
    schema["title"] = "Settings of diffcr"
    return schema


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in CompileConfig.model_fields.items():
        section: Any = field.annotation
        yield name, section


def _json(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)
