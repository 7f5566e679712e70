"""The benchmark over the zoo: its slow reference, its record of failures, its table."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.supported_models import one_model, processes, reference, settings, table
from benchmarks.supported_models.record import Record, first_line
from diffcr_compile import routing
from diffcr_compile.blocks import BlockSpec, TokenAxis
from diffcr_compile.errors import UnsupportedModelError
from diffcr_compile.passes.base import run_passes
from diffcr_compile.passes.insert_token_routers import InsertTokenRouters
from tests import models
from tests.conftest import Case
from tests.model_parts import Block, Conv1dBlock, TemporalBlock

N, WIDTH = 8, 16


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def record(tmp_path: Path) -> Record:
    made = Record(tmp_path / "entry.json", {"sizes": []})
    made.begin(0)
    return made


def halved(case: Case) -> nn.Module:
    """A FROZEN graph of its own with half the tokens; its weights may not be changed."""
    return case.frozen({s.name: s.num_tokens // 2 for s in case.routed.blocks}).module


def runs_of(case: Case) -> list[tuple[str, dict[str, Any], Any]]:
    given = (("example", case.inputs), ("other seed", reference.other_inputs(case.inputs)))
    return [(label, inputs, case.model(**inputs)) for label, inputs in given]


def parity(record: Record, case: Case, frozen: nn.Module, routed: Any = None) -> bool:
    routed = routed or case.routed.module
    one_model._check_parity(record, case.model, routed, frozen, runs_of(case))
    return record.size["passed"]["parity"]


# ------------------------------------------------------------------------------- the reference


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "masked", "joint", "nested"])
def test_frozen_agrees_with_the_reference(
    name: str, cases: Callable[..., Case], record: Record
) -> None:
    case = cases(name)
    assert parity(record, case, halved(case)), record.size["failures"]
    assert not any(block._forward_hooks for block in case.model.modules())


def test_a_router_that_differs_a_little_makes_parity_fail(
    cases: Callable[..., Case], record: Record
) -> None:
    case = cases("dit")
    routers = copy.deepcopy(case.routed.module.routers)
    last = routers[case.names[-1]].score.weight
    last += 0.1 * last.std() * models.randn(*last.shape, seed=5)
    wrong = types.SimpleNamespace(program=case.routed, routers=routers)
    assert not parity(record, case, halved(case), wrong)
    assert "error" in record.size["failures"][0]["error"]


def one_other_token(logits: Tensor, kept_tokens: int, shares_index: bool) -> Tensor:
    """The selection, but the last sample's worst kept token is the next one in the ranking."""
    index = routing.select_tokens(logits, kept_tokens, shares_index).clone()
    index[-1, -1] = logits[-1].topk(kept_tokens + 1).indices[-1]
    return index


def one_row_not_written(
    stream: Tensor, index: Tensor, kept: Tensor, processed: Tensor, *rest: Any
) -> Tensor:
    """The scatter, but one kept token of the first sample leaves the block as it came."""
    result = routing.scatter_tokens(stream, index, kept, processed, *rest).clone()
    result[0, index[0, 0]] = stream[0, index[0, 0]]
    return result


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (routing.select_tokens, one_other_token),
        (routing.scatter_tokens, one_row_not_written),
    ],
)
def test_one_wrong_row_in_the_last_block_makes_parity_fail(
    right: Any, wrong: Any, cases: Callable[..., Case], record: Record
) -> None:
    case = cases("dit")
    frozen: Any = halved(case)
    list(frozen.graph.find_nodes(op="call_function", target=right))[-1].target = wrong
    frozen.recompile()
    assert not parity(record, case, frozen)


def test_a_reference_that_drops_nothing_proves_nothing(
    cases: Callable[..., Case], record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_model, "KEEP_RATIO", 1.0)
    case = cases("dit")
    whole = case.frozen({s.name: s.num_tokens for s in case.routed.blocks}).module
    assert not parity(record, case, whole)
    assert re.search(r"changes (0\.0e\+00|\d\.\de-07),", record.size["failures"][0]["error"])


