"""Pipelines as input: the denoiser is found, its calls are recorded, the compiled one takes its place."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import diffcr_compile as dcr
from diffcr_compile.calibrate.pipeline_calls import run_pipeline
from diffcr_compile.calibrate.pipelines import (
    PipelineRuns,
    equal_steps,
    is_pipeline,
    open_pipeline,
)
from diffcr_compile.calibration_keys import calibration_settings
from diffcr_compile.cli import main
from diffcr_compile.config import CompileConfig, RoutingConfig, make_config
from diffcr_compile.config_text import effective_yaml, read_effective
from diffcr_compile.errors import ResourceError, UnsupportedModelError, UsageError
from diffcr_compile.runtime.diffusers_adapter import CompiledDenoiser
from diffcr_compile.sources import load_case
from tests import pipelines
from tests.conftest import equal

# Saving and loading it needs accelerate, which the tests do without.
NOT_RELOADED = {"wan"}
TINY = {
    "routing": {"buckets": 2, "multiple_of": 4},
    "rollouts": {"steps": 4, "pipeline_runs": 2},
    "calibration": {"steps": 4, "batch": 2},
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], PipelineRuns]:
    """``opened("flux")``: a pipeline, saved, loaded and run once."""
    made: dict[str, PipelineRuns] = {}

    def get(name: str) -> PipelineRuns:
        if name not in made:
            torch.manual_seed(0)
            pipe, inputs = pipelines.PIPELINES[name]()
            if name not in NOT_RELOADED:
                pipe = pipelines.reloaded(pipe, tmp_path_factory.mktemp(name))
            made[name] = open_pipeline(pipe, inputs)
        return made[name]

    return get


@pytest.mark.parametrize("name", pipelines.PIPELINES)
def test_the_denoiser_is_found_and_routed_bit_equal_on_its_recorded_inputs(
    name: str, opened: Callable[[str], PipelineRuns]
) -> None:
    runs = opened(name)
    assert is_pipeline(runs.pipe)
    assert runs.component == "transformer"
    assert len(runs.timesteps) == 3
    assert runs.timestep is not None
    routed = dcr.route(runs)
    assert routed.program.blocks
    with torch.no_grad():
        assert equal(routed(**runs.example), runs.model(**runs.example))


def test_recording_leaves_no_hook_and_no_setting_behind(
    opened: Callable[[str], PipelineRuns],
) -> None:
    runs = opened("flux")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in runs.model.modules())
    assert getattr(runs.pipe, "_progress_bar_config", {}) == {}


def test_the_answers_are_the_dense_models_own(opened: Callable[[str], PipelineRuns]) -> None:
    runs = opened("pixart")
    program = dcr.route(runs).program
    config = CompileConfig()
    rollouts = config.rollouts.model_copy(update={"pipeline_runs": 2})
    routing = RoutingConfig(buckets=2)
    states = runs.teacher_states(program, rollouts, routing, seed=0)
    assert len(states) == 2 * runs.steps * program.batch
    assert sorted(set(states.timesteps.tolist()), reverse=True) == list(runs.timesteps)
    rows = slice(0, program.batch)
    call = {name: t[rows] for name, t in states.inputs.items()}
    with torch.no_grad():
        assert torch.equal(program.module(**_call(program, call))[0], states.target[rows])
    # another seed is other noise
    first, second = states.inputs["hidden_states"].chunk(2)
    assert not torch.equal(first, second)


def _call(program: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    from diffcr_compile.program import rebuild_call

    return rebuild_call(program.signature, tensors)


@pytest.mark.parametrize("name", ["pixart", "flux"])
def test_a_compiled_pipeline_samples_what_the_frozen_graphs_sample(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pipe, inputs = pipelines.PIPELINES[name]()
    _wake(pipe.transformer)
    guided = {"export": {"cfg": "batched"}} if name == "pixart" else {}
    config = make_config({**TINY, **guided})
    inputs = {**inputs, "num_inference_steps": 4}
    artifact = dcr.compile(
        pipe, tmp_path / "out", pipeline_inputs=inputs, budget="80%", config=config
    )
    dense = pipe.transformer
    frozen = _Frozen(_frozen_graphs(pipe, inputs, config, tmp_path / "out"), dense, artifact)
    expected = _sample(pipe, inputs, frozen)
    found = _sample(pipe, inputs, CompiledDenoiser(tmp_path / "out", dense))
    assert _away(found, expected) < 1e-3
    assert _away(found, _sample(pipe, inputs, dense)) > 1e-3  # tokens were dropped
    highest = artifact.manifest.buckets[-1]["high"]
    assert highest == pytest.approx(max(open_pipeline(pipe, inputs).timesteps))


def test_a_pipeline_that_guides_is_not_doubled_silently(
    opened: Callable[[str], PipelineRuns], tmp_path: Path
) -> None:
    runs = opened("pixart")
    assert runs.images == 1
    with pytest.raises(
        UsageError, match=r"batch 2 for 1 image.*separate builds batch 1"
    ) as error:
        dcr.compile(runs, tmp_path / "out", config=make_config(TINY))
    assert error.value.code == "DCR-U055"
    assert not (tmp_path / "out").exists()  # before any work


@pytest.mark.parametrize("name", ["pixart", "flux", "stable_audio", "sd3"])
def test_with_all_tokens_kept_the_adapter_samples_what_the_dense_model_samples(
    name: str, opened: Callable[[str], PipelineRuns], tmp_path: Path
) -> None:
    runs = opened(name)
    dcr.export(dcr.freeze(dcr.route(runs), keep_ratio=1.0), tmp_path)
    adapter = CompiledDenoiser(tmp_path, runs.model)
    inputs = {**runs.inputs[0], "num_inference_steps": 3}
    expected = _sample(runs.pipe, inputs, runs.model)
    assert _away(_sample(runs.pipe, inputs, adapter), expected) < 1e-3
    example = {**runs.example, "return_dict": True}
    with torch.no_grad():
        assert torch.allclose(
            adapter(**example).sample, runs.model(**example).sample, atol=1e-4
        )


def test_the_adapter_refuses_other_shapes(
    opened: Callable[[str], PipelineRuns], tmp_path: Path
) -> None:
    runs = opened("flux")
    dcr.export(dcr.freeze(dcr.route(runs), keep_ratio=1.0), tmp_path)
    adapter = CompiledDenoiser(tmp_path, runs.model)
    assert adapter.config is runs.model.config
    assert (adapter.dtype, adapter.device) == (torch.float32, torch.device("cpu"))
    wider = {**runs.example, "hidden_states": runs.example["hidden_states"].repeat(2, 1, 1)}
    with pytest.raises(UsageError, match=r"hidden_states has shape \(2, 64, 16\)"):
        adapter(**wider)
    with pytest.raises(UsageError, match=r"does not fit .*surplus"):
        adapter(**runs.example, surplus=torch.zeros(1))


def test_the_adapter_refuses_other_values_of_what_is_fixed(
    opened: Callable[[str], PipelineRuns], tmp_path: Path
) -> None:
    runs = opened("flux")
    dcr.export(dcr.freeze(dcr.route(runs), keep_ratio=1.0), tmp_path)
    adapter = CompiledDenoiser(tmp_path, runs.model)
    adapter(**{**runs.example, "joint_attention_kwargs": {}})
    with pytest.raises(
        UsageError, match=r"joint_attention_kwargs_scale is 0.5, .*built with None"
    ):
        adapter(**{**runs.example, "joint_attention_kwargs": {"scale": 0.5}})
    manifest = adapter.runner.manifest
    built = {**manifest.constants, "joint_attention_kwargs_scale": 0.5}
    adapter.runner.manifest = dataclasses.replace(manifest, constants=built)
    with pytest.raises(UsageError, match=r"scale is None, .*built with 0.5"):
        adapter(**runs.example)


def test_two_models_that_share_the_steps_must_be_named() -> None:
    pipe, inputs = pipelines.wan(transformer_2=pipelines.wan_transformer(), boundary_ratio=0.7)
    with pytest.raises(UsageError, match=r"transformer, transformer_2.*component="):
        dcr.inspect(pipe, pipeline_inputs=inputs)
    high = open_pipeline(pipe, inputs, "transformer")
    low = open_pipeline(pipe, inputs, "transformer_2")
    assert high.model is pipe.transformer
    assert low.model is pipe.transformer_2
    assert min(high.timesteps) > max(low.timesteps)
    with pytest.raises(UsageError, match=r"no component 'unet'.*transformer_2"):
        dcr.route(pipe, pipeline_inputs=inputs, component="unet")


def test_a_pipeline_that_does_not_run_says_what_to_pass() -> None:
    pipe, _ = pipelines.flux()
    with pytest.raises(
        UsageError, match=r"pipeline_inputs=.*--pipeline-inputs.*prompt_embeds"
    ):
        dcr.inspect(pipe)


def test_example_inputs_beside_a_pipeline_and_pipeline_inputs_beside_a_model_are_refused() -> (
    None
):
    pipe, inputs = pipelines.dit()
    with pytest.raises(UsageError, match="recorded"):
        dcr.route(pipe, {"hidden_states": torch.zeros(1)}, pipeline_inputs=inputs)
    with pytest.raises(UsageError, match="example_inputs="):
        dcr.route(pipe.transformer, pipeline_inputs=inputs)
    with pytest.raises(UsageError, match="got str"):
        dcr.route("a/name/on/a/hub")


def test_calls_of_different_shapes_are_refused() -> None:
    pipe, inputs = pipelines.wan()
    longer = {**inputs, "negative_prompt_embeds": torch.zeros(1, 7, 12)}
    with pytest.raises(UnsupportedModelError, match=r"encoder_hidden_states.*\(1, 7, 12\)"):
        dcr.route(pipe, pipeline_inputs=longer)


def test_runs_of_different_sizes_are_refused(opened: Callable[[str], PipelineRuns]) -> None:
    runs = opened("flux")
    two = ({**runs.inputs[0]}, {**runs.inputs[0], "height": 64})
    with pytest.raises(UsageError, match="one size"):
        dcr.calibrate(
            dcr.route(runs),
            open_pipeline(runs.pipe, two),
            budget="80%",
            config=make_config(TINY),
        )


def test_records_are_bounded(opened: Callable[[str], PipelineRuns]) -> None:
    runs = opened("flux")
    config = make_config({"rollouts": {"max_gib": 1e-6}})
    with pytest.raises(ResourceError, match=r"rollouts\.pipeline_runs"):
        dcr.calibrate(dcr.route(runs), runs, budget="80%", config=config)


def test_buckets_hold_equally_many_steps() -> None:
    buckets = equal_steps([1.0, 0.95, 0.9, 0.8, 0.6, 0.2], 3)
    assert [buckets.index_of(t) for t in (0.2, 0.6, 0.8, 0.9, 0.95, 1.0)] == [0, 0, 1, 1, 2, 2]
    assert buckets.edges[0] == 0
    assert buckets.edges[-1] == 1
    with pytest.raises(UsageError, match=r"2 timesteps, fewer than routing\.buckets = 3"):
        equal_steps([1.0, 0.5], 3)
    with pytest.raises(UsageError, match="range of the timesteps cannot be told"):
        equal_steps([], 3)


def test_a_range_in_the_settings_is_stronger(opened: Callable[[str], PipelineRuns]) -> None:
    runs = opened("flux")
    assert runs.buckets(RoutingConfig(buckets=2, timestep_high=1.0)) is None
    found = runs.buckets(RoutingConfig(buckets=2))
    assert found is not None
    assert found.edges[-1] == 1.0


def test_the_written_down_settings_of_a_run_leave_the_range_to_the_pipeline_too(
    opened: Callable[[str], PipelineRuns], tmp_path: Path
) -> None:
    runs, settings = opened("flux"), CompileConfig(routing=RoutingConfig(buckets=2))
    (tmp_path / "effective.yaml").write_text(effective_yaml(settings))
    again = read_effective(tmp_path / "effective.yaml")
    assert runs.buckets(again.routing) == runs.buckets(settings.routing)
    # a range that is named is another calibration, even where its numbers are those of the default
    named = CompileConfig(
        routing=RoutingConfig(buckets=2, timestep_low=0.0, timestep_high=1000.0)
    )
    assert runs.buckets(named.routing) is None
    assert calibration_settings(named) != calibration_settings(settings)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a saved pipeline, and calls.yaml beside it."""
    torch.manual_seed(0)
    pipe, _ = pipelines.dit()
    pipe.save_pretrained(tmp_path / "pipe")
    (tmp_path / "calls.yaml").write_text(
        "[{class_labels: [1], num_inference_steps: 6}, {class_labels: [7], num_inference_steps: 6}]"
    )
    return tmp_path


