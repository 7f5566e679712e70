"""Models that torch.export cannot trace are recorded on real tensors, and checked on other inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import diffcr_compile as dcr
from diffcr_compile.errors import CaptureError
from tests.conftest import equal
from tests.model_parts import OwnDiT, inputs_for


class NumpyDiT(OwnDiT):
    """Reads a constant and a shape through numpy, which torch.export refuses."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        sizes = torch.tensor([x.shape[2], x.shape[3]])
        area = int(sizes.numpy().prod())
        tokens, condition = self.embed(x, t)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return self.image(tokens * (area / self.num_tokens))


class MaskDiT(OwnDiT):
    """Picks rows by a mask: their number depends on the data, though not on this model's inputs."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens, condition = self.embed(x, t)
        keep = torch.ones(self.num_tokens, dtype=torch.bool)
        rows = keep.nonzero().flatten()
        if len(rows) != self.num_tokens:
            raise AssertionError
        for block in self.blocks:
            tokens = block(tokens[:, rows], condition)
        return self.image(tokens)


class ScaleDiT(OwnDiT):
    """Reads the timestep as a Python number: recorded, it would be the example's for ever."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * (1 + float(t.max().item()))


class SampleDiT(OwnDiT):
    """Reads the noisy sample as a Python number."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * float(x.abs().max().numpy())


@pytest.mark.parametrize("kind", [NumpyDiT, MaskDiT])
def test_what_does_not_depend_on_the_inputs_is_recorded(kind: type[OwnDiT]) -> None:
    model, inputs = kind().eval(), inputs_for()
    routed = dcr.route(model, inputs)
    assert "recorded on real tensors" in routed.program.history[0]
    assert [spec.name for spec in routed.program.blocks] == ["blocks.0", "blocks.1"]
    assert equal(routed(**inputs), model(**inputs))
    other = {"x": torch.randn(2, 2, 6, 6), "t": torch.tensor([0.9, 0.1])}
    assert equal(routed(**other), model(**other))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (ScaleDiT, "reads a number from its inputs"),
        (SampleDiT, "on unseen inputs the captured graph differs"),
    ],
)
def test_a_number_that_is_read_from_the_inputs_is_never_baked_in(
    kind: type[OwnDiT], message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        dcr.route(kind().eval(), inputs_for())


def test_recorded_weights_are_the_users_own() -> None:
    model, inputs = NumpyDiT().eval(), inputs_for()
    routed = dcr.route(model, inputs)
    mine = {p.data_ptr() for p in model.parameters()}
    found = {p.data_ptr() for n, p in routed.named_parameters() if "select" not in n}
    assert found == mine
    with torch.no_grad():
        model.head.weight.add_(1.0)
    assert equal(routed(**inputs), model(**inputs))


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = NumpyDiT().eval(), inputs_for()
    before = model(**inputs)
    dcr.route(model, inputs)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert equal(model(**inputs), before)


def test_a_frozen_recorded_model_goes_through_onnx(tmp_path: Any) -> None:
    model, inputs = NumpyDiT().eval(), inputs_for()
    frozen = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)
    artifact = dcr.export(frozen, tmp_path / "out")
    found = artifact.load()(**{name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        expected = frozen[0](**inputs)
    # fp32 rounding of another order of sums
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
