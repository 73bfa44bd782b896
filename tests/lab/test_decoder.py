"""A decoder gives the logits of the model's own call, step by step, and a state that the model continues."""

from __future__ import annotations

import pytest
import torch

from gecko_lab import build_model
from gecko_lab.decoder import Decoder
from gecko_lab.model import LanguageModel

BOS = 256


def small(*overrides: str) -> LanguageModel:
    torch.manual_seed(0)
    sizes = "num_layers=2 dim=32 z_dim=16 value_dim=32 num_heads=2 ffn_dim=48 chunk_size=4 ema_modes=4 norm_groups=4"
    return build_model("model=gecko", *(f"model.{size}" for size in sizes.split()), *overrides).eval()


@pytest.mark.parametrize("read", [0, 1, 5, 11])
@pytest.mark.parametrize("bos_id", [None, BOS])
def test_steps_are_the_models_call(read: int, bos_id: int | None) -> None:
    model, steps = small(), 13
    tokens = torch.randint(0, 256, (3, read + steps + 6), generator=torch.Generator().manual_seed(read))
    tokens[0, read + 2] = tokens[1, read + 7] = tokens[2, read + 1] = BOS
    with torch.no_grad():
        wanted, _ = model(tokens, bos_id=bos_id)
        state = model(tokens[:, :read], bos_id=bos_id)[1] if read else None
        decoder = Decoder(model, state, 3, bos_id=bos_id)
        got = torch.stack([decoder.step(tokens[:, read + i]) for i in range(steps)], 1)
        rest, _ = model(tokens[:, read + steps :], decoder.state, bos_id)
    torch.testing.assert_close(got, wanted[:, read : read + steps], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(rest, wanted[:, read + steps :], atol=2e-5, rtol=1e-4)


def test_errors() -> None:
    model = small()
    with pytest.raises(ValueError, match="batch=0"):
        Decoder(model, None, 0)
    with pytest.raises(RuntimeError, match="take a step first"):
        _ = Decoder(model, None, 1).state
    _, state = model(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="batch=3"):
        Decoder(model, state, 3)
    with pytest.raises(ValueError, match="tokens: expected"):
        Decoder(model, state, 2).step(torch.zeros(2, 1, dtype=torch.int64))
