"""Which code a study runs: a fingerprint of every source file that shapes a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".cu", ".cuh", ".h", ".yaml"}
# what runs no step of a trial
APART = {"studies", "sweeps", "sweep.py", "report.py", "compare.py", "bench", "__pycache__"}


def fingerprint() -> str:
    """SHA-256 over names and bytes of the package's sources, the start of it."""
    digest = hashlib.sha256()
    for path in sorted(_sources(PACKAGE)):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _sources(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if (folder == PACKAGE and path.name in APART) or path.name == "__pycache__":
            continue
        if path.is_dir():
            yield from _sources(path)
        elif path.suffix in SUFFIXES:
            yield path
