"""The value that every pass reads and returns: a graph, its stage, and what is known about it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from diffcr_compile.blocks import BlockSpec, Path, Refusal, map_leaves
from diffcr_compile.errors import UsageError
from diffcr_compile.origin import Origin
from diffcr_compile.outputs import put_together, take_apart
from diffcr_compile.routing import Gate, TokenSelector
from diffcr_compile.schedule import TokenSchedule
from diffcr_compile.shortcut import LinearShortcut
from diffcr_compile.signature import CallSignature, keyword_call, same_constant


class Stage(enum.IntEnum):
    """How far a program has come. Each stage has its own rules in ``verify.py``."""

    CAPTURED = 0  # one call_module node per routable block, everything else ATen
    ROUTED = 1  # a selector, gathers and a scatter around each of them; K may change
    FROZEN = 2  # K is an integer in the graph; nothing that depends on data has a size
    OPEN = 3  # K is the length of an input where it differs between timestep buckets


class DiTGraph(fx.GraphModule):
    """A captured, routed or frozen model. Call it exactly like the model it was made from."""

    @property
    def program(self) -> Program:
        """What the compiler knows about this graph."""
        program: Program = self.meta["program"]
        return program

    @property
    def routers(self) -> dict[str, nn.Module]:
        """Router of each routed block: block name -> module, ``router(x (B, N, C)) -> (B, N)``."""
        found = {}
        for spec in self.program.blocks:
            for name in (f"{selector_name(spec.name)}.router", router_name(spec.name)):
                if _has_submodule(self, name):
                    found[spec.name] = self.get_submodule(name)
        return found

    @property
    def shortcuts(self) -> dict[str, LinearShortcut]:
        """Shortcut of each routed block that has one, by block name in running order."""
        found = {}
        for spec in self.program.blocks:
            if _has_submodule(self, shortcut_name(spec.name)):
                shortcut = self.get_submodule(shortcut_name(spec.name))
                assert isinstance(shortcut, LinearShortcut)
                found[spec.name] = shortcut
        return found

    @property
    def selectors(self) -> dict[str, TokenSelector]:
        """Selector of each routed block of a ROUTED graph, by block name in running order."""
        found = {}
        for spec in self.program.blocks:
            selector = self.get_submodule(selector_name(spec.name))
            assert isinstance(selector, TokenSelector)
            found[spec.name] = selector
        return found

    def check_inputs(self, found: tuple[Any, ...]) -> None:
        """Refuse a call with tensors of other sizes or types than the example's, the batch aside.

        Most graphs would run on them and say nothing: sizes such as a picture's stand in their views.
        """
        # torch's tracers guard what they were given themselves
        if torch.compiler.is_compiling():
            return
        program = self.program
        for name, tensor in zip(program.signature.inputs, found, strict=True):
            expected = program.example[name]
            if name in program.kept_inputs or _fits(tensor, expected, program):
                continue
            free = " (the batch may differ)" if program.dynamic_batch else ""
            raise UsageError(
                f"{name} is {_form(tensor)}, but the graph was captured with {_form(expected)}{free}: "
                "other sizes and types need a graph of their own. Capture again with example inputs of "
                "the size you need.",
                code="DCR-U021",
            )

    def check_constants(self, found: tuple[Any, ...]) -> None:
        """Refuse a call whose non-tensor arguments, or fixed inputs, differ from those of the capture."""
        for (path, expected), value in zip(
            self.program.signature.constants, found, strict=True
        ):
            if not same_constant(value, expected):
                where = str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])
                if isinstance(expected, Tensor):
                    raise UsageError(
                        f"{where} is not the tensor that the model was captured with: "
                        f"{_difference(value, expected)}. The model's forward reads numbers from it, "
                        "so it is fixed. Capture again with the value you need.",
                        code="DCR-U023",
                    )
                raise UsageError(
                    f"{where} is {value!r}, but the model was captured with {expected!r}, and a "
                    "graph cannot change it. Capture again with the value you need.",
                    code="DCR-U023",
                )

    def put_together(self, leaves: tuple[Any, ...]) -> Any:
        """The output from its leaves, where there are dataclasses in it."""
        form = self.program.signature.out_form
        assert form is not None
        return put_together(form, iter(leaves))


@dataclasses.dataclass(frozen=True)
class Program:
    """A graph and what the compiler knows about it.

    Attributes:
        module: the graph, callable like the model. Parameters are shared between programs.
        stage: how far compilation has come.
        signature: how the graph is called.
        example: example tensors by placeholder name; their sizes are the sizes of the program.
        blocks: the blocks that may be routed, in the order in which they run.
        refused: candidates that stay dense, and why.
        sample_input: placeholder of the noisy sample; None if it could not be told.
        timestep_input: placeholder of the timestep; None if it could not be told.
        gate: how a router's score enters the forward value.
        schedule: column of the token schedule, FROZEN only.
        bucket: index of the timestep bucket, FROZEN only.
        routed: the ROUTED program that it was frozen from, over the same weights; FROZEN only.
        kept_inputs: input whose length is a block's K -> that block, OPEN only.
        dynamic_batch: the graph runs with other batch sizes than the example's.
        history: one line per pass that changed the program, oldest first.
        origin: the user's model as it was; None where a program was made by hand.
    """

    module: DiTGraph
    stage: Stage
    signature: CallSignature
    example: Mapping[str, Tensor]
    blocks: tuple[BlockSpec, ...]
    refused: tuple[Refusal, ...] = ()
    sample_input: str | None = None
    timestep_input: str | None = None
    gate: Gate = "straight_through"
    schedule: TokenSchedule | None = None
    bucket: int | None = None
    routed: Program | None = dataclasses.field(default=None, repr=False, compare=False)
    kept_inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    dynamic_batch: bool = True
    history: tuple[str, ...] = ()
    origin: Origin | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def batch(self) -> int:
        """Batch size of the example inputs."""
        return batch_size(self.example)

    @property
    def device(self) -> torch.device:
        """Where the example inputs lie, and with them the model."""
        return next(iter(self.example.values())).device

    @property
    def fixed_inputs(self) -> dict[str, Tensor]:
        """Tensors among the model's inputs that are constants of the graph, by name."""
        return {
            "_".join(str(key) for key in path): value
            for path, value in self.signature.constants
            if isinstance(value, Tensor)
        }

    def with_graph(
        self, graph: fx.Graph, modules: Mapping[str, nn.Module] | None = None, **changes: Any
    ) -> Program:
        """A program around an edited `graph`; weights are shared with this one.

        Args:
            graph: the edited graph.
            modules: modules that the graph calls and this program does not have yet, by target.
            changes: other fields that change.
        """
        root = {
            str(node.target): _attribute(self.module, str(node.target), modules or {})
            for node in graph.nodes
            if node.op in {"call_module", "get_attr"}
        }
        module = DiTGraph(root, graph, class_name="DiTGraph").train(self.module.training)
        return dataclasses.replace(self, module=module, **changes).attached()

    def attached(self) -> Program:
        """Make ``program.module.program`` this program."""
        self.module.meta["program"] = self
        return self

    def copy_graph(self) -> fx.Graph:
        """A graph that may be edited; nodes keep their names and shapes."""
        return copy.deepcopy(self.graph)

    def reads_weights_of(self, name: str) -> bool:
        """Whether the graph itself reads a weight inside of a submodule, beside calling it."""
        attributes = self.graph.find_nodes(op="get_attr")
        return any(str(node.target).startswith(f"{name}.") for node in attributes)

    def block(self, name: str) -> BlockSpec:
        """The spec of a routable block."""
        return next(spec for spec in self.blocks if spec.name == name)


