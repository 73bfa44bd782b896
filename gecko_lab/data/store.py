"""A folder of tokens: shards, a manifest, and the tokenizer's own file.

manifest.json           what the store holds, from which text, by which tokenizer; checksums of every file
shard-NNNNN.tokens      the tokens of whole documents, without BOS, little-endian unsigned integers
shard-NNNNN.index.npy   int64 (documents, 4): first token, tokens, bytes of text, 1 for validation
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from .corpora import Split
from .errors import DataError
from .shards import START, TOKENS, VAL, VERSION, Record, file_checksum, sample_checksum, shard_files
from .source import ShardedTokens, TokenSource
from .tokenizers import Tokenizer, load_tokenizer

FORMAT = "gecko_lab token store"
MANIFEST = "manifest.json"


class Store:
    """An opened and checked store."""

    def __init__(self, path: Path, manifest: dict[str, Any], index: np.ndarray, tokens: ShardedTokens) -> None:
        self.path, self.manifest, self._index, self._tokens = path, manifest, index, tokens

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def tokenizer_fingerprint(self) -> str:
        return str(self.manifest["tokenizer"]["fingerprint"])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store."""
        described = self.manifest["tokenizer"]
        kind = described["name"].partition(":")[0]
        name = f"{kind}:{self.path / described['file']}" if described["file"] else described["name"]
        tokenizer = load_tokenizer(name)
        if tokenizer.fingerprint != described["fingerprint"]:
            raise DataError(f"{self.path}: tokenizer {name} is not the one that made the store")
        return tokenizer

    def split(self) -> Split:
        """The training documents, and the ones held out when the store was made."""
        val = self._index[:, VAL] == 1
        return Split(
            self._select(~val, "train", (0,)), self._select(val, "val", (1,)) if val.any() else None, self._empty()
        )

    def everything(self) -> TokenSource:
        """All documents."""
        return self._select(np.ones(len(self._index), dtype=bool), "all", (0, 1))

    def _select(self, chosen: np.ndarray, name: str, splits: tuple[int, ...]) -> TokenSource:
        counts = np.sum([np.asarray(s["byte_counts"])[list(splits)].sum(0) for s in self.manifest["shards"]], axis=0)
        fingerprint = hashlib.sha256(f"{self.fingerprint} {name}".encode()).hexdigest()
        index = self._index[chosen]
        return TokenSource(self._tokens, index[:, START].copy(), index[:, TOKENS].copy(), counts, fingerprint)

    def _empty(self) -> int:
        return int(self.manifest["empty_documents_skipped"])


def make_manifest(records: list[Record], tokenizer: Tokenizer, file: str | None, options: dict[str, Any]) -> bytes:
    """The manifest of finished shards; a function of its arguments, without times or places."""
    lengths = np.zeros(max(len(r["lengths"]) for r in records), dtype=np.int64)
    for record in records:
        lengths[: len(record["lengths"])] += record["lengths"]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": hashlib.sha256("".join(r["key"] for r in records).encode()).hexdigest(),
        "tokenizer": {
            "name": tokenizer.name if file is None else f"{tokenizer.name.partition(':')[0]}:{file}",
            "file": file,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
        },
        "dtype": tokenizer.dtype.newbyteorder("<").str,
        "options": options,
        **{name: sum(r[name] for r in records) for name in ("documents", "tokens", "bytes", "token_bytes")},
        "val_bytes": sum(sum(r["byte_counts"][1]) for r in records),
        "empty_documents_skipped": sum(r["empty"] for r in records),
        "document_length_histogram": {
            f"{1 << (bits - 1)}..{(1 << bits) - 1} tokens": int(n) for bits, n in enumerate(lengths) if n
        },
        "shards": records,
    }
    manifest["checksum"] = _checksum(manifest)
    return json.dumps(manifest, indent=1).encode()


def open_store(path: str | Path, full: bool = False) -> Store:
    """Open a store: sizes, manifest, index and samples of the tokens are checked, with ``full`` every byte.

    DataError: no store there, an unfinished, newer, damaged or truncated one.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    sizes: list[int] = []
    indexes, dtype = [], np.dtype(manifest["dtype"])
    for number, record in enumerate(manifest["shards"]):
        tokens_file, index_file, _ = shard_files(folder, number)
        _check_shard(tokens_file, index_file, record, dtype, full)
        index = np.load(index_file, allow_pickle=False)
        index[:, START] += sum(sizes)
        indexes.append(index)
        sizes.append(record["tokens"])
    file = manifest["tokenizer"]["file"]
    if file and not (folder / file).is_file():
        raise DataError(f"{folder / file}: the store's tokenizer file is missing")
    kept = [i for i, size in enumerate(sizes) if size]  # an empty file cannot be mapped
    tokens = ShardedTokens([shard_files(folder, i)[0] for i in kept], [sizes[i] for i in kept], dtype.str)
    return Store(folder, manifest, np.concatenate(indexes), tokens)


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; make a store with python -m gecko_lab.prepare SOURCE --out {folder}"
        )
    file = folder / MANIFEST
    if not file.is_file():
        if any(folder.glob("shard-*")):
            raise DataError(f"{folder}: an unfinished store; run the same gecko_lab.prepare command again to finish it")
        raise DataError(f"{folder}: not a token store (no {MANIFEST}); python -m gecko_lab.prepare makes one")
    try:
        manifest = json.loads(file.read_bytes())
        version, checksum = manifest["version"], manifest.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{file}: damaged; prepare the store again") from None
    if manifest.get("format") != FORMAT:
        raise DataError(f"{file}: not the manifest of a token store")
    if version != VERSION:
        raise DataError(f"{file}: store version {version}, this program reads version {VERSION}; prepare it again")
    if checksum != _checksum(manifest):
        raise DataError(f"{file}: damaged, its checksum does not match; prepare the store again")
    return dict(manifest)


def _check_shard(tokens: Path, index: Path, record: Record, dtype: np.dtype[Any], full: bool) -> None:
    for file in (tokens, index):
        if not file.is_file():
            raise DataError(f"{file}: missing; prepare the store again")
    size, expected = tokens.stat().st_size, record["tokens"] * dtype.itemsize
    if size != expected:
        raise DataError(f"{tokens}: truncated or changed, {size} bytes instead of {expected}; prepare the store again")
    whole = file_checksum(index) == record["index_sha256"] and (
        file_checksum(tokens) == record["tokens_sha256"] if full else sample_checksum(tokens) == record["tokens_sample"]
    )
    if not whole:
        raise DataError(f"{tokens.with_suffix('')}: damaged, its checksum does not match; prepare the store again")


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
