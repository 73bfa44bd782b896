"""What is timed: for each name, how to make it at a size, and its costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..components import state as states
from . import cost
from .llama import LlamaBlock, LlamaModel, rotary
from .sizes import Size, packed

if TYPE_CHECKING:
    from ..model import LanguageModel


@dataclass(frozen=True)
class Job:
    """``call(*inputs)`` returns the outputs; gradients are taken of ``inputs`` and ``parameters``."""

    call: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...] = ()
    block: torch.nn.Module | None = None  # of a case that is one block of the lab


@dataclass(frozen=True)
class Case:
    """One name of the table. ``whole``: a block or a model, whose kernels may fall back where they must. ``made``: the
    tokens that a call makes or reads, where a rate is what one asks for."""

    name: str
    make: Callable[[Size, torch.device, torch.dtype], Job]
    bytes: cost.Cost
    flops: cost.Cost
    whole: bool = False
    backends: tuple[str, ...] = ("reference", "compiled", "cuda")
    modes: tuple[str, ...] = ("fwd", "fwd+bwd")
    made: Callable[[Size], int] | None = None


def _leaf(*shape: int, device: torch.device, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device=device)).to(dtype).requires_grad_()


def _sequence(s: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _leaf(s.batch, s.length, s.dim, device=device, dtype=dtype)


def _weights(count: int, width: int, device: torch.device) -> list[Tensor]:
    return [_leaf(width, device=device, dtype=torch.float32, scale=0.1) for _ in range(count)]


def _timestep_norm(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    from ..kernels import ops

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (ops.timestep_norm(x, weight, bias, groups=s.groups, eps=1e-5)[0],)

    return Job(call, (_sequence(s, device, dtype), *_weights(2, s.dim, device)))


def _timestep_decay_norm(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    from ..kernels import ops

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y, _ = ops.timestep_decay_norm(x, weight, bias, groups=s.groups, beta1=0.999, beta2=0.9999, eps=1e-5)
        return (y,)

    return Job(call, (_sequence(s, device, dtype), *_weights(2, s.dim, device)))


def _complex_ema(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    from ..kernels import ops

    alpha, delta = 0.2 * torch.randn(2, s.dim, s.modes, device=device)
    base = torch.rand(s.dim, 1, device=device) * 2 * math.pi / s.modes
    p = torch.sigmoid(alpha)
    q = torch.polar(1 - p * torch.sigmoid(delta), base * torch.arange(1, s.modes + 1, device=device))
    gamma = torch.complex(torch.randn(s.dim, s.modes, device=device) / math.sqrt(s.modes), torch.zeros_like(p))

    def call(x: Tensor, p: Tensor, q: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
        return (ops.complex_ema(x, p, q, gamma)[0],)

    return Job(call, (_sequence(s, device, dtype), *(t.requires_grad_() for t in (p, q, gamma))))


def _rms_norm(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    from ..kernels import ops

    def call(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (ops.rms_norm(x, weight, eps=1e-5),)

    return Job(call, (_sequence(s, device, dtype), *_weights(1, s.dim, device)))


def _layer_norm(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    from ..kernels import ops

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (ops.layer_norm(x, weight, bias, eps=1e-5),)

    return Job(call, (_sequence(s, device, dtype), *_weights(2, s.dim, device)))


def _z_views(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    from ..kernels import ops

    angle = torch.rand(s.length, s.head_dim // 2, device=device) * 2 * math.pi
    cos, sin = angle.cos(), angle.sin()

    def call(z: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        return ops.z_views(z, gamma, beta, cos, sin, heads=s.heads, rope_heads=s.heads)

    z = _leaf(s.batch, s.length, s.z_dim, device=device, dtype=dtype)
    tables = [_leaf(4, s.z_dim, device=device, dtype=torch.float32, scale=0.1) for _ in range(2)]
    return Job(call, (z, *tables))


def _gate(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    from ..kernels import ops

    def call(near: Tensor, r: Tensor, far: Tensor) -> tuple[Tensor, ...]:
        return (ops.gate(near, r, far),)

    near, r, far = (_leaf(s.batch, s.length, s.value_dim, device=device, dtype=dtype) for _ in range(3))
    return Job(call, (near, r, far))


def _swiglu(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    from ..kernels import ops

    def call(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (ops.swiglu(a, b),)

    a, b = (_leaf(s.batch, s.length, s.ffn_dim, device=device, dtype=dtype) for _ in range(2))
    return Job(call, (a, b))


def _heads(s: Size, device: torch.device, dtype: torch.dtype, scale: float) -> tuple[Tensor, ...]:
    keys = (s.batch, s.length, s.heads, s.head_dim)
    q, k = (_leaf(*keys, device=device, dtype=dtype, scale=scale) for _ in range(2))
    return q, k, _leaf(s.batch, s.length, s.heads, s.value_head_dim, device=device, dtype=dtype)


def _sliding_chunk_attention(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    from ..kernels import ops

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (ops.sliding_chunk_attention(q, k, v, chunk=s.chunk)[0],)

    return Job(call, _heads(s, device, dtype, s.head_dim**-0.25))


def _adaptive_working_memory(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    from ..kernels import ops

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (ops.adaptive_working_memory(q, k, v, chunk=s.chunk)[0],)

    return Job(call, _heads(s, device, dtype, 1.0))


def _gecko(s: Size, layers: int, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    from ..build import build_model

    sizes = {
        "num_layers": layers,
        "vocab_size": s.vocab_size,
        "dim": s.dim,
        "z_dim": s.z_dim,
        "value_dim": s.value_dim,
        "num_heads": s.heads,
        "ffn_dim": s.ffn_dim,
        "chunk_size": s.chunk,
        "ema_modes": s.modes,
        "norm_groups": s.groups,
    }
    with torch.device(device):
        model = build_model("model=gecko", *(f"model.{name}={value}" for name, value in sizes.items()))
    return model.to(device, dtype)


def _gecko_block(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    block = _gecko(s, 1, device, dtype).get_submodule("blocks.0")

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return (block(x, None, None)[0],)

    return Job(call, (_sequence(s, device, dtype),), tuple(block.parameters()), block)


def _llama_block(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    with torch.device(device):
        block = LlamaBlock(s.dim, s.llama_heads, s.llama_ffn_dim).to(dtype)
    cos, sin = rotary(s.length, s.dim // s.llama_heads, device, dtype)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return (block(x, cos, sin),)

    return Job(call, (_sequence(s, device, dtype),), tuple(block.parameters()))


def _lab_llama_block(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    """The lab's own Llama, out of its components, in the sizes of the peer."""
    from ..build import build_model

    sizes = {
        "num_layers": 1,
        "dim": s.dim,
        "z_dim": s.dim,
        "value_dim": s.dim,
        "num_heads": s.llama_heads,
        "ffn_dim": s.llama_ffn_dim,
        "chunk_size": s.chunk,
    }
    with torch.device(device):
        model = build_model("model=llama", *(f"model.{name}={value}" for name, value in sizes.items()))
    block = model.to(device, dtype).get_submodule("blocks.0")

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return (block(x, None, None)[0],)

    return Job(call, (_sequence(s, device, dtype),), tuple(block.parameters()), block)


