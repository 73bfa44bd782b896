"""Selective copying, after Jing et al. (arXiv 1706.02761) as posed in Gu and Dao, "Mamba" (arXiv 2312.00752).

n tokens stand at random places among blanks; the row ends with n times the token that asks, where the answers are the n
tokens in their order. As the gaps differ from row to row, a filter that is fixed in time cannot do it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gecko_lab.components.registry import option

from .task import Examples, SyntheticConfig, blank, distinct

ASK = 1


@dataclass
class SelectiveCopyConfig(SyntheticConfig):
    name: str = option("selective_copy", "copy the tokens that stand among blanks")
    vocab_size: int = option(16, "tokens: 0 is blank, 1 asks, the others are copied")
    seq_len: int = option(256, "tokens in a row, the questions at its end included")
    copies: int = option(16, "tokens to copy in a row")

    @property
    def answers(self) -> int:
        return self.copies

    def _check_task(self) -> None:
        self.need("vocab_size", 4, "the blank, the one that asks, and two to copy")
        self.need("copies", 1, "there must be something to copy")
        self.need("seq_len", 2 * self.copies, f"{self.copies} tokens to copy, and as many questions")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        n, begin = self.copies, self.seq_len - self.copies
        out = blank(count, self.seq_len)
        places = np.sort(distinct(rng, count, n, 0, begin), axis=1)
        copied = rng.integers(ASK + 1, self.vocab_size, (count, n))
        out.tokens[np.arange(count)[:, None], places] = copied
        out.tokens[:, begin:] = ASK
        out.targets[:, begin:], out.scored[:, begin:] = copied, True
        out.distances[:, begin:] = np.arange(begin, self.seq_len) - places
        return out
