"""Settings from a YAML file and from dotted keys, each remembering where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffcr_compile.config import CompileConfig, make_config
from diffcr_compile.data_files import read_yaml
from diffcr_compile.errors import UsageError


def load_config(
    path: Path | None,
    overrides: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
) -> CompileConfig:
    """A config from a YAML file, with ``{"calibration.steps": 100}`` put over it.

    Args:
        path: the YAML file; None for none.
        overrides: dotted key -> value, stronger than the file.
        defaults: section -> key -> value, weaker than the file and stronger than the built-in ones.
    """
    data: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        if not path.is_file():
            what = "is no file" if path.exists() else "does not exist"
            raise UsageError(f"the configuration file {path} {what}", code="DCR-U011")
        try:
            data = read_yaml(path) or {}
        except ValueError as error:
            raise UsageError(f"{path} is not YAML: {error}", code="DCR-U012") from error
        if not isinstance(data, dict):
            raise UsageError(
                f"{path} holds a {type(data).__name__}, expected sections such as `calibration:`",
                code="DCR-U012",
            )
        origins |= _origins_of(data, str(path))
    data = {name: section for name, section in data.items() if section is not None}
    for name, section in (defaults or {}).items():
        origins |= {
            k: v
            for k, v in _origins_of({name: section}, "the verb").items()
            if k not in origins
        }
        mine = data.get(name)
        if mine is None or isinstance(mine, dict):
            data[name] = {**section, **(mine or {})}
    for key, value in (overrides or {}).items():
        section = data
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise UsageError(
                    f"there is no setting {key}: {parent} has a value of its own",
                    code="DCR-U009",
                )
        section[last] = value
        origins[key] = "--set"
    config = make_config(data)
    config._origins = origins
    return config


def _origins_of(data: Mapping[str, Any], origin: str) -> dict[str, str]:
    return {
        f"{name}.{key}": origin
        for name, section in data.items()
        if isinstance(section, dict)
        for key in section
    }
