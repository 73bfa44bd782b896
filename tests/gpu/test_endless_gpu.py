"""A stream of four million tokens on a GPU: memory and state do not grow, nothing drifts."""

import time

import pytest
import torch

from gecko_lab.build import build_model
from gecko_lab.components import state as states
from gecko_lab.components.rotary import tables
from gecko_lab.data.tokenizers import load_tokenizer
from gecko_lab.tasks import Subject

pytestmark = pytest.mark.gpu
PIECE, TOTAL = 65_536, 4_194_304
SIZES = ["model.num_layers=2", "model.dim=256", "model.ffn_dim=512", "model.z_dim=128", "model.value_dim=512",
         "model.num_heads=2", "model.chunk_size=512", "model.norm_groups=16", "model.ema_modes=16"]  # fmt: skip


def test_four_million_tokens_in_constant_memory() -> None:
    """What a piece costs is printed only: on a card that others use, time says nothing (docs/evaluation.md has it)."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    subject = Subject(build_model(*SIZES).eval().to(device), load_tokenizer("bytes"), device, "bf16-mixed")
    random = torch.Generator().manual_seed(0)
    state, peaks, sizes, seconds, losses = None, [], [], [], []
    for _ in range(TOTAL // PIECE):
        tokens = torch.randint(0, 256, (1, PIECE + 1), generator=random).to(device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        features, state = subject.features(tokens[:, :-1], state, None)
        losses.append(float(subject.losses(features, tokens[:, 1:]).mean()))
        del features
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        peaks.append(torch.cuda.max_memory_allocated())
        sizes.append(states.nbytes(state))
    assert state is not None
    assert state.blocks[0].attention.position == TOTAL
    assert int(state.blocks[0].norm.count[0]) == TOTAL
    assert len(set(sizes)) == 1, sizes
    assert max(peaks[1:]) <= 1.01 * min(peaks[1:]), peaks
    assert all(torch.isfinite(t).all() for t in states.tensors(state) if t.is_floating_point() or t.is_complex())
    nats = torch.tensor(losses)
    assert torch.isfinite(nats).all()
    assert float((nats[-8:].mean() - nats[1:9].mean()).abs()) < 0.05  # noise stays noise: nothing drifts
    print(f"\n{PIECE / min(seconds[2:22]):,.0f} tokens/s early, {PIECE / min(seconds[-20:]):,.0f} late")


def test_rotary_angles_on_the_gpu_are_exact_at_four_million() -> None:
    cos, sin = tables(TOTAL, 256, 64, 500_000.0, torch.device("cuda"))
    want_cos, want_sin = tables(TOTAL, 256, 64, 500_000.0, torch.device("cpu"))
    torch.testing.assert_close(cos.cpu(), want_cos, rtol=0, atol=1e-7)
    torch.testing.assert_close(sin.cpu(), want_sin, rtol=0, atol=1e-7)
