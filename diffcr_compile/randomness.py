"""Models that draw random numbers or remember earlier calls: no graph of them is a function of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.recorded import fresh, output_tensors

NOT_ONE_FUNCTION = (
    "the model itself, called twice with the same inputs, gives two outputs. Either it draws random numbers in forward "
    "(draw them outside and pass them as an input), or it remembers earlier calls, such as a cache that counts steps "
    "(switch it off)"
)


def draws(ops: Iterable[str]) -> bool:
    """Whether one of these ATen ops, such as ``aten.randn_like.default``, draws random numbers.

    Attention does not: it only could, with dropout.
    """
    for op in ops:
        found: Any = torch.ops
        for part in op.split("."):
            found = getattr(found, part, None)
        seeded = torch.Tag.nondeterministic_seeded in getattr(found, "tags", ())
        if seeded and "attention" not in op:
            return True
    return False


@torch.no_grad()
def differs_from_itself(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether two calls of the model with the same inputs give two outputs."""
    with kept_caches(model):
        runs = []
        for _ in range(2):
            given_args, given_kwargs = fresh((args, dict(kwargs)))
            runs.append(list(output_tensors(model(*given_args, **given_kwargs))))
    one, two = runs
    return len(one) != len(two) or any(
        not torch.equal(a, b) for a, b in zip(one, two, strict=True)
    )