def test_equal_scores_are_drawn_anew(cases: Callable[..., Case], record: Record) -> None:
    case = cases("dit")
    routed = run_passes(case.captured, [InsertTokenRouters(seed=3)])
    for router in routed.module.routers.values():
        router.score.weight.zero_()  # topk may take any token, the reference takes the first
    tied = dataclasses.replace(case, routed=routed)
    frozen: Any = halved(tied)
    select = list(frozen.graph.find_nodes(op="call_function", target=routing.select_tokens))
    select[0].target = last_of_equals
    frozen.recompile()
    assert parity(record, tied, frozen), record.size["failures"]
    assert all(weight.any() for weight in tied.router_weights().values())


def last_of_equals(logits: Tensor, kept_tokens: int, shares_index: bool) -> Tensor:
    flipped = routing.select_tokens(logits.flip(1), kept_tokens, shares_index)
    return logits.shape[1] - 1 - flipped


def spec_of(name: str = "0") -> BlockSpec:
    stream = TokenAxis((0, 0), 1)
    return BlockSpec(name, stream, (), (), N, WIDTH, False, True, 0.0)


def block_call(block: nn.Module) -> Any:
    return (models.randn(2, N, WIDTH), models.randn(2, WIDTH, seed=1)), {}


def test_the_reference_is_what_the_block_makes_of_each_samples_best_tokens() -> None:
    block, weight = Block(WIDTH), models.randn(WIDTH, seed=2)
    (x, condition), _ = tree = block_call(block)
    found, distance = reference.slow_block(
        block.forward, tree, block(x, condition), spec_of(), weight, 3
    )
    assert distance > 0
    for sample in range(2):
        best = (x[sample] @ weight).argsort()[-3:]
        alone = block(x[sample : sample + 1, best], condition[sample : sample + 1])[0]
        torch.testing.assert_close(found[sample, best], alone)
        others = [token for token in range(N) if token not in best.tolist()]
        assert torch.equal(found[sample, others], x[sample, others])


def test_a_block_that_needs_the_whole_batch_is_run_on_it() -> None:
    block, weight = Block(WIDTH), models.randn(WIDTH, seed=2)
    tree = block_call(block)
    dense = block(*tree[0])

    def pair(x: Tensor, condition: Tensor) -> Tensor:
        if len(x) != 2:
            raise ValueError("two samples, please")
        return block(x, condition)

    alone, _ = reference.slow_block(block.forward, tree, dense, spec_of(), weight, 3)
    together, _ = reference.slow_block(pair, tree, dense, spec_of(), weight, 3)
    torch.testing.assert_close(together, alone)


def test_a_block_that_nothing_reproduces_is_an_error_that_says_both_reasons() -> None:
    block = Block(WIDTH)
    tree = block_call(block)

    def grid(x: Tensor, condition: Tensor) -> Tensor:
        return block(x.reshape(2, N, WIDTH), condition)

    with pytest.raises(RuntimeError, match=r"sample_by_sample.*batch_at_once"):
        reference.slow_block(grid, tree, block(*tree[0]), spec_of(), models.randn(WIDTH), 3)


def test_text_tokens_and_tables_are_cut_where_the_roles_say() -> None:
    spec = BlockSpec(
        "0", TokenAxis((0, "x"), 1, 2), (), (TokenAxis((1, "table"), 0, 3),), 4, 1, False, True, 0
    )  # fmt: skip
    x = torch.arange(7.0)[None, :, None].repeat(2, 1, 1)
    tree = ({"x": x}, {"table": 10 * torch.arange(7.0)})
    kept = torch.tensor([[3, 0], [1, 2]])
    seen: list[Tensor] = []

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["table"])
        return torch.zeros(1)

    reference.sample_by_sample(lambda *a, **k: forward(**k), tree, spec, kept)
    reference.batch_at_once(lambda *a, **k: forward(**k), tree, spec, kept)
    expected = torch.tensor([[0, 10, 20, 60, 30], [0, 10, 20, 40, 50]]).float()
    assert torch.equal(seen[0], expected[0])
    assert torch.equal(seen[1], expected[1])
    assert torch.equal(seen[2], expected)
    rows = reference.rows_of(kept[0], 2, 4, 7)
    assert rows.tolist() == [0, 1, 5, 2, 6]


