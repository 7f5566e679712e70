"""Modules that hold what cannot be copied are copied all the same; everything else is copied as by deepcopy."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.config import make_config
from diffcr_compile.copied import copied
from tests import models
from tests.conftest import equal


def doubled(x: Tensor) -> Tensor:
    return 2 * x


class Holding(models.Block):
    """A block with a function of TorchScript, a lock and, as a cache, what autograd computed."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.doubled, self.lock = torch.jit.script(doubled), threading.Lock()
        self.cache = doubled(self.modulation.weight)  # has a history, which deepcopy refuses
        self.table = {"sizes": [1, 2]}

    def mix(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.doubled(x)


def test_what_cannot_be_copied_is_shared_and_the_rest_is_not() -> None:
    model = models.OwnDiT(Holding)
    other = copied(model)
    for mine, theirs in zip(model.blocks, other.blocks, strict=True):
        assert theirs.doubled is mine.doubled
        assert theirs.lock is mine.lock
        assert theirs.table == mine.table
        assert theirs.table is not mine.table
        assert torch.equal(theirs.cache, mine.cache)
        assert theirs.cache is not mine.cache
        assert not theirs.cache.requires_grad
        assert theirs.modulation.weight is not mine.modulation.weight
    assert equal(dict(other.state_dict()), dict(model.state_dict()))


def test_what_is_shared_stays_shared_between_copies() -> None:
    """Two modules with one weight, copied one after the other with the same memo, the first with a lock."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    first.lock = threading.Lock()
    memo: dict[int, Any] = {}
    a, b = copied(first, memo), copied(second, memo)
    assert a.weight is b.weight
    assert a.weight is not first.weight
    assert a.lock is first.lock


def test_many_copies_with_one_memo_do_not_take_each_others_places() -> None:
    """What is kept alive between copies stands under an id; it must be that of an object that lives as long."""
    memo: dict[int, Any] = {}
    for layer in [nn.Sequential(nn.Linear(2, 2), nn.GELU()) for _ in range(20)]:
        other = copied(layer, memo)
        assert equal(dict(other.state_dict()), dict(layer.state_dict()))
        assert list(other._modules) == ["0", "1"]
        keeping = [
            key
            for key, value in memo.items()
            if isinstance(value, list) and any(one is layer for one in value)
        ]
        assert keeping == [id(memo)]


def test_a_way_back_to_the_parent_leads_to_the_copied_parent() -> None:
    parent = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for child in parent:
        child.lock, child.parent = threading.Lock(), [parent]  # in a list: no submodule
    other = copied(parent)
    assert all(child.parent[0] is other for child in other)
    assert [a.lock is b.lock for a, b in zip(parent, other, strict=True)] == [True, True]


def test_what_stands_in_the_place_of_a_weight_does_so_beside_a_lock() -> None:
    layer, given = nn.Linear(3, 3), nn.Parameter(torch.zeros(3, 3))
    layer.lock = threading.Lock()
    assert copied(layer, {id(layer.weight): given}).weight is given


def test_a_module_that_refuses_to_be_copied_is_an_error() -> None:
    class Single(nn.Linear):
        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            raise TypeError("there is only one of me")

    with pytest.raises(TypeError, match="only one"):
        copied(nn.Sequential(Single(2, 2)))


def test_a_model_that_holds_such_things_is_compiled() -> None:
    model, inputs = models.OwnDiT(Holding).eval(), models.inputs_for()
    with torch.no_grad():
        dense = model(**inputs)
    before = copied(model).state_dict()
    config = make_config(
        {
            "routing": {"multiple_of": 4, "buckets": 2, "timestep_high": 1.0},
            "rollouts": {"trajectories": 2, "steps": 2},
            "calibration": {"steps": 4, "batch": 2},
        }
    )
    routed = dcr.route(model, inputs, config.routing)
    with torch.no_grad():
        assert torch.equal(routed(**inputs), dense)
    schedule = dcr.calibrate(routed, budget="80%", config=config).schedule
    assert len(dcr.freeze(routed, schedule=schedule)) == 2
    with torch.no_grad():  # all weights of a copy were trained
        assert torch.equal(model(**inputs), dense)
    assert equal(dict(before), dict(model.state_dict()))
    trained = dict(routed.program.module.named_parameters())
    assert any(not torch.equal(trained[name], w) for name, w in model.named_parameters())
