"""``python -m gecko_lab.export RUN --out DIR``: a trained model as safetensors and JSON, for others to load."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from safetensors.torch import save_file

from . import __version__
from .artifacts import Artifact, add_model_arguments, open_artifact, sha256
from .cli import guarded
from .data.tokenizers import Tokenizer
from .errors import RunError
from .exported import CONFIG, FACTS, FORMAT, VERSION, WEIGHTS, seal
from .interop import to_official

TEXT = """Write a trained model as model.safetensors and config.json, with the file of its tokenizer.
Read it back with gecko_lab.load(DIR), or give DIR to evaluate and generate."""


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    p = argparse.ArgumentParser(prog="python -m gecko_lab.export", description=TEXT, allow_abbrev=False)
    add_model_arguments(p)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make; it must be new or empty")
    p.add_argument(
        "--official",
        action="store_true",
        help="parameter names and configuration keys of the official Gecko release (refused for other architectures)",
    )
    return p


def export(artifact: Artifact, out: str | Path, official: bool = False) -> Path:
    """Write the folder at once: it appears whole or not at all.

    RunError: ``out`` exists and is not an empty folder, or cannot be written. LabError: ``official`` and the official
    model has no such component.
    """
    folder = Path(out).absolute()
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise RunError(f"--out {folder}: exists and is not an empty folder; it is not overwritten")
    tokenizer = artifact.tokenizer()
    config: dict[str, Any] | None = None
    if official:
        config, weights = to_official(artifact.model)
    else:
        tied = artifact.model.config.tie_embeddings
        weights = {k: v for k, v in artifact.model.state_dict().items() if not (tied and k == "head.weight")}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            # clone: safetensors refuses tensors that share memory, as tied ones under official names do
            save_file({k: v.clone() for k, v in weights.items()}, making / WEIGHTS, metadata={"format": "pt"})
            facts = _facts(artifact, tokenizer, making)
            if config is None:
                (making / CONFIG).write_text(seal({**facts, "model": dataclasses.asdict(artifact.model.config)}))
            else:
                (making / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
                facts["sha256"][CONFIG] = sha256(making / CONFIG)
                (making / FACTS).write_text(seal(facts))
            _publish(making, folder)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
    except OSError as error:
        raise RunError(f"--out {folder}: cannot be written ({error.strerror or error})") from error
    return folder


def _facts(artifact: Artifact, tokenizer: Tokenizer, making: Path) -> dict[str, Any]:
    """All that a reader needs beside the model's configuration; the tokenizer's file is copied."""
    file = None
    if tokenizer.file is not None:
        file = f"tokenizer{tokenizer.file.suffix}"
        shutil.copyfile(tokenizer.file, making / file)
    return {
        "format": FORMAT,
        "version": VERSION,
        "gecko_lab": __version__,
        "parameters": artifact.model.num_parameters(),
        "tokenizer": {
            "name": tokenizer.name if file is None else f"{tokenizer.name.partition(':')[0]}:{file}",
            "file": file,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
        },
        "source": {
            "checkpoint": artifact.file.name,
            "step": artifact.step,
            "sha256": sha256(artifact.file),
            "data_fingerprint": artifact.data_fingerprint,
            "seq_len": artifact.seq_len,
        },
        "sha256": {name: sha256(making / name) for name in [WEIGHTS, *([file] if file else [])]},
    }


def _publish(making: Path, folder: Path) -> None:
    """Make what was written durable, then give it its name (an empty folder of that name is replaced)."""
    umask = os.umask(0)
    os.umask(umask)
    for path in [*making.iterdir(), making]:
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)  # temporary folders and safetensors files are private
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    with contextlib.suppress(FileNotFoundError):
        folder.rmdir()
    os.rename(making, folder)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 with a message about what to mend."""
    options = parser().parse_args(arguments)
    return guarded(lambda: _main(options))


def _main(options: argparse.Namespace) -> int:
    artifact = open_artifact(options.model, options.checkpoint)
    console = Console(soft_wrap=True)
    for note in artifact.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    folder = export(artifact, options.out, options.official)
    facts = [
        ("from", artifact.name),
        ("model", f"{artifact.model.config.family}, {artifact.model.num_parameters():,} parameters"),
        ("names", "official" if options.official else "gecko_lab"),
        *(("wrote", f"{file} ({file.stat().st_size:,} bytes)") for file in sorted(folder.iterdir())),
    ]
    for name, value in facts:
        console.print(f"[bold]{name:6}[/] {escape(value)}", highlight=False)
    console.print(f'Read it with: gecko_lab.load("{options.out}")', highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