@pytest.mark.parametrize(
    ("block", "legal"), [(Block, True), (Conv1dBlock, False), (TemporalBlock, False)]
)
def test_the_permutation_check_tells_legal_blocks_from_others(
    block: type[Block], legal: bool
) -> None:
    model = Nested(block(WIDTH, zero_gates=True))
    inputs = {"x": models.randn(2, N, WIDTH), "t": models.randn(2, WIDTH, seed=1)}
    error = reference.permutation_errors(model, inputs, [spec_of("block")])["block"]
    assert (error < 1e-10) if legal else (error > 0.1)


class Nested(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.block(x, t)


def test_other_inputs_leave_masks_and_ids_and_exchange_timesteps() -> None:
    given = {
        "x": models.randn(2, 3, 4),
        "mask": torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        "ids": torch.arange(6.0).reshape(2, 3),
        "t": torch.tensor([0.3, 0.7]),
        "labels": torch.tensor([1, 5]),
        "nested": [models.randn(3, 4), None],
    }
    found = reference.other_inputs(given)
    assert not (found["x"] == given["x"]).any()
    assert not (found["nested"][0] == given["nested"][0]).any()
    assert torch.equal(found["mask"], given["mask"])
    assert torch.equal(found["ids"], given["ids"])
    assert found["t"].tolist() == given["t"].flip(0).tolist()
    assert found["labels"].tolist() == [5, 1]


def test_a_model_that_ignores_its_inputs_or_is_random_is_no_example() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor, noise: float) -> Tensor:
            return torch.ones(2) + noise * torch.rand(2)

    inputs = {"x": models.randn(2, 3)}
    with pytest.raises(ValueError, match="same dense output"):
        one_model._dense_runs(Odd(), {**inputs, "noise": 0.0})
    with pytest.raises(ValueError, match="called again"):
        one_model._dense_runs(Odd(), {**inputs, "noise": 1.0})


def test_not_a_number_is_far_from_everything() -> None:
    nan = torch.tensor([float("nan")])
    assert reference.relative([nan], [nan]) == float("inf")
    with pytest.raises(ValueError, match="shapes"):
        reference.relative([torch.ones(2)], [torch.ones(3)])


# ---------------------------------------------------------------------------------- the record


def test_a_step_that_raises_is_recorded_without_folders_and_ends_nothing(
    record: Record,
) -> None:
    folder = "/some/where/deep"
    with record.step("onnx"):
        record.require("onnx", True, "")
        raise ValueError(f"cannot read {folder}/graph.py:\nsecond line")
    written = json.loads(record.path.read_text())
    assert written["running"] is None
    error = "ValueError: cannot read graph.py:"
    assert written["sizes"][0]["failures"] == [{"step": "onnx", "error": error}]
    assert not table.holds({"sizes": [record.size] * 2}, "onnx")


def test_a_step_is_on_disk_while_it_runs(record: Record) -> None:
    with record.step("rtx"):
        assert json.loads(record.path.read_text())["running"] == "rtx"


def test_a_step_that_failed_once_does_not_pass_later(record: Record) -> None:
    record.require("onnx", False, "too far")
    record.require("onnx", True, "")
    assert record.size["passed"] == {"onnx": False}


def test_an_error_of_the_package_keeps_its_reason() -> None:
    error = UnsupportedModelError("no block of X can be routed.\n  blocks.0: a reason")
    assert first_line(error).endswith("can be routed. blocks.0: a reason")


@pytest.mark.parametrize("end", ["crash", "endless", "hang", "no start"])
def test_a_process_that_dies_leaves_its_step_as_the_reason(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(command: list[str], timeout: int, **_: Any) -> Any:
        assert command[:3] == [sys.executable, "-m", "benchmarks.supported_models"]
        if end != "no start":
            began = {**entry_of("A", ()), "running": "rtx", "finished": False}
            began["sizes"] = began["sizes"][:1]
            (tmp_path / "A.json").write_text(json.dumps(began))
        if end == "hang":
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=-24 if end == "endless" else -11)

    monkeypatch.setattr(processes.subprocess, "run", dies)
    args = argparse.Namespace(work=tmp_path, skip_rtx=False, jobs=1, limit=7)
    model = types.SimpleNamespace(kind="image", refused=None)
    entry = processes.run_in_process("A", model, args)
    failure = entry["sizes"][-1]["failures"][-1]
    assert failure["step"] == ("start" if end == "no start" else "rtx")
    errors = {
        "hang": "not finished after 70 s",
        "endless": "not finished after 7 s of processor time",
    }
    assert failure["error"] == errors.get(end, "its process ended with -11")
    assert table.verdict(entry) == "failed"
    assert processes.finished(tmp_path / "A.json", skip_rtx=True) is None
    assert json.loads((tmp_path / "A.json").read_text()) == entry