def with_batch(program: Program, batch: int | None) -> Program:
    """The same program for another batch size; None leaves it.

    Raises:
        UsageError: the graph was captured with a fixed batch.
    """
    if batch is None or batch == program.batch:
        return program
    if not program.dynamic_batch:
        raise UsageError(
            f"the model's graph is fixed to batch {program.batch}, {batch} was asked for; give "
            f"example inputs with batch {batch} instead"
        )
    rows = torch.arange(batch) % program.batch
    example = map_batched(dict(program.example), program.batch, lambda tensor: tensor[rows])
    return dataclasses.replace(program, example=example).attached()


def _fits(found: Any, expected: Tensor, program: Program) -> bool:
    if not isinstance(found, Tensor) or found.dtype != expected.dtype:
        return False
    is_batched = program.dynamic_batch and expected.shape[:1] == (program.batch,)
    first = 1 if is_batched else 0
    return found.ndim == expected.ndim and found.shape[first:] == expected.shape[first:]


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def _difference(found: Any, expected: Tensor) -> str:
    if not isinstance(found, Tensor):
        return f"expected a {expected.dtype} of shape {tuple(expected.shape)}, found {found!r}"
    one, two = ((t.dtype, tuple(t.shape)) for t in (found, expected))
    if one != two:
        return f"expected {two[0]} of shape {two[1]}, found {one[0]} of shape {one[1]}"
    return "its values are others"


