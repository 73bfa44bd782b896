"""On a GPU, where steps are graphs: sessions, forks, files and batches give the text that one reading gives."""

import time
from pathlib import Path

import pytest
import torch

import gecko_lab
from gecko_lab import LanguageModel, Sampling, Session
from gecko_lab.data.tokenizers import ByteTokenizer
from gecko_lab.generation import answers, generate
from gecko_lab.generation.session_file import fingerprint

pytestmark = pytest.mark.gpu
BYTES = ByteTokenizer()
SIZES = ["model.dim=256", "model.z_dim=128", "model.value_dim=512", "model.ffn_dim=512", "model.chunk_size=64"]
TEXT = "The gecko climbs; \u58c1 and \u00e9. " * 20
SAMPLINGS = [Sampling(temperature=0), Sampling(temperature=1.2, top_p=0.95, repetition_penalty=1.1, seed=6)]


def make(*overrides: str) -> LanguageModel:
    torch.manual_seed(0)
    model = gecko_lab.build_model(*overrides).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=["gecko", "llama"], scope="module")
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make(f"model={request.param}", *(SIZES if request.param == "gecko" else [])).cuda()


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_sessions_are_plain_generation(model: LanguageModel, sampling: Sampling, tmp_path: Path) -> None:
    tokens = torch.tensor([[256, *TEXT.encode()]])
    options = {"top_p": sampling.top_p, "repetition_penalty": sampling.repetition_penalty, "seed": sampling.seed}
    plain = [int(t) for t in generate(model, tokens, 60, bos_id=256, temperature=sampling.temperature, **options)]  # type: ignore[arg-type]
    plain = plain[: plain.index(256)] if 256 in plain else plain
    session = Session(model, BYTES)
    session.read(TEXT)
    session.save(tmp_path / "s")
    mark, fork = session.mark(), session.fork()
    assert list(session.tokens(60, sampling)) == plain
    session.rewind(mark)
    assert list(session.tokens(60, sampling)) == plain
    session.read("elsewhere")
    list(session.tokens(20, sampling))
    assert list(fork.tokens(60, sampling)) == plain
    assert list(Session.load(tmp_path / "s", model, BYTES).tokens(60, sampling)) == plain


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_batches_are_single_prompts(model: LanguageModel, sampling: Sampling) -> None:
    prompts = [TEXT, "", "a", "y" * 100, TEXT[:200], "y" * 101, "a"]
    alone = []
    for index, prompt in enumerate(prompts):
        session = Session(model, BYTES)
        if prompt:
            session.read(prompt)
        own = Sampling(**{**vars(sampling), "seed": sampling.seed + index})
        alone.append("".join(session.generate(40, own)))
    for rows in (1, 3, 16):
        found = sorted(answers(model, BYTES, prompts, 40, sampling=sampling, rows=rows))
        assert [a.text for a in found] == alone, rows


def test_a_session_moves_between_devices(model: LanguageModel, tmp_path: Path) -> None:
    session = Session(model, BYTES)
    session.read(TEXT)
    session.save(tmp_path / "s")
    there = list(session.tokens(20, SAMPLINGS[0]))
    before = fingerprint(model)
    try:
        assert fingerprint(model.cpu()) == before
        here = Session.load(tmp_path / "s", model, BYTES)
        assert list(here.tokens(20, SAMPLINGS[0])) == there
    finally:
        model.cuda()


def test_turns_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints seconds; a turn must not cost a second whatever the decoder makes at its start."""
    model = make("model=gecko_200m").cuda().bfloat16()
    session = Session(model, BYTES)
    session.read(TEXT * 40)
    rows = []
    for _ in range(4):
        began = time.perf_counter()
        session.read("a question")
        first = None
        for _token in session.tokens(200, SAMPLINGS[1]):
            first = first or time.perf_counter() - began
        rows.append((first, time.perf_counter() - began, session.length))
    with capsys.disabled():
        for first, whole, length in rows:
            print(f"\nturn: first token {first:.3f} s, whole answer {whole:.3f} s, stream {length:,}")
    assert min(whole for _, whole, _ in rows) < 5