def test_resume_keeps_a_finished_entry_that_has_all_steps(tmp_path: Path) -> None:
    path = tmp_path / "A.json"
    path.write_text(json.dumps({**entry_of("A"), "rtx": False}))
    assert processes.finished(path, skip_rtx=True) is not None
    assert processes.finished(path, skip_rtx=False) is None


def test_a_file_missing_from_the_zoo_is_an_error_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import tests.zoo

    monkeypatch.setattr(tests.zoo, "_FILES", ("no_such_file",))
    with pytest.raises(SystemExit, match=r"no_such_file\.py.*No module named"):
        processes.load_models(partial=False)
    _, problems = processes.load_models(partial=True)
    assert len(problems) == 1


def test_a_refused_model_goes_through_the_steps_it_can(tmp_path: Path) -> None:
    model = types.SimpleNamespace(
        name="conv", kind="handwritten", refused="mixes tokens",
        build=lambda size: models.convolution_throughout(),
    )  # fmt: skip
    entry = one_model.run_model(model, tmp_path / "conv.json", skip_rtx=True)
    assert table.verdict(entry) == "refused"
    assert table.holds(entry, "captured")
    assert not table.holds(entry, "routed")
    assert [len(size["not_routed"]) for size in entry["sizes"]] == [2, 2]
    assert table.verdict({**entry, "refused": "other words"}) == "wrong"


def test_a_model_goes_through_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # engines are built in test_rtx_build.py
    monkeypatch.setattr(one_model, "_rtx_engine", lambda data: data[:10])
    model = types.SimpleNamespace(
        name="masked", kind="handwritten", refused=None, build=lambda size: models.masked()
    )
    entry = one_model.run_model(model, tmp_path / "masked.json", skip_rtx=False)
    assert [f for size in entry["sizes"] for f in size["failures"]] == []
    assert table.verdict(entry) == "supported"
    assert table.verdict({**entry, "refused": "anything"}) == "wrong"
    assert json.loads((tmp_path / "masked.json").read_text()) == entry
    for size in entry["sizes"]:
        assert size["passed"] == dict.fromkeys(settings.STEPS, True)
        assert size["parity"]["example"]["error"] < 1e-5 < size["parity"]["example"]["effect"]


# ----------------------------------------------------------------------------------- the table


