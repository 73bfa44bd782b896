"""The schema of ``gecko_lab.train``: every field with its default and its help, published to Hydra.

YAML in conf/ only composes (presets, ablations); what exists, of which type and why stands in dataclasses: here, in
``gecko_lab/model.py``, ``gecko_lab/data/config.py`` and, for a component, in the component's own file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

from hydra.core.config_store import ConfigStore

from .components import KINDS
from .components.registry import option
from .data.config import DataConfig
from .data.synthetic import TASKS
from .model import ModelConfig


@dataclass
class OptimConfig:
    """AdamW with warm-up and cosine decay."""

    lr: float = option(3e-3, "peak learning rate")
    warmup_steps: int = option(30, "optimiser steps of linear warm-up")
    min_lr_ratio: float = option(0.1, "learning rate at the last step, as a share of the peak")
    beta1: float = option(0.9, "AdamW's decay of the gradient's mean")
    beta2: float = option(0.95, "AdamW's decay of the gradient's square")
    eps: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.1, "decay of the matrices; norms, biases and EMA parameters have none")
    clip: float = option(1.0, "gradients are scaled to this global norm; 0: no clipping")
    fused: bool = option(True, "one kernel for the whole update where the device has it")


@dataclass
class TrainerConfig:
    """How long, where and in which precision."""

    max_steps: int = option(300, "optimiser steps")
    batch_size: int = option(4, "rows of a batch, on each device")
    accumulate: int = option(1, "batches whose gradients make one step")
    accelerator: str = option("auto", "auto, cpu or gpu")
    devices: int = option(1, "processes, one a device")
    num_nodes: int = option(1, "machines")
    strategy: str = option("auto", "auto, ddp or fsdp (FSDP2, a block is a unit)")
    precision: str = option("auto", "auto (bf16-mixed on a GPU, else 32-true), 32-true, bf16-mixed or bf16-true")
    compile: bool = option(False, "torch.compile every block")
    piece_len: int = option(0, "tokens of a row in memory at once, state and gradient carried between; 0: whole rows")
    deterministic: bool = option(False, "only operations that repeat bit for bit where torch has them, else a warning")
    on_nonfinite: str = option("stop", "NaN or Inf in loss or gradient: stop (with a dump of the step) or skip (it)")
    max_skipped: int = option(10, "skip: updates that may be left out before the run stops after all")
    loss_chunk: int = option(4096, "positions whose logits exist at once; 0: all")
    progress: bool = option(True, "progress bar")


@dataclass
class CheckpointConfig:
    """When the run is saved."""

    every_n_steps: int = option(100, "steps between two checkpoints; the last is always saved")
    keep_last: int = option(2, "how many of them stay")
    keep_best: bool = option(True, "also keep the one with the lowest validation loss")


@dataclass
class LogConfig:
    """What is recorded, and how often."""

    every_n_steps: int = option(10, "steps between two points of the training curves")
    validate_every_n_steps: int = option(100, "steps between two validations")
    probes: bool = option(True, "at each validation also record what the components carry: half-lives, entropies, ...")
    sample_prompt: str = option("", "text that the printed sample continues; empty: from the start of a document")
    sample_tokens: int = option(256, "length of the sample; 0: none")
    sample_temperature: float = option(0.8, "softmax temperature of the sample; 0: greedy")


@dataclass
class TrainConfig:
    """A run."""

    seed: int = option(0, "seed of weights, data order and dropout")
    resume: Optional[str] = option(None, "auto: the latest good checkpoint of this run folder; or a path")  # noqa: UP045
    kernels: str = option("auto", "auto, reference or strict (an unsupported case is an error)")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


def register() -> None:
    """Publish the schemas; called again after a component was registered, it adds the new one."""
    store = ConfigStore.instance()
    store.store(name="schema", node=TrainConfig)
    store.store(group="model", name="schema", node=ModelConfig)
    store.store(group="data", name="schema", node=DataConfig)
    for name, task in TASKS.items():  # a task's vocabulary is the model's, unless the model's is given
        node = {"data": task, "model": {"vocab_size": "${data.vocab_size}"}}
        store.store(group="data", name=name, node=node, package="_global_")
    for kind, registry in KINDS.items():
        for name in registry:
            store.store(group=f"model/{kind}", name=name, node=registry[name].Config)


def check(config: TrainConfig) -> None:
    """Raise ValueError for values that no run can have, naming field, value and rule."""

    def need(condition: bool, name: str, value: Any, rule: str) -> None:
        if not condition:
            raise ValueError(f"{name}={value}: {rule}")

    for name in ("max_steps", "batch_size", "accumulate", "devices", "num_nodes"):
        value = getattr(config.trainer, name)
        need(value >= 1, f"trainer.{name}", value, "must be at least 1")
    for section, name, allowed in (
        ("trainer", "precision", ("auto", "32-true", "bf16-mixed", "bf16-true")),
        ("trainer", "accelerator", ("auto", "cpu", "gpu")),
        ("trainer", "strategy", ("auto", "ddp", "fsdp")),
        ("trainer", "on_nonfinite", ("stop", "skip")),
    ):
        value = getattr(getattr(config, section), name)
        need(value in allowed, f"{section}.{name}", value, "must be one of " + ", ".join(allowed))
    for name in ("piece_len", "loss_chunk", "max_skipped"):
        value = getattr(config.trainer, name)
        need(value >= 0, f"trainer.{name}", value, "must not be negative")
    sharded_bf16 = config.trainer.strategy == "fsdp" and config.trainer.precision == "bf16-true"
    need(not sharded_bf16, "trainer.precision", "bf16-true", "strategy=fsdp keeps one type in a block; use bf16-mixed")
    need(config.kernels in ("auto", "reference", "strict"), "kernels", config.kernels, "auto, reference or strict")
    need(config.optim.lr > 0, "optim.lr", config.optim.lr, "must be positive")
    need(0 <= config.optim.min_lr_ratio <= 1, "optim.min_lr_ratio", config.optim.min_lr_ratio, "must be in [0, 1]")
    for name in ("beta1", "beta2"):
        value = getattr(config.optim, name)
        need(0 <= value < 1, f"optim.{name}", value, "must be in [0, 1)")
    for name in ("warmup_steps", "weight_decay", "clip"):
        value = getattr(config.optim, name)
        need(value >= 0, f"optim.{name}", value, "must not be negative")
    for section, name in (
        ("checkpoint", "every_n_steps"),
        ("checkpoint", "keep_last"),
        ("log", "every_n_steps"),
        ("log", "validate_every_n_steps"),
    ):
        value = getattr(getattr(config, section), name)
        need(value >= 1, f"{section}.{name}", value, "must be at least 1")
