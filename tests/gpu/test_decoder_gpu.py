"""The captured decode step against the model's own call in plain PyTorch."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from gecko_lab import build_model
from gecko_lab.components import state as states
from gecko_lab.decoder import Decoder
from gecko_lab.kernels import backend
from gecko_lab.model import LanguageModel

BOS = 256
CHUNK = 8
SIZES = "num_layers=2 dim=64 z_dim=32 value_dim=128 num_heads=2 ffn_dim=96 chunk_size=8 ema_modes=4 norm_groups=8"
VARIANTS: dict[str, tuple[str, ...]] = {
    "gecko": ("model=gecko",),
    "megalodon": ("model=megalodon",),
    "chunk with memory": ("model=gecko", "model/attention=chunk"),
    "late memory": ("model=gecko", "model.memory.lag=1"),
    "no memory": ("model=gecko", "model/memory=none"),
    "real average": ("model=gecko", "model/ema=real", "model/norm=timestep"),
    "no average": ("model=gecko", "model/ema=none"),
    "plain feed-forward": ("model=gecko", "model/feedforward=mlp", "model.feedforward.bias=true",
                           "model.feedforward.rescale=true", "model.block.two_hop_residual=true"),
    "odd sizes": ("model=gecko", "model.dim=42", "model.norm_groups=6", "model.value_dim=54", "model.z_dim=20",
                  "model.ffn_dim=35", "model.ema_modes=5", "model.num_rope_heads=1", "model.scale_embeddings=true"),
    "wide groups": ("model=gecko", "model.dim=272", "model.norm_groups=2", "model.ema_modes=16", "model.z_dim=528"),
}


def built(variant: str, device: torch.device) -> LanguageModel:
    torch.manual_seed(0)
    name, *changes = VARIANTS[variant]
    model = build_model(name, *(f"model.{size}" for size in SIZES.split()), *changes)
    with torch.no_grad():  # so that no scale, shift or bias is a bare 0 or 1
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.dim() == 1 else 0)
        for block in model.blocks:
            for table in (block.gamma, block.beta):
                table.add_(0.3 * torch.randn_like(table))
    return model.to(device).eval()


def stream(batch: int, length: int, device: torch.device) -> Tensor:
    """Tokens in which documents begin at different places of the rows, some rows in one document for long."""
    random = torch.Generator().manual_seed(batch * 1000 + length)
    tokens = torch.randint(0, 256, (batch, length), generator=random)
    for row in range(0, batch, 2):
        tokens[row, [(5 * row + 3) % length, length // 2 + row % 4, length - 3]] = BOS
    return tokens.to(device)


def decoded(model: LanguageModel, tokens: Tensor, read: int, steps: int, bos_id: int | None) -> tuple[Tensor, Tensor]:
    """Logits of the steps after ``read`` tokens, and those of the rest, which the model reads from the state."""
    with torch.no_grad():
        state = None
        if read:
            with backend.use("reference"):
                _, state = model(tokens[:, :read], bos_id=bos_id)
        with backend.use("strict"):
            decoder = Decoder(model, state, len(tokens), bos_id=bos_id)
            got = torch.stack([decoder.step(tokens[:, read + i]) for i in range(steps)], 1)
        after = decoder.state
        with backend.use("reference"):
            rest, _ = model(tokens[:, read + steps :], after, bos_id)
    return got, rest


def plain(model: LanguageModel, tokens: Tensor, bos_id: int | None) -> Tensor:
    with torch.no_grad(), backend.use("reference"):
        return model(tokens, bos_id=bos_id)[0]


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("read", [0, 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_is_the_models_call(variant: str, read: int, cuda: torch.device) -> None:
    model, steps = built(variant, cuda), 2 * CHUNK + 6
    tokens = stream(3, read + steps + CHUNK + 1, cuda)
    wanted = plain(model, tokens, BOS)
    got, rest = decoded(model, tokens, read, steps, BOS)
    assert distance(got, wanted[:, read : read + steps]) < 2e-5
    assert distance(rest, wanted[:, read + steps :]) < 2e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_errs_as_little_as_the_models_call(variant: str, cuda: torch.device) -> None:
    model, steps, read = built(variant, cuda).bfloat16(), 2 * CHUNK + 6, CHUNK + 3
    tokens = stream(3, read + steps + CHUNK + 1, cuda)
    eager = plain(model, tokens, BOS)
    got, rest = decoded(model, tokens, read, steps, BOS)
    exact = plain(model.float(), tokens, BOS)
    here, there = slice(read, read + steps), slice(read + steps, None)
    assert distance(got, exact[:, here]) < 2 * distance(eager[:, here], exact[:, here])
    assert distance(rest, exact[:, there]) < 2 * distance(eager[:, there], exact[:, there])


@pytest.mark.parametrize("batch", [1, 8, 9, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches(batch: int, dtype: torch.dtype, cuda: torch.device) -> None:
    model = built("gecko", cuda).to(dtype)
    tokens = stream(batch, 3 * CHUNK + 5, cuda)
    got, rest = decoded(model, tokens, 4, 2 * CHUNK, BOS)
    wanted = plain(model, tokens, BOS)[:, 4:]
    limit = 2e-5 if dtype == torch.float32 else 0.03
    assert distance(torch.cat((got, rest), 1), wanted) < limit


@pytest.mark.parametrize("read", [0, 13])
def test_one_document(read: int, cuda: torch.device) -> None:
    model = built("gecko", cuda)
    tokens = stream(2, 60, cuda)
    wanted = plain(model, tokens, None)
    got, rest = decoded(model, tokens, read, 30, None)
    assert distance(torch.cat((got, rest), 1), wanted[:, read:]) < 2e-5


def test_documents_told_apart_only_before_or_only_from_now_on(cuda: torch.device) -> None:
    model = built("gecko", cuda)
    tokens = stream(2, 50, cuda)
    for before, now in ((BOS, None), (None, BOS)):
        with torch.no_grad(), backend.use("reference"):
            _, state = model(tokens[:, :21], bos_id=before)
            wanted, _ = model(tokens[:, 21:], state, now)
        decoder = Decoder(model, state, 2, bos_id=now)
        got = torch.stack([decoder.step(tokens[:, 21 + i]) for i in range(29)], 1)
        assert distance(got, wanted) < 2e-5


def test_memory_does_not_grow_and_the_state_given_stays(cuda: torch.device) -> None:
    model = built("gecko", cuda).bfloat16()
    tokens = stream(4, 100, cuda)
    with torch.no_grad():
        _, state = model(tokens[:, :20], bos_id=BOS)
    kept = states.clone(state)
    decoder = Decoder(model, state, 4, bos_id=BOS)
    held = set()
    for i in range(20, 100):
        decoder.step(tokens[:, i])
        if i % CHUNK == CHUNK - 1:
            held.add(torch.cuda.memory_allocated(cuda))
    assert len(held) == 1
    for a, b in zip(states.tensors(state), states.tensors(kept), strict=True):
        assert torch.equal(a, b)


def test_what_the_kernels_do_not_serve(cuda: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    model = build_model("model=llama", "model.num_layers=1").to(cuda).eval()
    with backend.use("strict"), pytest.raises(RuntimeError, match="LlamaBlock"):
        Decoder(model, None, 1)
    with caplog.at_level(logging.WARNING):
        decoder = Decoder(model, None, 2)
    assert "LlamaBlock" in caplog.text
    tokens = stream(2, 6, cuda)
    got = torch.stack([decoder.step(tokens[:, i]) for i in range(6)], 1)
    assert distance(got, plain(model, tokens, None)) < 2e-5


def test_a_large_head(cuda: torch.device) -> None:
    """The head of the 7B shape, whose values take a whole block of threads."""
    torch.manual_seed(0)
    sizes = "num_layers=1 dim=256 z_dim=512 value_dim=4096 num_heads=2 ffn_dim=512 chunk_size=64 ema_modes=16"
    model = build_model("model=gecko", *(f"model.{size}" for size in sizes.split())).to(cuda).eval()
    tokens = stream(2, 200, cuda)
    for dtype, limit in ((torch.float32, 2e-5), (torch.bfloat16, 0.02)):
        model = model.to(dtype)
        wanted = plain(model, tokens, BOS)
        got, rest = decoded(model, tokens, 100, 90, BOS)
        assert distance(torch.cat((got, rest), 1), wanted[:, 100:]) < limit
