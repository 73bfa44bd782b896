"""Multi-query associative recall, after Arora et al., "Zoology" (arXiv 2312.04927).

A row begins with n pairs, key value key value ...; then each key is asked once, at a place drawn among every second
position of the rest: the g-th of them (from 1) with a weight of g ** (power - 1), so that a power below 1 asks soon and
1 asks anywhere. The answer at a key that is asked is its value. It does not stand in the row, so that no answer helps
another; all else is blank. Keys are of the lower half of the vocabulary, values of the upper half, each different.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gecko_lab.components.registry import option

from .task import Examples, SyntheticConfig, blank, distinct, weighted_places


@dataclass
class MqarConfig(SyntheticConfig):
    name: str = option("mqar", "multi-query associative recall")
    vocab_size: int = option(8192, "tokens: 0 is blank, then keys, from the middle on values")
    seq_len: int = option(256, "tokens in a row, at least 4 times data.pairs")
    pairs: int = option(16, "keys with a value in a row; each is asked once")
    power: float = option(0.01, "where keys are asked: near 0 soon after the pairs, 1 anywhere in the rest of the row")

    @property
    def answers(self) -> int:
        return self.pairs

    def _check_task(self) -> None:
        self.need("pairs", 1, "there must be something to recall")
        self.need("vocab_size", 2 * self.pairs + 2, f"a blank, and {self.pairs} different keys and values")
        self.need("seq_len", 4 * self.pairs, f"{self.pairs} pairs, and twice that room for as many questions")
        self.need("power", 1e-6, "the weight of the g-th place is g ** (power - 1)")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        n, middle = self.pairs, (self.vocab_size + 1) // 2
        out = blank(count, self.seq_len)
        keys = distinct(rng, count, n, 1, middle)
        values = distinct(rng, count, n, middle, self.vocab_size)
        out.tokens[:, 0 : 2 * n : 2], out.tokens[:, 1 : 2 * n : 2] = keys, values
        weights = np.arange(1, (self.seq_len - 2 * n) // 2 + 1, dtype=np.float64) ** (self.power - 1)
        places = 2 * n + 2 * weighted_places(rng, count, n, weights)
        rows = np.arange(count)[:, None]
        out.tokens[rows, places], out.targets[rows, places], out.scored[rows, places] = keys, values, True
        out.distances[rows, places] = places - (2 * np.arange(n) + 1)  # to the value
        return out
