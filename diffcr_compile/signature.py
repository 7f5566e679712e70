"""Call a graph the way its model is called: same arguments, same output structure.

A captured graph has one placeholder per tensor among the arguments. :class:`CallCodeGen` writes
the ``forward`` of the user's model around it: the same parameters with the same defaults, one
line that reaches into nested arguments per placeholder, and the same output structure.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from diffcr_compile.blocks import Path, get_leaf, leaves
from diffcr_compile.errors import UsageError
from diffcr_compile.outputs import OutputForm

_STARS: dict[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}


@dataclasses.dataclass(frozen=True)
class CallSignature:
    """How the user calls the model, and which arguments are graph inputs.

    Attributes:
        parameters: the parameters of the model's ``forward``, without ``self``.
        inputs: placeholder name -> path into the bound arguments, tensors only, in graph order.
        constants: (path, value) of every other argument leaf; these are fixed by the capture. A value
            is a tensor where the model's forward reads numbers from it.
        out_spec: pytree of the output.
        out_form: how the output is built where there are dataclasses in it; the pytree is then a tuple of
            its leaves.
    """

    parameters: tuple[inspect.Parameter, ...]
    inputs: Mapping[str, Path]
    constants: tuple[tuple[Path, Any], ...]
    out_spec: pytree.TreeSpec
    out_form: OutputForm | None = None

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter name, defaults filled in."""
        bound = inspect.Signature(list(self.parameters)).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def tensors(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """The graph's inputs by placeholder name, taken out of a call."""
        bound = self.bind(args, kwargs)
        return {name: get_leaf(bound, path) for name, path in self.inputs.items()}


def bind_call(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[inspect.Parameter, ...], dict[str, Any]]:
    """The parameters of ``model.forward`` and the given arguments by name.

    Raises:
        UsageError: the arguments do not fit the signature.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}. "
            "Pass them as a dict of keyword arguments or a tuple of positional ones."
        ) from error
    return tuple(signature.parameters.values()), dict(bound.arguments)


def keyword_call(
    parameters: Sequence[inspect.Parameter], bound: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by parameter name as keyword arguments: ``**kwargs`` are merged in."""
    call = dict(bound)
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            call.update(call.pop(parameter.name, {}))
    return call


def call_arguments(
    parameters: Sequence[inspect.Parameter], bound: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call from arguments by parameter name."""
    call = keyword_call(parameters, bound)
    first = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.name in call]
    return tuple(call.pop(name) for name in first), call


def split_leaves(bound: Mapping[str, Any]) -> tuple[list[Path], list[tuple[Path, Any]]]:
    """Paths of the tensors among the bound arguments, and (path, value) of everything else."""
    every = list(leaves(dict(bound)))
    tensors = [path for path, value in every if isinstance(value, torch.Tensor)]
    constants = [(p, v) for p, v in every if not isinstance(v, torch.Tensor)]
    return tensors, constants


class CallCodeGen(_PyTreeCodeGen):
    """Writes ``forward`` with the signature of the user's model."""

    def __init__(self, signature: CallSignature) -> None:
        names = [p.name for p in signature.parameters]
        super().__init__(_PyTreeInfo(names, signature.out_spec, signature.out_spec))
        self.signature = signature

    def __deepcopy__(self, memo: dict[int, Any]) -> CallCodeGen:
        return CallCodeGen(self.signature)  # immutable, so every copy of a graph may share it

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **_: Any) -> str:
        lines = [f"def {self._func_name}({self._parameters()}){maybe_return_annotation}:"]
        names = [
            variable.split(":")[0].strip() for variable in free_vars if variable != "self"
        ]
        for name, path in zip(names, self.signature.inputs.values(), strict=True):
            if (name,) != path:
                lines.append(f"    {name} = {_access(path)}")
        if names:
            lines.append(f"    self.check_inputs(({', '.join(names)},))")
        if self.signature.constants:
            found = ", ".join(_access(path) for path, _ in self.signature.constants)
            lines.append(f"    self.check_constants(({found},))")
        return "\n".join(lines)

    def generate_output(self, *args: Any, **options: Any) -> str:
        text: str = super().generate_output(*args, **options)
        if self.signature.out_form is None:
            return text
        return f"return self.put_together({text.removeprefix('return ')})"

    def process_inputs(self, *inputs: Any) -> Any:
        return inputs  # torch.fx.Interpreter is run on the placeholders themselves

    def _parameters(self) -> str:
        text, keyword_only = ["self"], False
        for parameter in self.signature.parameters:
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
                text.append("*")
            keyword_only |= parameter.kind in (
                inspect.Parameter.KEYWORD_ONLY,
                inspect.Parameter.VAR_POSITIONAL,
            )
            stars = _STARS.get(parameter.kind, "")
            default = (
                ""
                if parameter.default is parameter.empty
                else f"={_literal(parameter.default)}"
            )
            text.append(stars + parameter.name + default)
        return ", ".join(text)


def same_constant(found: Any, expected: Any) -> bool:
    """Whether an argument is the one that the graph was captured with."""
    if isinstance(found, torch.Tensor) or isinstance(expected, torch.Tensor):
        return found is expected or _same_tensor(found, expected)
    try:
        return bool(found is expected or found == expected)
    except Exception:  # noqa: BLE001 - a foreign __eq__ may do anything; unequal is the safe answer
        return False


def _same_tensor(found: Any, expected: Any) -> bool:
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return False
    if found.is_meta or isinstance(found, FakeTensor) or found.dtype != expected.dtype:
        return False
    return torch.equal(found.detach().cpu(), expected.cpu())


def _access(path: Path) -> str:
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def _literal(value: Any) -> str:
    return repr(value) if isinstance(value, (bool, int, float, str, type(None))) else "None"
