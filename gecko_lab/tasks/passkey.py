"""The passkey task: a number, said once in much irrelevant text, is asked for at the end.

As published by Mohtashami and Jaggi (2023) and used by Chen et al. (2023); ``data`` puts a text of one's own around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..components.registry import option
from ..errors import LabError
from .base import TASKS
from .haystack import Item, Question
from .retrieval import Retrieval, RetrievalConfig

HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n"
)


@TASKS.register("passkey")
class Passkey(Retrieval):
    """One needle, "The pass key is 12345. Remember it. 12345 is the pass key.", at each depth of each length."""

    @dataclass
    class Config(RetrievalConfig):
        name: str = option("passkey", "a number said once in a long text: depth x length, at multiples of the window")
        digits: int = option(5, "of the pass key")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.digits < 1:
            raise LabError(f"digits={config.digits}: must be at least 1")

    def item(self, random: np.random.Generator, depth: float | None) -> Item:
        key = "".join(str(d) for d in random.integers(0, 10, self.config.digits))
        needle = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
        question = Question("\nWhat is the pass key? The pass key is", f" {key}", (key,))
        return Item(((needle, 0.5 if depth is None else depth),), (question,), HEAD)

    def chance(self) -> float:
        return float(10.0**-self.config.digits)

    def title(self) -> str:
        return "the pass key, written"
