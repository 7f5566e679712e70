"""Arguments of the public functions that are something else than they should be, said before any work."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

from diffcr_compile.config import CompileConfig, RoutingConfig, make_config
from diffcr_compile.errors import UsageError

Settings = TypeVar("Settings", bound=BaseModel)


def settings_from(
    given: Settings | Mapping[str, Any] | None, kind: type[Settings]
) -> Settings:
    """Settings as they were given: an object of them, a dict of those that are no defaults, or None.

    Args:
        given: as the caller has it.
        kind: CompileConfig or RoutingConfig.

    Raises:
        UsageError: it is something else, or a key or value is wrong.
    """
    if given is None:
        return kind()
    if isinstance(given, kind):
        return given
    if isinstance(given, Mapping):
        # as a whole, so that keys that do not exist are named with their section
        all_of_them = issubclass(kind, CompileConfig)
        made = make_config(dict(given) if all_of_them else {"routing": dict(given)})
        found = made if all_of_them else made.routing
        assert isinstance(found, kind)
        return found
    hint = ""
    if isinstance(given, CompileConfig):
        hint = "; pass its section: config.routing"
    elif isinstance(given, RoutingConfig):
        hint = "; pass CompileConfig(routing=config)"
    raise _wrong("config", given, f"{kind.__name__} or a dict of its settings", hint)


def check_choice(name: str, given: object, choices: Collection[str]) -> None:
    """Refuse a word that is none of the choices."""
    if given not in choices:
        raise UsageError(
            f"{name} is {given!r}; expected one of {', '.join(choices)}", code="DCR-U078"
        )


def check_sampling(sampler: object, conditions: object) -> None:
    """Refuse a sampler that cannot sample and conditions that cannot be drawn; None is for those by default."""
    lacking = [n for n in ("timesteps", "start", "step") if not hasattr(sampler, n)]
    if sampler is not None and lacking:
        raise _wrong(
            "sampler",
            sampler,
            "FlowEuler, SchedulerSampler(scheduler, steps) or an object with timesteps, start and step",
            f"; it lacks {', '.join(lacking)}",
        )
    if conditions is not None and not callable(conditions):
        raise _wrong(
            "conditions",
            conditions,
            "a function of (generator, count) that returns a dict of tensors by input name",
        )


def _wrong(name: str, given: object, expected: str, hint: str = "") -> UsageError:
    return UsageError(
        f"{name} is of type {type(given).__name__}; expected {expected}{hint}", code="DCR-U078"
    )
