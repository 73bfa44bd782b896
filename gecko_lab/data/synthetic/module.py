"""Synthetic examples as the data of a run: batches are a function of (seed, step), so that a restart is exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ..batches import Batch, Loader, TrainLoader
from ..module import LabData
from .task import FIXED, ORDER, TRAIN, VAL, Examples, SyntheticConfig

BLOCK = 1024  # examples of a fixed set that come of one random stream


class SyntheticBatches(Dataset[Batch]):
    """``batches[step]`` -> tokens, targets (B, L) int64, scored (B, L) bool, bytes () int64 (0: there is no text).

    Rank r of W has the rows [r * B, (r + 1) * B) of a global batch of W * B examples, whatever W is.
    """

    def __init__(
        self, config: SyntheticConfig, stream: list[int], batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.config, self.stream = config, stream
        self.every = batch_size * world_size
        self.mine = slice(rank * batch_size, (rank + 1) * batch_size)

    def __len__(self) -> int:
        return self.config.val_batches

    def examples(self, step: int) -> Examples:
        """This rank's part of a step."""
        drawn = self.config.draw(np.random.default_rng([*self.stream, step]), self.every)
        return Examples(*(part[self.mine] for part in drawn))

    def __getitem__(self, step: int) -> Batch:
        drawn = self.examples(step)
        names = ("tokens", "targets", "scored")
        return {name: torch.from_numpy(getattr(drawn, name).copy()) for name in names} | {"bytes": torch.tensor(0)}


class FixedBatches(SyntheticBatches):
    """The same ``config.examples`` examples in every epoch, each once, in an order of its own; all in memory."""

    def __init__(self, config: SyntheticConfig, seed: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(config, [FIXED, seed], batch_size, rank, world_size)
        kind = np.min_scalar_type(max(config.vocab_size, config.seq_len))
        blocks = []
        for first in range(0, config.examples, BLOCK):
            drawn = config.draw(np.random.default_rng([FIXED, seed, first]), min(BLOCK, config.examples - first))
            blocks.append([part if part.dtype == bool else part.astype(kind) for part in drawn])
        self.all = [np.concatenate(parts) for parts in zip(*blocks)]
        self.seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def examples(self, step: int) -> Examples:
        indices = np.arange(step * self.every, (step + 1) * self.every)[self.mine]
        chosen = [self._place(*divmod(int(i), self.config.examples)) for i in indices]
        parts = (part[chosen] for part in self.all)
        return Examples(*(part if part.dtype == bool else part.astype(np.int64) for part in parts))

    def _place(self, epoch: int, inner: int) -> int:
        if self._order[0] != epoch:
            order = np.random.default_rng([ORDER, self.seed, epoch]).permutation(self.config.examples)
            self._order = epoch, order
        return int(self._order[1][inner])


class SyntheticData(LabData):
    """``LabData`` without text: no tokenizer, no documents (a row is one), answers at some positions only."""

    config: SyntheticConfig

    def setup(self, stage: str | None = None) -> None:
        pass

    def train_dataloader(self, start_step: int = 0) -> TrainLoader:
        place = (self.batch_size, *self._place())
        batches: SyntheticBatches
        if self.config.examples:
            batches = FixedBatches(self.config, self.seed, *place)
        else:
            batches = SyntheticBatches(self.config, [TRAIN, self.seed], *place)
        return TrainLoader(batches, self.total_batches, self.config.workers, start_step)

    def val_dataloader(self) -> Loader:
        batches = SyntheticBatches(self.config, [VAL], self.batch_size, *self._place())
        return Loader(batches, len(batches), self.config.workers)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def bos_id(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        """Facts for the log."""
        config = self.config
        return {
            "data": config.name,
            "fingerprint": self.fingerprint,
            "tokenizer": f"of data={config.name}",
            "vocab_size": config.vocab_size,
            "train_examples": config.examples,
            "val_batches": config.val_batches,
            "answers": config.answers,
        }

    @property
    def fingerprint(self) -> str:
        return self.config.fingerprint