@pytest.mark.parametrize("component", ["", "#transformer"])
def test_a_folder_with_a_pipeline_is_a_model_on_the_command_line(
    component: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source, calls = f"diffusers:{saved / 'pipe'}{component}", str(saved / "calls.yaml")
    words = ["diffcr", "inspect", source, "--pipeline-inputs", calls, "--json"]
    monkeypatch.setattr("sys.argv", words)
    main()
    plan = json.loads(capsys.readouterr().out)
    assert [block["name"] for block in plan["blocks"]] == [
        "transformer_blocks.0",
        "transformer_blocks.1",
    ]
    assert plan["next_command"].startswith(
        f"diffcr compile {source} --pipeline-inputs {calls}"
    )


def test_tensors_of_a_pipelines_call_come_from_the_inputs_file(saved: Path) -> None:
    save_file({"class_labels": torch.tensor([3])}, saved / "in.safetensors")
    (saved / "steps.json").write_text('{"num_inference_steps": 2}')
    source = f"diffusers:{saved / 'pipe'}"
    case = load_case(source, saved / "in.safetensors", saved / "steps.json")
    assert isinstance(case.model, PipelineRuns)
    assert case.model.example["class_labels"].tolist() == [3, 1000]
    assert len(case.model.timesteps) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("other.yaml", None, "does not exist"),
        ("calls.yaml", "[1, 2]", "by name"),
        ("calls.yaml", "{a: [", "neither YAML nor JSON"),
        ("calls.yaml", "{prompt: a cat}", r"does not run on \['prompt'\]"),
    ],
)
def test_a_wrong_file_of_pipeline_inputs_is_told(
    name: str, text: str | None, message: str, saved: Path
) -> None:
    if text is not None:
        (saved / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        load_case(f"diffusers:{saved / 'pipe'}", None, saved / name)


class _Frozen(nn.Module):
    """FROZEN graphs in torch, in the denoiser's place; the bucket is chosen by the runner's rule."""

    def __init__(self, graphs: Any, dense: nn.Module, artifact: Any) -> None:
        super().__init__()
        self.graphs, self.runner, self.config = list(graphs), artifact.load(), dense.config
        self.dtype, self.device = dense.dtype, dense.device
        self.cache_context = dense.cache_context if hasattr(dense, "cache_context") else None

    @torch.no_grad()
    def forward(self, *args: Any, **inputs: Any) -> Any:
        bucket = self.runner.bucket_of(float(inputs["timestep"].flatten()[0]))
        return self.graphs[bucket](*args, **inputs)


def _away(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest value: latents of random weights run to hundreds."""
    return float((found - expected).abs().max() / expected.abs().max())


def _wake(model: nn.Module) -> None:
    """Random gates and output projections: freshly built ones are so small that nothing shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))


def _frozen_graphs(pipe: Any, inputs: Any, config: CompileConfig, out: Path) -> Any:
    """The graphs that the artifact was made from: the trained weights at its schedule."""
    from diffcr_compile.resumable import load_trained
    from diffcr_compile.schedule import TokenSchedule

    routed = dcr.route(pipe, config=config.routing, pipeline_inputs=inputs)
    load_trained(routed.program, out / "model/routed.safetensors", config)
    saved = json.loads((out / "model/calibration.json").read_text())
    return dcr.freeze(routed, schedule=TokenSchedule.from_json(saved["schedule"]))


def _sample(pipe: Any, inputs: Any, denoiser: nn.Module) -> Tensor:
    """The latents that the whole pipeline ends with."""
    placed = copy.copy(pipe)
    object.__setattr__(placed, "scheduler", copy.deepcopy(pipe.scheduler))
    object.__setattr__(placed, "transformer", denoiser)
    output = run_pipeline(placed, inputs, 3, seed=5)
    found = output[0]
    assert isinstance(found, Tensor)
    return found
