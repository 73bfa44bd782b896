"""What the synthetic tasks have in common: rows of tokens that ask questions, and which positions must answer.

A task is the dataclass of its options: ``data=NAME`` chooses it, ``draw`` makes examples out of a random stream and
nothing else, so that the same stream gives the same examples on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gecko_lab.components.registry import option

from ..config import DataConfig
from ..errors import DataError
from ..tokenizers import Tokenizer

BLANK = 0  # the token that says nothing, in every task but ListOps
TRAIN, ORDER, FIXED, VAL = range(4)  # one family of random streams for each use: validation examples are none of the
# training's whatever the seed


class Examples(NamedTuple):
    """``tokens`` (B, L) int64 are read. Where ``scored`` (B, L) bool, the answer is ``targets`` (B, L) int64 and what
    it follows from was read ``distances`` (B, L) int64 tokens earlier (0: nowhere in particular); elsewhere both are 0.
    Every row has the same number of scored positions, ``SyntheticConfig.answers``."""

    tokens: np.ndarray
    targets: np.ndarray
    scored: np.ndarray
    distances: np.ndarray


@dataclass
class SyntheticConfig(DataConfig):
    """Options that every synthetic task has; ``seq_len`` is the length of a row, ``vocab_size`` the model's too."""

    vocab_size: int = option(16, "tokens of the task")
    examples: int = option(0, "training examples, read again and again in new orders; 0: new ones for ever")
    val_batches: int = option(8, "validation batches, the same in every run")

    def draw(self, rng: np.random.Generator, count: int) -> Examples:
        """``count`` examples."""
        raise NotImplementedError

    @property
    def answers(self) -> int:
        """Scored positions of a row."""
        raise NotImplementedError

    def check(self) -> None:
        plain = DataConfig(name=self.name)
        for field in ("path", "weights", "mixture", "val_path", "val_fraction", "text_field", "tokenizer", "truncate"):
            if getattr(self, field) != getattr(plain, field):
                raise DataError(f"data.{field}={getattr(self, field)!r} with data={self.name}: is for text")
        if self.mode != "pack":
            raise DataError(f"data.mode={self.mode} with data={self.name}: every row is an example; use pack")
        for field, lowest in (("seq_len", 1), ("val_batches", 1), ("workers", 0), ("examples", 0)):
            if getattr(self, field) < lowest:
                raise DataError(f"data.{field}={getattr(self, field)}: must be at least {lowest} with data={self.name}")
        self._check_task()

    def _check_task(self) -> None:
        """Refuse what the task cannot make."""
        raise NotImplementedError

    def need(self, field: str, lowest: float, why: str) -> None:
        """DataError when ``data.FIELD`` is less than ``lowest``."""
        value = getattr(self, field)
        if value < lowest:
            raise DataError(f"data.{field}={value}: data={self.name} needs at least {lowest:g}: {why}")

    @property
    def fingerprint(self) -> str:
        """Changes when an option changes, or what the generator makes of it."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("val_batches", "workers")}
        digest = hashlib.sha256(repr(sorted(values.items())).encode())
        for part in self.draw(np.random.default_rng([VAL]), 4):
            digest.update(part.tobytes())
        return digest.hexdigest()


def blank(count: int, length: int) -> Examples:
    """Examples of blanks and no question, to be filled."""
    tokens, targets, distances = (np.zeros((count, length), dtype=np.int64) for _ in range(3))
    return Examples(tokens, targets, np.zeros((count, length), dtype=bool), distances)


def distinct(rng: np.random.Generator, count: int, take: int, low: int, high: int) -> np.ndarray:
    """(count, take) int64: in each row different numbers of [low, high), every choice and order equally likely.

    Floyd's sampling, all rows at once: its work does not grow with the range.
    """
    size = high - low
    chosen = np.full((count, take), -1, dtype=np.int64)
    for i, top in enumerate(range(size - take, size)):
        drawn = rng.integers(0, top + 1, count)
        chosen[:, i] = np.where((chosen == drawn[:, None]).any(1), top, drawn)
    return rng.permuted(chosen, axis=1) + low


def weighted_places(rng: np.random.Generator, count: int, take: int, weights: np.ndarray) -> np.ndarray:
    """(count, take) int64: in each row different indices of ``weights``, drawn one after another by weight.

    The largest of log weight + Gumbel noise are such a draw. Their order is then random.
    """
    score = np.log(weights) + rng.gumbel(size=(count, len(weights)))
    return rng.permuted(np.argpartition(-score, take - 1, axis=1)[:, :take], axis=1)


class TaskTokenizer(Tokenizer):
    """Stands where a text's tokenizer would: there is no text, and no token begins a document."""

    def __init__(self, config: SyntheticConfig) -> None:
        self.name, self.vocab_size, self.bos_id = f"of data={config.name}", config.vocab_size, -1
        self.fingerprint = config.fingerprint
        self.byte_lengths = np.zeros(config.vocab_size, dtype=np.int64)

    def _encode(self, text: bytes) -> np.ndarray:
        raise DataError(f"the tokens {self.name} are numbers and no text; python -m gecko_lab.evaluate RUN task=recall")

    def decode(self, ids: Any) -> str:
        return " ".join(str(int(i)) for i in ids)
