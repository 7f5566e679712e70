"""``diffcr``, which is ``python -m diffcr_compile``: the command line as a process, from its first moment to its last."""

from __future__ import annotations

import signal
import sys


def run() -> None:
    """Load the command line and run it."""
    try:
        from diffcr_compile.cli import main
    except KeyboardInterrupt:
        print("Interrupted before anything was done.", file=sys.stderr)
        sys.exit(130)
    try:
        main()
    finally:
        # All is said; whoever presses Ctrl-C once more must not break into what Python does at its end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    run()
