"""Every error this package raises, and the exit code that the command line gives it.

The text of an error is the same in Python and on the command line: its code, what is wrong and where,
what was found and expected, what to do next, and where the case is documented.

* DiffCRError                  1   a bug
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

from typing import Any, ClassVar

from diffcr_compile.error_cases import CASES, ErrorCase

INTERRUPTED = 130


class DiffCRError(Exception):
    """Base class, so that callers can write ``except DiffCRError``.

    Args:
        message: what, where, what was found and expected, what to do next.
        code: of the documented case; by default the one that stands for the whole class.

    Attributes:
        message: without the code.
        code: such as ``DCR-U009``; stable, described in ``docs/errors.md``.
    """

    exit_code: ClassVar[int] = 1
    general_code: ClassVar[str] = "DCR-X000"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.general_code

    @property
    def case(self) -> ErrorCase:
        """What the code stands for."""
        return CASES[self.code]

    def __str__(self) -> str:
        return f"{self.code}: {self.message}\nHelp: {self.case.anchor}"

    def to_dict(self) -> dict[str, Any]:
        """For logs: all that the text says, in fields."""
        return {
            "code": self.code,
            "error": type(self).__name__,
            "message": self.message,
            "title": self.case.title,
            "remedy": self.case.remedy,
            "help": self.case.anchor,
            "exit_code": self.exit_code,
        }


class UsageError(DiffCRError):
    """An argument or a setting is wrong."""

    exit_code = 2
    general_code = "DCR-U000"


class BudgetError(UsageError):
    """The budget cannot be reached.

    Attributes:
        smallest: the smallest reachable budget, a fraction of the dense model in (0, 1].
    """

    general_code = "DCR-U015"

    def __init__(self, message: str, smallest: float) -> None:
        super().__init__(message)
        self.smallest = smallest


class UnsupportedModelError(DiffCRError):
    """The model cannot be compiled."""

    exit_code = 3
    general_code = "DCR-M000"


class CaptureError(UnsupportedModelError):
    """torch.export could not capture the model."""

    general_code = "DCR-C000"


class TargetError(UnsupportedModelError):
    """A graph has what the device or runtime that it is meant for does not take."""

    general_code = "DCR-M003"


class EnvironmentMissingError(DiffCRError):
    """A package, a version or a device is missing."""

    exit_code = 4
    general_code = "DCR-E000"


class ResourceError(DiffCRError):
    """Memory or disk does not suffice."""

    exit_code = 5
    general_code = "DCR-R000"


class AccuracyError(DiffCRError):
    """A parity or quality gate was not met."""

    exit_code = 6
    general_code = "DCR-Q000"


class ArtifactError(DiffCRError):
    """An artifact is missing, changed, or of another version."""

    exit_code = 7
    general_code = "DCR-A000"


class PassError(DiffCRError):
    """A pass could not finish."""

    general_code = "DCR-P000"


class PreconditionError(PassError):
    """The program handed to a pass was not what the pass needs."""

    general_code = "DCR-P001"


class PostconditionError(PassError):
    """The program that a pass made was not what the pass promised."""

    general_code = "DCR-P002"


class VerificationError(DiffCRError):
    """A program breaks a rule of its stage."""

    general_code = "DCR-V000"


def plain_text(error: BaseException) -> str:
    """The message without code and help line, for an error that becomes part of another text."""
    return error.message if isinstance(error, DiffCRError) else str(error)


def one_line(error: BaseException, limit: int = 400) -> str:
    """Class and message of an error in one line, the message cut to `limit` characters."""
    return f"{type(error).__name__}: {' '.join(plain_text(error).split())[:limit]}"
