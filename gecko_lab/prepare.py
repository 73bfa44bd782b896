"""``python -m gecko_lab.prepare SOURCE... --out DIR``: text to a token store for ``data=store data.path=DIR``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from .cli import complain, guarded
from .data.errors import DataError
from .data.prepare import Request, list_files, prepare
from .data.store import Store, open_store

INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    text = "Turn text into a token store, to train on with data=store data.path=DIR."
    p = argparse.ArgumentParser(prog="python -m gecko_lab.prepare", description=text, allow_abbrev=False)
    p.add_argument("sources", nargs="*", metavar="SOURCE", help="files, folders or globs: text or .jsonl, .xz .gz .zst")
    p.add_argument("--out", type=Path, help="folder of the store; an interrupted run in it is continued")
    p.add_argument("--tokenizer", default="bytes", help="bytes, hf:FILE.json, spm:FILE.model, tiktoken:NAME|FILE")
    p.add_argument("--text-field", default="text", help="field of a .jsonl row that holds the text (default: text)")
    p.add_argument("--val-fraction", type=float, default=0.05, help="documents held out, by their hash (default: 0.05)")
    p.add_argument("--val-source", action="append", metavar="SOURCE", help="validation text instead; may be repeated")
    p.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        help="processes (default: one a core); the result is the same",
    )
    p.add_argument("--shard-mb", type=int, default=16, help="text in a shard, in MiB (default: 16)")
    p.add_argument("--overwrite", action="store_true", help="replace a finished store in --out")
    p.add_argument(
        "--verify", type=Path, metavar="DIR", help="check every byte of a finished store, and do nothing else"
    )
    return p


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 with a message about what to mend, or 130 when it was interrupted."""
    p = parser()
    options = p.parse_args(arguments)
    if options.verify is None and (not options.sources or options.out is None):
        p.error("give SOURCE... and --out DIR (or --verify DIR)")
    try:
        return guarded(lambda: _verify(options.verify) if options.verify else _prepare(options))
    except KeyboardInterrupt:
        complain(DataError("interrupted; the same command continues where it was"))
        return INTERRUPTED


def _verify(path: Path) -> int:
    summary(open_store(path, full=True), "every byte checked")
    return 0


def _prepare(options: argparse.Namespace) -> int:
    request = Request(
        sources=options.sources,
        out=options.out,
        tokenizer=options.tokenizer,
        text_field=options.text_field,
        val_fraction=options.val_fraction,
        val_sources=options.val_source,
        workers=options.workers,
        shard_bytes=options.shard_mb << 20,
        overwrite=options.overwrite,
    )
    began = time.monotonic()
    total = sum(file.path.stat().st_size for file, _ in list_files(request))
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading", total=total)
        store = prepare(request, lambda size: bar.advance(task, size))
    seconds = time.monotonic() - began
    rate = store.manifest["bytes"] / 1e6 / seconds
    summary(store, f"{seconds:.1f} s, {rate:.1f} MB of text a second with {request.workers} processes")
    return 0


def summary(store: Store, note: str) -> None:
    """Print what a store holds."""
    m = store.manifest
    vocab = m["tokenizer"]["vocab_size"]
    train = f"python -m gecko_lab.train data=store data.path={store.path}"
    train += "" if m["val_bytes"] else " data.val_path=ANOTHER_STORE"
    train += "" if vocab == 257 else f" model.vocab_size={vocab}"
    table = Table(title=f"Token store {store.path}", title_justify="left", show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("documents", f"{m['documents']:,} ({m['empty_documents_skipped']:,} empty ones skipped)"),
        ("tokens", f"{m['tokens']:,} ({m['tokenizer']['name']}, {m['bytes'] / max(m['tokens'], 1):.2f} bytes a token)"),
        ("text", f"{m['bytes']:,} bytes, {m['val_bytes']:,} of them for validation"),
        ("fingerprint", store.fingerprint[:16]),
        ("done", note),
    ):
        table.add_row(name, value)
    console = Console(soft_wrap=True)
    console.print(table)
    console.print(f"Train with: {train}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
