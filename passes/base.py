"""What a pass is, and how passes run."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from diffcr_compile.errors import DiffCRError, PassError
from diffcr_compile.program import Program
from diffcr_compile.verify import KnownCalls, verify


@dataclasses.dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass returns.

    Attributes:
        program: a new program, or the very same object if nothing changed.
        edits: how many graph edits were made; 0 means "nothing to do".
    """

    program: Program
    edits: int


@dataclasses.dataclass(frozen=True)
class Pass(abc.ABC):
    """One program-to-program step. Options are fields; there is no other state.

    Calling a pass checks `requires`, runs `run`, then checks `ensures` and the rules of the
    program's stage. A pass never changes the program it was given.
    """

    name: ClassVar[str]

    def requires(self, program: Program) -> None:
        """Raise PreconditionError if `program` is not what this pass needs."""

    @abc.abstractmethod
    def run(self, program: Program) -> PassResult:
        """Do the work on a copy of the graph."""

    def ensures(self, program: Program) -> None:
        """Raise PostconditionError if `program` is not what this pass promises."""

    def __call__(self, program: Program, known: KnownCalls | None = None) -> PassResult:
        self.requires(program)
        result = self.run(program)
        if (result.program is program) != (result.edits == 0):
            raise PassError(
                f"{self.name}: returned {result.edits} edits but "
                f"{'the same' if result.program is program else 'a new'} program"
            )
        self.ensures(result.program)
        verify(result.program, known)
        return result


def run_passes(program: Program, passes: Sequence[Pass]) -> Program:
    """Run `passes` in the order given; the order is the pipeline."""
    known: KnownCalls = {}
    for index, pass_ in enumerate(passes):
        try:
            result = pass_(program, known)
        except DiffCRError:
            raise
        except Exception as error:
            before = [p.name for p in passes[:index]]
            raise PassError(f"{pass_.name} failed after {before}: {error}") from error
        program = result.program
        if result.edits:
            line = f"{pass_.name}: {result.edits} edits"
            program = dataclasses.replace(program, history=(*program.history, line)).attached()
    return program
