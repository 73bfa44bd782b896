"""What each component means beyond the laws: equivalences, starts, sizes, refusals."""

import dataclasses
import math
import warnings

import pytest
import torch

from gecko_lab import laws
from gecko_lab.components import KINDS, Documents, Shape
from gecko_lab.components.init import MODES, init_matrix
from gecko_lab.components.registry import Parts


def configs(**names: str) -> dict:
    return {kind: KINDS[kind][name].Config() for kind, name in {**laws.PARTS, **names}.items()}


def block(shape: Shape, chosen: dict) -> torch.nn.Module:
    return KINDS["block"][chosen["block"].name](chosen["block"], shape, Parts(chosen, shape))


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


GECKO_7B = Shape(dim=4096, z_dim=1024, value_dim=8192, num_heads=4, ffn_dim=8192, chunk_size=2048, norm_groups=64)


def test_gecko_7b_block():
    with torch.device("meta"):
        assert count(block(GECKO_7B, configs())) == 222_614_528
        assert 32 * 222_614_528 + 2 * 4096 + 2 * 32_000 * 4096 == 7_385_817_088


@pytest.mark.parametrize(
    ("layers", "dim", "heads", "z", "value", "ffn", "groups", "feedforward", "total"),
    [
        (12, 1024, 1, 256, 2048, 2560, 32, "mlp", 220_627_968),
        (24, 2048, 2, 512, 4096, 4864, 64, "mlp", 1_342_832_640),
        (32, 4096, 4, 1024, 8192, 8192, 64, "swiglu", 7_385_817_088),
    ],
    ids=["200m", "1.3b", "7.3b"],
)
def test_megalodon_sizes(layers, dim, heads, z, value, ffn, groups, feedforward, total):
    shape = Shape(dim=dim, z_dim=z, value_dim=value, num_heads=heads, ffn_dim=ffn, chunk_size=2048, norm_groups=groups)
    chosen = configs(norm="timestep", attention="chunk", memory="none", feedforward=feedforward)
    chosen["ema"].omega_skip = chosen["ema"].scale = True
    with torch.device("meta"):
        assert layers * count(block(shape, chosen)) + 2 * dim + 2 * 32_000 * dim == total


@pytest.mark.parametrize(
    ("layers", "dim", "heads", "ffn", "total"),
    [(32, 4096, 32, 11_008, 6_738_415_616), (40, 5120, 40, 13_824, 13_015_864_320)],
    ids=["7b", "13b"],
)
def test_llama_sizes(layers, dim, heads, ffn, total):
    shape = Shape(dim=dim, z_dim=dim, value_dim=dim, num_heads=heads, ffn_dim=ffn, chunk_size=2048)
    chosen = configs(ema="none", norm="rms", attention="full", memory="none", block="llama")
    chosen["feedforward"].norm = "rms"
    with torch.device("meta"):
        assert layers * count(block(shape, chosen)) + dim + 2 * 32_000 * dim == total


def test_real_ema_is_the_complex_one_without_phase():
    real, complex_ = laws.Subject("ema", "real"), laws.Subject("ema", "complex")
    with torch.no_grad():
        for name in ("alpha", "delta"):
            getattr(complex_.module, name).copy_(getattr(real.module, name))
        complex_.module.gamma[..., 0] = real.module.gamma
        complex_.module.theta.fill_(-1e3)  # sigmoid = 0
    x, documents = real.inputs(2, 20), laws.random_documents(2, 20)
    y, h = real.run(x, documents)
    expected, g = complex_.run(x, documents)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(h, g.real)


def test_mega_ema_by_the_definition():
    """Spec 3.5, token by token."""
    s = laws.Subject("ema", "real", options={"mega": True})
    m, (x,) = s.module, s.inputs(2, 9)
    a, q = m.delta.sigmoid(), 1 - m.delta.sigmoid() * m.alpha.sigmoid()
    h, rows = torch.zeros(2, *q.shape, dtype=x.dtype), []
    for t in range(9):
        h = q * h + a * m.beta * x[:, t, :, None]
        rows.append(torch.nn.functional.silu((m.gamma * h).sum(-1) / math.sqrt(q.shape[1]) + m.omega * x[:, t]))
    torch.testing.assert_close(s.run((x,))[0], torch.stack(rows, 1))


def test_megalodon_ema_by_the_definition():
    """Spec 3.4, token by token: output scale 1/sqrt(N), weighted skip."""
    s = laws.Subject("ema", "complex", options={"omega_skip": True, "scale": True})
    m, (x,) = s.module, s.inputs(2, 9)
    modes = m.alpha.shape[1]
    p = m.alpha.sigmoid()
    phase = torch.arange(1, modes + 1) * m.theta.sigmoid()[:, None] * 2 * math.pi / modes
    q = (1 - p * m.delta.sigmoid()) * torch.exp(1j * phase)
    h, rows = torch.zeros(2, *q.shape, dtype=q.dtype), []
    for t in range(9):
        h = q * h + p * x[:, t, :, None]
        gamma = torch.view_as_complex(m.gamma) / math.sqrt(modes)
        rows.append((gamma * h).real.sum(-1) + m.omega * x[:, t])
    torch.testing.assert_close(s.run((x,))[0], torch.stack(rows, 1))


