"""ListOps, after Nangia and Bowman (arXiv 1804.06028); long ones are a task of the Long Range Arena (arXiv 2011.04006).

A row is an expression such as [MAX 2 9 [MIN 4 7 ] 0 ], the token that asks, and blanks. The answer, where it asks, is
the expression's value, a digit: the least, the greatest, the median (rounded down) or the sum modulo 10 of what stands
in the brackets.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from gecko_lab.components.registry import option

from .task import Examples, SyntheticConfig, blank

OPERATIONS = {
    "MIN": min,
    "MAX": max,
    "MED": lambda values: (sorted(values)[(len(values) - 1) // 2] + sorted(values)[len(values) // 2]) // 2,
    "SM": lambda values: sum(values) % 10,
}
NAMES = [*map(str, range(10)), *(f"[{name}" for name in OPERATIONS), "]", "?", "."]  # of the tokens
CLOSE, ASK, REST = (NAMES.index(name) for name in "]?.")
SMALLEST = 4  # [MIN 1 2 ]


@dataclass
class ListopsConfig(SyntheticConfig):
    name: str = option("listops", "the value of a nested expression")
    vocab_size: int = option(len(NAMES), "tokens: digits, four operations, a bracket, one that asks, a blank")
    seq_len: int = option(256, "tokens in a row; expressions are shorter by at least one")
    depth: int = option(10, "operations inside one another, at most")
    arguments: int = option(10, "arguments of an operation, at most")

    @property
    def answers(self) -> int:
        return 1

    def _check_task(self) -> None:
        self.need("vocab_size", len(NAMES), "digits, operations and marks")
        self.need("seq_len", SMALLEST + 1, "the shortest expression and the question")
        self.need("depth", 1, "an expression has an operation")
        self.need("arguments", 2, "an operation has two")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        out = blank(count, self.seq_len)
        out.tokens[:] = REST
        for row, seed in enumerate(rng.integers(0, 2**63, count).tolist()):
            written: list[int] = []
            value = self._write(random.Random(seed), written, self.seq_len - 1, self.depth, top=True)
            end = len(written)
            out.tokens[row, :end], out.tokens[row, end] = written, ASK
            out.targets[row, end], out.scored[row, end] = value, True
        return out

    def _write(self, rng: random.Random, out: list[int], room: int, depth: int, top: bool = False) -> int:
        """Append an expression of at most ``room`` tokens; its value. The more room, the rarer is a mere digit."""
        if not top and (depth == 0 or room < SMALLEST or rng.random() < SMALLEST / room):
            out.append(rng.randrange(10))
            return out[-1]
        operation = rng.randrange(len(OPERATIONS))
        out.append(10 + operation)
        room -= 2  # its two brackets
        values = []
        for left in range(rng.randint(2, min(self.arguments, room)), 0, -1):
            before = len(out)
            share = room if left == 1 else min(room - left + 1, rng.randint(1, 2 * room // left))
            values.append(self._write(rng, out, share, depth - 1))
            room -= len(out) - before
        out.append(CLOSE)
        return int(list(OPERATIONS.values())[operation](values))  # type: ignore[operator]
