"""The application that verbs are registered with: options that every verb has, examples in the help."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from diffcr_compile.commands.terminal import terminal
from diffcr_compile.errors import UsageError

_PANEL = "Common options"
_COMMON: dict[str, tuple[Any, Any]] = {
    "verbose": (
        Annotated[
            bool,
            typer.Option(
                "--verbose", "-v", help="say more; show tracebacks", rich_help_panel=_PANEL
            ),
        ],
        False,
    ),
    "quiet": (
        Annotated[
            bool,
            typer.Option(
                "--quiet", "-q", help="results and errors only", rich_help_panel=_PANEL
            ),
        ],
        False,
    ),
    "dry_run": (
        Annotated[
            bool,
            typer.Option(
                "--dry-run",
                help="this verb writes nothing anyway; accepted so that every verb takes it",
                rich_help_panel=_PANEL,
            ),
        ],
        False,
    ),
    "no_color": (
        Annotated[
            bool,
            typer.Option(
                "--no-color", help="as NO_COLOR in the environment", rich_help_panel=_PANEL
            ),
        ],
        False,
    ),
    "log_json": (
        Annotated[
            Path | None,
            typer.Option(
                help="add one JSON object per event to this file", rich_help_panel=_PANEL
            ),
        ],
        None,
    ),
}


class App(typer.Typer):
    """A ``typer.Typer`` whose verbs all take -v, -q, --no-color, --log-json and --dry-run."""

    def verb(self, name: str, examples: Sequence[str] = ()) -> Callable[[Any], Any]:
        """Register a function as ``diffcr name``.

        Args:
            name: of the verb.
            examples: what may follow the name, each shown as a line at the end of the help.
        """
        lines = [f"diffcr {name} {example}".rstrip() for example in examples]
        epilog = "\n\n".join(["Examples:", *lines]) if lines else None

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self.command(name, epilog=epilog)(_with_common_options(name, function))
            return function

        return register


def _with_common_options(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as Typer should see it: with the common options, which it never gets."""
    signature = inspect.signature(function)
    options = {o: v for o, v in _COMMON.items() if o not in signature.parameters}

    @functools.wraps(function)
    def command(**arguments: Any) -> Any:
        given = {option: arguments.pop(option) for option in options}
        given.pop("dry_run", None)
        _apply(name, **given)
        return function(**arguments)

    hints = typing.get_type_hints(function, include_extras=True)
    hints |= {option: hint for option, (hint, _) in options.items()}
    own = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values()]
    keyword = inspect.Parameter.KEYWORD_ONLY
    common = [
        inspect.Parameter(option, keyword, default=default, annotation=hints[option])
        for option, (_, default) in options.items()
    ]
    parameters = [*own, *common]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = hints
    del command.__wrapped__  # or the hints of the function itself would be read
    return command


def _apply(
    name: str, verbose: bool, quiet: bool, no_color: bool, log_json: Path | None
) -> None:
    if verbose and quiet:
        raise UsageError(
            "-v and -q cannot both be given; leave one of them out", code="DCR-U019"
        )
    terminal.verbosity = verbose - quiet
    if no_color:
        terminal.without_color()
    if log_json is not None:
        terminal.log_to(log_json)
    terminal.event("start", verb=name)
