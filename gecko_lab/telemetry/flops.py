"""Model FLOPs of a token: what the mathematics asks for, whatever the hardware repeats.

A multiplication and an addition are 2. Counted: every linear layer (the head among them), attention over the keys that
a query sees on average, the recurrence of a moving average, the memory. Not counted: norms, gates, softmaxes, rotary
positions, the embedding's look-up. Training is 3 times the forward pass (the backward pass has two products for each);
``checkpoint_blocks`` makes the hardware do 4 times, which is not model FLOPs and so lowers the MFU.
"""

from __future__ import annotations

from functools import singledispatch

import torch
from torch import nn

from ..components import Shape
from ..components.attention import Attention
from ..components.ema import ComplexEMA, RealEMA
from ..components.memory import AdaptiveWorkingMemory
from ..model import LanguageModel

TRAINING = 3


@singledispatch
def count(module: nn.Module, shape: Shape, length: int) -> float:
    """Forward FLOPs a token of this module alone, without the modules inside it, for rows of ``length`` tokens.

    A component of your own that multiplies outside of linear layers adds its rule with ``@count.register``.
    """
    return 0.0


@count.register
def _linear(module: nn.Linear, shape: Shape, length: int) -> float:
    return 2.0 * module.in_features * module.out_features


@count.register
def _attention(module: Attention, shape: Shape, length: int) -> float:
    """Scores and weighted values, over the mean number of visible keys of one document of ``length`` tokens."""
    time = torch.arange(length)
    visible = float((time - module.first_visible(time) + 1).double().mean())
    return 2.0 * visible * (shape.z_dim + shape.value_dim)


@count.register
def _complex_ema(module: ComplexEMA, shape: Shape, length: int) -> float:
    """h = q h + p x (4 products, 4 sums), y += Re(gamma h) (2 products, 2 sums), p x shared: 12 a mode with it."""
    return 12.0 * module.alpha.numel()


@count.register
def _real_ema(module: RealEMA, shape: Shape, length: int) -> float:
    """h = q h + p x, y += gamma h: 5 a mode."""
    return 5.0 * module.alpha.numel()


@count.register
def _memory(module: AdaptiveWorkingMemory, shape: Shape, length: int) -> float:
    """The read and the sum over a chunk of key times value; key times key; P M once a chunk."""
    keys, values = shape.z_dim, shape.value_head_dim
    return 4.0 * keys * values + 2.0 * keys * shape.head_dim + 2.0 * keys * shape.head_dim * values / module.chunk


def flops_per_token(model: LanguageModel, length: int) -> float:
    """Forward FLOPs a token of the model on rows of ``length`` tokens, each one document read from its start."""
    total = count(model.head, model.config.shape(0), length)
    for layer, block in enumerate(model.blocks):
        shape = model.config.shape(layer)
        total += sum(count(module, shape, length) for module in block.modules())
    return total
