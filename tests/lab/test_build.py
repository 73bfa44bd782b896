"""Configuration to model: presets, parameter counts, swaps, ablations, and what is refused."""

import pytest
import torch

import gecko_lab
from gecko_lab.build import build_config, options
from gecko_lab.errors import ConfigError

COUNTS = {
    "gecko_7b": 7_385_817_088,
    "megalodon_200m": 220_627_968,
    "megalodon_1b": 1_342_832_640,
    "megalodon_7b": 7_385_817_088,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
}


@pytest.mark.parametrize("preset", COUNTS)
def test_published_parameter_counts(preset: str) -> None:
    with torch.device("meta"):
        assert gecko_lab.build_model(f"model={preset}").num_parameters() == COUNTS[preset]


@pytest.mark.parametrize("preset", [p for p in options("model") if p not in COUNTS])
def test_every_other_preset_builds(preset: str) -> None:
    with torch.device("meta"):
        model = gecko_lab.build_model(f"model={preset}")
    millions = {"11m": (9e6, 13e6), "200m": (1.9e8, 2.6e8), "1b": (1.0e9, 1.6e9)}
    for suffix, (low, high) in millions.items():
        if preset.endswith(f"_{suffix}"):
            assert low < model.num_parameters() < high


@pytest.mark.parametrize(
    ("ablation", "kind", "name"),
    [
        ("no_awm", "memory", "none"),
        ("real_ema", "ema", "real"),
        ("no_ema", "ema", "none"),
        ("timestep_norm", "norm", "timestep"),
        ("layer_norm", "norm", "layer"),
        ("chunk_attention", "attention", "chunk"),
        ("sliding_window", "attention", "sliding_window"),
        ("full_attention", "attention", "full"),
    ],
)
def test_ablation_swaps_exactly_one_component(ablation: str, kind: str, name: str) -> None:
    full, ablated = build_config(), build_config(f"+ablation={ablation}")
    assert getattr(ablated.model, kind).name == name
    setattr(ablated.model, kind, getattr(full.model, kind))
    assert ablated == full


def test_ablations_combine() -> None:
    model = build_config("+ablation=[no_awm,no_rope,two_hop]").model
    assert (model.memory.name, model.num_rope_heads, model.block.two_hop_residual) == ("none", 0, True)
    megalodon = build_config("+ablation=megalodon").model
    assert (megalodon.norm.name, megalodon.attention.name, megalodon.memory.name) == ("timestep", "chunk", "none")


def test_command_line_wins_over_preset() -> None:
    model = build_config("model=gecko_7b", "model.vocab_size=128256", "model/memory=none").model
    assert (model.vocab_size, model.memory.name, model.dim) == (128256, "none", 4096)


def test_memory_only_in_the_upper_half() -> None:
    model = gecko_lab.build_model("model.per_layer.memory=[none,adaptive_working]")
    kinds = [type(block.memory).__name__ for block in model.blocks]
    assert kinds[0] == kinds[1] != kinds[2] == kinds[3]


def test_seed_fixes_the_weights() -> None:
    def weights() -> torch.Tensor:
        torch.manual_seed(3)
        return torch.cat([p.detach().flatten() for p in gecko_lab.build_model().parameters()])

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model/ema=complx", ["ema", "'complx'", "complex"]),
        ("model=gecko_8b", ["model", "'gecko_8b'", "gecko_7b"]),
        ("+ablation=no_amw", ["ablation", "'no_amw'", "no_awm"]),
        ("ablation=no_awm", ["+ablation=no_awm"]),
        ("model.dims=3", ["model.dims", "dim"]),
        ("model.ema.mode=3", ["model.ema.mode"]),
        ("trainr.max_steps=3", ["trainr", "trainer"]),
        ("model.dim=wide", ["wide", "dim"]),
        ("model.num_heads=3", ["model.z_dim=64", "multiple", "num_heads=3"]),
        ("model.chunk_size=0", ["model.chunk_size=0", "at least 1"]),
        ("model.norm_groups=7", ["groups", "7", "128"]),
        ("model.num_layers=0", ["model.num_layers=0"]),
        ("model.dropout=1.5", ["model.dropout=1.5"]),
        ("model.init=he2", ["he2", "he"]),
        ("model.per_layer.memory=[none,none,none]", ["per_layer.memory", "num_layers=4"]),
        ("model.per_layer.memory=[non]", ["memory", "'non'", "none"]),
        ("trainer.max_steps=0", ["trainer.max_steps=0"]),
        ("trainer.precision=fp8", ["trainer.precision=fp8", "bf16-mixed"]),
        ("optim.lr=-1", ["optim.lr=-1"]),
        ("model.dim=", ["dim"]),
    ],
)
def test_mistakes_are_named(override: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        gecko_lab.build_model(override)
    for word in words:
        assert word in str(caught.value)


def test_unknown_name_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'adaptive_working'"):
        build_config("model/memory=adaptiv_working")


def test_tokens_outside_the_vocabulary() -> None:
    model = gecko_lab.build_model("model.vocab_size=10", "model.num_layers=1")
    with pytest.raises(ValueError, match=r"id 10 .* 0\.\.9"):
        model(torch.tensor([[1, 10]]))
    with pytest.raises(ValueError, match="L >= 1"):
        model(torch.zeros(1, 0, dtype=torch.int64))