def test_theta_is_a_permutation_fixed_by_the_seed():
    shape = dataclasses.replace(laws.TINY, dim=32)

    def theta(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return KINDS["ema"]["complex"](KINDS["ema"]["complex"].Config(), shape).theta.detach()

    assert torch.equal(theta(1), theta(1))
    assert not torch.equal(theta(1), theta(2))
    expected = 32.0 ** (-torch.arange(32, 0, -1) / 32.0)
    torch.testing.assert_close(theta(1).sigmoid().sort().values, expected, rtol=1e-5, atol=1e-6)


def test_ema_coefficients_stay_float32_in_bfloat16():
    module = laws.Subject("ema", "complex").module.bfloat16()
    assert [t.dtype for t in module.coefficients()] == [torch.float32, torch.complex64, torch.complex64]


@pytest.mark.parametrize(
    ("attention", "lag"), [("sliding_chunk", 2), ("chunk", 1), ("sliding_window", 2), ("full", 2)], ids=str
)
def test_memory_follows_the_attention(attention, lag):
    """In a block every token of the past is seen by attention or table: a change anywhere shows at the end."""
    s = laws.Subject("block", "gecko", parts={"attention": attention, "ema": "none", "norm": "layer"})
    assert s.module.memory.lag == lag
    (x,) = s.inputs(1, 22)
    x.requires_grad_()
    for t in range(12, 22):
        (grad,) = torch.autograd.grad(s.run((x,))[0][0, t].square().sum(), x)
        assert (grad[0, : t + 1].abs().amax(-1) > 0).all()


def test_memory_refuses_a_gap():
    cls = KINDS["memory"]["adaptive_working"]
    with pytest.raises(ValueError, match=r"model.memory.lag=2: the attention beside it covers 1 whole chunk"):
        cls(cls.Config(lag=2), laws.TINY, covered=1)
    with pytest.warns(UserWarning, match=r"model.memory.lag=2"):
        assert cls(cls.Config(lag=2, allow_gap=True), laws.TINY, covered=1).lag == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cls(cls.Config(lag=1), laws.TINY, covered=2).lag == 1
        assert cls(cls.Config(lag=5), laws.TINY, covered=None).lag == 5
    with pytest.raises(ValueError, match=r"model.memory.lag=0"):
        cls(cls.Config(lag=0), laws.TINY, covered=2)
    with pytest.raises(ValueError, match=r"model.memory.lag=1: the attention beside it covers 0 whole chunk"):
        cls(cls.Config(), laws.TINY, covered=0)  # a window shorter than a chunk


@pytest.mark.parametrize("groups", [3, 8, 16])
@pytest.mark.parametrize("norm", ["timestep", "timestep_decay"])
def test_norm_groups(norm, groups):
    with pytest.raises(ValueError, match=f"model.norm_groups={groups}: must divide model.dim=8"):
        laws.Subject("norm", norm, dataclasses.replace(laws.TINY, norm_groups=groups))


def test_refusals_name_the_choice():
    for names, message in [
        ({"block": "llama"}, "model/ema=complex: must be none"),
        ({"block": "llama", "ema": "none"}, "model/memory=adaptive_working: must be none"),
        ({"block": "mega"}, "model/memory=adaptive_working: must be none"),
    ]:
        with pytest.raises(ValueError, match=message):
            block(laws.TINY, configs(**names))
    chosen = configs()
    chosen["feedforward"].norm = "timestep"
    with pytest.raises(ValueError, match="norm='timestep': must be a norm of a row alone, one of layer, rms"):
        block(laws.TINY, chosen)


def test_two_hop_residual_adds_to_the_input():
    one = laws.Subject("block", "gecko")
    two = laws.Subject("block", "gecko", options={"two_hop_residual": True})
    two.module.load_state_dict(one.module.state_dict())
    with torch.no_grad():
        for s in (one, two):
            s.module.nffn.fc2.weight.zero_()
    (x,) = one.inputs(1, 7)
    assert torch.equal(two.run((x,))[0], x)
    assert not torch.allclose(one.run((x,))[0], x)


def test_views_follow_the_memory():
    assert laws.Subject("block", "gecko").module.gamma.shape[0] == 4
    assert laws.Subject("block", "gecko", parts={"memory": "none"}).module.gamma.shape[0] == 2


@pytest.mark.parametrize("name", ["gecko", "mega", "llama"])
def test_dropouts_act_in_training_only(name):
    shape = dataclasses.replace(laws.TINY, dropout=0.3, hidden_dropout=0.3, attention_dropout=0.3)
    s = laws.Subject("block", name, shape)
    inputs = s.inputs(1, 9)
    assert not torch.equal(s.run(inputs)[0], s.run(inputs)[0])
    s.module.eval()
    assert torch.equal(s.run(inputs)[0], s.run(inputs)[0])


@pytest.mark.parametrize(
    ("mode", "dim", "std"),
    [("he", None, 1 / math.sqrt(3 * 300)), ("bert", None, 0.02), ("gaussian", 300, 1 / math.sqrt(300)),
     ("gaussian", None, 1.0), ("xavier", None, math.sqrt(2 / 500))],
)
def test_init(mode, dim, std):
    torch.manual_seed(0)
    weight = torch.empty(200, 300)
    init_matrix(weight, mode, dim)
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    if mode == "gaussian":
        assert weight.abs().max() <= 3 * std
    init_matrix(torch.empty(2, 3, device="meta"), mode, dim)


def test_init_none_and_unknown():
    weight = torch.ones(2, 2)
    init_matrix(weight, "none")
    assert torch.equal(weight, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"model.init='hee'.*Did you mean 'he'"):
        init_matrix(weight, "hee")
    assert MODES[0] == "he"


def test_documents_of_pieces_continue():
    """The packed and the cut stream agree on segments and positions."""
    bos = torch.tensor([[False, True, False, False, True, False]])
    whole = Documents.from_bos(bos)
    first = Documents.from_bos(bos[:, :3])
    second = Documents.from_bos(bos[:, 3:], first.cursor)
    for w, a, b in zip(whole, first, second, strict=True):
        assert torch.equal(w, torch.cat((a, b), 1))
