"""Let a subpackage and a public function share one name (docs/decisions/0006).

``dcr.export(frozen, "out/")`` is a function and ``diffcr_compile.export.artifact`` lies in a folder;
likewise ``calibrate``. Python binds a subpackage to its name in the parent whenever somebody
imports it, so the function alone would vanish.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module("diffcr_compile.api"), name)(*args, **kwargs)


def make_callable(package: str) -> None:
    """Calling the package calls the function of that name in ``diffcr_compile.api``."""
    sys.modules[package].__class__ = _CallablePackage
