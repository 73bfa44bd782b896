"""Induction heads, after Olsson et al. (arXiv 2209.11895) as trained in Gu and Dao, "Mamba" (arXiv 2312.00752).

A row is random tokens. A special token, the vocabulary's last, stands once somewhere and again at the row's end, where
the answer is the token that followed it the first time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gecko_lab.components.registry import option

from .task import Examples, SyntheticConfig, blank


@dataclass
class InductionConfig(SyntheticConfig):
    name: str = option("induction", "induction heads: what followed the special token?")
    vocab_size: int = option(16, "tokens; the last is the special one")
    seq_len: int = option(256, "tokens in a row, the question at its end included")

    @property
    def answers(self) -> int:
        return 1

    def _check_task(self) -> None:
        self.need("vocab_size", 3, "the special token and two others")
        self.need("seq_len", 3, "the special token, what follows it, and the question")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        out = blank(count, self.seq_len)
        out.tokens[:] = rng.integers(0, self.vocab_size - 1, out.tokens.shape)
        rows, first = np.arange(count), rng.integers(0, self.seq_len - 2, count)
        out.tokens[rows, first] = out.tokens[:, -1] = self.vocab_size - 1
        out.targets[:, -1], out.scored[:, -1] = out.tokens[rows, first + 1], True
        out.distances[:, -1] = self.seq_len - 2 - first  # to the answer
        return out
