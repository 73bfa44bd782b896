"""Text files to a token store, by several processes; the result does not depend on how many."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError
from .reader import Raw, SourceFile, find_files, read_raw
from .shards import Options, Record, shard_files, write_file, write_shard
from .store import MANIFEST, Store, make_manifest, open_store
from .tokenizers import load_tokenizer

Progress = Callable[[int], None]


@dataclass
class Request:
    """What ``prepare`` is asked to do; ``val_sources`` replaces the held-out ``val_fraction``."""

    sources: list[str]
    out: Path
    tokenizer: str = "bytes"
    text_field: str = "text"
    val_fraction: float = 0.05
    val_sources: list[str] | None = None
    workers: int = 1
    shard_bytes: int = 16 << 20
    overwrite: bool = False


def list_files(request: Request) -> list[tuple[SourceFile, bool]]:
    """Every file once, in order, with whether it is given as validation. DataError: a file in both parts."""
    found: dict[Path, tuple[SourceFile, bool]] = {}
    for specs, val in ((request.sources, False), (request.val_sources or [], True)):
        for file in itertools.chain.from_iterable(find_files(spec) for spec in specs):
            known = found.setdefault(file.path.resolve(), (file, val))
            if known[1] != val:
                raise DataError(f"{file.path}: given for training and for validation")
    return list(found.values())


def prepare(request: Request, progress: Progress = lambda size: None) -> Store:
    """Make the store, keeping the shards that an interrupted run has finished; ``progress`` gets bytes read on disk.

    DataError: anything wrong with sources, tokenizer or folder; the folder is then no store, and a later call goes on.
    """
    for name, value, least in (("workers", request.workers, 1), ("shard_bytes", request.shard_bytes, 1)):
        if value < least:
            raise DataError(f"{name}={value}: must be at least {least}")
    if not 0.0 <= request.val_fraction < 1.0:
        raise DataError(f"val_fraction={request.val_fraction}: must be in [0, 1)")
    files = list_files(request)
    tokenizer = load_tokenizer(request.tokenizer)
    fraction = 0.0 if request.val_sources else request.val_fraction
    options = Options(request.tokenizer, tokenizer.fingerprint, request.text_field, fraction)
    with _locked(request.out):
        manifest_file = request.out / MANIFEST
        if manifest_file.exists():
            if not request.overwrite:
                raise DataError(f"{request.out}: holds a finished store; --overwrite replaces it, --verify checks it")
            manifest_file.unlink()
        for leftover in request.out.glob(".tmp-*"):
            leftover.unlink()
        records = _write_shards(request, files, options, progress)
        if not sum(record["documents"] for record in records):
            raise DataError(f"{', '.join(request.sources)}: no text, all documents are empty")
        copied: str | None = None
        if tokenizer.file is not None:
            copied = f"tokenizer{tokenizer.file.suffix}"
            write_file(request.out / copied, tokenizer.file.read_bytes())
        described: dict[str, Any] = {"text_field": request.text_field, "val_fraction": fraction}
        write_file(manifest_file, make_manifest(records, tokenizer, copied, described))
        _remove_stale(request.out, len(records))
    return open_store(request.out)


def _write_shards(
    request: Request, files: list[tuple[SourceFile, bool]], options: Options, progress: Progress
) -> list[Record]:
    batches = enumerate(_batches(files, request.shard_bytes, progress))
    if request.workers == 1:
        return [write_shard(request.out, number, batch, options) for number, batch in batches]
    records: dict[int, Record] = {}
    pending: dict[Future[Record], int] = {}

    def collect() -> None:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            records[pending.pop(future)] = future.result()

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(request.workers, context, initializer=_end_with_parent) as pool:
        try:
            for number, batch in batches:
                pending[pool.submit(write_shard, request.out, number, batch, options)] = number
                while len(pending) > request.workers:  # one waits for each that works: memory stays bounded
                    collect()
            while pending:
                collect()
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed (out of memory?); run the same command again, perhaps with fewer workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    return [records[number] for number in sorted(records)]


def _batches(files: list[tuple[SourceFile, bool]], size: int, progress: Progress) -> Iterator[list[tuple[Raw, bool]]]:
    """Documents in order, cut where ``size`` bytes are reached: the shards, whoever writes them."""
    batch: list[tuple[Raw, bool]] = []
    held = 0
    for file, val in files:
        for raw in read_raw(file, progress):
            batch.append((raw, val))
            held += len(raw.data)
            if held >= size:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def _end_with_parent() -> None:
    """A worker whose parent was killed ends too, instead of waiting for work for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as file:
            with suppress(ImportError):  # no file locks there (Windows): the rest is the same
                import fcntl

                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise DataError(f"{folder}: another gecko_lab.prepare works in this folder") from None
            yield
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from None


def _remove_stale(folder: Path, count: int) -> None:
    current = {file for number in range(count) for file in shard_files(folder, number)}
    for file in folder.glob("shard-*"):
        if file not in current:
            file.unlink()
