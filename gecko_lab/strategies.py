"""Several devices: what ``trainer.strategy`` stands for, and FSDP2 with the blocks of the model as its units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from . import checkpoint as checkpoints
from .model import LanguageModel


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 whose checkpoints are the single verified file of every other run, loadable on any number of devices."""

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Gathered on rank 0, parameters numbered in the optimiser's own order as in a run on one device."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        module = _given(self.lightning_module)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(module, optimizer, options=options)
        return _renamed(state, {name: i for i, name in enumerate(_names(module, optimizer))}) if state else {}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads and checks the file, and keeps its shards."""
        checkpoint = checkpoints.load(Path(self.broadcast(checkpoint_path)))
        module, options = _given(self.lightning_module), StateDictOptions(full_state_dict=True)
        set_model_state_dict(module, checkpoint["state_dict"], options=options)
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            state = _renamed(saved, dict(enumerate(_names(module, optimizer))))
            set_optimizer_state_dict(module, optimizer, state, options=options)
        return checkpoint


def _given(module: nn.Module | None) -> nn.Module:
    assert module is not None
    return module


def _names(module: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Of the parameters, in the order in which the optimiser numbers them."""
    names = {id(p): name for name, p in module.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _renamed(state: dict[str, Any], new: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimiser's state dictionary with its parameters called otherwise."""
    groups = [{**group, "params": [new[p] for p in group["params"]]} for group in state["param_groups"]]
    return {"state": {new[p]: value for p, value in state["state"].items()}, "param_groups": groups}


def make_strategy(name: str, processes: int) -> Any:
    """What Lightning's Trainer takes for ``trainer.strategy`` on this many processes of all nodes."""
    return ShardedStrategy(processes) if name == "fsdp" else name


def shard(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Split the parameters over the mesh: each block is gathered when it runs, the rest with the whole model."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the loss reads the head's weight after the features
    register_fsdp_forward_method(model, "features")


def whole_model(model: LanguageModel) -> LanguageModel:
    """A model that one process can run alone: itself, or on rank 0 a gathered copy of a sharded one.

    Every process must call it; on the other ranks the copy of a sharded model has no trained weights.
    """
    if not isinstance(model, FSDPModule):
        return model
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    copy = LanguageModel(model.config)
    if weights:  # only rank 0 gets them
        copy.load_state_dict(weights)
    return copy.to(next(iter(model.parameters())).device).eval()


def whole(value: Tensor) -> Tensor:
    """The tensor itself, gathered where it is split over processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value
