"""The state atlas says what real models have and cost."""

import json

import pytest
import torch

import gecko_lab
from gecko_lab.components import state as states
from gecko_lab.describe import describe, main
from gecko_lab.telemetry.flops import flops_per_token

SMALL = ["model.num_layers=2", "model.dim=32", "model.ffn_dim=48", "model.chunk_size=8", "model.norm_groups=4",
         "model.ema_modes=4", "model.value_dim=32", "model.z_dim=32"]  # fmt: skip
CASES = {
    "gecko": ["model=gecko"],
    "megalodon": ["model=megalodon"],
    "mega": ["model=mega"],
    "llama": ["model=llama"],
    "window": ["model=gecko", "model/attention=sliding_window", "model.attention.window=21", "model.memory.lag=1"],
    "mixed": ["model=gecko", "model.per_layer.memory=[none,adaptive_working]", "model.per_layer.attention=[full,chunk]",
              "model.memory.lag=1", "model.tie_embeddings=true"],
}  # fmt: skip
LENGTHS = (1, 7, 8, 20, 33, 64, 95)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_numbers_are_those_of_a_real_model(case: str, dtype: torch.dtype) -> None:
    facts = describe(*CASES[case], *SMALL, contexts=LENGTHS, dtype=dtype, against="none")
    model = gecko_lab.build_model(*CASES[case], *SMALL).eval()
    assert facts["parameters"] == model.num_parameters() == sum(p["parameters"] for p in facts["parts"])
    assert facts["flops"] == pytest.approx([flops_per_token(model, length) for length in LENGTHS])
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.to(dtype)
    sizes = []
    with torch.no_grad():
        for length in LENGTHS:
            state = model.features(torch.zeros(1, length, dtype=torch.int64), None, 256)[1]
            sizes.append(states.nbytes(state))
            by_kind = {p["kind"]: 0 for p in facts["parts"]}
            for part in facts["parts"]:
                by_kind[part["kind"]] += part["state"][LENGTHS.index(length)]
            for kind in ("ema", "norm", "memory", "attention"):
                held = [getattr(block, kind) for block in state.blocks]
                assert by_kind.get(kind, 0) == states.nbytes(held)
        if facts["largest_state"] is not None:
            state, seen = None, []
            for _ in range(60):
                _, state = model.features(torch.zeros(1, 1, dtype=torch.int64), state, 256)
                seen.append(states.nbytes(state))
            assert facts["largest_state"] == max(seen)
    assert facts["state"] == sizes


def test_a_million_tokens_cost_what_the_chunk_grid_says() -> None:
    facts = describe("model=gecko", *SMALL, contexts=(40, 40 + 8 * 10**6), against="none")
    assert facts["state"][0] == facts["state"][1]
    facts = describe("model=llama", *SMALL, contexts=(100, 10**6), against="none")
    assert facts["state"][1] - facts["state"][0] == facts["growth"] * (10**6 - 100)
    assert facts["largest_state"] is None


def test_the_crossover_with_llama_is_where_its_cache_overtakes() -> None:
    facts = describe("model=gecko", contexts=(64,))
    other, edge = facts["against"], facts["against"]["crossover"]
    assert other["preset"] == "llama"
    for length, larger in ((edge - 1, False), (edge, True)):
        theirs = describe("model=llama", contexts=(length,))["state"][0]
        assert (theirs > facts["largest_state"]) == larger


def test_the_published_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """2 C keys and values of 32 layers in bf16, but one token; and 0.5 MB a token for Llama, plus document ids."""
    assert main(["model=gecko_7b", "--context", "6143", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 7_385_817_088
    attention = next(p for p in facts["parts"] if p["kind"] == "attention")
    assert attention["state"] == [32 * 4095 * (2 * (1024 + 8192) + 8)]
    assert facts["windows"] == {"sliding_chunk": "2,049 to 4,096 tokens"}
    assert facts["against"]["preset"] == "llama_7b"
    assert facts["against"]["growth"] == 32 * (2 * 2 * 4096 + 8)
    assert 5_400 < facts["against"]["crossover"] < 7_000


def test_the_table_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model=gecko", "+ablation=no_awm", "--context", "100,2000"]) == 0
    out = capsys.readouterr().out
    for words in ("sliding_chunk", "65 to 128 tokens", "state at its largest", "beside llama", "from ", "at 2,000"):
        assert words in out
    assert main(["model=llama"]) == 0
    assert "grows without end" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=geko"], "Did you mean 'gecko'"),
        (["model.dimm=3"], "unknown field"),
        (["model.z_dim=33"], "z_dim"),
        (["--context", "0"], "--context 0"),
        (["--context", "a"], "--context a"),
        (["--against", "lama"], "Did you mean 'llama'"),
    ],
    ids=str,
)
def test_mistakes(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
