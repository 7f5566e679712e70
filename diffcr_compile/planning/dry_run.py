"""Look at a model without running it: legality, capture and costs in seconds, in little memory.

The full way (``legality.find_blocks``) runs the model on real numbers several times and tries every
block. Here

1. the whole model runs once on *fake* tensors, which have shapes and no data; that gives the calls
   of the blocks, their MACs and a trace of each block (``fake_run.py``, ``op_trace.py``);
2. only what stands *outside* the blocks runs on real numbers, each block being the identity; that shows
   where the image tokens are and gives each block real inputs;
3. the experiments of ``legality.py`` run in float64 on one block of each structure. A block whose trace
   equals a tried one's, with all tokens and with half of them, has its result; so have its parts;
4. the graph is captured with fake weights and with stand-ins for the blocks, and one block of each
   structure is traced on its own.

The user's model is never touched: all of it works on copies of the modules that share the weights.
Weights on the meta device (no data) are given random values, one block at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from diffcr_compile.block_choice import choose_blocks
from diffcr_compile.blocks import (
    BlockSpec,
    Path,
    Refusal,
    StreamView,
    TokenAxis,
    leaves,
    map_leaves,
)
from diffcr_compile.capture import capture
from diffcr_compile.config import RoutingConfig
from diffcr_compile.errors import CaptureError, UsageError
from diffcr_compile.examiner import Examiner, examine, guess_views
from diffcr_compile.kept_caches import kept_caches
from diffcr_compile.legality import Findings, find_blocks
from diffcr_compile.parts import PartFindings
from diffcr_compile.planning.copies import (
    fake_copy,
    fill_meta,
    shared_copy,
    to_fake,
    with_data,
)
from diffcr_compile.planning.fake_run import FakeRun, Tree, short
from diffcr_compile.planning.stand_in import stand_in
from diffcr_compile.program import Program
from diffcr_compile.quiet import quiet_torch
from diffcr_compile.randomness import NOT_ONE_FUNCTION, differs_from_itself, draws
from diffcr_compile.recorded import Call, IllegalError, output_tensors, two_samples
from diffcr_compile.residual import Pairs
from diffcr_compile.streams import Moved, image_stream
from diffcr_compile.views import given_call, show_block, with_turned_blocks


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Attributes:
        findings: blocks and refusals, as from ``legality.find_blocks``.
        same_as: block -> the block of the same structure that was tried in its place.
        calls: block -> its first call on fake tensors.
        macs: block -> MACs per sample of its calls; refused ones too.
        total_macs: MACs per sample of the whole model; None if it does not run on fake tensors.
        ops: ATen op -> how often it ran in one forward.
        forward_bytes: bytes of all tensors that one forward of one sample makes.
        output_bytes: bytes of the output, per sample.
        program: CAPTURED, on tensors of `mode`; None if the model cannot be captured.
        mode: fake mode of `program`; None if its tensors are real.
        error: why the model cannot be captured or run; None if it can.
        note: what was done in another way than usual, and why; None if nothing.
    """

    findings: Findings
    mode: FakeTensorMode | None = None
    same_as: Mapping[str, str] = dataclasses.field(default_factory=dict)
    calls: Mapping[str, Call] = dataclasses.field(default_factory=dict)
    macs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    total_macs: float | None = None
    ops: Mapping[str, int] = dataclasses.field(default_factory=dict)
    forward_bytes: int = 0
    output_bytes: int = 0
    program: Program | None = None
    error: str | None = None
    note: str | None = None


