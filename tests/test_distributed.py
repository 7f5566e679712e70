"""Several processes that calibrate together: equal to one, and one that is killed is not waited for."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcr_compile.calibrate.data import TeacherStates
from diffcr_compile.calibrate.distributed import Ranks, _in_buckets, bit_sum, joined_ranks
from diffcr_compile.calibrate.loop import run_calibration
from diffcr_compile.calibrate.sharding import _shardable, _Watched
from diffcr_compile.calibrate.shards import made_in_shards
from diffcr_compile.config import CalibrationConfig
from diffcr_compile.errors import ArtifactError, UsageError
from diffcr_compile.macs import measure_costs
from diffcr_compile.resumable import workspace_of
from diffcr_compile.schedule import TimestepBuckets
from diffcr_compile.tensor_file import write_tensors
from tests import rank_worker
from tests.conftest import Case

DIES_AT = 13
# Sums over a batch are taken in another order: fp32 rounding, over 50 steps of training on it. The
# losses themselves are about 3e-4, so the relative tolerance is the sharp one.
CLOSE, RELATIVELY_CLOSE = 1e-4, 1e-3


# What the settings of the first and of the second launch change. Sharded weights are whole in the state: a run goes
# on with or without.
LAUNCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole": ({}, {}),
    "sharded only at first": ({"shard": True}, {}),
    "sharded only at last": (
        {"optimizer": "muon", "estimator": "two_bin"},
        {
            "optimizer": "muon",
            "estimator": "two_bin",
            "shard": True,
            "checkpointing": True,
        },
    ),
}


def launch(
    folder: Path, meeting: str, changes: dict[str, Any], dies_at: int = 0
) -> list[subprocess.Popen[bytes]]:
    """Both ranks; `dies_at` is the step after which rank 1 kills itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.rank_worker", str(rank), "2", str(folder), meeting,
             str(dies_at if rank == 1 else 0), json.dumps(changes)],
            env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip


@dataclasses.dataclass
class Runs:
    """Two launches in one folder: rank 1 of the first is killed, the second goes on."""

    changes: tuple[dict[str, Any], dict[str, Any]]
    folder: Path
    first: list[int]
    seconds_after_the_kill: float
    second: list[int]
    single: dict[str, Any]

    def of(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name).read_text())


@pytest.fixture(scope="module", params=LAUNCHES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("ranks")
    first_changes, second_changes = LAUNCHES[request.param]
    leader, killed = launch(folder, "meeting_1", first_changes, DIES_AT)
    first_killed = killed.wait(timeout=300)
    died = time.monotonic()
    first = [leader.wait(timeout=120), first_killed]
    seconds = time.monotonic() - died
    again = launch(folder, "meeting_2", second_changes)
    routed, result = rank_worker.calibrate(None, {**second_changes, "shard": False})
    single = {
        "losses": [record["loss"] for record in result.history],
        "schedule": result.schedule.to_json(),
        "sum": sum(float(p.detach().double().abs().sum()) for p in routed.parameters()),
    }
    second = [process.wait(timeout=300) for process in again]
    return Runs(LAUNCHES[request.param], folder, first, seconds, second, single)


def test_a_killed_rank_ends_the_run_with_a_clear_error_in_time(runs: Runs) -> None:
    assert runs.first == [4, -signal.SIGKILL]
    assert (
        runs.seconds_after_the_kill < 60
    )  # the connection is closed: no waiting for a time-out
    error = runs.of("error_0.json")
    assert error["code"] == "DCR-E010"
    assert "does not answer" in error["message"]
    # with a rank its share is gone, and the last regular state is the one to go on from
    is_saved = f"The state after step {DIES_AT} is in" in error["message"]
    assert is_saved != runs.changes[0].get("shard", False)


def test_two_ranks_learn_what_one_process_learns(runs: Runs) -> None:
    """Over all steps, the killed ones and those of the resumed run."""
    assert runs.second == [0, 0]
    one, two = runs.of("result_0.json"), runs.of("result_1.json")
    held = one.pop("held"), two.pop("held")
    assert one == two  # every rank has the same weights, losses and schedule
    if runs.changes[1].get("shard"):  # embeddings, head and routers are whole on both
        assert max(held) < 0.65 * rank_worker.numbers_in_all(runs.changes[1])
        assert min(held) > 0.4 * rank_worker.numbers_in_all(runs.changes[1])
    else:
        assert held == (rank_worker.numbers_in_all(runs.changes[1]),) * 2
    assert len(one["losses"]) == rank_worker.STEPS
    differences = [
        abs(a - b) for a, b in zip(one["losses"], runs.single["losses"], strict=True)
    ]
    assert max(differences) < CLOSE
    assert max(differences) > 0  # sums in another order: the work was shared indeed
    assert one["schedule"] == runs.single["schedule"]
    assert one["sum"] == pytest.approx(runs.single["sum"], rel=1e-4)
    losses = one["losses"]
    assert sum(losses[-10:]) < sum(losses[30:40])  # and it learns


# ------------------------------------------------------------------------- without processes


class Pretended(Ranks):
    """A rank whose others are only pretended."""

    def total(self, value: float) -> float:
        return value * self.count


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [3, 4, 24])
def test_shares_are_the_batch_and_their_weighted_means_are_its_mean(
    count: int, batch: int
) -> None:
    rows = torch.randperm(100)[:batch]
    shares = [Ranks(rank, count).share(rows) for rank in range(count)]
    assert sorted(torch.cat([mine for mine, _ in shares]).tolist()) == sorted(rows.tolist())
    mean = sum(weight * mine.double().mean() for mine, weight in shares)
    assert float(mean) == pytest.approx(rows.double().mean().item())


