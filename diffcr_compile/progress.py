"""Whom a long piece of work tells how far it has come."""

from __future__ import annotations

from collections.abc import Callable

# (done, of how many)
Progress = Callable[[int, int], None]
# (what is under way, done, of how many)
PhaseProgress = Callable[[str, int, int], None]
