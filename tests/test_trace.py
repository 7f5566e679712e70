"""Models that torch.export cannot trace are recorded on real tensors, and checked on other inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.errors import CaptureError, UsageError
from tests.conftest import equal
from tests.model_parts import Block, OwnDiT, inputs_for


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
    """Reads the noisy sample as a Python number, through numpy."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * float(x.abs().max().numpy())


class HiddenDiT(OwnDiT):
    """Reads the noisy sample in a way that no recorder sees."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * float(np.from_dlpack(x.abs().max()[None])[0])  # type: ignore[arg-type]


class WeightDiT(OwnDiT):
    """Reads a weight as a Python number: training would not reach it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * self.head.weight.abs().max().item()


class TextDiT(OwnDiT):
    """Takes the text tokens that a mask says, as many as the longest prompt of the batch has."""

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, kind: Tensor
    ) -> Tensor:  # type: ignore[override]
        longest = int(mask.sum(1).max().item())
        text, mask = text[:, :longest], mask[:, :longest]
        chosen = text[mask.bool()]
        written = torch.zeros_like(text)
        written[mask.bool()] = chosen * 2 + kind.float().mean()
        mean = written.sum(1) / mask.sum(1, keepdim=True)
        return super().forward(x + mean[:, :, None, None], t)


class ListDiT(TextDiT):
    """Reads the mask with tolist and repeats rows as often as it says."""

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor, kind: Tensor
    ) -> Tensor:  # type: ignore[override]
        lengths = [sum(row) for row in mask.tolist()]
        repeats = torch.tensor([1, 2]) if lengths[0] < 4 else torch.tensor([2, 1])
        text = text[:, :2].repeat_interleave(repeats, dim=1)
        return OwnDiT.forward(self, x + text.sum(1)[:, :, None, None], t + kind.float().mean())


def text_inputs(mask: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, mask.shape[1], 2, generator=generator)
    return {**inputs_for(), "text": text, "mask": mask, "kind": torch.tensor([1, 2])}


class DataDiT(OwnDiT):
    """Fills a table through ``.data``, of which tracers lose sight."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        table = x.new_zeros(1, 2, 6, 6)
        table.data[:, :, 2:].copy_(torch.ones(1, 2, 4, 6))
        return super().forward(x * table, t)


class CounterDiT(NumpyDiT):
    """Writes to a constant in place, which must begin afresh at every call."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        total = torch.tensor([1.0, 2.0])
        total += t
        return super().forward(x * total[:, None, None, None], t)


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
        (SampleDiT, "needs the values of x for"),
        (HiddenDiT, "on unseen inputs the captured graph differs"),
        (WeightDiT, r"needs the values of head\.weight"),
    ],
)
def test_a_number_that_is_read_from_the_inputs_is_never_baked_in(
    kind: type[OwnDiT], message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        dcr.route(kind().eval(), inputs_for())


RAGGED = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
FULL = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])


@pytest.mark.parametrize("kind", [TextDiT, ListDiT])
@pytest.mark.parametrize("mask", [RAGGED, FULL])
def test_an_input_that_decides_sizes_is_fixed_to_its_values(
    kind: type[OwnDiT], mask: Tensor
) -> None:
    model, inputs = kind().eval(), text_inputs(mask)
    routed = dcr.route(model, inputs)
    program = routed.program
    assert list(program.fixed_inputs) == ["mask"]
    assert list(program.example) == ["x", "t", "text", "kind"]
    assert "forward reads the values of mask: fixed" in program.history[0]
    noise = torch.Generator().manual_seed(5)
    other = {
        **inputs,
        "x": torch.randn(2, 2, 6, 6, generator=noise),
        "t": torch.tensor([0.9, 0.1]),
        "text": torch.randn(2, 5, 2, generator=noise),
        "kind": torch.tensor([5, 0]),
        "mask": mask.clone(),
    }
    for call in (inputs, other):
        assert equal(routed(**call), model(**call))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (FULL, "its values are others"),
        (RAGGED.float(), r"expected torch\.int64 of shape \(2, 5\), found torch\.float32"),
        (RAGGED[:, :4], r"found torch\.int64 of shape \(2, 4\)"),
        (None, "found None"),
    ],
)
def test_another_value_of_a_fixed_input_is_refused(wrong: Any, words: str) -> None:
    model, inputs = TextDiT().eval(), text_inputs(RAGGED)
    routed = dcr.route(model, inputs)
    with pytest.raises(UsageError, match=f"mask is not the tensor .*{words}"):
        routed(**{**inputs, "mask": wrong})


def test_a_fixed_input_does_not_change_with_the_users_tensor() -> None:
    model, inputs = TextDiT().eval(), text_inputs(RAGGED.clone())
    routed = dcr.route(model, inputs)
    inputs["mask"].fill_(1)
    with pytest.raises(UsageError, match="its values are others"):
        routed(**inputs)


def test_fractions_and_the_sample_are_never_fixed() -> None:
    model, inputs = TextDiT().eval(), text_inputs(RAGGED)
    inputs["mask"] = inputs["mask"] * 0.5
    with pytest.raises(CaptureError, match="needs the values of mask for"):
        dcr.route(model, inputs)


def test_a_frozen_model_with_a_fixed_input_goes_through_onnx(tmp_path: Any) -> None:
    model, inputs = TextDiT().eval(), text_inputs(RAGGED)
    frozen = dcr.freeze(dcr.route(model, inputs), keep_ratio=0.5)
    runner = dcr.export(frozen, tmp_path / "out").load()
    arrays = {name: value.numpy() for name, value in inputs.items()}
    with pytest.raises(UsageError, match="mask"):
        runner(**arrays)
    del arrays["mask"]
    with torch.no_grad():
        expected = frozen[0](**inputs)
    # fp32 rounding of another order of sums
    torch.testing.assert_close(
        torch.from_numpy(runner(**arrays)), expected, rtol=1e-4, atol=1e-5
    )


def test_writes_through_data_are_seen() -> None:
    model, inputs = DataDiT().eval(), inputs_for()
    routed = dcr.route(model, inputs)
    assert routed.program.dynamic_batch
    assert equal(routed(**inputs), model(**inputs))


def test_a_constant_that_is_written_to_begins_afresh() -> None:
    model, inputs = CounterDiT().eval(), inputs_for()
    routed = dcr.route(model, inputs)
    assert "recorded" in routed.program.history[0]
    for _ in range(3):
        assert equal(routed(**inputs), model(**inputs))


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


class PassingBlock(Block):
    """Reads positions and hands them through."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.table = nn.Embedding(16, 16)

    def forward(self, x: Tensor, condition: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x + self.table(ids), condition), ids


class PassingDiT(OwnDiT):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        area = int(torch.tensor([x.shape[2], x.shape[3]]).numpy().prod())
        tokens, condition = self.embed(x, t)
        ids = torch.arange(area).expand(len(x), -1)
        for block in self.blocks:
            tokens, ids = block(tokens, condition, ids)
        return self.image(tokens)


def test_what_a_block_hands_through_stays_what_it_was() -> None:
    """A routed block returns it cut, and the next one needs it whole."""
    model, inputs = PassingDiT(block=PassingBlock, side=4).eval(), inputs_for(4)
    routed = dcr.route(model, inputs)
    assert "recorded" in routed.program.history[0]
    assert len(routed.program.blocks) == 2
    assert equal(routed(**inputs), model(**inputs))
    frozen = dcr.freeze(routed, keep_ratio=0.5)[0]
    assert frozen(**inputs).shape == model(**inputs).shape