def batch_size(example: Mapping[str, Tensor]) -> int:
    """Size of axis 0 of the input with the most axes, which is the sample."""
    return max(example.values(), key=lambda t: t.ndim).shape[0]


def map_batched(tree: Any, batch: int, edit: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested tuples, lists and dicts with ``edit(tensor)`` for each (batch, ...) tensor."""

    def change(_: Path, leaf: Any) -> Any:
        is_batched = isinstance(leaf, Tensor) and leaf.shape[:1] == (batch,)
        return edit(leaf) if is_batched else leaf

    return map_leaves(tree, change)


def identifier(block: str) -> str:
    """A block's name as the name of a node or of an attribute."""
    return block.replace(".", "_").replace("-", "_")


def selector_name(block: str) -> str:
    return f"{identifier(block)}_select"


def shortcut_name(block: str) -> str:
    return f"{identifier(block)}_shortcut"


def is_routing_weight(program: Program, name: str) -> bool:
    """Whether a weight of a ROUTED program is a router's or a shortcut's, and not the model's."""
    own = (
        (f"{selector_name(b.name)}.router.", f"{shortcut_name(b.name)}.")
        for b in program.blocks
    )
    return name.startswith(tuple(prefix for pair in own for prefix in pair))


def router_name(block: str) -> str:
    return f"{identifier(block)}_router"


def _attribute(owner: nn.Module, target: str, extra: Mapping[str, nn.Module]) -> Any:
    if target in extra:
        return extra[target]
    value: Any = owner
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _has_submodule(module: nn.Module, name: str) -> bool:
    try:
        module.get_submodule(name)
    except AttributeError:
        return False
    return True


def tensor_args(program: Program, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Tensors in placeholder order.

    Raises:
        UsageError: an input is missing or unknown.
    """
    names = list(program.signature.inputs)
    if set(names) != set(tensors):
        fixed = sorted(program.fixed_inputs)
        hint = f"; {fixed} are fixed by the capture, leave them out" if fixed else ""
        raise UsageError(
            f"the graph takes the inputs {names}, got {sorted(tensors)}{hint}", code="DCR-U020"
        )
    return tuple(tensors[name] for name in names)


def run_flat(program: Program, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Run the graph on tensors by placeholder name; the output's tensors, flat."""
    return flat_tensors(program.module(**rebuild_call(program.signature, tensors)))


def flat_tensors(outputs: Any) -> list[Tensor]:
    """The tensors of a model's or a graph's outputs, in the order of the graph's outputs."""
    leaves, _ = take_apart(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def rebuild_call(signature: CallSignature, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments of a call from its tensors and the constants of the capture."""
    call: dict[str, Any] = {}
    every = [(path, tensors[name]) for name, path in signature.inputs.items()]
    for path, value in [*every, *signature.constants]:
        _put(call, path, value)
    built = {name: _as_sequences(value) for name, value in call.items()}
    return keyword_call(signature.parameters, built)


def _put(tree: dict[Any, Any], path: tuple[int | str, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def _as_sequences(tree: Any) -> Any:
    """Dicts whose keys are 0, 1, 2, ... back into lists."""
    if not isinstance(tree, dict):
        return tree
    items = {key: _as_sequences(value) for key, value in tree.items()}
    if items and all(isinstance(key, int) for key in items):
        return [items[key] for key in sorted(items)]
    return items


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` is in evaluation mode while the context lasts."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
