"""What every pass is held to: passes that lie, break or forget are caught and named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import pytest

from diffcr_compile.errors import PassError, PostconditionError
from diffcr_compile.passes.base import Pass, PassResult, run_passes
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from diffcr_compile.program import Program, Stage
from tests.conftest import Case


@dataclasses.dataclass(frozen=True)
class Liar(Pass):
    name: ClassVar[str] = "liar"
    edits: int
    copies: bool

    def run(self, program: Program) -> PassResult:
        made = program.with_graph(program.copy_graph()) if self.copies else program
        return PassResult(made, self.edits)


@dataclasses.dataclass(frozen=True)
class Breaker(Pass):
    name: ClassVar[str] = "breaker"

    def run(self, program: Program) -> PassResult:
        raise KeyError("blocks.0")


@dataclasses.dataclass(frozen=True)
class Forgetful(InsertTokenRouters):
    """Promises routers and inserts none."""

    name: ClassVar[str] = "forgetful"

    def run(self, program: Program) -> PassResult:
        return PassResult(program.with_graph(program.copy_graph(), stage=Stage.ROUTED), 1)


def test_a_pass_that_lies_about_its_edits_is_caught(cases: Callable[..., Case]) -> None:
    program = cases("plain").captured
    with pytest.raises(PassError, match="liar: returned 0 edits but a new program"):
        Liar(edits=0, copies=True)(program)
    with pytest.raises(PassError, match="liar: returned 2 edits but the same program"):
        run_passes(program, [Liar(edits=2, copies=False)])
    assert Liar(edits=0, copies=False)(program).program is program
    assert Liar(edits=1, copies=True)(program).program is not program


def test_a_pass_that_breaks_is_named_with_what_ran_before(cases: Callable[..., Case]) -> None:
    program = cases("plain").captured
    with pytest.raises(PassError, match=r"breaker failed after \['insert-token-routers'\]"):
        run_passes(program, [InsertTokenRouters(), Breaker()])


def test_a_pass_that_does_not_keep_its_promise_is_caught(cases: Callable[..., Case]) -> None:
    with pytest.raises(
        PostconditionError, match=r"forgetful: no router was inserted for \['blocks.0'"
    ):
        Forgetful()(cases("plain").captured)
