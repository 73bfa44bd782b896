"""Configurations and checkpoints of the official Gecko release, read and written (spec 6.6, 6.7).

Only names differ: the modules here carry the official ones below ``layers.i.``, so the translation is a table.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor

from .components.registry import nearest
from .errors import LabError
from .model import LanguageModel, ModelConfig

# official key -> (field of ModelConfig or "kind.field", official default)
FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32000),
    "num_layers": ("num_layers", 32),
    "model_dim": ("dim", 4096),
    "z_dim": ("z_dim", 1024),
    "value_dim": ("value_dim", 8192),
    "num_heads": ("num_heads", 4),
    "ffn_hidden_dim": ("ffn_dim", 8192),
    "cema_ndim": ("ema_modes", 16),
    "chunk_size": ("chunk_size", 2048),
    "timenorm_num_groups": ("norm_groups", 64),
    "timenorm_beta1": ("norm.beta1", 0.999),
    "timenorm_beta2": ("norm.beta2", 0.9999),
    "norm_affine": ("norm_affine", True),
    "norm_eps": ("norm_eps", 1e-5),
    "rope_base": ("rope_base", 500_000.0),
    "num_rope_heads": ("num_rope_heads", None),
    "swiglu": ("", True),
    "rescale_nffn": ("feedforward.rescale", False),
    "two_hop_residual": ("block.two_hop_residual", False),
    "scale_emb": ("scale_embeddings", False),
    "share_emb": ("tie_embeddings", False),
    "init_mode": ("init", "he"),
    "dropout": ("dropout", 0.0),
    "hidden_dropout": ("hidden_dropout", 0.0),
    "attention_dropout": ("attention_dropout", 0.0),
}
# official keys without a counterpart: the value that means "as here"
FIXED: dict[str, tuple[Any, ...]] = {
    "layernorm_num_groups": (1,),
    "output_size": (-1,),
    "efficient_attn": ("swift", "fused"),
    "memory_efficient_norm": (True, False),
    "memory_efficient_dropout": (True, False),
}
DROPPED = re.compile(r"rope\.freqs|.*\.prior_(count|mean|var)")


def _config(official: dict[str, Any]) -> ModelConfig:
    from .build import build_config

    for key, value in official.items():
        if key in FIXED and value not in FIXED[key]:
            raise LabError(f"official configuration {key}={value!r}: only {FIXED[key]} can be read here")
        if key not in FIELDS and key not in FIXED:
            raise LabError(f"official configuration: unknown key {key!r}. {nearest(key, [*FIELDS, *FIXED])}")
    swiglu = official.get("swiglu", True)
    config = build_config("model=gecko", f"model/feedforward={'swiglu' if swiglu else 'mlp'}").model
    for key, (field, default) in FIELDS.items():
        value = official.get(key, default)
        owner, _, name = field.rpartition(".")
        if name:
            setattr(getattr(config, owner) if owner else config, name, value)
    return config


def _official_name(name: str) -> str:
    """Our parameter's name in an official checkpoint."""
    name = re.sub(r"^blocks\.(\d+)\.nffn\.", r"layers.\1.nffn.", name)
    name = re.sub(r"^blocks\.(\d+)\.", r"layers.\1.mega.", name)
    name = re.sub(r"^final_norm\.", "output.final_norm.", name)
    return re.sub(r"^head\.", "output.output.", name)


def from_official(config: dict[str, Any], state_dict: dict[str, Tensor]) -> LanguageModel:
    """A model from an official configuration (keys of spec 6.6; missing ones have the official defaults) and weights.

    Buffers that never change (``rope.freqs``, ``prior_*``) may be present or absent. Raises LabError for unknown
    configuration keys and for missing, unexpected or misshapen parameters, all listed.
    """
    with torch.device("meta"):
        model = LanguageModel(_config(config))
    ours = {_official_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    given = {k: v for k, v in state_dict.items() if not DROPPED.fullmatch(k)}
    tied = model.config.tie_embeddings
    if tied:
        given.setdefault("output.output.weight", given.get("embed.weight", torch.empty(0)))
    problems = [f"missing {k}" for k in ours if k not in given] + [f"unexpected {k}" for k in given if k not in ours]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key in ours.keys() & given.keys():
        if given[key].shape != parameters[ours[key]].shape:
            problems.append(f"{key}: shape {tuple(given[key].shape)}, expected {tuple(parameters[ours[key]].shape)}")
    if problems:
        raise LabError("the official checkpoint does not fit its configuration: " + "; ".join(sorted(problems)))
    model.to_empty(device="cpu")
    model.load_state_dict({ours[k]: v for k, v in given.items()}, strict=True)
    if tied:
        model.head.weight = model.embed.weight
    return model


def to_official(model: LanguageModel) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The inverse: an official configuration and state dict. Raises LabError when the official model has no such
    component."""
    config = model.config
    needed = {"ema": ("complex",), "norm": ("timestep_decay",), "attention": ("sliding_chunk",),
              "memory": ("adaptive_working",), "feedforward": ("swiglu", "mlp"), "block": ("gecko",)}
    for layer in range(config.num_layers):
        for kind, names in needed.items():
            chosen = config.parts(layer).name(kind)
            if chosen not in names:
                raise LabError(f"layer {layer} has {kind}={chosen}: the official Gecko knows only {', '.join(names)}")
    default = _config({"swiglu": config.feedforward.name == "swiglu"})
    official: dict[str, Any] = {"swiglu": config.feedforward.name == "swiglu"}
    for key, (field, _) in FIELDS.items():
        owner, _, name = field.rpartition(".")
        if name:
            official[key] = getattr(getattr(config, owner) if owner else config, name)
            setattr(getattr(default, owner) if owner else default, name, official[key])
    mine, theirs = dataclasses.asdict(config), dataclasses.asdict(default)
    for label in ("family", "checkpoint_blocks", "per_layer"):
        mine.pop(label), theirs.pop(label)
    if mine != theirs:
        changed = [k for k in mine if mine[k] != theirs[k]]
        raise LabError(f"the official Gecko has no counterpart of these settings: {changed}")
    named = model.named_parameters(remove_duplicate=not config.tie_embeddings)
    return official, {_official_name(name): parameter.detach() for name, parameter in named}
