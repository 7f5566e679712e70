"""What runs without data leave in a model's own caches: nothing, wherever the model keeps them."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import diffcr_compile as dcr
from diffcr_compile.kept_caches import kept_caches
from tests.conftest import equal
from tests.model_parts import Block, OwnDiT, inputs_for

Scale = Callable[[Block, int], Tensor]
GLOBAL_TABLE: dict[int, Tensor] = {}


def make(tokens: int) -> Tensor:
    return torch.full((1, 1, 1), math.log(tokens))


def in_attributes(block: Block, tokens: int) -> Tensor:
    """Two attributes that belong together."""
    if getattr(block, "tokens", None) != tokens:
        block.tokens, block.scale = tokens, make(tokens)
    return block.scale


def in_a_dict(block: Block, tokens: int) -> Tensor:
    table = block.__dict__.setdefault("table", {})
    if tokens not in table:
        table[tokens] = make(tokens)
    return table[tokens]


class Helper:
    """An object of the model's that is no module."""

    def __init__(self) -> None:
        self.table: dict[int, Tensor] = {}


def in_a_helper(block: Block, tokens: int) -> Tensor:
    helper = block.__dict__.setdefault("helper", Helper())
    if tokens not in helper.table:
        helper.table[tokens] = make(tokens)
    return helper.table[tokens]


def in_a_global_dict(_: Block, tokens: int) -> Tensor:
    if tokens not in GLOBAL_TABLE:
        GLOBAL_TABLE[tokens] = make(tokens)
    return GLOBAL_TABLE[tokens]


@functools.lru_cache
def _limited(tokens: int) -> Tensor:
    return make(tokens)


@functools.cache
def _unlimited(tokens: int) -> tuple[Tensor, Tensor]:
    return make(tokens), make(tokens)


def in_lru_cache(_: Block, tokens: int) -> Tensor:
    return _limited(tokens)


def in_a_cache_of_pairs(_: Block, tokens: int) -> Tensor:
    return _unlimited(tokens)[0]


class CachingBlock(Block):
    """Scales by the logarithm of the number of tokens, worked out once."""

    def __init__(self, scale: Scale, **options: int) -> None:
        super().__init__(**options)
        self.of = scale

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * self.of(self, x.shape[1]), condition)


CACHES = [
    in_attributes,
    in_a_dict,
    in_a_helper,
    in_a_global_dict,
    in_lru_cache,
    in_a_cache_of_pairs,
]


@pytest.fixture(params=CACHES, ids=lambda scale: scale.__name__)
def model(request: pytest.FixtureRequest) -> OwnDiT:
    _limited.cache_clear()
    _unlimited.cache_clear()
    GLOBAL_TABLE.clear()
    return OwnDiT(block=functools.partial(CachingBlock, request.param), depth=1).eval()


def test_a_model_that_was_inspected_computes_on_real_numbers(model: OwnDiT) -> None:
    plan = dcr.inspect(model, inputs_for())
    assert plan.error is None
    assert plan.note is None
    with torch.no_grad():
        assert type(model(**inputs_for())) is Tensor


def test_a_cache_that_is_new_beside_classes_that_were_looked_at_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where a cell of a notebook is run again, or a helper makes its cache at its first call."""
    model = OwnDiT(block=functools.partial(CachingBlock, in_lru_cache), depth=1).eval()
    dcr.inspect(model, inputs_for())
    monkeypatch.setattr(sys.modules[__name__], "_limited", functools.lru_cache(make))
    assert dcr.inspect(model, inputs_for()).error is None
    assert _limited.cache_info().currsize == 0  # emptied, as there was a fake tensor in it
    with torch.no_grad():
        assert type(model(**inputs_for())) is Tensor


def test_a_cache_without_foreign_tensors_keeps_what_it_holds() -> None:
    _limited.cache_clear()
    model = OwnDiT(block=functools.partial(CachingBlock, in_lru_cache), depth=1).eval()
    with torch.no_grad():
        model(**inputs_for())
        held = _limited.cache_info().currsize
        with kept_caches(model):
            model(**inputs_for())
    assert _limited.cache_info().currsize == held > 0


def test_a_frozen_graph_computes_on_real_numbers(model: OwnDiT, tmp_path: Path) -> None:
    inputs = inputs_for()
    routed = dcr.route(model, inputs)
    frozen = dcr.freeze(routed, keep_ratio=0.5)
    with torch.no_grad():
        found = frozen[0](**inputs)
        assert not isinstance(found, FakeTensor)
        assert equal(routed(**inputs), model(**inputs))
    dcr.export(frozen, tmp_path / "out")
    with torch.no_grad():
        assert equal(frozen[0](**inputs), found)
