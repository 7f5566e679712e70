"""What ONNX or ONNX Runtime lacks is said in other words, and says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.export.bfloat16 import compute_in_float32
from diffcr_compile.export.complex_numbers import has_complex_numbers, use_real_numbers
from diffcr_compile.export.constant_parts import work_out_constants
from diffcr_compile.export.empty_attention import drop_empty_attention
from diffcr_compile.export.logical_where import say_where_in_logic
from diffcr_compile.export.lower import lower_for_onnx
from diffcr_compile.export.parity import run_onnx
from diffcr_compile.export.small_constants import keep_small_constants
from diffcr_compile.runtime.complex_inputs import as_graph_input


class Computes(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        table = torch.polar(torch.ones(3, 4), torch.arange(12.0).reshape(3, 4))
        self.register_buffer("table", table)
        self.weight = nn.Parameter(
            torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
        )

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def exported(function: Callable[..., Any], *inputs: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(Computes(function), inputs, strict=False)


def complex_input(seed: int, *shape: int) -> Tensor:
    return torch.randn(
        *shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed)
    )


def in_onnx_runtime(program: torch.export.ExportedProgram, path: Path, *inputs: Tensor) -> Any:
    made = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    made.save(path)
    names = [value.name for value in made.model_proto.graph.input]
    return run_onnx(path, dict(zip(names, (t.numpy() for t in inputs), strict=True)))


as_real, cat = torch.view_as_real, torch.cat
ROWS = torch.tensor([2, 0])
# On x and y (3, 4) complex; the reference is torch's own complex arithmetic.
OPS: dict[str, Callable[..., Any]] = {
    "mul": lambda m, x, y: as_real(x * y * m.table),
    "mul by a number": lambda m, x, y: as_real(x * (2 - 3j)),
    "mul by a real tensor": lambda m, x, y: as_real(x * y.real[:1]),
    "add and sub": lambda m, x, y: as_real((x + y[:1]) - torch.mul(x, 2) + 1j),
    "add a multiple": lambda m, x, y: as_real(torch.add(x, y, alpha=2)),
    "sub from real": lambda m, x, y: as_real(y.real - x),
    "neg and conj": lambda m, x, y: as_real(-x * y.conj()),
    "real, imag, abs": lambda m, x, y: x.real + y.imag + (x * y).abs(),
    "angle": lambda m, x, y: (x * y).angle(),
    "div": lambda m, x, y: as_real(x / y),
    "div by a real tensor": lambda m, x, y: as_real(x / (y.real.abs() + 1)),
    "reciprocal": lambda m, x, y: as_real(1 / x + y.reciprocal()),
    "square": lambda m, x, y: as_real(x**2),
    "exp": lambda m, x, y: as_real(torch.exp(1j * x.real) + torch.exp(y)),
    "polar and complex": lambda m, x, y: as_real(
        torch.polar(x.real, y.imag) * torch.complex(x.imag, y.real)
    ),
    "matmul": lambda m, x, y: as_real(x @ y.mT),
    "view as complex": lambda m, x, y: as_real(
        torch.view_as_complex(x.real.reshape(3, 2, 2).contiguous()).repeat(1, 2) * y
    ),
    "shapes": lambda m, x, y: as_real(
        x.unsqueeze(-1).transpose(-1, 0).squeeze(0).flatten(0, -1).view(-1, 6).permute(-1, 0)
    ),
    "expand and movedim": lambda m, x, y: as_real(x[None].expand(2, -1, 4).movedim(-1, 0)),
    "cat and stack": lambda m, x, y: as_real(torch.stack([cat([x, y], -1), cat([y, x], 1)], -1)),
    "cat with real": lambda m, x, y: as_real(cat([x, y.real + 0j], -1)),
    "index": lambda m, x, y: as_real(m.table[ROWS] + x[ROWS, :] + y.index_select(-2, ROWS)),
    "gather": lambda m, x, y: as_real(torch.gather(x, -1, ROWS[None].expand(3, 2))),
    "slices": lambda m, x, y: as_real(x[..., 1:3] * y.narrow(-1, 0, 2) + x.select(-1, 0)[:, None]),
    "split and unbind": lambda m, x, y: as_real(x.chunk(2, -1)[1] + y.unbind(-1)[3][:, None]),
    "where": lambda m, x, y: as_real(torch.where(x.real > 0, x, y)),
    "masked fill": lambda m, x, y: as_real(x.masked_fill(y.real > 0, 1.5)),
    "sum and mean": lambda m, x, y: as_real(x.sum(-1) + y.mean(-1)),
    "flip and roll": lambda m, x, y: as_real(x.flip(-1) + y.roll(1, -1)),
    "other precision": lambda m, x, y: as_real((x.to(torch.complex128) * y).to(torch.complex64)),
    "new tensors": lambda m, x, y: as_real(torch.zeros_like(x) + torch.ones_like(y) * x),
    "write in place": lambda m, x, y: as_real(written(x, y)),
}  # fmt: skip


def written(x: Tensor, y: Tensor) -> Tensor:
    made = torch.zeros(3, 4, dtype=torch.complex64)
    made[1, :2] = x[0, :2]
    made[2] = y[1]
    return made


@pytest.mark.parametrize("name", OPS)
def test_complex_ops_say_the_same_in_real_numbers(name: str, tmp_path: Path) -> None:
    inputs = complex_input(1, 3, 4), complex_input(2, 3, 4)
    program = exported(OPS[name], *inputs)
    expected = Computes(OPS[name])(*inputs)
    real = lower_for_onnx(program)
    assert not has_complex_numbers(real)
    found = in_onnx_runtime(real, tmp_path / "m.onnx", *map(as_real, inputs))
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=2e-5, atol=2e-6)


def test_a_program_without_complex_numbers_is_left_as_it_is() -> None:
    program = torch.export.export(nn.Linear(4, 4), (torch.ones(2, 4),), strict=False)
    nodes = [node.format_node() for node in program.graph.nodes]
    assert use_real_numbers(program) is program
    assert [node.format_node() for node in lower_for_onnx(program).graph.nodes] == nodes


def test_use_real_numbers_leaves_the_given_program_alone() -> None:
    inputs = complex_input(1, 3, 4), complex_input(2, 3, 4)
    program = exported(OPS["mul"], *inputs)
    expected = program.module()(*inputs)
    assert not has_complex_numbers(use_real_numbers(program))
    assert torch.equal(program.module()(*inputs), expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x, "output 0 .* is complex"),
        (lambda m, x: x * 2, "output 0 .* is complex"),
        (
            lambda m, x: as_real(torch.linalg.inv(x)),
            "linalg_inv.* computes with complex numbers",
        ),
        (lambda m, x: as_real(x.sum()), "sum.default computes with complex"),
        (lambda m, x: as_real(x.roll(1)), "roll.default computes with complex"),
        (lambda m, x: torch.fft.ifft(x).real, "fft.* computes with complex numbers"),
    ],
)
def test_what_has_no_known_real_form_is_refused_by_name(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        use_real_numbers(exported(function, complex_input(1, 4, 4)))


def test_a_complex_array_becomes_pairs_and_a_real_one_stays() -> None:
    array = complex_input(3, 2, 3).numpy()
    found = as_graph_input(array)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, as_real(torch.from_numpy(array)).numpy())
    assert as_graph_input(found) is found


# ------------------------------------------------------------------- choosing truth values


def where_of_truth_values() -> onnx.ModelProto:
    names = {"c": [3, 1], "a": [1, 4], "b": [3, 4]}
    inputs = [helper.make_tensor_value_info(n, TensorProto.BOOL, s) for n, s in names.items()]
    output = helper.make_tensor_value_info("y", TensorProto.BOOL, [3, 4])
    graph = helper.make_graph(
        [helper.make_node("Where", ["c", "a", "b"], ["y"])], "g", inputs, [output]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_where_between_truth_values_becomes_logic_that_onnx_runtime_has(
    tmp_path: Path,
) -> None:
    model = where_of_truth_values()
    assert say_where_in_logic(model) == 1
    assert say_where_in_logic(model) == 0
    onnx.save(model, tmp_path / "m.onnx")
    random = np.random.default_rng(0)
    c, a, b = (random.random(s) < 0.5 for s in ((3, 1), (1, 4), (3, 4)))
    found = run_onnx(tmp_path / "m.onnx", {"c": c, "a": a, "b": b})[0]
    np.testing.assert_array_equal(found, np.where(c, a, b))


def test_where_between_numbers_stays() -> None:
    model = where_of_truth_values()
    for value in (*list(model.graph.input)[1:], *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    before = model.SerializeToString()
    assert say_where_in_logic(model) == 0
    assert model.SerializeToString() == before


# ------------------------------------------------------------- constants and empty attention


def test_a_decomposed_weight_is_worked_out_and_other_constants_stay(tmp_path: Path) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return x @ torch.linalg.qr(m.weight + 1e-8)[0] + x @ m.weight.mT

    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    program = exported(function, x)
    expected = program.module()(x).detach()
    assert work_out_constants(program) == 1
    assert work_out_constants(program) == 0
    targets = {str(node.target) for node in program.graph.nodes}
    assert not any("linalg" in target for target in targets)
    assert "aten.mT.default" in targets or any("transpose" in t for t in targets)
    found = in_onnx_runtime(lower_for_onnx(program), tmp_path / "m.onnx", x)
    np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-6)


def test_a_decomposition_that_depends_on_inputs_stays() -> None:
    program = exported(lambda m, x: torch.linalg.qr(x)[0], torch.randn(4, 4))
    assert work_out_constants(program) == 0


def test_attention_over_no_keys_is_zero_and_over_some_stays(tmp_path: Path) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        return x + attend(x, x[:, :, :0], x[:, :, :0]) + attend(x, x, x)

    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(2))
    program = exported(function, x)
    expected = program.module()(x)
    assert drop_empty_attention(program.graph) == 1
    assert drop_empty_attention(program.graph) == 0
    found = in_onnx_runtime(lower_for_onnx(program), tmp_path / "m.onnx", x)
    np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-6)


# ------------------------------------------------------------------------------ small constants


def test_a_tiny_addition_is_not_taken_for_zero(tmp_path: Path) -> None:
    """Without the pass the exporter makes 0 / 0 of it."""

    def divide(m: Computes, x: Tensor, y: Tensor) -> Tensor:
        return x / (y + 1e-15) + (x - 1e-9) * 1.00001

    x, y = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    program = exported(divide, x, y)
    with torch.no_grad():
        expected = program.module()(x, y)
    (found,) = in_onnx_runtime(lower_for_onnx(program), tmp_path / "small.onnx", x, y)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-6)
    (plain,) = in_onnx_runtime(exported(divide, x, y), tmp_path / "plain.onnx", x, y)
    assert np.isnan(plain).any()  # if not, the pass is no longer needed


def test_ordinary_numbers_and_scalars_stay_as_they_are() -> None:
    program = exported(lambda m, x: (x + 0.5) * 2.0 + (x.sum() + 1e-15), torch.ones(2))
    before = len(program.graph.nodes)
    assert keep_small_constants(program.graph) == 0
    assert len(program.graph.nodes) == before


def bfloat16_parts(module: Any, x: Tensor) -> Any:
    """Rotation, split, product and softmax in bfloat16, with float32 around them."""
    y = x.to(torch.bfloat16)
    left, right = y.chunk(2, dim=-1)
    turned = torch.cat([left * 1.25 - right, right.sin() + left], dim=-1)
    turned[..., 0] += 0.5  # an in-place write
    return (turned @ module.weight.to(torch.bfloat16)).softmax(-1).float(), turned.type_as(x)


def test_what_is_rounded_to_bfloat16_is_rounded_at_the_same_places() -> None:
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    program = exported(bfloat16_parts, x)
    lowered = compute_in_float32(program)
    for node in lowered.graph.nodes:
        values = [n.meta["val"] for n in node.all_input_nodes]
        reads = [v.dtype for v in values if isinstance(v, Tensor)]
        if torch.bfloat16 in reads:
            assert node.target is torch.ops.aten._to_copy.default
    expected, found = program.module()(x), lowered.module()(x)
    # One rounding of a number below 1 may go the other way, where a sum was made in another order.
    assert (expected[0] - found[0]).abs().max() <= 2**-8
    assert torch.equal(
        expected[1], found[1]
    )  # elementwise: PyTorch computes these in float32 too


def test_without_bfloat16_nothing_changes() -> None:
    program = exported(lambda module, x: x @ module.weight, torch.randn(3, 4))
    assert compute_in_float32(program) is program


def test_onnx_runtime_runs_what_was_bfloat16(tmp_path: Path) -> None:
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    made = torch.onnx.export(
        lower_for_onnx(exported(bfloat16_parts, x)),
        dynamo=True,
        opset_version=20,
        verbose=False,
    )
    assert made is not None
    onnx_file = tmp_path / "graph.onnx"
    onnx.save(made.model_proto, onnx_file)
    found = run_onnx(onnx_file, {made.model_proto.graph.input[0].name: x.numpy()})
    expected = bfloat16_parts(Computes(bfloat16_parts), x)
    for mine, theirs in zip(found, expected, strict=True):
        assert np.abs(mine - theirs.detach().numpy()).max() <= 2**-8  # see above
