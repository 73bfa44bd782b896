"""One shard of a token store: documents to a file of tokens, an index and a record that says both are complete.

A shard's content is a function of its documents and the options; its record is written last, and carries a key over
both, so that a restart keeps exactly the shards that would come out the same.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .reader import Raw, text_of
from .tokenizers import Tokenizer, load_tokenizer

VERSION = 1
START, TOKENS, BYTES, VAL = range(4)  # columns of the index
SAMPLE, SAMPLES = 1 << 12, 16  # the cheap checksum reads so many blocks of so many bytes


@dataclass(frozen=True)
class Options:
    """What decides a shard's content beside its documents."""

    tokenizer: str
    tokenizer_fingerprint: str
    text_field: str
    val_fraction: float

    def key(self) -> bytes:
        # Not the tokenizer's name: that is a path, and a moved file is the same tokenizer.
        return repr((VERSION, self.tokenizer_fingerprint, self.text_field, self.val_fraction)).encode()


Record = dict[str, Any]


def shard_files(folder: Path, number: int) -> tuple[Path, Path, Path]:
    """(tokens, index, record) of a shard."""
    stem = f"shard-{number:05d}"
    return folder / f"{stem}.tokens", folder / f"{stem}.index.npy", folder / f"{stem}.json"


def write_shard(folder: Path, number: int, documents: list[tuple[Raw, bool]], options: Options) -> Record:
    """Tokenize documents, each with whether it is given as validation, into a shard; a finished one is kept.

    DataError: a document that is no text, a full disk, a folder that cannot be written.
    """
    digest = hashlib.sha256(options.key())
    for raw, val in documents:
        digest.update(f"{raw.name}\0{raw.line}\0{val}\0{len(raw.data)}\0".encode())
        digest.update(raw.data)
    key = digest.hexdigest()
    kept = _finished(folder, number, key)
    if kept is not None:
        return kept
    tokenizer = _tokenizer(options.tokenizer)
    if tokenizer.fingerprint != options.tokenizer_fingerprint:
        raise DataError(f"tokenizer {options.tokenizer}: its file changed during the run")
    arrays: list[np.ndarray] = []
    rows: list[tuple[int, int, int, int]] = []
    counts = np.zeros((2, 256), dtype=np.int64)
    start = token_bytes = 0
    for raw, given in documents:
        text = text_of(raw, options.text_field)
        ids = tokenizer.encode(text) if text else np.zeros(0, dtype=tokenizer.dtype)
        if not len(ids):
            continue
        val = given or _held_out(text, options.val_fraction)
        counts[int(val)] += np.bincount(np.frombuffer(text, dtype=np.uint8), minlength=256)
        arrays.append(ids)
        rows.append((start, len(ids), len(text), int(val)))
        token_bytes += tokenizer.count_bytes(ids) - tokenizer.prefix_bytes if tokenizer.name != "bytes" else len(ids)
        start += len(ids)
    index = np.asarray(rows, dtype=np.int64).reshape(-1, 4)
    tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype=tokenizer.dtype)
    content = tokens.astype(tokenizer.dtype.newbyteorder("<"), copy=False).view(np.uint8).data
    buffer = io.BytesIO()
    np.save(buffer, index)
    tokens_file, index_file, record_file = shard_files(folder, number)
    write_file(tokens_file, content)
    write_file(index_file, buffer.getbuffer())
    record = {
        "key": key,
        "documents": len(rows),
        "empty": len(documents) - len(rows),
        "tokens": start,
        "bytes": int(counts.sum()),
        "token_bytes": token_bytes,
        "byte_counts": counts.tolist(),
        "lengths": np.bincount(np.frexp(index[:, TOKENS].astype(np.float64))[1], minlength=1).tolist(),
        "tokens_sha256": hashlib.sha256(content).hexdigest(),
        "tokens_sample": sample_checksum(tokens_file),
        "index_sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
    }
    write_file(record_file, json.dumps(record).encode())
    return record


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write, flush to the disk, then rename: the name never stands for half a file. DataError: disk full and alike."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{path}: disk full. Nothing half-written was kept; free some space and run the same command again, "
                "it continues with the shards that are finished"
            ) from None
        raise DataError(f"{path}: {error.strerror or error}") from None


def sample_checksum(path: Path) -> str:
    """sha256 over blocks spread evenly over the file, its ends included."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(max(size - SAMPLE, 0) * i // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """sha256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finished(folder: Path, number: int, key: str) -> Record | None:
    tokens_file, index_file, record_file = shard_files(folder, number)
    try:
        record: Record = json.loads(record_file.read_bytes())
        whole = (
            record["key"] == key
            and file_checksum(tokens_file) == record["tokens_sha256"]
            and file_checksum(index_file) == record["index_sha256"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if whole else None


def _held_out(text: bytes, fraction: float) -> bool:
    """By the text's own hash: equal documents go the same way, wherever they lie."""
    return fraction > 0 and int.from_bytes(hashlib.sha256(text).digest()[:6], "big") < fraction * 2**48


@functools.lru_cache(maxsize=1)
def _tokenizer(name: str) -> Tokenizer:
    return load_tokenizer(name)
