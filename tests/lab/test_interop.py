"""Whole models against the official implementation's outputs on an H100 (tests/golden), and names both ways."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gecko_lab
from gecko_lab.errors import LabError
from gecko_lab.interop import from_official, to_official

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "official.pt", weights_only=True)
CASES = [name for name in GOLDEN if name.startswith("model")]


def weights(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(_normal(seed, shape).astype("float32") * np.float32(std))
        for name, (shape, seed, std) in case["fill"].items()
    }


def _normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", CASES)
def test_official_logits_loss_gradients_and_stream(name: str) -> None:
    case = GOLDEN[name]
    model = from_official(case["cfg"], weights(case))
    tokens, bos = case["tokens"], (0 if case["multi_segments"] else None)
    logits, _ = model(tokens[:, :80], bos_id=bos)
    assert relative(logits, case["logits"]) < 1e-4
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(float(loss) - case["loss"]) < 1e-4
    loss.backward()
    grads = {n: p.grad for n, p in _official(model).items()}
    for i, key in enumerate(sorted(grads)):
        want, grad = case["grads"][key], grads[key].double()
        w = _normal(77 + i, (4, grad.numel()))
        scale = float(want["norm"]) + 1e-12
        assert abs(float(grad.norm()) - float(want["norm"])) < 1e-3 * scale, key
        proj = torch.from_numpy(w) @ grad.flatten()
        assert float((proj - torch.tensor(want["proj"], dtype=torch.float64)).norm()) < 2e-3 * scale * 2, key

    if bos is None:
        state, pieces, at = None, [], 0
        with torch.no_grad():
            for length in (32, 32, 7, *[1] * 9):
                piece, state = model(tokens[:, at : at + length], state)
                pieces.append(piece)
                at += length
        assert relative(torch.cat(pieces, 1), case["stream_logits"]) < 1e-4


def _official(model: gecko_lab.LanguageModel) -> dict[str, torch.Tensor]:
    from gecko_lab.interop import _official_name

    return {_official_name(n): p for n, p in model.named_parameters()}


def test_round_trip() -> None:
    torch.manual_seed(0)
    model = gecko_lab.build_model("model.num_layers=2", "model.block.two_hop_residual=true", "model.num_rope_heads=1")
    config, state = to_official(model)
    again = from_official(config, {**state, "rope.freqs": torch.zeros(3)})
    tokens = torch.randint(0, 257, (2, 70))
    assert torch.equal(model(tokens)[0], again(tokens)[0])
    assert to_official(again)[0] == config


def test_tied_embeddings_stay_tied() -> None:
    model = gecko_lab.build_model("model.num_layers=1", "model.tie_embeddings=true")
    config, state = to_official(model)
    again = from_official(config, {k: v for k, v in state.items() if k != "output.output.weight"})
    assert again.head.weight is again.embed.weight
    assert again.num_parameters() == model.num_parameters()


def test_what_does_not_fit_is_listed() -> None:
    model = gecko_lab.build_model("model.num_layers=1")
    config, state = to_official(model)
    with pytest.raises(LabError, match=r"unknown key 'modle_dim'.*model_dim"):
        from_official({**config, "modle_dim": 3}, state)
    del state["layers.0.mega.wz.bias"]
    state["layers.0.mega.wz.weight"] = torch.zeros(2, 2)
    state["extra"] = torch.zeros(1)
    with pytest.raises(LabError, match=r"wz.weight: shape .*missing layers.0.mega.wz.bias.*unexpected extra"):
        from_official(config, state)
    with pytest.raises(LabError, match="attention=chunk"):
        to_official(gecko_lab.build_model("+ablation=chunk_attention"))
