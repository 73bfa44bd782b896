"""Batches as a function of the step, and the loaders that count through them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import DataError
from .rows import PackedRows, Rows
from .tokenizers import Tokenizer

Batch = dict[str, Tensor]


class Batches(Dataset[Batch]):
    """``batches[step]`` -> tokens (B, L) int64, targets (B, L) int64, bytes () int64.

    ``targets`` are the tokens one later; ``bytes`` is the number of source bytes that the targets stand for (a BOS
    stands for none). Rank r of W holds the rows [r * B, (r + 1) * B) of the same global batch of W * B rows.
    """

    def __init__(self, rows: Rows, tokenizer: Tokenizer, batch_size: int, rank: int = 0) -> None:
        self.rows, self.batch_size, self.rank = rows, batch_size, rank
        self.bos_id, self.prefix_bytes = tokenizer.bos_id, tokenizer.prefix_bytes
        self.byte_lengths = tokenizer.byte_lengths

    def __getitem__(self, step: int) -> Batch:
        first = self.rank * self.batch_size
        return self._batch([self.rows.read(step, first + i) for i in range(self.batch_size)])

    def _batch(self, rows: list[np.ndarray]) -> Batch:
        block = np.stack(rows)
        tokens, targets = block[:, :-1], block[:, 1:]
        size = int(self.byte_lengths[targets].sum())
        if self.prefix_bytes:
            size -= self.prefix_bytes * int(((tokens == self.bos_id) & (targets != self.bos_id)).sum())
        return {
            "tokens": torch.from_numpy(tokens.copy()),
            "targets": torch.from_numpy(targets.copy()),
            "bytes": torch.tensor(size),
        }


class ValBatches(Batches):
    """A fixed list of packed rows, spread evenly over the split: the same in every run and at every validation.

    Rows that do not fill the split's last row or last global batch are left out; of a split smaller than one global
    batch, the batch holds the rows that there are.
    """

    def __init__(
        self,
        rows: PackedRows,
        tokenizer: Tokenizer,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        limit: int = 0,
    ) -> None:
        super().__init__(rows, tokenizer, batch_size, rank)
        whole = (rows.stream.tokens - 1) // rows.length
        self.batch_size = min(batch_size, whole // world_size)
        if self.batch_size < 1:
            raise DataError(
                f"too little validation text: {rows.stream.tokens} tokens; data.seq_len={rows.length} on {world_size} "
                f"process(es) needs {rows.length * world_size + 1}; hold out more, give data.val_path or shorten rows"
            )
        self.every = self.batch_size * world_size
        self.count = whole // self.every if limit == 0 else min(limit, whole // self.every)
        chosen = self.count * self.every
        self.chosen = np.arange(chosen) * whole // chosen
        self.packed = rows

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, step: int) -> Batch:
        first = step * self.every + self.rank * self.batch_size
        return self._batch([self.packed.read_row(int(i)) for i in self.chosen[first : first + self.batch_size]])


class Loader:
    """Counts through batches in order; ``len`` is how many there are in all, wherever it starts."""

    def __init__(self, batches: Dataset[Batch], total: int, workers: int = 0) -> None:
        self.batches, self.total, self.workers = batches, total, workers

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._from(0))

    def _from(self, step: int) -> DataLoader[Any]:
        return DataLoader(
            self.batches,
            batch_size=None,
            sampler=range(step, self.total),
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the global one would make a resumed run's dropout differ
        )


class TrainLoader(Loader):
    """A loader that continues: ``position`` is the next batch, and the whole state of the data."""

    def __init__(self, batches: Dataset[Batch], total: int, workers: int = 0, start: int = 0) -> None:
        super().__init__(batches, total, workers)
        self.position = start

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._from(self.position):
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = int(state["position"])
