"""torch.compile over FROZEN graphs, and the backend that applies an artifact's schedule."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import register_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import diffcr_compile as dcr
from diffcr_compile.dynamo_backend import diffcr
from tests import models
from tests.conftest import flat

STEPS = 50
EDGES = (0.0, 0.41, 1.0)  # of the range of timesteps; no step lies on one


class Built(NamedTuple):
    model: nn.Module
    inputs: dict[str, Any]
    frozen: tuple[nn.Module, ...]
    folder: Path
    high: float


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    made: dict[str, Built] = {}

    def get(name: str) -> Built:
        if name not in made:
            model, inputs = models.DIFFUSERS[name]()
            high = 1.0 if name == "flux" else 1000.0
            routed = dcr.route(model, inputs)
            specs = routed.program.blocks
            schedule = dcr.TokenSchedule(
                {s.name: (s.num_tokens // 4, s.num_tokens // 2) for s in specs},
                {s.name: s.num_tokens for s in specs},
                dcr.TimestepBuckets(tuple(e * high for e in EDGES), (0.4, 0.6)),
            )
            frozen = dcr.freeze(routed, schedule=schedule)
            folder = tmp_path_factory.mktemp(name)
            dcr.export(frozen, folder)
            made[name] = Built(model, inputs, frozen, folder, high)
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _dynamo() -> Iterator[None]:
    """A fresh Dynamo; the backend is registered as the installed package registers it."""
    torch._dynamo.reset()
    counters.clear()
    if "diffcr" not in torch._dynamo.list_backends(exclude_tags=()):
        register_backend(diffcr, name="diffcr")  # an environment from before the entry point
    yield
    torch._dynamo.reset()


def steps(case: Built) -> Iterator[dict[str, Any]]:
    """The calls of a 50-step run, from the highest timestep down."""
    for step in range(STEPS):
        value = case.high * (1 - step / STEPS)
        given = case.inputs["timestep"]
        timestep = torch.full_like(given, value if given.is_floating_point() else round(value))
        generator = torch.Generator().manual_seed(step)
        sample = torch.randn(case.inputs["hidden_states"].shape, generator=generator)
        yield {**case.inputs, "timestep": timestep, "hidden_states": sample}


def bucket_of(case: Built, call: dict[str, Any]) -> int:
    return int(float(call["timestep"][0]) > EDGES[1] * case.high)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_frozen_graphs_compile_once_per_bucket_without_a_break(
    name: str, built: Callable[[str], Built]
) -> None:
    case = built(name)
    compiled = [torch.compile(graph, backend="eager", fullgraph=True) for graph in case.frozen]
    visits = [0, 0]
    with torch.no_grad():
        for call in steps(case):
            bucket = bucket_of(case, call)
            visits[bucket] += 1
            found = flat(compiled[bucket](**call))[0]
            if visits[bucket] in (1, 2, 20):
                assert torch.equal(found, flat(case.frozen[bucket](**call))[0])
    assert visits == [20, 30]
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 2  # one compilation per bucket
    assert dict(counters["recompiles"]) == {}


def test_the_backend_applies_the_artifacts_schedule(built: Callable[[str], Built]) -> None:
    case = built("pixart")
    inner = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        case.model, backend="diffcr", options={"artifact": str(case.folder), "inner": inner}
    )
    with torch.no_grad():
        for number, call in enumerate(steps(case)):
            found = flat(compiled(**call))[0]
            if number in (0, 1, 29, 30, 49):
                expected = flat(case.frozen[bucket_of(case, call)](**call))[0]
                # another order of sums in fused kernels
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                assert (found - flat(case.model(**call))[0]).abs().max() > 1e-3
    assert inner.frame_count == 2  # one per bucket, not per step
    assert dict(counters["graph_break"]) == {}
    assert counters["stats"]["unique_graphs"] == 1


def test_the_output_keeps_the_models_own_class(built: Callable[[str], Built]) -> None:
    case = built("dit")
    compiled = torch.compile(
        case.model, backend="diffcr", options={"artifact": case.folder, "inner": "eager"}
    )
    with torch.no_grad():
        call = next(steps(case))
        assert type(compiled(**call)) is type(case.model(**call))


def refused(
    case: Built, words: str, options: Any, call: Any = None, model: Any = None
) -> None:
    compiled = torch.compile(model or case.model, backend="diffcr", options=options)
    with pytest.raises(BackendCompilerFailed, match=words), torch.no_grad():
        compiled(**(call or next(steps(case))))
    torch._dynamo.reset()


def test_what_the_backend_cannot_do_is_refused(built: Callable[[str], Built]) -> None:
    case = built("dit")
    good = {"artifact": case.folder, "inner": "eager"}
    refused(case, r"DCR-U053.*options=\['artefact'\]", {"artefact": "out/"})
    small = {**next(steps(case)), "hidden_states": torch.zeros(1, 1, 16, 16)}
    small = {k: v[:1] if isinstance(v, Tensor) else v for k, v in small.items()}
    refused(case, r"DCR-U021.*shape \(1, 1, 16, 16\)", good, small)
    compiled = torch.compile(case.model, backend="diffcr", options=good)
    with pytest.raises(BackendCompilerFailed, match="inference"):
        compiled(**next(steps(case)))


class Broken(nn.Module):
    """Prints in the middle, which Dynamo cannot trace."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        doubled = {k: v * 1.0 if k == "hidden_states" else v for k, v in inputs.items()}
        torch._dynamo.graph_break()
        return self.model(**doubled)


def test_a_trace_in_pieces_is_refused(built: Callable[[str], Built]) -> None:
    case = built("dit")
    options = {"artifact": case.folder, "inner": "eager"}
    refused(case, r"DCR-U053.*breaks", options, model=Broken(case.model))


def test_the_package_registers_the_backend() -> None:
    import tests.test_house as house

    declared = house._load_pyproject()["project"]["entry-points"]["torch_dynamo_backends"]
    point = importlib.metadata.EntryPoint(
        "diffcr", declared["diffcr"], "torch_dynamo_backends"
    )
    assert point.load() is diffcr
