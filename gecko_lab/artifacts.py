"""What training leaves behind, found and read: a run folder, one of its checkpoints, or an exported folder.

Nothing executes from a file: checkpoints are read with ``weights_only``, exports are safetensors and JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint as checkpoints
from .config import TrainConfig, TrainerConfig
from .data.config import DataConfig
from .data.synthetic import TASKS, SyntheticConfig, TaskTokenizer
from .data.tokenizers import Tokenizer
from .data.tokenizers import load_tokenizer as tokenizer_named
from .errors import ConfigError, LabError, RunError
from .model import LanguageModel, ModelConfig

log = logging.getLogger(__name__)


@dataclass
class Artifact:
    """A trained model and what is known of its training; ``training`` and ``run`` are None away from a run folder."""

    kind: str  # "checkpoint" or "export"
    file: Path
    model: LanguageModel
    step: int | None = None
    run: Path | None = None
    training: TrainConfig | None = None
    data_fingerprint: str | None = None
    seq_len: int | None = None
    notes: list[str] = field(default_factory=list)
    _tokenizer: dict[str, Any] | None = None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with.

        LabError: nothing says which, its file is missing or another one now, or it has more tokens than the model.
        """
        tokenizer, known = self._find_tokenizer(), self.model.config.vocab_size
        if tokenizer.vocab_size > known:
            raise RunError(f"{self.file}: knows {known} tokens, the tokenizer {tokenizer.name} {tokenizer.vocab_size}")
        return tokenizer

    def _find_tokenizer(self) -> Tokenizer:
        if self._tokenizer is not None:
            return _described_tokenizer(self.file.parent, self._tokenizer)
        if self.training is None:
            raise RunError(f"{self.file}: nothing beside it says which tokenizer it was trained with{self.away}")
        data = self.training.data
        if data.name == "store":
            from .data.store import open_store

            return open_store(data.parts()[0][0]).tokenizer()
        if isinstance(data, SyntheticConfig):
            return TaskTokenizer(data)
        return tokenizer_named(data.tokenizer)

    @property
    def away(self) -> str:
        """The end of a message about a missing config.yaml or description."""
        return " (a checkpoint belongs in RUN/checkpoints beside RUN/config.yaml)" if self.kind == "checkpoint" else ""

    @property
    def name(self) -> str:
        """One line for a summary."""
        step = "" if self.step is None else f", step {self.step:,}"
        return f"{self.file}{step}"


def load(path: str | Path) -> LanguageModel:
    """The model of a run folder, a checkpoint or an exported folder (ours or official names), on the CPU in eval mode.

    A run gives its best checkpoint, else the latest whole one. LabError: nothing there, a damaged or foreign file,
    weights that do not fit their configuration (all listed).
    """
    return open_artifact(path).model


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run folder, a checkpoint in one, or an exported folder."""
    return open_artifact(path).tokenizer()


def open_artifact(path: str | Path, which: str = "best") -> Artifact:
    """Find and read; ``which`` chooses a run's checkpoint: best (else the latest whole one), last, or a path."""
    where = Path(path)
    if not where.exists():
        raise RunError(f"{where}: no such file or folder; give a run folder, a .ckpt file or an exported folder")
    if where.is_file() and where.suffix != ".safetensors":
        return _from_checkpoint(where)
    folder = where.parent if where.is_file() else where
    if folder.name == "checkpoints" and (folder.parent / "config.yaml").exists():
        folder = folder.parent
    if (folder / "config.yaml").exists() or (folder / "checkpoints").is_dir():
        return _from_run(folder, which)
    if (folder / "config.json").exists() or (folder / "model.safetensors").exists():
        from .exported import read_export

        if which != "best":
            raise RunError(f"{folder} is an exported folder and holds one model: drop --checkpoint {which}")
        return read_export(folder)
    inner = sorted(p.parent for p in folder.glob("*/config.yaml"))[:5]
    hint = f"; it holds these runs: {', '.join(str(p) for p in inner)}" if inner else ""
    raise RunError(f"{folder}: no run folder (config.yaml, checkpoints/) and no exported one (config.json){hint}")


def read_checkpoint(file: Path) -> dict[str, Any]:
    """The contents of a checkpoint of a run; LabError for whatever else the file is."""
    try:
        found = checkpoints.load(file)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        if isinstance(error, LabError):
            raise
        raise RunError(f"{file}: not a checkpoint of gecko_lab; nothing of it was run ({_short(error)})") from None
    if not isinstance(found, dict) or not {"gecko_lab", "state_dict"} <= found.keys():
        raise RunError(f"{file}: not a checkpoint of gecko_lab (no model configuration in it)")
    return found


