"""A run of a few steps that takes a fraction of a second, for the tests that break it and continue it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from gecko_lab import checkpoint
from gecko_lab.build import compose, to_config
from gecko_lab.config import TrainConfig
from gecko_lab.train import train

STEPS = 8
TINY = (
    "model.num_layers=1 model.dim=32 model.ffn_dim=48 model.z_dim=32 model.value_dim=32 model.chunk_size=16 "
    "model.norm_groups=4 model.ema_modes=4 model.dropout=0.1 model.attention_dropout=0.1 data.seq_len=32 "
    "data.val_batches=2 trainer.batch_size=2 trainer.accelerator=cpu trainer.progress=false optim.warmup_steps=2 "
    f"log.sample_tokens=0 log.every_n_steps=1 trainer.max_steps={STEPS}"
).split()


def write_text(folder: Path) -> Path:
    """A folder of small documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(20):
        text = "The gecko climbs the wall and sees the moon. " * (5 + i)
        (folder / f"{i:02}.txt").write_text(f"Document {i}. {text}")
    return folder


@cache
def _composed() -> DictConfig:
    return compose([*TINY, "data=text", "data.path=unset"])


def configure(*overrides: str) -> TrainConfig:
    """The tiny run with some fields set; composed once, as that takes longer than the run."""
    node = _composed().copy()
    for override in overrides:
        key, _, value = override.partition("=")
        OmegaConf.update(node, key, yaml.safe_load(value))
    return to_config(node)


def run(folder: Path, text: Path, *overrides: str) -> dict[str, float]:
    """Train in this process, as ``python -m gecko_lab.train`` does."""
    return train(configure(f"data.path={text}", *overrides), folder)


def record(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of every loss and gradient norm in metrics.jsonl, in order."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        found += [
            (values["step"], name, value)
            for name, value in values.items()
            if name in ("train/loss", "train/bits_per_byte", "train/gradient_norm", "val/loss", "val/bits_per_byte")
        ]
    return found


def outcome(folder: Path, step: int = STEPS) -> dict[str, Any]:
    """Weights, optimiser, schedule, position, stream state and RNG at the end of a run."""
    saved = checkpoint.load(folder / "checkpoints" / f"step-{step:08d}.ckpt")
    names = ("state_dict", "optimizer_states", "lr_schedulers", "gecko_lab", "global_step", "loops")
    return {name: saved[name] for name in names}


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places where two trees of tensors and plain values are not bit for bit the same."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [f"{where}.{k}" for k in a.keys() ^ b.keys()]
        return missing + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)}"]
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}[{i}]")]
    return [] if a == b else [f"{where}: {a} and {b}"]


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().flatten().view(torch.uint8) if x.numel() else x
