"""The command line: which verbs there are, and how a command ends. A verb is a file in ``commands/``."""

from __future__ import annotations

import shlex
import sys

from diffcr_compile.commands import (
    bench,
    compile,
    demo,
    doctor,
    inspect,
    lint,
    report,
    run,
    show,
    validate,
)
from diffcr_compile.commands.app import App
from diffcr_compile.commands.terminal import errors, terminal
from diffcr_compile.errors import INTERRUPTED, DiffCRError

VERBS = (
    doctor,
    inspect,
    compile,
    validate,
    lint,
    bench,
    report,
    run,
    show,
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
        app(standalone_mode=False)
    except DiffCRError as error:
        errors.print(f"[bold red]{type(error).__name__}[/]: ", end="")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        command = shlex.join(["diffcr", *sys.argv[1:]])
        errors.print(
            f"Interrupted. What is finished is kept; go on with:  {command}",
            markup=False,
            soft_wrap=True,
        )
        sys.exit(INTERRUPTED)
    except Exception as error:
        usage = getattr(error, "exit_code", None)  # click's own errors carry one
        if usage is None:
            raise
        if hasattr(error, "show"):
            error.show()
        sys.exit(usage)
    finally:
        terminal.close()


if __name__ == "__main__":
    main()
