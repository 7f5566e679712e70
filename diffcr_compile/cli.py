"""The command line: which verbs there are, and how a command ends. A verb is a file in ``commands/``."""

from __future__ import annotations

import shlex
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import typer

from diffcr_compile.commands import (
    bench,
    build,
    compile,
    demo,
    diff,
    doctor,
    init,
    inspect,
    lint,
    pack,
    report,
    run,
    show,
    stages,
    suggest,
    validate,
)
from diffcr_compile.commands.app import App
from diffcr_compile.commands.terminal import errors, terminal
from diffcr_compile.durable import disk_error, is_disk_error
from diffcr_compile.errors import INTERRUPTED, DiffCRError, UsageError, one_line

VERBS = (
    doctor,
    init,
    inspect,
    suggest,
    compile,
    stages,
    validate,
    lint,
    build,
    pack,
    bench,
    report,
    run,
    show,
    diff,
    demo,
)

app = App(
    help="Compile a diffusion transformer into token-compressed static ONNX graphs.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
for verb in VERBS:
    verb.register(app)


def main() -> None:
    """Run the command line; every error leaves with its documented exit code."""
    terminal.start()
    try:
        status = app(standalone_mode=False)
    except DiffCRError as error:
        _stop(error)
    except (KeyboardInterrupt, typer.Abort):
        _stop_interrupted()
    except Exception as error:  # noqa: BLE001 - no traceback unless it is asked for
        if isinstance(error, OSError) and is_disk_error(error):
            _stop(disk_error(error, Path.cwd()), error)
        if type(error).__name__ == "NoArgsIsHelpError":  # the help stands there already
            sys.exit(UsageError.exit_code)
        if hasattr(error, "format_message"):  # one of click's, which Typer may bring along
            _stop(UsageError(_in_words(error)), error)
        bug = DiffCRError(f"{one_line(error)}. Run it again with -v for the traceback.")
        _stop(bug, error)
    else:
        # Typer turns Ctrl-C, and an exit that a verb asks for, into what it returns.
        if status == INTERRUPTED:
            _stop_interrupted()
        if isinstance(status, int) and status != 0:
            sys.exit(status)
    finally:
        terminal.close()


def _in_words(error: Any) -> str:
    """What is wrong with a command line, and where its help is."""
    context = getattr(error, "ctx", None)
    help_ = f" Try: {context.command_path} --help" if context else ""
    return f"{error.format_message()}{help_}"


def _stop(error: DiffCRError, cause: BaseException | None = None) -> NoReturn:
    terminal.event("error", **error.to_dict())
    _show(cause or error, str(error))
    sys.exit(error.exit_code)


def _stop_interrupted() -> NoReturn:
    command = shlex.join(["diffcr", *sys.argv[1:]])
    errors.print(
        f"Interrupted. What is finished is kept; go on with:  {command}",
        markup=False,
        soft_wrap=True,
    )
    sys.exit(INTERRUPTED)


def _show(error: BaseException, text: str) -> None:
    if terminal.verbosity > 0:
        errors.print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True)
    errors.print(f"[bold red]{type(error).__name__}[/] ", end="")
    errors.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