def entry_of(
    name: str,
    passed: tuple[str, ...] = settings.STEPS,
    kind: str = "image",
    refused: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """An entry as a run leaves it; both sizes alike."""
    size: dict[str, Any] = {
        "passed": {step: step in passed for step in settings.STEPS},
        "failures": [], "seconds": {}, "candidates": 3, "units": ["a", "b"],
        "not_routed": {"c": "it mixes | tokens [0](1) by position 0.5"},
        "parity": {"example": {"error": 2e-7}, "other seed": {"error": 3e-7}},
        "onnx": {"example": 4e-7, "other seed": 1e-7},
        "permutation": {"checked": 2, "worst": 1e-15}, **more,
    }  # fmt: skip
    return {
        "name": name, "kind": kind, "refused": refused, "code": "c0de", "rtx": True,
        "running": None, "finished": True,
        "sizes": [{"size": number, **copy.deepcopy(size)} for number in (0, 1)],
    }  # fmt: skip


def report_of(*entries: dict[str, Any]) -> str:
    report = {"date": "2025-01-01", "environment": {"torch": "1"}, "models": list(entries)}
    return table.markdown(json.loads(json.dumps(report)))


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_table_has_the_figures_of_a_supported_model() -> None:
    cells = row(report_of(entry_of("A")), "A")
    assert cells[:9] == [
        "A",
        "image",
        "yes",
        "2 of 3",
        "yes",
        "3e-07",
        "4e-07",
        "yes",
        "supported",
    ]
    assert cells[9] == r"1 not routed: it mixes \| tokens \[0\](1) by position 0.5"


def test_a_failure_outside_of_the_counted_steps_is_no_support() -> None:
    entry = entry_of("A")
    entry["sizes"][0]["failures"] = [{"step": "inspect", "error": "it raised"}]
    assert row(report_of(entry), "A")[8] == "failed"


def test_a_step_counts_only_if_both_sizes_pass() -> None:
    entry = entry_of("A")
    entry["sizes"][1]["passed"]["onnx"] = False
    entry["sizes"][1]["failures"] = [{"step": "onnx", "error": "relative error 0.2"}]
    cells = row(report_of(entry), "A")
    assert cells[6] == "size 0 only"
    assert cells[8] == "failed"
    assert cells[9].startswith("onnx: relative error 0.2; ")
    entry["sizes"] = entry["sizes"][:1]
    assert not table.holds(entry, "captured")


def test_the_same_reason_of_sizes_and_steps_stands_once() -> None:
    entry = entry_of("A", ("captured",), failures=[{"step": "routed", "error": "12 tokens"}])
    entry["sizes"][1]["failures"] = [
        {"step": "routed", "error": "24 tokens"},
        {"step": "onnx", "error": "24 tokens"},
    ]
    assert row(report_of(entry), "A")[9].startswith("routed, onnx: 12 tokens; 1 not routed: ")


def test_percentages_are_of_the_classes_of_diffusers() -> None:
    entries = [entry_of("A"), entry_of("B", ("captured",), kind="video")]
    own = [entry_of("C", (), kind="handwritten"), entry_of("D", kind="handwritten")]
    text = report_of(*entries, *own, entry_of("E", kind="handwritten"))
    summary = table.summarise(entries)
    assert summary["captured"] == {"models": 2, "percent": 100.0}
    assert summary["parity"] == {"models": 1, "percent": 50.0}
    assert summary["verdicts"] == {"failed": 1, "supported": 1}
    assert summary["permutation_checks"] == 8
    diffusers, handwritten = text.split("## ")[1:]
    assert "| parity at keep ratio 0.5 | 1 | 50.0 % |" in diffusers
    assert "| parity at keep ratio 0.5 | 2 | 66.7 % |" in handwritten
    assert row(diffusers, "A")
    assert row(handwritten, "C")
    assert "| C |" not in diffusers


def test_a_refusal_must_have_the_words_of_the_zoo() -> None:
    refused = entry_of("A", ("captured",), refused="MIXES", units=[], refusal="no block")
    assert table.verdict(refused) == "refused"
    assert table.verdict({**refused, "refused": "no image"}) == "wrong"
    assert table.verdict(entry_of("A", refused="mixes")) == "wrong"  # whole blocks are routed
    parts = entry_of("A", refused="mixes", units=["c.ff"])
    assert table.verdict(parts) == "supported"
    assert table.verdict({**parts, "refused": "no image"}) == "wrong"
    del refused["sizes"][1]["refusal"]
    assert table.verdict(refused) == "wrong"  # something else stopped it


def test_a_table_of_several_versions_of_the_code_says_so() -> None:
    other = {**entry_of("B"), "code": "other"}
    assert "different versions of the code" in report_of(entry_of("A"), other)
    assert "different versions of the code" not in report_of(entry_of("A"), entry_of("B"))


def test_engines_that_were_not_built_are_no_failure_and_no_success() -> None:
    entry = {**entry_of("A", tuple(s for s in settings.STEPS if s != "rtx")), "rtx": False}
    text = report_of(entry)
    assert row(text, "A")[7:9] == ["not run", "supported"]
    assert table.TITLES["rtx"] not in text


def test_the_environment_names_kinds_and_versions_only() -> None:
    found = processes.environment(rtx=False)
    assert set(found) == {"python", *processes.VERSIONS, "CPU", "cores"}
    assert not any("/" in value for value in found.values())
