"""A decoder gives the logits of the model's own call, step by step, and a state that the model continues."""

from __future__ import annotations

import pytest
import torch

from gecko_lab import build_model
from gecko_lab.components import state as states
from gecko_lab.decode_graph import Memory
from gecko_lab.decoder import Decoder
from gecko_lab.kernels import ops
from gecko_lab.kernels.types import MemoryState
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


@pytest.mark.parametrize("read", [0, 3, 8])
@pytest.mark.parametrize("with_documents", [False, True])
def test_a_memory_that_folds_from_rings_has_the_operations_state(read: int, with_documents: bool) -> None:
    part, chunk, steps = small().get_submodule("blocks.0.memory"), 4, 10
    random = torch.Generator().manual_seed(read)
    keys, values = (torch.randn(2, read + steps, 2, size, generator=random) for size in (8, 16))
    segments = (torch.rand(2, read + steps, generator=random) < 0.15).cumsum(1) if with_documents else None

    def whole(end: int) -> MemoryState:
        seen = None if segments is None else segments[:, :end]
        return ops.adaptive_working_memory(keys[:, :end], keys[:, :end], values[:, :end], chunk=chunk, segments=seen)[1]

    ring, ids = torch.zeros(2, 2 * chunk, 32), torch.zeros(2, 2 * chunk, dtype=torch.int64)
    memory = Memory(part, whole(read) if read else None, ring, (2, 2, 8, 16), read)  # type: ignore[arg-type]
    table = memory.place.table
    for position in range(read, read + steps):
        memory.place.keys[:, position % chunk] = keys[:, position]
        ring[:, position % (2 * chunk)] = values[:, position].flatten(1)
        if segments is not None:
            ids[:, position % (2 * chunk)] = segments[:, position]
        seen = None if segments is None else ids
        for got, wanted in zip(states.tensors(memory.state(position + 1, seen)), states.tensors(whole(position + 1)),
                               strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
        if (position + 1) % chunk == 0:
            memory.fold(position + 1, seen)
            assert memory.place.table is table