def test_each_rank_makes_its_own_shards_and_reads_the_others(tmp_path: Path) -> None:
    for number in (0, 2, 4):  # rank 0's
        path = tmp_path / f"rollouts_{number:04d}.safetensors"
        write_tensors(path, {"n": torch.tensor([number])})
    made: list[int] = []

    def shard(number: int) -> dict[str, torch.Tensor]:
        made.append(number)
        return {"n": torch.tensor([number])}

    found = made_in_shards(5, shard, tmp_path, ranks=Pretended(1, 2))
    assert [int(s["n"]) for s in found] == [0, 1, 2, 3, 4]
    assert made == [1, 3]


def test_a_folder_that_is_not_common_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="in common") as caught:
        made_in_shards(2, lambda n: {"n": torch.tensor([n])}, tmp_path, ranks=Pretended(0, 2))
    assert caught.value.code == "DCR-U071"


def test_a_damaged_shard_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rollouts_0000.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match="rollouts_0000"):
        made_in_shards(1, lambda n: {}, tmp_path)


def test_gradients_are_sent_in_buckets_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffcr_compile.calibrate.distributed.BUCKET_BYTES", 100)
    tensors = [
        torch.zeros(10),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(20),
        torch.zeros(5),
    ]
    parts = list(_in_buckets(tensors))
    assert [[len(t) for t in part] for part in parts] == [[10, 20], [5], [3]]


def test_more_ranks_than_states_in_a_step_are_refused(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    inputs = {"x": torch.zeros(8, 2, 6, 6), "t": torch.linspace(0.1, 0.9, 8)}
    states = TeacherStates(inputs, torch.zeros(8, 2, 6, 6), inputs["t"])
    costs = measure_costs(case.routed, 4, 0.25)
    buckets = TimestepBuckets.even(2, 0.0, 1.0)
    config = CalibrationConfig(batch=4)
    with pytest.raises(UsageError, match="at most 4") as caught:
        run_calibration(
            case.routed, states, config, costs, buckets, 0.7, ranks=Pretended(0, 5)
        )
    assert caught.value.code == "DCR-U074"


def test_only_rank_0_works_in_the_output_folder(tmp_path: Path) -> None:
    with (
        workspace_of(tmp_path / "out", Ranks()) as first,
        workspace_of(tmp_path / "out", Pretended(1, 2)) as second,
    ):
        assert first.folder == tmp_path / "out"
        with second.stage("capture", "key"):
            pass
        assert not first.records
    assert not second.folder.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_one_bit_tells_tensors_apart_and_order_does_not(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 50).to(dtype)
    other = tensor.clone()
    other.view(torch.uint8)[7] ^= 1
    assert bit_sum(tensor) != bit_sum(other)
    assert bit_sum(tensor) == bit_sum(tensor.flip(0)) == bit_sum(tensor[::1].contiguous())


def test_ranks_that_start_from_different_things_are_refused(runs: Runs) -> None:
    for rank in range(2):
        assert runs.of(f"different_{rank}.json")["code"] == "DCR-U070"
        assert "of rank 1 differ" in runs.of(f"different_{rank}.json")["message"]


def test_sharding_needs_processes_and_trained_weights(cases: Callable[..., Case]) -> None:
    case = cases("plain")
    inputs = {"x": torch.zeros(8, 2, 6, 6), "t": torch.linspace(0.1, 0.9, 8)}
    states = TeacherStates(inputs, torch.zeros(8, 2, 6, 6), inputs["t"])
    costs = measure_costs(case.routed, 4, 0.25)
    buckets = TimestepBuckets.even(2, 0.0, 1.0)
    config = CalibrationConfig(batch=4, shard=True)
    weights = {n: p.detach().clone() for n, p in case.routed.module.named_parameters()}
    with pytest.raises(UsageError, match="under torchrun") as caught:
        run_calibration(case.routed, states, config, costs, buckets, 0.7)
    assert caught.value.code == "DCR-U079"
    for name, parameter in case.routed.module.named_parameters():
        assert torch.equal(parameter, weights[name])
    with pytest.raises(ValueError, match="train: lora"):
        CalibrationConfig(train="lora", shard=True)


def test_blocks_whose_weights_are_used_elsewhere_stay_whole(
    cases: Callable[..., Case],
) -> None:
    program = cases("plain").routed
    first, second = (program.module.get_submodule(spec.name) for spec in program.blocks)
    own = first.mlp
    try:
        assert _shardable(program) == ["blocks.0", "blocks.1"]
        first.mlp = second.mlp
        with pytest.raises(UsageError, match="used by other modules") as caught:
            _shardable(program)
        assert caught.value.code == "DCR-U079"
    finally:
        first.mlp = own


def test_a_block_that_writes_to_its_weights_is_not_sharded() -> None:
    class KeptNormalised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():
                self.weight.data.div_(self.weight.norm())
            return super().forward(x)

    block = KeptNormalised(3, 3)
    _Watched("blocks.7", block)
    with torch.no_grad():
        block(torch.ones(3))
    with pytest.raises(UsageError, match=r"blocks\.7 writes to its own weights") as caught:
        block(torch.ones(3))
    assert caught.value.code == "DCR-U079"
    plain = nn.Linear(3, 3)
    _Watched("blocks.7", plain)
    assert torch.equal(plain(torch.ones(3)), plain(torch.ones(3)))


def test_one_process_is_a_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with joined_ranks(1.0) as ranks:
        assert (ranks.rank, ranks.count) == (0, 1)
        assert ranks.total(0.1) == 0.1
        ranks.wait_for_leader()