def dry_run(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    config: RoutingConfig = RoutingConfig(),  # noqa: B008 - frozen
) -> DryRun:
    """Look at `model`; what is wrong with it is in the result, nothing is raised.

    Args:
        model: any DiT, also one on the meta device; it is not changed.
        args: positional example inputs.
        kwargs: keyword example inputs. Those on the meta device get random values, integers 0.
        config: which blocks are wanted, and how large.

    Raises:
        UsageError: a block is named that does not exist.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tree: Tree = map_leaves((tuple(args), dict(kwargs)), lambda _, leaf: with_data(leaf))
    try:
        whole, twin = shared_copy(model), fake_copy(model, mode)
        with torch.no_grad(), kept_caches(twin):
            samples = two_samples(twin, *tree)
        first = FakeRun(whole, twin, samples, mode)
        views = guess_views(*samples, first.calls, first.output)
        turned = twin
        if views:
            turned = with_turned_blocks(twin, views)
            first = FakeRun(whole, turned, samples, mode)
        tried = _OnePerStructure(turned, mode, first, views)
        findings = find_blocks(whole, *samples, tried, config.granularity)
    except Exception as error:  # noqa: BLE001 - the user's model may raise anything
        return _on_real_numbers(model, tree, config, error)
    findings = choose_blocks(findings, config)
    same_as = {b: o for b, o in tried.same_as.items() if b in _names(findings)}
    program, problem = _captured(model, twin, tree, tried, findings)
    if problem is None and draws(tried.first.trace.counts) and not _has_no_data(model):
        problem = NOT_ONE_FUNCTION if differs_from_itself(shared_copy(model), *tree) else None
    is_fake = program is not None and any(
        isinstance(t, FakeTensor) for t in program.example.values()
    )
    first = tried.first
    return DryRun(
        findings=findings,
        mode=mode if is_fake else None,
        same_as=same_as,
        calls=tried.calls,
        macs=tried.macs,
        total_macs=first.total_macs,
        ops=dict(first.trace.counts),
        forward_bytes=first.trace.new_bytes // first.batch,
        output_bytes=_bytes(first.output) // first.batch,
        program=program,
        error=problem,
    )


def _names(findings: Findings) -> set[str]:
    return {s.name for s in findings.blocks} | {r.block for r in findings.refused}


def _on_real_numbers(
    model: nn.Module, tree: Tree, config: RoutingConfig, reason: Exception
) -> DryRun:
    """The full way, for a model that looks at the values of its tensors."""
    nothing = Findings((), (), ())
    if _has_no_data(model):
        return DryRun(nothing, error=f"it does not run without data: {short(reason)}")
    whole = shared_copy(model)
    try:
        findings = find_blocks(whole, *tree, granularity=config.granularity)
    except Exception as error:  # noqa: BLE001 - the user's model may raise anything
        return DryRun(nothing, error=f"it does not run on the example inputs: {short(error)}")
    findings = choose_blocks(findings, config)
    note = f"the whole model ran on real numbers, because it does not run without: {short(reason)}"
    program, problem = _attempt(lambda: _capture(whole, tree, findings))
    return DryRun(findings, program=program, error=problem, note=note)


class _OnePerStructure(Examiner):
    """Runs the model around stand-ins, and tries one block of each structure.

    Attributes:
        first: the fake run of the outermost candidates.
        calls: candidate -> its first call on fake tensors, those inside of others too.
        macs: candidate -> MACs per sample.
        same_as: candidate -> the one of its structure that was tried.
    """

    def __init__(
        self,
        twin: nn.Module,
        mode: FakeTensorMode,
        first: FakeRun,
        views: Mapping[str, StreamView],
    ) -> None:
        self.twin, self.mode, self.first, self.shown_as = twin, mode, first, views
        self.seen = first
        self.calls: dict[str, Call] = {}
        self.macs: dict[str, float] = {}
        self.same_as: dict[str, str] = {}
        self._tried: dict[str, list[BlockSpec | Refusal]] = {}  # key -> what was found
        self._pairs: dict[str, Pairs] = {}  # digest -> which input for which output

    def prepared(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        candidates: Mapping[str, nn.Module],
    ) -> tuple[nn.Module, Mapping[str, nn.Module]]:
        if set(candidates) != set(self.first.modules):  # candidates inside of candidates
            self.seen = FakeRun(
                model, self.twin, (args, dict(kwargs)), self.mode, list(candidates)
            )
            self._tried.clear()
        shell = fill_meta(shared_copy(model), leave=candidates)
        watched = {name: shell.get_submodule(name) for name in candidates}
        for name, calls in self.seen.calls.items():
            stand_in(watched[name], calls[0])
            self.calls[name], self.macs[name] = calls[0], self.seen.macs[name]
        return shell, watched

    def views(self, *_: Any) -> dict[str, StreamView]:
        """Those of the fake run."""
        return dict(self.shown_as)

    def pairs(self, name: str, module: nn.Module, call: Call) -> Pairs:
        digest = self.seen.digests[name]
        if digest not in self._pairs:
            self._pairs[digest] = super().pairs(name, fill_meta(shared_copy(module)), call)
        return self._pairs[digest]

    def examine(
        self,
        name: str,
        module: nn.Module,
        calls: Sequence[Call],
        moved: Moved | None,
        known: Sequence[BlockSpec],
    ) -> BlockSpec:
        fault = self.seen.calls[name][0].fault if name in self.seen.calls else None
        if fault:  # what stands in for a block does nothing to its arguments
            raise IllegalError(fault)
        if len(calls) != 1 or moved is None:
            return examine(name, module, calls, moved, known)  # refuses it without a run
        key, axes, num_tokens = self._key(name, calls[0], moved)
        for found in self._tried.setdefault(key, []):
            other = found.name if isinstance(found, BlockSpec) else found.block
            cut = (found.stream, *found.aligned) if isinstance(found, BlockSpec) else axes
            if cut and not self._agree_on_half(name, other, cut, num_tokens):
                continue
            self.same_as[name] = other
            if isinstance(found, BlockSpec):
                return dataclasses.replace(found, name=name, members=())
            raise IllegalError(found.reason)
        try:
            spec = examine(name, fill_meta(shared_copy(module)), calls, moved, known)
        except IllegalError as reason:
            self._tried[key].append(Refusal(name, str(reason)))
            raise
        self._tried[key].append(spec)
        return spec

    def parts(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        wanted: Mapping[str, nn.Module],
        every: Mapping[str, nn.Module],
        sample: Path,
    ) -> dict[str, PartFindings]:
        """Tried in the blocks that were tried themselves; the others of their structure are alike."""
        tried = [name for name in wanted if name not in self.same_as]
        shell = fill_meta(shared_copy(model), leave=[n for n in every if n not in tried])
        watched = {name: shell.get_submodule(name) for name in every}
        for name in every:
            if name not in tried and name in self.calls:
                stand_in(watched[name], self.calls[name])
        real = {name: watched[name] for name in tried}
        found = super().parts(shell, args, kwargs, real, watched, sample)
        for name in wanted:
            other = self.same_as.get(name)
            if other in found:
                found[name] = found[other].moved(other, name)
                for spec in found[other].parts:
                    self.same_as[spec.moved(other, name).name] = spec.name
        self._record(model, args, kwargs, found)
        return found

    def _record(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        found: Mapping[str, PartFindings],
    ) -> None:
        """Calls and costs of the parts."""
        names = [spec.name for block in found.values() for spec in block.parts]
        if names:
            seen = FakeRun(model, self.twin, (args, dict(kwargs)), self.mode, names)
            for name, calls in seen.calls.items():
                self.calls[name], self.macs[name] = calls[0], seen.macs[name]

    def _key(
        self, name: str, call: Call, moved: Moved
    ) -> tuple[str, tuple[TokenAxis, ...], int]:
        """Equal for blocks of one structure in equal surroundings; and the stream, if there is one."""
        pairs = moved.pairs or {}
        unread = [
            path
            for path, leaf in leaves(call.output)
            if isinstance(leaf, Tensor)
            and path not in pairs
            and not moved.outside.is_read(name, path)
        ]
        around = f"{self.seen.digests[name]} {unread} {name in moved.outside.bypassed}"
        try:
            stream = image_stream(call, moved)
        except IllegalError as reason:
            return f"{around} {reason}", (), 0
        path, _, (start, num_tokens) = stream
        return f"{around} {stream}", (TokenAxis(path, 1, start),), num_tokens

    def _agree_on_half(
        self, name: str, other: str, axes: tuple[TokenAxis, ...], num_tokens: int
    ) -> bool:
        one, two = (self.seen.digest_of_half(n, axes, num_tokens) for n in (name, other))
        return one == two


def _captured(
    model: nn.Module, twin: nn.Module, tree: Tree, tried: _OnePerStructure, findings: Findings
) -> tuple[Program | None, str | None]:
    """The CAPTURED program, with fake weights if that can be, or why there is none."""

    def on_fake_weights() -> Program:
        fake: Tree = map_leaves(tree, lambda _, leaf: to_fake(leaf, tried.mode))
        light = shared_copy(twin)
        for spec in findings.blocks:
            call = tried.calls[spec.name]
            if spec.view is not None:
                call = given_call(call, spec.view)
            if spec.name not in tried.same_as:
                _check_traceable(spec.name, twin.get_submodule(spec.name), call)
            stand_in(light.get_submodule(spec.name), call, reads_all=True)
        program = _capture(light, fake, findings)
        bodies = {s.name: _body(twin.get_submodule(s.name), s) for s in findings.blocks}
        return program.with_graph(program.copy_graph(), bodies)

    program, problem = _attempt(on_fake_weights)
    if program is not None or _has_no_data(model):
        return program, problem
    # with data and all blocks there is one way more to capture a model
    return _attempt(lambda: _capture(shared_copy(model), tree, findings))


def _body(block: nn.Module, spec: BlockSpec) -> nn.Module:
    return block if spec.view is None else show_block(block, spec.view)


def _attempt(make: Callable[[], Program]) -> tuple[Program | None, str | None]:
    """What `make` returns, or in words why it cannot."""
    try:
        return make(), None
    except (CaptureError, UsageError) as error:
        return None, error.message
    except Exception as error:  # noqa: BLE001 - the user's model may raise anything
        return None, short(error)


def _capture(model: nn.Module, tree: Tree, findings: Findings) -> Program:
    blocks, refused, sample = findings.blocks, findings.refused, findings.sample
    return capture(model, *tree, blocks, refused, sample)


def _check_traceable(name: str, block: nn.Module, call: Call) -> None:
    args, kwargs = call.tree
    try:
        with torch.no_grad(), kept_caches(block), quiet_torch():
            torch.export.export(block, args, kwargs, strict=False)
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot trace the block {name}: {short(error)}"
        ) from error


def _has_no_data(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def _bytes(output: Any) -> int:
    return sum(t.numel() * t.element_size() for t in output_tensors(output))
