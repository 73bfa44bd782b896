"""The options of ``data.*``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gecko_lab.components.registry import option

from .errors import DataError


@dataclass
class DataConfig:
    """Where text comes from and how it becomes batches. ``path``, ``val_path`` take one name or a list of names."""

    name: str = option(
        "stdlib", "stdlib (this Python's own library), text (files, folders, globs), store (prepared), or a task's name"
    )
    path: Any = option(
        None, "file, folder or glob (text), or the folder of a token store (store); a list mixes several"
    )
    weights: list[float] | None = option(None, "share of the rows that each entry of path gets; null: by its tokens")
    mixture: list[Any] | None = option(None, "the same as one list: [{path: A, weight: 0.7}, {path: B, weight: 0.3}]")
    val_path: Any = option(None, "text or store for validation; null: a part of path is held out")
    val_fraction: float | None = option(None, "part held out; null: 0.05 of the files, 0.1 of a single file")
    text_field: str = option("text", "field of a .jsonl row that holds the text")
    tokenizer: str = option(
        "bytes", "bytes, hf:FILE.json, spm:FILE.model or tiktoken:NAME|FILE; a store brings its own"
    )
    mode: str = option("pack", "pack: rows cut from packed documents; stream: every row is one endless stream")
    truncate: bool = option(False, "pack: begin every row with a document, drop what does not fit at its end")
    seq_len: int = option(512, "tokens in a row")
    val_batches: int = option(50, "validation batches, spread evenly over the split; 0: all of it")
    workers: int = option(0, "processes that make batches beside the training process")

    def check(self) -> None:
        """Refuse impossible values: DataError names the field, the value and the rule."""
        if self.name not in ("stdlib", "text", "store"):
            raise DataError(f"data.name={self.name!r}: must be stdlib, text or store")
        if self.mode not in ("pack", "stream"):
            raise DataError(f"data.mode={self.mode!r}: must be pack or stream")
        if self.truncate and self.mode != "pack":
            raise DataError(f"data.truncate=true with data.mode={self.mode}: truncation is for data.mode=pack")
        if self.seq_len < 1:
            raise DataError(f"data.seq_len={self.seq_len}: must be at least 1")
        if self.val_fraction is not None and not 0.0 < self.val_fraction < 1.0:
            raise DataError(f"data.val_fraction={self.val_fraction}: must be between 0 and 1")
        for field in ("val_batches", "workers"):
            if getattr(self, field) < 0:
                raise DataError(f"data.{field}={getattr(self, field)}: must not be negative")
        if self.name == "stdlib" and (self.path is not None or self.mixture or self.val_path is not None):
            raise DataError(
                f"data.path={self.path!r} with data.name=stdlib: say data=text or data=store to read a path"
            )
        if self.name != "stdlib" and self.path is None and not self.mixture:
            raise DataError(f"data={self.name} needs data.path=...")

    def parts(self) -> list[tuple[str, float | None]]:
        """The (path, weight) pairs of the mixture; a weight of None means by tokens."""
        if self.mixture:
            if self.path is not None or self.weights is not None:
                raise DataError("data.mixture stands instead of data.path and data.weights: give one of the two")
            for entry in self.mixture:
                if "path" not in entry or "weight" not in entry:
                    raise DataError(f"data.mixture: {dict(entry)} needs path and weight")
            pairs = [(str(entry["path"]), entry["weight"]) for entry in self.mixture]
        else:
            paths = as_list(self.path)
            weights = list(self.weights) if self.weights is not None else [None] * len(paths)
            if len(weights) != len(paths):
                raise DataError(f"data.weights={weights}: {len(weights)} weights for {len(paths)} paths")
            pairs = list(zip(paths, weights))
        for path, weight in pairs:
            if weight is not None and not (isinstance(weight, int | float) and 0 < weight < float("inf")):
                raise DataError(f"weight {weight} of {path}: must be a positive number")
        return [(path, None if weight is None else float(weight)) for path, weight in pairs]


def as_list(value: Any) -> list[str]:
    """One name or a list of names, as a list."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]
