"""Several devices: what ``trainer.strategy`` stands for, and FSDP2 with the blocks of the model as its units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from . import checkpoint as checkpoints
from .model import LanguageModel


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose checkpoints are the single verified file of every other run, loadable on any number of devices."""

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads and checks the file, and keeps its shards."""
        checkpoint = checkpoints.load(Path(self.broadcast(checkpoint_path)))
        assert self.lightning_module is not None
        names = {i: name for i, name in enumerate(_in_optimizer_order(self.lightning_module, self.optimizers[0]))}
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            set_optimizer_state_dict(self.lightning_module, optimizer, _by_name(saved, names), options=options)
        return checkpoint


def _in_optimizer_order(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    names = {id(p): name for name, p in module.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _by_name(saved: dict[str, Any], names: dict[int, str]) -> dict[str, Any]:
    """An optimiser's saved state with parameters called by name, as the distributed loader wants them."""
    groups = [{**group, "params": [names.get(p, p) for p in group["params"]]} for group in saved["param_groups"]]
    return {"state": {names.get(p, p): state for p, state in saved["state"].items()}, "param_groups": groups}


def make_strategy(name: str, processes: int) -> Any:
    """What Lightning's Trainer takes for ``trainer.strategy`` on this many processes of all nodes."""
    return ShardedStrategy(processes) if name == "fsdp" else name


def shard(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Split the parameters over the mesh: each block is gathered when it runs, the rest with the whole model."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the loss reads the head's weight after the features
    register_fsdp_forward_method(model, "features")


def whole(value: Tensor) -> Tensor:
    """The tensor itself, gathered where it is split over processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value
