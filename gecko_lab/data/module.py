"""The data of a run, for the trainer."""

from __future__ import annotations

import hashlib
import sys
from typing import Any

import lightning

from . import corpora
from .batches import Batches, Loader, TrainLoader, ValBatches
from .config import DataConfig, as_list
from .corpora import Split
from .errors import DataError
from .rows import MixedRows, PackedRows, Rows, StreamRows, TokenStream, TruncatedRows
from .source import TokenSource, join, unigram_entropy
from .store import open_store
from .tokenizers import Tokenizer, load_tokenizer


class LabData(lightning.LightningDataModule):
    """Corpora, tokenizer and loaders of a run: ``batch_size`` rows a process, the same global batch on any number.

    ``total_batches`` is the length of the training loader (micro-batches, not optimiser steps); None is endless.
    ``setup`` may be called before the model is built (``tokenizer`` is there after it) and does its work once.
    DataError: anything about the data that the user must mend.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        batch_size: int,
        total_batches: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        config.check()
        if batch_size < 1:
            raise DataError(f"batch_size={batch_size}: must be at least 1")
        self.config, self.seed, self.batch_size = config, seed, batch_size
        self.total_batches = sys.maxsize if total_batches is None else total_batches
        self._rank, self._world_size = rank, world_size
        self.tokenizer: Tokenizer
        self.sources: list[TokenSource] = []
        self.weights: list[float] = []
        self.val_source: TokenSource
        self.skipped = 0

    @property
    def vocab_size(self) -> int:
        """Tokens that the model must know."""
        return self.tokenizer.vocab_size

    @property
    def bos_id(self) -> int | None:
        """The token that begins a document; None: each row is one."""
        return self.tokenizer.bos_id

    def setup(self, stage: str | None = None) -> None:
        if self.sources:
            return
        config = self.config
        splits, weights = self._splits()
        held = self._read(as_list(config.val_path), training=False)
        vals = [s.train for s in held] or [s.val for s in splits if s.val is not None]
        if not vals:
            raise DataError(f"data.path={config.path}: nothing is held out for validation; give data.val_path")
        self.sources = [split.train for split in splits]
        for source in self.sources:
            if not source.token_count:
                raise DataError(f"data={config.name}: no training text is left beside the validation part")
        self.weights = [float(s.token_count) if w is None else w for s, w in zip(self.sources, weights)]
        self.val_source = vals[0] if len(vals) == 1 else join(vals)
        self.skipped = sum(split.skipped for split in [*splits, *held])
        self._val_batches()

    def train_dataloader(self, start_step: int = 0) -> TrainLoader:
        """Batches from ``start_step`` on; Lightning saves and restores the position by its ``state_dict``."""
        self.setup()
        rank, world_size = self._place()
        batches = Batches(self._rows(self.batch_size * world_size), self.tokenizer, self.batch_size, rank)
        return TrainLoader(batches, self.total_batches, self.config.workers, start_step)

    def val_dataloader(self) -> Loader:
        """The fixed validation batches."""
        self.setup()
        batches = self._val_batches()
        return Loader(batches, len(batches), self.config.workers)

    def describe(self) -> dict[str, Any]:
        """Facts for the log: corpus, fingerprint, sizes, and the validation text's unigram entropy in bits a byte."""
        self.setup()
        return {
            "data": self.config.name,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.tokenizer.vocab_size,
            "train_documents": sum(s.documents for s in self.sources),
            "train_tokens": sum(s.token_count for s in self.sources),
            "train_bytes": sum(s.byte_count for s in self.sources),
            "val_documents": self.val_source.documents,
            "val_tokens": self.val_source.token_count,
            "val_bytes": self.val_source.byte_count,
            "val_batches": len(self._val_batches()),
            "empty_documents_skipped": self.skipped,
            "val_unigram_bits_per_byte": unigram_entropy(self.val_source.byte_counts),
        }

    @property
    def fingerprint(self) -> str:
        """Changes when any text, split, tokenizer or share changes."""
        self.setup()
        parts = [*(s.fingerprint for s in self.sources), self.val_source.fingerprint, self.tokenizer.fingerprint]
        return hashlib.sha256(repr((parts, self.weights)).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """What must be the same for a position in the data to mean the same batch."""
        config = self.config
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "mode": config.mode,
            "truncate": config.truncate,
            "seq_len": config.seq_len,
            "global_batch": self.batch_size * self._place()[1],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to continue on other data than the run began with."""
        now = self.state_dict()
        changed = [f"{key} was {state_dict.get(key)}, is {now[key]}" for key in now if state_dict.get(key) != now[key]]
        if changed:
            raise DataError("the data changed since the run began: " + "; ".join(changed))

    def _splits(self) -> tuple[list[Split], list[float | None]]:
        config = self.config
        if config.name == "stdlib":
            self.tokenizer = load_tokenizer(config.tokenizer)
            return [corpora.stdlib(self.tokenizer, config.val_fraction)], [None]
        pairs = config.parts()
        return self._read([path for path, _ in pairs], training=True), [w for _, w in pairs]

    def _read(self, paths: list[str], training: bool) -> list[Split]:
        config = self.config
        hold_out = training and config.val_path is None
        if config.name == "store":
            stores = [open_store(path) for path in paths]
            for path, store in zip(paths, stores):
                if not hasattr(self, "tokenizer"):
                    self.tokenizer = store.tokenizer()
                if store.tokenizer_fingerprint != self.tokenizer.fingerprint:
                    raise DataError(f"{path}: prepared with another tokenizer than the other stores of this run")
            return [store.split() if training else Split(store.everything(), None) for store in stores]
        self.tokenizer = load_tokenizer(config.tokenizer)
        return [corpora.text(p, self.tokenizer, config.text_field, config.val_fraction, hold_out) for p in paths]

    def _rows(self, batch: int) -> Rows:
        config, bos = self.config, self.tokenizer.bos_id
        if config.mode == "stream":
            return StreamRows(self.sources, self.weights, bos, config.seq_len, batch, self.seed)
        streams = [TokenStream(source, bos, self.seed, key=key) for key, source in enumerate(self.sources)]
        cutter = TruncatedRows if config.truncate else PackedRows
        parts = [cutter(stream, config.seq_len, batch) for stream in streams]
        return parts[0] if len(parts) == 1 else MixedRows(parts, self.weights, batch, self.seed)

    def _val_batches(self) -> ValBatches:
        stream = TokenStream(self.val_source, self.tokenizer.bos_id, seed=0, shuffle=False)
        rows = PackedRows(stream, self.config.seq_len, self.batch_size, shuffle=False)
        return ValBatches(rows, self.tokenizer, self.batch_size, *self._place(), limit=self.config.val_batches)

    def _place(self) -> tuple[int, int]:
        """(rank, world size): as given, else the trainer's."""
        trainer = self.trainer
        rank = self._rank if self._rank is not None else (trainer.global_rank if trainer else 0)
        return rank, self._world_size if self._world_size is not None else (trainer.world_size if trainer else 1)


def lab_data(config: DataConfig, seed: int, batch_size: int, total_batches: int | None = None) -> LabData:
    """The data module of a configuration: text, or the examples of a synthetic task."""
    from .synthetic import SyntheticConfig
    from .synthetic.module import SyntheticData

    kind = SyntheticData if isinstance(config, SyntheticConfig) else LabData
    return kind(config, seed, batch_size, total_batches)
