"""Every error this package raises, and the exit code that the command line gives it.

* DiffCRError                  1
  - UsageError                 2   an argument or a setting is wrong
    + BudgetError              2   the budget cannot be reached; names the smallest that can
  - UnsupportedModelError      3   the model cannot be captured, or no block can be routed
    + CaptureError             3
    + TargetError              3   a graph has what its target does not take
  - EnvironmentMissingError    4   a package, a version or a device is missing
  - ResourceError              5   memory or disk
  - AccuracyError              6   a parity or quality gate was not met
  - ArtifactError              7   an artifact is missing, changed, or of another version
  - PassError                  1   a pass could not finish; names the pass and the node
    + PreconditionError        1   the program handed to the pass was not what it needs
    + PostconditionError       1   the program that the pass made was not what it promised
  - VerificationError          1   a program breaks a rule of its stage
"""

from __future__ import annotations

from typing import ClassVar

INTERRUPTED = 130


class DiffCRError(Exception):
    """Base class, so that callers can write ``except DiffCRError``."""

    exit_code: ClassVar[int] = 1


class UsageError(DiffCRError):
    """An argument or a setting is wrong."""

    exit_code = 2


class BudgetError(UsageError):
    """The budget cannot be reached.

    Attributes:
        smallest: the smallest reachable budget, a fraction of the dense model in (0, 1].
    """

    def __init__(self, message: str, smallest: float) -> None:
        super().__init__(message)
        self.smallest = smallest


class UnsupportedModelError(DiffCRError):
    """The model cannot be compiled."""

    exit_code = 3


class CaptureError(UnsupportedModelError):
    """torch.export could not capture the model."""


class TargetError(UnsupportedModelError):
    """A graph has what the device or runtime that it is meant for does not take."""


class EnvironmentMissingError(DiffCRError):
    """A package, a version or a device is missing."""

    exit_code = 4


class ResourceError(DiffCRError):
    """Memory or disk does not suffice."""

    exit_code = 5


class AccuracyError(DiffCRError):
    """A parity or quality gate was not met."""

    exit_code = 6


class ArtifactError(DiffCRError):
    """An artifact is missing, changed, or of another version."""

    exit_code = 7


class PassError(DiffCRError):
    """A pass could not finish."""


class PreconditionError(PassError):
    """The program handed to a pass was not what the pass needs."""


class PostconditionError(PassError):
    """The program that a pass made was not what the pass promised."""


class VerificationError(DiffCRError):
    """A program breaks a rule of its stage."""


def one_line(error: BaseException, limit: int = 400) -> str:
    """Class and message of an error in one line, the message cut to `limit` characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"
