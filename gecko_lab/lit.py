"""The LightningModule: one training step, one validation step, what they log, and what a resume needs."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from .components import state as states
from .config import OptimConfig, TrainConfig, TrainerConfig
from .errors import RunError
from .loss import losses_and_hits, mean_loss, token_losses
from .metrics import LanguageMetrics
from .model import LanguageModel, ModelConfig, ModelState
from .optim import make_optimizer
from .pieces import row_losses
from .strategies import ShardedStrategy, shard, whole

log = logging.getLogger(__name__)
Batch = dict[str, Any]


class LitLanguageModel(L.LightningModule):
    """Trains a LanguageModel on batches {tokens (B, L), targets (B, L), bytes}, of a task also scored (B, L) bool:
    the positions that must answer.

    With ``stream`` the model's state is carried from batch to batch, detached: truncated back-propagation through
    time. Checkpoints hold plain values only, so that they load without executing anything.
    """

    def __init__(self, config: TrainConfig, bos_id: int | None, stream: bool = False) -> None:
        super().__init__()
        self.config = config
        self.bos_id, self.stream = bos_id, stream
        self.model = LanguageModel(config.model)
        self.val_metrics = LanguageMetrics()
        self.state: ModelState | None = None
        self.last_loss: Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.check_gradient: Callable[[Tensor], None] | None = None  # told the norm before each update
        self._configured = False
        self._saved: list[dict[str, Any]] | None = None  # what each process had when the checkpoint was written

    @property
    def optim(self) -> OptimConfig:
        return self.config.optim

    @property
    def training_config(self) -> TrainerConfig:
        return self.config.trainer

    def configure_model(self) -> None:
        """Compile, then shard; Lightning calls this for every fit and validation, so a second call does nothing."""
        if self._configured:
            return
        self._configured = True
        if self.training_config.compile:
            torch._dynamo.config.fail_on_recompile_limit_hit = True  # the default is to go on uncompiled, silently
            for block in self.model.blocks:
                block.compile()
        if isinstance(self.trainer.strategy, ShardedStrategy):
            shard(self.model, self.trainer.strategy.device_mesh["data_parallel"])

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.model, self.optim, self.training_config.max_steps)

    def losses(
        self, batch: Batch, state: ModelState | None = None, measure: Callable[..., Tensor] = token_losses
    ) -> tuple[Tensor, ModelState]:
        """Nats (or another measure) of every target (B, L), and the state after the batch."""
        options = self.training_config
        return row_losses(
            self.model, batch["tokens"], batch["targets"], state, self.bos_id,
            piece_len=options.piece_len, loss_chunk=options.loss_chunk, scored=batch.get("scored"), measure=measure,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses, state = self.losses(batch, self.state if self.stream else None)
        if self.stream:
            self.state = states.detach(state)
        loss = mean_loss(losses, batch.get("scored"))
        self.last_loss = loss.detach()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Nats of every target (B, L), for whoever records more than their mean."""
        if "scored" in batch:
            losses, hits = self.losses(batch, measure=losses_and_hits)[0].unbind(-1)
        else:
            losses, hits = self.losses(batch)[0], None
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # no backward pass follows that would do it
        self.val_metrics.update(losses, batch["bytes"], batch.get("scored"), hits)
        return losses

    def on_validation_epoch_end(self) -> None:
        for name, value in self.val_metrics.compute().items():
            self.log(f"val/{name}", value, prog_bar=name != "perplexity", logger=False, rank_zero_only=False)
        self.val_metrics.reset()

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Clip to the global norm and keep it for the record."""
        limit = self.optim.clip or float("inf")
        self.gradient_norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if self.check_gradient is not None:
            self.check_gradient(self.gradient_norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gecko_lab"] = {
            "model": dataclasses.asdict(self.config.model),
            "processes": _of_all_processes({
                "stream_state": None if self.state is None else states.flatten(states.to(self.state, "cpu"))[0],
                "rng": _rng_state(),
            }),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_architecture(checkpoint, self.config.model)
        extra = checkpoint["gecko_lab"]
        self._saved = extra["processes"]

    def on_train_start(self) -> None:
        """Carried state and random state of this process; the second last, as the probe in the first draws dropout."""
        if self._saved is None:
            return
        rank, processes = self.global_rank, len(self._saved)
        if self.stream and self._saved[0]["stream_state"] is not None:
            self.state = self._restore_stream([saved["stream_state"] for saved in self._saved])
        if processes != self.trainer.world_size:
            log.warning("saved by %d processes, resumed by %d: dropout will differ", processes, self.trainer.world_size)
        if rank < processes:
            _set_rng_state(self._saved[rank]["rng"])
        self._saved = None

    def _restore_stream(self, saved: list[list[Any]]) -> ModelState:
        """This process's rows of what all processes saved, in the state's structure, learnt by reading one token."""
        whole = [torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in zip(*saved, strict=True)]
        rows = next(leaf.shape[0] for leaf in whole if isinstance(leaf, Tensor)) // self.trainer.world_size
        mine = slice(rows * self.global_rank, rows * (self.global_rank + 1))
        leaves = [leaf[mine].clone() if isinstance(leaf, Tensor) else leaf for leaf in whole]
        probe = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        with torch.no_grad():
            _, like = self.model.features(probe, None, self.bos_id)
        return states.to(states.unflatten(leaves, like), self.device)


def check_architecture(checkpoint: dict[str, Any], model: ModelConfig) -> None:
    """RunError naming each field in which the checkpoint's model is another than this one."""
    saved, here = checkpoint.get("gecko_lab", {}).get("model", {}), dataclasses.asdict(model)
    different = sorted(k for k in here if saved.get(k) != here[k] and k not in ("checkpoint_blocks", "family"))
    if different:
        raise RunError(
            "the checkpoint is of another architecture; it differs in "
            + ", ".join(f"model.{k} (checkpoint {saved.get(k)}, here {here[k]})" for k in different)
        )


def _of_all_processes(mine: dict[str, Any]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return [mine]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def _rng_state() -> dict[str, Any]:
    kind, keys, pos, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), pos, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def _set_rng_state(saved: dict[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"])
    kind, keys, pos, has_gauss, cached = saved["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))


def model_from_checkpoint(checkpoint: dict[str, Any]) -> LanguageModel:
    """The LanguageModel that a checkpoint of a run holds, in eval mode."""
    model = LanguageModel(ModelConfig.from_dict(checkpoint["gecko_lab"]["model"]))
    weights = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}
    model.load_state_dict({k.replace("._orig_mod", ""): v for k, v in weights.items()})
    return model.eval()
