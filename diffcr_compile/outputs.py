"""Outputs that are plain dataclasses, which torch's pytree takes for leaves: taken apart and built again.

Output classes of diffusers and transformers know pytree; a dataclass of the user's own does not, and to
register it would change what the user's other code sees.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree


@dataclasses.dataclass(frozen=True)
class OutputForm:
    """How an output is built from its leaves.

    Attributes:
        spec: pytree in which a dataclass is a leaf.
        records: one entry per leaf of `spec`: None, or the dataclass that stands there.
    """

    spec: pytree.TreeSpec
    records: tuple[OutputRecord | None, ...]


@dataclasses.dataclass(frozen=True)
class OutputRecord:
    """A dataclass in an output.

    Attributes:
        kind: its class.
        fields: form of each field, by name.
    """

    kind: type
    fields: tuple[tuple[str, OutputForm], ...]


def take_apart(output: Any) -> tuple[list[Any], OutputForm]:
    """All leaves of an output in order, those in dataclasses too, and how to build it again."""
    leaves: list[Any] = []
    records: list[OutputRecord | None] = []
    items, spec = pytree.tree_flatten(output)
    for item in items:
        if not dataclasses.is_dataclass(item) or isinstance(item, type):
            leaves.append(item)
            records.append(None)
            continue
        fields = []
        for field in dataclasses.fields(item):
            inner, form = take_apart(getattr(item, field.name))
            leaves += inner
            fields.append((field.name, form))
        records.append(OutputRecord(type(item), tuple(fields)))
    return leaves, OutputForm(spec, tuple(records))


def put_together(form: OutputForm, leaves: Iterator[Any]) -> Any:
    """The output of that form from its leaves."""
    items = [
        next(leaves) if record is None else _built(record, leaves) for record in form.records
    ]
    return pytree.tree_unflatten(items, form.spec)


def _built(record: OutputRecord, leaves: Iterator[Any]) -> Any:
    # Not by its constructor: what __post_init__ did to the fields is in the recorded ones already.
    made: Any = object.__new__(record.kind)
    for name, form in record.fields:
        object.__setattr__(made, name, put_together(form, leaves))
    return made


class OutputForms:
    """The form of a model's output, if there is a dataclass in it."""

    def __init__(self) -> None:
        self.found: OutputForm | None = None

    @contextlib.contextmanager
    def flat(self, model: nn.Module) -> Iterator[None]:
        """While the context lasts, `model` returns a tuple of leaves instead of dataclasses."""

        def flatten(_: nn.Module, __: Any, output: Any) -> Any:
            leaves, form = take_apart(output)
            if not any(form.records):
                return None
            self.found = form
            return tuple(leaves)

        handle = model.register_forward_hook(flatten)
        try:
            yield
        finally:
            handle.remove()