def _baseline_attention(name: str) -> Callable[[Size, torch.device, torch.dtype], Job]:
    """An attention of the baselines at the heads of the Llama, in documents of `PACKED` tokens."""

    def make(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
        from ..components import Documents
        from ..components.registry import KINDS, Shape

        cls = KINDS["attention"][name]
        layer = Shape(s.dim, s.dim, s.dim, num_heads=s.llama_heads, ffn_dim=s.llama_ffn_dim, chunk_size=s.chunk)
        module = cls(cls.Config(), layer)
        bos = torch.arange(s.length, device=device).expand(s.batch, -1) % packed(s) == 0
        documents = Documents.from_bos(bos)

        def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            return (module.attend(q, k, v, documents, None)[0],)

        shape = (s.batch, s.length, s.llama_heads, s.dim // s.llama_heads)
        q, k = (_leaf(*shape, device=device, dtype=dtype, scale=shape[3] ** -0.25) for _ in range(2))
        return Job(call, (q, k, _leaf(*shape, device=device, dtype=dtype)))

    return make


def _language_job(model: torch.nn.Module, s: Size, device: torch.device) -> Job:
    tokens, targets = torch.randint(s.vocab_size, (2, s.batch, s.length), device=device)

    def call() -> tuple[Tensor, ...]:
        out = model(tokens)
        logits = out[0] if isinstance(out, tuple) else out
        return (F.cross_entropy(logits.flatten(0, 1), targets.flatten()),)

    return Job(call, (), tuple(model.parameters()))


def _gecko_model(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    """With the loss head of training: logits a chunk at a time."""
    from ..pieces import row_losses

    model = _gecko(s, s.layers, device, dtype)
    tokens, targets = torch.randint(s.vocab_size, (2, s.batch, s.length), device=device)
    return Job(lambda: (row_losses(model, tokens, targets)[0].mean(),), (), tuple(model.parameters()))


def _llama_model(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    with torch.device(device):
        model = LlamaModel(s.dim, s.llama_heads, s.llama_ffn_dim, s.layers, s.vocab_size).to(dtype)
    return _language_job(model, s, device)


def _decode(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    """One token for every row, after ``length`` tokens."""
    from ..decoder import Decoder
    from ..generation import read

    model = _language_model(s, device, dtype)
    _, state = read(model, torch.randint(s.vocab_size, (1, s.length), device=device))
    rows = states.map_tensors(lambda t: t.expand(s.batch, *t.shape[1:]).contiguous(), state)
    decoder, tokens = Decoder(model, rows, s.batch), torch.randint(s.vocab_size, (s.batch,), device=device)
    return Job(lambda: (decoder.step(tokens),), ())


def _prefill(s: Size, device: torch.device, dtype: torch.dtype) -> Job:
    """All tokens in pieces, and the logits of the one after them."""
    from ..generation import read

    model = _language_model(s, device, dtype)
    tokens = torch.randint(s.vocab_size, (s.batch, s.length), device=device)
    return Job(lambda: (read(model, tokens)[0],), ())


def _language_model(s: Size, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    from ..model import LanguageModel

    model = _gecko(s, s.layers, device, dtype).eval()
    assert isinstance(model, LanguageModel)
    return model


_PEER = ("reference", "compiled")
_EAGER, _FORWARD = ("reference", "cuda"), ("fwd",)
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("timestep_decay_norm", _timestep_decay_norm, cost.norm_bytes, cost.no_flops),
        Case("timestep_norm", _timestep_norm, cost.norm_bytes, cost.no_flops),
        Case("complex_ema", _complex_ema, cost.norm_bytes, cost.no_flops),
        Case("rms_norm", _rms_norm, cost.norm_bytes, cost.no_flops),
        Case("layer_norm", _layer_norm, cost.norm_bytes, cost.no_flops),
        Case("z_views", _z_views, cost.view_bytes, cost.no_flops),
        Case("gate", _gate, cost.gate_bytes, cost.no_flops),
        Case("swiglu", _swiglu, cost.swiglu_bytes, cost.no_flops),
        Case("sliding_chunk_attention", _sliding_chunk_attention, cost.attention_bytes, cost.attention_flops),
        Case("adaptive_working_memory", _adaptive_working_memory, cost.attention_bytes, cost.memory_flops),
        *(
            Case(f"{name}_documents", _baseline_attention(name), cost.baseline_bytes, count, True, _EAGER)
            for name, count in (
                ("full", cost.full_flops),
                ("sliding_window", cost.window_flops),
                ("chunk", cost.chunk_flops),
            )
        ),
        Case("gecko_block", _gecko_block, cost.gecko_block_bytes, cost.gecko_block_flops, whole=True),
        Case("llama_block", _llama_block, cost.llama_block_bytes, cost.llama_block_flops, True, _PEER),
        Case("lab_llama_block", _lab_llama_block, cost.llama_block_bytes, cost.llama_block_flops, True),
        Case("gecko_model", _gecko_model, cost.gecko_model_bytes, cost.gecko_model_flops, whole=True),
        Case("llama_model", _llama_model, cost.llama_model_bytes, cost.llama_model_flops, True, _PEER),
        Case("decode", _decode, cost.decode_bytes, cost.decode_flops, True, _EAGER, _FORWARD, lambda s: s.batch),
        Case("prefill", _prefill, cost.prefill_bytes, cost.prefill_flops, True, _EAGER, _FORWARD, lambda s: s.tokens),
    )
}
