"""A calibration that does not end leaves the program as it found it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from diffcr_compile.calibrate.trained import routing_parameters
from diffcr_compile.program import Program


@contextlib.contextmanager
def as_it_was_if_it_fails(program: Program) -> Iterator[None]:
    """Whatever ends the context early: all tokens kept, evaluation mode, and the modules, weights and routers of before.

    A program that is half trained would be taken for the dense model by the next calibration, which asks it for answers.

    Args:
        program: ROUTED, all tokens kept.
    """
    module = program.module
    before = [*module.named_children(), *module.named_parameters(recurse=False)]
    routers = {n: p.detach().clone() for n, p in routing_parameters(program).items()}
    try:
        yield
    except BaseException:
        for name, part in before:
            setattr(module, name, part)
        with torch.no_grad():
            for name, parameter in routing_parameters(program).items():
                parameter.copy_(routers[name])
                parameter.grad = None
        for selector in module.selectors.values():
            selector.keep(selector.num_tokens)
        module.eval()
        raise