def build(config: ModelConfig, weights: dict[str, Tensor], where: Path) -> LanguageModel:
    """A model with these weights, float32 in eval mode. LabError lists every missing, unexpected or misshapen one."""
    try:
        with torch.device("meta"):
            like = LanguageModel(config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: its model cannot be built here: {error}") from None
    if config.tie_embeddings:
        weights = {**weights, "head.weight": weights.get("head.weight", weights.get("embed.weight", torch.empty(0)))}
    expected = like.state_dict()
    problems = [f"missing {k}" for k in expected.keys() - weights.keys()]
    problems += [f"unexpected {k}" for k in weights.keys() - expected.keys()]
    for key in expected.keys() & weights.keys():
        if weights[key].shape != expected[key].shape:
            problems.append(f"{key}: shape {tuple(weights[key].shape)}, expected {tuple(expected[key].shape)}")
    if problems:
        raise RunError(f"{where}: the weights do not fit their configuration: {'; '.join(sorted(problems))}")
    with torch.random.fork_rng(devices=[]):  # the start values are drawn and overwritten
        model = LanguageModel(config)
    model.load_state_dict(weights)
    return model.eval()


def model_config(values: Any, where: Path) -> ModelConfig:
    """A ModelConfig from plain values of a file."""
    try:
        return ModelConfig.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{where}: its model configuration cannot be read here: {error}") from None


def _from_run(run: Path, which: str) -> Artifact:
    folder = run / "checkpoints"
    if which not in ("best", "last"):
        return _from_checkpoint(Path(which), run)
    candidates = checkpoints.steps(folder)
    best = folder / "best.ckpt"
    if which == "best" and best.exists():
        candidates.insert(0, best)
    notes = []
    for file in candidates:
        try:
            artifact = _from_checkpoint(file, run)
        except checkpoints.DamagedCheckpoint as error:
            notes.append(f"{error}; another checkpoint is used")
            continue
        if which == "best" and file != best and not best.exists():
            notes.append(f"the run kept no best.ckpt: {file.name} is its latest checkpoint")
        artifact.notes = notes + artifact.notes
        return artifact
    if candidates:
        raise RunError(f"{folder}: none of its {len(candidates)} checkpoints can be read; {notes[0].partition(';')[0]}")
    raise RunError(f"{run}: the run has no checkpoint yet (checkpoint.every_n_steps says when it is saved)")


def _from_checkpoint(file: Path, run: Path | None = None) -> Artifact:
    found = read_checkpoint(file)
    if run is None and file.absolute().parent.name == "checkpoints":
        run = file.absolute().parent.parent
    training, notes = read_training(run) if run is not None else (None, [])
    weights = {k.removeprefix("model."): v for k, v in found["state_dict"].items() if k.startswith("model.")}
    weights = {k.replace("._orig_mod", ""): v for k, v in weights.items()}
    config = model_config(found["gecko_lab"].get("model"), file)
    data = found.get("LabData") or found.get("SyntheticData") or {}
    return Artifact(
        kind="checkpoint",
        file=file,
        model=build(config, weights, file),
        step=found.get("global_step"),
        run=run,
        training=training,
        data_fingerprint=data.get("fingerprint"),
        seq_len=data.get("seq_len"),
        notes=notes,
    )


def read_training(run: Path) -> tuple[TrainConfig | None, list[str]]:
    """The data and trainer sections of a run's config.yaml, and why there are none."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    file = run / "config.yaml"
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except OSError as error:
        return None, [f"{file}: {error.strerror}"]
    except (YAMLError, ValueError) as error:
        raise RunError(f"{file}: damaged, not YAML ({_short(error)})") from None
    if not isinstance(values, dict) or not {"data", "trainer"} <= values.keys():
        return None, [f"{file}: says nothing about data and trainer"]
    try:
        kind = TASKS.get(values["data"].get("name"), DataConfig)
        data, trainer = kind(**values["data"]), TrainerConfig(**values["trainer"])
        data.check()
    except (TypeError, ValueError) as error:
        raise RunError(f"{file}: cannot be read by this version of gecko_lab: {error}") from None
    return TrainConfig(kernels=values.get("kernels", "auto"), data=data, trainer=trainer), []


def _described_tokenizer(folder: Path, described: dict[str, Any]) -> Tokenizer:
    """The tokenizer of an exported folder: by name, or from the file copied into it."""
    try:
        name, file, fingerprint = described["name"], described["file"], described["fingerprint"]
    except (KeyError, TypeError):
        raise RunError(f"{folder}: its description of the tokenizer cannot be read") from None
    if file:
        name = f"{str(name).partition(':')[0]}:{folder / Path(file).name}"
    tokenizer = tokenizer_named(str(name))
    if tokenizer.fingerprint != fingerprint:
        raise RunError(f"{folder}: tokenizer {name} is not the one that the model was trained with")
    return tokenizer


def sha256(file: Path) -> str:
    """Hexadecimal digest of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def device_named(name: str) -> torch.device:
    """The device of ``--device``: auto is a CUDA device where there is one. LabError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name}: cannot be used here ({_short(error)}); say auto, cpu or cuda") from None
    return device


def add_model_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """The arguments that every command over a trained model has; ``optional``: RUN may be left out."""
    text = "a run folder, a .ckpt file or an exported folder"
    parser.add_argument("model", metavar="RUN", type=Path, nargs="?" if optional else None, help=text)
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="WHICH",
        help="of a run folder: best (lowest validation loss, else the latest; the default), last, or a path",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """The argument that ``device_named`` reads."""
    text = "auto (a CUDA device where there is one; the default), cpu, cuda, cuda:N"
    parser.add_argument("--device", default="auto", help=text)
