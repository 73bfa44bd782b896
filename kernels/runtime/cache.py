"""Compiled programs on disk: one checksummed file each, replaced atomically, so that many ranks may share a folder."""

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from .nvrtc import Program, Resources

FORMAT = b"gecko_lab kernel 1\n"
SUFFIX = ".cubin.cache"
log = logging.getLogger(__name__)
_warned_folders: set[str] = set()


def folder() -> Path | None:
    """GECKO_LAB_KERNEL_CACHE, else XDG_CACHE_HOME/gecko_lab/kernels, else ~/.cache/gecko_lab/kernels; None: no home."""
    if chosen := os.environ.get("GECKO_LAB_KERNEL_CACHE"):
        return Path(chosen).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "gecko_lab" / "kernels"
    try:
        return Path.home() / ".cache" / "gecko_lab" / "kernels"
    except RuntimeError:
        return None


def load(name: str) -> Program | None:
    """The program stored under a name, or None. A damaged entry is reported in one line and counts as absent."""
    if (path := _path(name)) is None:
        return None
    try:
        blob = path.read_bytes()
    except OSError:
        return None
    try:
        return _decode(blob)
    except (ValueError, KeyError, TypeError) as error:
        log.warning("kernel cache: %s is damaged (%s); compiling it again", path, error)
        return None


def store(name: str, program: Program) -> None:
    """Write an entry beside its place and move it there. A folder that cannot be written is reported once."""
    if (path := _path(name)) is None:
        return
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(_encode(program))
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if str(path.parent) not in _warned_folders:
            _warned_folders.add(str(path.parent))
            log.warning("kernel cache: cannot write to %s (%s); kernels stay in memory only", path.parent, error)


def clear() -> int:
    """Delete every entry of the folder; returns how many there were."""
    place = folder()
    entries = list(place.glob(f"*{SUFFIX}")) if place is not None else []
    for entry in entries:
        entry.unlink(missing_ok=True)
    return len(entries)


def _path(name: str) -> Path | None:
    place = folder()
    return None if place is None else place / f"{name}{SUFFIX}"


def _encode(program: Program) -> bytes:
    facts = {
        "names": dict(program.names),
        "log": program.log,
        "resources": {kernel: asdict(used) for kernel, used in program.resources.items()},
    }
    head = json.dumps(facts).encode()
    body = len(head).to_bytes(8, "little") + head + program.cubin
    return FORMAT + hashlib.sha256(body).digest() + body


def _decode(blob: bytes) -> Program:
    start = len(FORMAT)
    if blob[:start] != FORMAT:
        raise ValueError("not a cache entry of this version")
    checksum, body = blob[start : start + 32], blob[start + 32 :]
    if hashlib.sha256(body).digest() != checksum:
        raise ValueError("wrong checksum")
    size = int.from_bytes(body[:8], "little")
    facts = json.loads(body[8 : 8 + size])
    resources = {kernel: Resources(**used) for kernel, used in facts["resources"].items()}
    return Program(body[8 + size :], facts["names"], facts["log"], resources)
