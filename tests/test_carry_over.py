"""One calibration, several resolutions: what was learned at one size runs at another."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.budgets import cost_table
from diffcr_compile.carry_over import carry_over, read_learned
from diffcr_compile.config import make_config
from diffcr_compile.errors import BudgetError, UsageError
from diffcr_compile.manifest import read_manifest, sha256_file
from diffcr_compile.schedule import TokenSchedule
from tests import pipelines
from tests.test_cli import run

SMALL = {
    "routing": {"buckets": 2, "multiple_of": 4, "timestep_high": 1},
    "rollouts": {"trajectories": 4, "steps": 4},
    "calibration": {"steps": 6, "batch": 2},
    "export": {"profiles": False},
}
GRIDS = {"small": 8, "large": 12}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.norm1(x) + time[:, None]
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class AnyGrid(nn.Module):
    """Takes pictures of any even size: positions are computed from where a token is."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.patch, self.out = nn.Conv2d(1, width, 2, 2), nn.ConvTranspose2d(width, 1, 2, 2)
        self.place, self.time = nn.Linear(2, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        grid = self.patch(sample)
        rows, columns = grid.shape[2:]
        at = torch.cartesian_prod(torch.linspace(0, 1, rows), torch.linspace(0, 1, columns))
        x = grid.flatten(2).transpose(1, 2) + self.place(at)
        time = self.time(timestep[:, None])
        for block in self.blocks:
            x = block(x, time)
        return self.out(x.transpose(1, 2).unflatten(2, (rows, columns)))


def example(size: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    side = 2 * GRIDS[size]
    return {
        "sample": torch.randn(2, 1, side, side, generator=generator),
        "timestep": torch.tensor([0.4, 0.4]),
    }


def model() -> AnyGrid:
    torch.manual_seed(0)
    return AnyGrid().eval()


def small() -> Any:
    return model(), example("small")


def large() -> Any:
    return model(), example("large")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated at the small size."""
    out = tmp_path_factory.mktemp("first") / "out"
    config = make_config(SMALL)
    dcr.compile(model(), out, example_inputs=example("small"), budget=0.7, config=config)
    return out


@pytest.fixture(scope="module")
def second(first: Path) -> Path:
    """The same at the large size; settings that say nothing about the routing."""
    out = first.parent / "second"
    config = make_config({"rollouts": SMALL["rollouts"], "export": SMALL["export"]})
    dcr.compile(
        model(), out, example_inputs=example("large"), learned_from=first, config=config
    )
    return out


def test_routers_weights_and_shares_are_those_that_were_learned(
    first: Path, second: Path
) -> None:
    learned, carried = (load_file(out / "model/routed.safetensors") for out in (first, second))
    assert learned.keys() == carried.keys()
    assert all(torch.equal(learned[name], carried[name]) for name in learned)
    here, there = read_manifest(second), read_manifest(first)
    assert [b["high"] for b in here.buckets] == [b["high"] for b in there.buckets]
    assert here.budget["asked"] == there.budget["asked"] == 0.7
    assert 0.69 <= here.budget["reached"] <= 0.7
    for block, kept in here.schedule.items():
        assert here.num_tokens[block] == 144
        # attention weighs more at the larger size, so the same budget keeps somewhat other shares
        for a, b in zip(kept, there.schedule[block], strict=True):
            assert abs(a / 144 - b / 64) < 0.15


def test_the_graphs_are_the_trained_model_at_the_new_size(second: Path) -> None:
    """Against routing by hand: the trained weights in the user's own code, tokens picked by an explicit sort."""
    manifest = read_manifest(second)
    learned = load_file(second / "model/routed.safetensors")
    trained = model()
    own = {n: t for n, t in learned.items() if "_select.router." not in n}
    assert own.keys() == dict(trained.named_parameters()).keys()
    trained.load_state_dict(own)
    inputs = example("large")
    found = dcr.load(second)(**{name: t.numpy() for name, t in inputs.items()})
    bucket = next(b["index"] for b in manifest.buckets if b["high"] >= 0.4)
    with torch.no_grad():
        x = trained.patch(inputs["sample"]).flatten(2).transpose(1, 2)
        line = torch.linspace(0, 1, 12)
        x = x + trained.place(torch.cartesian_prod(line, line))
        time = trained.time(inputs["timestep"][:, None])
        for number, block in enumerate(trained.blocks):
            kept = manifest.schedule[f"blocks.{number}"][bucket]
            weight = next(
                t for n, t in learned.items() if f"blocks_{number}_select.router" in n
            )
            after = x.clone()
            for sample in range(len(x)):
                scores = (x[sample] @ weight[0]).tolist()
                best = sorted(range(144), key=lambda i: -scores[i])[:kept]
                if best:
                    after[sample, best] = block(
                        x[sample : sample + 1, best], time[sample : sample + 1]
                    )[0]
            x = after
        expected = trained.out(x.transpose(1, 2).unflatten(2, (12, 12)))
    # sums in another order; a wrong token would be off by 0.1 and more
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=1e-4)


def test_the_report_says_where_it_was_learned(first: Path, second: Path) -> None:
    page = (second / "report/report.html").read_text(encoding="utf-8")
    assert f"taken from <code>{first}</code>" in page
    assert "taken from <code>" not in (first / "report/report.html").read_text(
        encoding="utf-8"
    )


def test_the_same_call_again_changes_nothing(first: Path, second: Path) -> None:
    before = {p: sha256_file(p) for p in second.rglob("onnx/*")}
    created = read_manifest(second).created
    config = make_config({"rollouts": SMALL["rollouts"], "export": SMALL["export"]})
    dcr.compile(
        model(), second, example_inputs=example("large"), learned_from=first, config=config
    )
    assert {p: sha256_file(p) for p in second.rglob("onnx/*")} == before
    assert read_manifest(second).created == created


def test_what_does_not_fit_is_refused(first: Path, tmp_path: Path) -> None:
    other = AnyGrid(
        depth=2
    ).eval()  # not only other weights: all of them come from the artifact
    call = {"example_inputs": example("large"), "learned_from": first}
    with pytest.raises(UsageError, match="not compiled from this AnyGrid") as caught:
        dcr.compile(other, tmp_path / "a", **call)
    assert caught.value.code == "DCR-U051"
    with pytest.raises(UsageError, match=r"routing.buckets is 3 here and 2 there") as caught:
        dcr.compile(
            model(), tmp_path / "b", config=make_config({"routing": {"buckets": 3}}), **call
        )
    assert caught.value.code == "DCR-U057"
    with pytest.raises(BudgetError):
        dcr.compile(model(), tmp_path / "c", budget="1%", **call)


def test_blocks_that_only_one_size_can_route_are_named(first: Path, tmp_path: Path) -> None:
    schedule = json.loads((first / "model/schedule.json").read_text())
    assert set(schedule["kept_tokens"]) == {"blocks.0", "blocks.1", "blocks.2"}
    learned = read_learned(first)
    fewer = make_config({"routing": {"exclude": ["blocks.2"]}}).routing
    routed = dcr.route(model(), example("large"), fewer).program
    costs = cost_table(routed, learned.routing)
    with pytest.raises(UsageError, match=r"blocks\.2") as caught:
        carry_over(
            learned, model(), routed, costs, 0.7, None, tmp_path / "weights.safetensors"
        )
    assert caught.value.code == "DCR-U057"
    assert not (tmp_path / "weights.safetensors").exists()


class Shifted(dcr.FlowEuler):
    """More of its steps where there is much noise."""

    def __init__(self, steps: int, shift: float) -> None:
        super().__init__(steps, 1.0)
        self.timesteps = [shift * t / (1 + (shift - 1) * t) for t in self.timesteps]


def test_the_budget_is_one_over_the_steps_of_this_sampling(
    first: Path, tmp_path: Path
) -> None:
    """A larger picture is sampled with a more shifted schedule; the artifact's buckets are then met otherwise."""
    call = {"example_inputs": example("large"), "learned_from": first, "until": "freeze"}
    sampler = Shifted(8, 3.0)
    dcr.compile(model(), tmp_path / "out", sampler=sampler, **call)
    schedule = TokenSchedule.from_json(
        json.loads((tmp_path / "out/model/schedule.json").read_text())
    )
    high = sum(t > schedule.buckets.edges[1] for t in sampler.timesteps) / 8
    assert high > 0.5
    assert schedule.buckets.weights == (1 - high, high)
    routed = dcr.route(model(), example("large"), read_learned(first).routing).program
    costs = cost_table(routed, read_learned(first).routing)
    by_hand = costs.outer + sum(
        weight * costs.per_level[block][costs.levels[block].index(kept)]
        for block, column in schedule.kept_tokens.items()
        for weight, kept in zip((1 - high, high), column, strict=True)
    )
    assert schedule.reached == pytest.approx(by_hand / costs.dense)
    assert by_hand <= 0.7 * costs.dense
    with pytest.raises(UsageError, match="no sampling step has a timestep in") as caught:
        dcr.compile(model(), tmp_path / "few", sampler=Shifted(2, 9.0), **call)
    assert caught.value.code == "DCR-U073"


def test_on_the_command_line(
    first: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    arguments = [
        "compile", "python:tests.test_carry_over:large", "-o", str(tmp_path / "out"),
        "--learned-from", str(first), "--set", "export.profiles=false",
    ]  # fmt: skip
    assert run(monkeypatch, *arguments, "--dry-run") == 0
    assert f"budget that of {first}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run(monkeypatch, *arguments) == 0
    assert "learned_from" in (tmp_path / "out/effective_config.yaml").read_text()
    assert read_manifest(tmp_path / "out").budget["asked"] == 0.7
    assert run(monkeypatch, "export", str(tmp_path / "out")) == 0  # goes on from the settings


def test_a_pipeline_runs_at_every_size_that_was_built(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe, inputs = pipelines.pixart()
    pipe.set_progress_bar_config(disable=True)
    call = {**inputs, "guidance_scale": 1.0, "num_inference_steps": 2}
    folders = []
    for side in (32, 48):
        sized = {**call, "height": side, "width": side}
        routed = dcr.route(pipe, pipeline_inputs=sized)
        folders.append(tmp_path / str(side))
        dcr.export(dcr.freeze(routed, keep_ratio=0.5), folders[-1], profiles=False)
    together = dcr.DiffusersTransformer.from_artifacts(folders)
    assert together.config.sample_size == pipe.transformer.config.sample_size

    def image(transformer: Any, side: int) -> Any:
        mine = copy.copy(pipe)
        mine.scheduler = copy.deepcopy(pipe.scheduler)
        mine.transformer = transformer
        sized = {**call, "height": side, "width": side, "output_type": "np"}
        with torch.no_grad():
            return np.asarray(mine(**sized, generator=torch.Generator().manual_seed(1)).images)

    for folder, side in zip(folders, (32, 48), strict=True):
        alone = dcr.DiffusersTransformer.from_artifact(folder)
        assert np.array_equal(image(together, side), image(alone, side))
    with pytest.raises(UsageError, match="Built were") as caught:
        image(together, 64)
    assert caught.value.code == "DCR-U021"
    assert caught.value.message.count("samples of") == 2
