"""Hand-written models of the zoo: what is found in DiTs outside of diffusers.

Importing this file fills the zoo from the ``handwritten_*`` files; ``tests/test_zoo_handwritten.py`` says
of each model what is right.
"""

from __future__ import annotations

from tests.zoo import (
    handwritten_arguments,
    handwritten_habits,
    handwritten_mixing,
    handwritten_structure,
)

POSITION = handwritten_mixing.POSITION

__all__ = [
    "POSITION",
    "handwritten_arguments",
    "handwritten_habits",
    "handwritten_mixing",
    "handwritten_structure",
]
