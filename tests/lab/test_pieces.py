"""A row cut inside a step: the numbers of the uncut row, in the memory of one piece."""

from collections.abc import Callable

import pytest
import torch

import gecko_lab
from gecko_lab.components import state as states
from gecko_lab.pieces import row_losses

FAMILIES = ["gecko", "megalodon", "mega", "llama"]
BOS = 39
SMALL = ["model.num_layers=2", "model.dim=16", "model.ffn_dim=24", "model.chunk_size=8", "model.norm_groups=4",
         "model.vocab_size=40", "model.ema_modes=2", "model.z_dim=16", "model.value_dim=16"]


def make(family: str, *more: str) -> gecko_lab.LanguageModel:
    torch.manual_seed(0)
    model = gecko_lab.build_model(f"model={family}", *SMALL, *more).double()
    for p in model.parameters():  # fresh zeros (norm weights, biases) would hide mistakes
        p.data.add_(0.1 * torch.randn_like(p))
    return model


def a_row(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.randint(0, BOS, (2, length + 1), generator=torch.Generator().manual_seed(1))
    row[0, [0, 5, 6, 30]] = BOS
    row[1, [8, 33]] = BOS
    return row[:, :-1], row[:, 1:]


def run(model: gecko_lab.LanguageModel, piece_len: int, bos_id: int | None, state: object = None, loss_chunk: int = 0,
        ) -> tuple[torch.Tensor, object, list[torch.Tensor]]:
    """Losses, the state after, and the gradients of a loss in which late targets weigh more."""
    tokens, targets = a_row(45)
    model.zero_grad()
    losses, after = row_losses(model, tokens, targets, state, bos_id, piece_len=piece_len, loss_chunk=loss_chunk)  # type: ignore[arg-type]
    (losses * torch.linspace(0.5, 2.0, 45)).mean().backward()
    return losses.detach(), states.detach(after), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(a: tuple, b: tuple, **tolerance: float) -> None:
    torch.testing.assert_close(a[0], b[0], **tolerance)
    for x, y in zip(states.tensors(a[1]), states.tensors(b[1]), strict=True):
        torch.testing.assert_close(x, y, **tolerance)
    assert len(a[2]) > 5
    for x, y in zip(a[2], b[2], strict=True):
        torch.testing.assert_close(x, y, **tolerance)


CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("bos_id", [BOS, None], ids=["documents", "one"])
@pytest.mark.parametrize("piece_len", [7, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_give_the_gradient_of_the_whole_row(family: str, piece_len: int, bos_id: int | None) -> None:
    model = make(family)
    assert_same(run(model, piece_len, bos_id), run(model, 0, bos_id), **CLOSE)


def test_the_gradient_crosses_the_cut() -> None:
    """Detached pieces, truncated back-propagation, give other gradients: so the test above can fail."""
    model = make("gecko")
    whole = run(model, 0, None)[2]
    tokens, targets = a_row(45)
    model.zero_grad()
    first, state = row_losses(model, tokens[:, :16], targets[:, :16])
    rest, _ = row_losses(model, tokens[:, 16:], targets[:, 16:], states.detach(state))
    (torch.cat((first, rest), 1) * torch.linspace(0.5, 2.0, 45)).mean().backward()
    cut = [p.grad for p in model.parameters() if p.grad is not None]
    assert max(float((a - b).abs().max()) for a, b in zip(whole, cut)) > 1e-4


def test_pieces_after_a_carried_state_with_checkpointed_blocks_and_chunked_logits() -> None:
    model, twin = make("gecko"), make("gecko", "model.checkpoint_blocks=true")
    _, state, _ = run(model, 0, BOS)
    assert_same(run(twin, 10, BOS, state, loss_chunk=5), run(model, 0, BOS, state), **CLOSE)


def test_pieces_repeat_their_dropout_when_recomputed() -> None:
    model = make("gecko", "model.dropout=0.2", "model.hidden_dropout=0.2", "model.attention_dropout=0.2").train()
    tokens, targets = a_row(45)
    weight = model.head.weight

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return row_losses(model, tokens, targets, bos_id=BOS, piece_len=8)[0].mean()

    loss().backward()
    assert weight.grad is not None
    slope, step = weight.grad.clone(), torch.randn_like(weight)
    with torch.no_grad():
        weight.add_(1e-6 * step)
        above = loss()
        weight.sub_(2e-6 * step)
        below = loss()
    assert float((above - below) / 2e-6) == pytest.approx(float((slope * step).sum()), rel=1e-5)


def test_pieces_under_bf16_autocast() -> None:
    model = make("gecko").float()
    with torch.autocast("cpu", torch.bfloat16):
        cut, whole = run(model, 16, BOS), run(model, 0, BOS)
    for a, b in zip(cut[2], whole[2], strict=True):
        assert float((a - b).norm()) <= 0.05 * float(b.norm()) + 1e-4
    assert all(t.dtype != torch.bfloat16 for t in states.tensors(cut[1].blocks[0].ema))  # type: ignore[attr-defined]


def peak_bytes(work: Callable[[], None]) -> int:
    """The most bytes that tensors made during ``work`` held at one time, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("family", ["gecko", "megalodon"])
def test_memory_is_that_of_one_piece_and_the_states(family: str) -> None:
    torch.manual_seed(0)
    sizes = ["model.num_layers=2", "model.dim=64", "model.ffn_dim=96", "model.chunk_size=32"]
    model = gecko_lab.build_model(f"model={family}", *sizes)
    row = torch.randint(0, 257, (1, 641))

    def step(length: int, piece_len: int) -> int:
        def work() -> None:
            losses, _ = row_losses(model, row[:, :length], row[:, 1 : length + 1], bos_id=256, piece_len=piece_len)
            losses.mean().backward()

        work()  # gradients exist from here on: they are not the row's
        return peak_bytes(work)

    with torch.no_grad():
        _, state = row_losses(model, row[:, :128], row[:, 1:129], bos_id=256)
    one, cut, whole = step(128, 0), step(640, 128), step(640, 0)
    assert whole > 3 * one
    assert cut < 1.5 * one + 5 * states.nbytes(state)
