"""What every verb prints through: two consoles, verbosity, and the log of events."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from diffcr_compile.errors import UsageError

console = Console()
errors = Console(stderr=True)


class Terminal:
    """How loud this command is, and where its events are logged.

    Attributes:
        verbosity: -1 for errors and results only, 0 usual, 1 also what happens inside and tracebacks.
    """

    def __init__(self) -> None:
        self.verbosity = 0
        self._log: IO[str] | None = None

    def start(self) -> None:
        """A new command: the usual verbosity, colours where the terminal has them, no log."""
        self.verbosity = 0
        self.close()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(
                stream, io.TextIOWrapper
            ):  # in ASCII alone a sign is better lost than the result
                stream.reconfigure(errors="replace")
        for each in (console, errors):
            # rich reads NO_COLOR when a console is made; one process may run several commands
            each.no_color = "NO_COLOR" in each._environ

    def without_color(self) -> None:
        """Text without colours."""
        console.no_color = errors.no_color = True

    def log_to(self, path: Path) -> None:
        """Add one JSON object per event to a file.

        Raises:
            UsageError: the file cannot be written.
        """
        try:
            self._log = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"--log-json {path} cannot be written: {error}. Name a file in a folder that exists.",
                code="DCR-U033",
            ) from error

    def event(self, kind: str, **fields: Any) -> None:
        """One line in the log, with the time in UTC; nothing without a log."""
        if self._log is None:
            return
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        try:
            self._log.write(
                json.dumps({"time": now, "event": kind, **fields}, default=str) + "\n"
            )
            self._log.flush()
        except OSError as error:  # hours of work do not end for a line of a log
            self.close()
            errors.print(
                f"--log-json: {error}. The log ends here, the work goes on.",
                markup=False,
                soft_wrap=True,
            )

    def close(self) -> None:
        """Close the log."""
        log, self._log = self._log, None
        if log is not None:
            with contextlib.suppress(OSError):  # what it still holds cannot be written
                log.close()


terminal = Terminal()


def say(text: str) -> None:
    """A plain line of a result, as it is: no markup, no colours, no line breaks of ours."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """A line about the work, on stderr, so that stdout holds the result only; not with -q."""
    if terminal.verbosity >= 0:
        errors.print(text, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """The result as JSON, on stdout."""
    print(json.dumps(value, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)
