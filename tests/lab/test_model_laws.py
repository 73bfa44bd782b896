"""The protocol's law, for whole models of every family and ablation: any cut, any packing, the same numbers."""

import pytest
import torch

import gecko_lab
from gecko_lab.build import options
from gecko_lab.components import state as states

FAMILIES = ["gecko", "megalodon", "mega", "llama"]
CASES = [[f"model={f}"] for f in FAMILIES] + [[f"+ablation={a}"] for a in options("ablation")]
CASES += [["model.per_layer.memory=[none,adaptive_working]"], ["model.per_layer.attention=[sliding_chunk,full]"]]
SMALL = ["model.num_layers=2", "model.dim=32", "model.ffn_dim=48", "model.chunk_size=8", "model.norm_groups=4",
         "model.vocab_size=40", "model.ema_modes=4"]
BOS = 39


def make(case: list[str]) -> gecko_lab.LanguageModel:
    torch.manual_seed(0)
    sizes = [] if "model=llama" in case else ["model.z_dim=16", "model.value_dim=32"]
    if "model=llama" in case:
        sizes = ["model.z_dim=32", "model.value_dim=32"]
    model = gecko_lab.build_model(*case, *SMALL, *sizes).double().eval()
    for p in model.parameters():  # fresh zeros (norm weights, biases) would hide mistakes
        p.data.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(params=CASES, ids=lambda c: c[0].split("=", 1)[1].strip("[]").replace(",", "-") if c else "gecko")
def model(request: pytest.FixtureRequest) -> gecko_lab.LanguageModel:
    return make(request.param)


def some_tokens(length: int, documents: bool = True) -> torch.Tensor:
    tokens = torch.randint(0, BOS, (2, length), generator=torch.Generator().manual_seed(1))
    if documents:
        tokens[0, [0, 5, 6, 30]] = BOS
        tokens[1, [8, 33]] = BOS
    return tokens


def test_causality(model: gecko_lab.LanguageModel) -> None:
    tokens = some_tokens(45)
    changed = tokens.clone()
    changed[:, 27] = (changed[:, 27] + 1) % BOS
    a, _ = model(tokens, bos_id=BOS)
    b, _ = model(changed, bos_id=BOS)
    assert torch.equal(a[:, :27], b[:, :27])
    assert not torch.equal(a[:, 27], b[:, 27])


@pytest.mark.parametrize(
    "cuts", [[17], [1, 2, 3, 8, 16, 24, 25, 40], list(range(1, 45))], ids=["two", "some", "tokens"]
)
@pytest.mark.parametrize("bos_id", [BOS, None], ids=["documents", "one"])
def test_any_cut_gives_the_same_logits(model: gecko_lab.LanguageModel, cuts: list[int], bos_id: int | None) -> None:
    tokens = some_tokens(45)
    whole, _ = model(tokens, bos_id=bos_id)
    state, pieces = None, []
    for start, end in zip([0, *cuts], [*cuts, 45]):
        logits, state = model(tokens[:, start:end], state, bos_id)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)


def test_packed_documents_equal_documents_alone(model: gecko_lab.LanguageModel) -> None:
    """The chunk grid is absolute (spec 5.3), so a document alone is read at the same place of the grid."""
    tokens = some_tokens(45)
    packed, _ = model(tokens, bos_id=BOS)
    for start, end in [(5, 6), (6, 30), (30, 45)]:
        alone = torch.randint(0, BOS, (1, 45), generator=torch.Generator().manual_seed(2))
        alone[0, start:end] = tokens[0, start:end]
        other, _ = model(alone, bos_id=BOS)
        torch.testing.assert_close(other[0, start:end], packed[0, start:end], rtol=1e-9, atol=1e-9)


def test_state_is_sliced_and_detached(model: gecko_lab.LanguageModel) -> None:
    tokens = some_tokens(45)
    _, state = model(tokens[:, :21], bos_id=BOS)
    both, _ = model(tokens[:, 21:], states.detach(state), BOS)
    one, _ = model(tokens[1:, 21:], states.rows(states.detach(state), slice(1, 2)), BOS)
    torch.testing.assert_close(one, both[1:], rtol=1e-9, atol=1e-9)
    assert not any(t.requires_grad for t in states.tensors(states.detach(state)))


def test_gradient_through_the_carried_state(model: gecko_lab.LanguageModel) -> None:
    tokens = some_tokens(45)
    whole, _ = model(tokens, bos_id=BOS)
    whole[:, 21:].square().sum().backward()
    expected = model.embed.weight.grad.clone()
    model.zero_grad()
    _, state = model(tokens[:, :21], bos_id=BOS)
    model(tokens[:, 21:], state, BOS)[0].square().sum().backward()
    torch.testing.assert_close(model.embed.weight.grad, expected, rtol=1e-8, atol=1e-9)


def test_bfloat16_is_finite_and_close(model: gecko_lab.LanguageModel) -> None:
    tokens = some_tokens(45)
    exact, _ = model(tokens, bos_id=BOS)
    rough, _ = model.bfloat16()(tokens, bos_id=BOS)
    assert rough.dtype == torch.float32
    assert torch.isfinite(rough).all()
    assert (rough.double() - exact).norm() < 0.1 * exact.norm()


def test_checkpointed_blocks_give_the_same_gradient(model: gecko_lab.LanguageModel) -> None:
    tokens = some_tokens(45)
    grads = []
    for flag in (False, True):
        model.config.checkpoint_blocks = flag
        model.zero_grad()
        model(tokens, bos_id=BOS)[0].square().sum().backward()
        grads.append(model.embed.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=0)
