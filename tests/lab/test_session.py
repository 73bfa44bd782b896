"""One stream: pieces, sessions, forks, files and batches all give the text that reading it at once gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import gecko_lab
from gecko_lab import LanguageModel, Sampling, Session
from gecko_lab.data.tokenizers import ByteTokenizer
from gecko_lab.errors import LabError
from gecko_lab.generation import Batch, answers, generate
from gecko_lab.generation.session_file import fingerprint

SMALL = ["model.num_layers=2", "model.dim=32", "model.ffn_dim=48", "model.chunk_size=8", "model.norm_groups=4",
         "model.ema_modes=4", "model.value_dim=32"]  # fmt: skip
CASES = {
    "gecko": ["model=gecko", "model.z_dim=16"],
    "megalodon": ["model=megalodon", "model.z_dim=16"],
    "mega": ["model=mega", "model.z_dim=16"],
    "llama": ["model=llama", "model.z_dim=32"],
}
BYTES = ByteTokenizer()
GREEDY = Sampling(temperature=0)
LIVELY = Sampling(temperature=1.3, top_p=0.95, repetition_penalty=1.2, seed=6)
TEXT = "The gecko climbs; \u58c1 and \u00e9. "


def make(case: str, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    model = gecko_lab.build_model(*CASES[case], *SMALL).double().eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


@pytest.fixture(params=CASES, scope="module")
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return make(request.param)


@pytest.fixture(scope="module")
def gecko() -> LanguageModel:
    return make("gecko")


def ids(text: str) -> list[int]:
    return list(text.encode())


def begun(model: LanguageModel, text: str = TEXT, piece: int = 8192) -> Session:
    session = Session(model, BYTES, piece=piece)
    session.read(text)
    return session


@pytest.mark.parametrize("sampling", [GREEDY, LIVELY], ids=["greedy", "sampled"])
def test_plain_pieced_sessioned_and_batched_are_the_same_text(
    model: LanguageModel, sampling: Sampling, tmp_path: Path
) -> None:
    """Also against recomputing the whole text for each token, which has no state at all."""
    seen = torch.tensor([[256, *ids(TEXT)]])
    options = {"top_p": sampling.top_p, "repetition_penalty": sampling.repetition_penalty, "seed": sampling.seed}
    plain = [int(t) for t in generate(model, seen, 12, bos_id=256, temperature=sampling.temperature, **options)]  # type: ignore[arg-type]
    if sampling is GREEDY:
        stateless = seen
        for _ in range(12):
            logits = model(stateless, bos_id=256)[0]
            stateless = torch.cat([stateless, logits[:, -1].argmax(-1, keepdim=True)], 1)
        assert stateless[0, seen.shape[1] :].tolist() == plain
    plain = plain[: plain.index(256)] if 256 in plain else plain

    pieced = begun(model, piece=7)
    assert list(pieced.tokens(12, sampling)) == plain
    session = begun(model, TEXT[:20])
    session.read(TEXT[20:])
    session.save(tmp_path / "s")
    assert list(session.fork().tokens(12, sampling)) == plain
    again = Session.load(tmp_path / "s", model, BYTES)
    assert list(again.tokens(12, sampling)) == plain
    others = ["x" * n for n in (20, 40)]
    for rows in (2, 16):
        batch = Batch(model, [ids(t) for t in (TEXT, *others)], 12, bos_id=256, sampling=sampling, rows=rows)
        assert [token for index, token in batch if index == 0] == plain


@pytest.mark.parametrize("sampling", [GREEDY, LIVELY], ids=["greedy", "sampled"])
def test_each_prompt_of_a_batch_is_continued_as_alone(gecko: LanguageModel, sampling: Sampling) -> None:
    model, prompts = gecko, [TEXT, "", "a", "y" * 55, "a"]
    alone = []
    for index, prompt in enumerate(prompts):
        session = Session(model, BYTES)
        if prompt:
            session.read(prompt)
        own = Sampling(**{**vars(sampling), "seed": sampling.seed + index})
        alone.append(("".join(session.generate(12, own, stop=["e", "zz"])), session.finish))
    for rows in (1, 2, 16):
        found = sorted(answers(model, BYTES, prompts, 12, sampling=sampling, stop=["e", "zz"], rows=rows))
        assert [(a.text, a.finish) for a in found] == alone
        assert [a.prompt for a in found] == list(range(len(prompts)))


def test_questions_from_a_session_are_a_batch(gecko: LanguageModel) -> None:
    session = begun(gecko)
    questions = ["who?", "where, then?", "", "why " * 4]
    expected = []
    for question in questions:
        fork = session.fork()
        if question:
            fork.read(question)
        expected.append("".join(fork.generate(8, GREEDY)))
    found = sorted(answers(gecko, BYTES, questions, 8, sampling=GREEDY, start=session.mark()))
    assert [a.text for a in found] == expected
    assert len(set(expected)) > 1


def test_forks_go_on_independently(gecko: LanguageModel) -> None:
    session = begun(gecko)
    fork = session.fork()
    fork.read("another way")
    list(fork.tokens(8, LIVELY))
    assert list(session.tokens(8, LIVELY)) == list(begun(gecko).tokens(8, LIVELY))


def test_rewinding_forgets(gecko: LanguageModel) -> None:
    session = begun(gecko)
    mark = session.mark()
    length = session.length
    texts = []
    for question in ("one", "two", "one"):
        session.read(question)
        texts.append("".join(session.generate(8, LIVELY)))
        session.rewind(mark)
        assert session.length == length
    assert texts[0] == texts[2] != texts[1]


def test_an_answer_that_is_not_taken_whole_is_part_of_the_stream(gecko: LanguageModel) -> None:
    session = begun(gecko)
    stream = session.tokens(50, LIVELY)
    taken = [next(stream) for _ in range(7)]
    stream.close()
    other = begun(gecko)
    other.read(taken)
    assert session.length == other.length == 1 + len(TEXT.encode()) + 7
    assert list(session.tokens(9, GREEDY)) == list(other.tokens(9, GREEDY))


def test_a_reading_that_breaks_off_leaves_the_session_as_it_was(gecko: LanguageModel) -> None:
    class Enough(Exception):
        pass

    def progress(count: int) -> None:
        raise Enough

    session = begun(gecko, piece=5)
    with pytest.raises(Enough):
        session.read("x" * 50, progress)
    assert session.length == 1 + len(TEXT.encode())
    assert list(session.tokens(9, GREEDY)) == list(begun(gecko).tokens(9, GREEDY))


def test_a_stop_string_is_read_and_not_shown(gecko: LanguageModel) -> None:
    plain = "".join(begun(gecko).generate(20, LIVELY))
    assert len(plain) > 12
    stop = plain[8:10]
    session = begun(gecko)
    assert "".join(session.generate(20, LIVELY, stop=[stop])) == plain[: plain.index(stop)]
    assert session.finish == "stop"
    assert session.length > 1 + len(TEXT.encode()) + plain.index(stop)


def test_the_state_and_its_file_do_not_grow(tmp_path: Path) -> None:
    model = make("gecko").float()
    sizes = []
    for chunks in (3, 30):
        session = Session(model, BYTES)
        session.read("x" * (8 * chunks - 1))  # BOS and a whole number of chunks
        session.save(tmp_path / "s")
        sizes.append((session.nbytes, round((tmp_path / "s").stat().st_size, -2)))
    assert sizes[0] == sizes[1]


def test_the_file_names_what_it_was_made_with(gecko: LanguageModel, tmp_path: Path) -> None:
    begun(gecko).save(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        facts = json.loads(file.metadata()["gecko_lab"])
    assert facts["format"] == "gecko_lab session"
    assert facts["model"] == fingerprint(gecko)
    assert facts["tokenizer"]["name"] == "bytes"
    assert facts["length"] == 1 + len(TEXT.encode())


def test_the_fingerprint_sees_one_changed_weight_and_the_dtype() -> None:
    model = make("gecko")
    before = fingerprint(model)
    assert fingerprint(make("gecko")) == before != fingerprint(make("gecko", 1))
    assert fingerprint(make("gecko").float()) != before
    with torch.no_grad():
        model.blocks[0].wz.weight[[0, 1]] = model.blocks[0].wz.weight[[1, 0]].clone()
    assert fingerprint(model) != before


def altered(path: Path, **facts: object) -> None:
    """The same file with another description."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        known = json.loads(file.metadata()["gecko_lab"])
    save_file(tensors, path, metadata={"gecko_lab": json.dumps({**known, **facts})})


def test_files_that_are_refused(gecko: LanguageModel, tmp_path: Path) -> None:
    file = tmp_path / "s"
    begun(gecko).save(file)
    good = file.read_bytes()

    def refused(words: str, model: LanguageModel = gecko, tokenizer: ByteTokenizer = BYTES) -> None:
        with pytest.raises(LabError, match=words):
            Session.load(file, model, tokenizer)

    refused("another model", make("gecko", 1))
    other = ByteTokenizer()
    other.fingerprint = "another"
    refused("tokenizer bytes", tokenizer=other)
    file.write_bytes(good[: len(good) // 2])
    refused("cut or damaged")
    flipped = np.frombuffer(good, dtype=np.uint8).copy()
    flipped[-5] ^= 1
    file.write_bytes(flipped.tobytes())
    refused("checksum")
    file.write_bytes(good)
    altered(file, length=5)
    refused("checksum")
    altered(file, version=99)
    refused("version 99")
    save_file({"x": torch.zeros(1)}, file)
    refused("no session of gecko_lab")
    file.write_text("not at all")
    refused("not a session")
    file.unlink()
    refused("no such file")


def test_saving_never_destroys(gecko: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "book.txt").write_text("a book")
    with pytest.raises(LabError, match="no session; it is not overwritten"):
        begun(gecko).save(tmp_path / "book.txt")
    with pytest.raises(LabError, match="does not exist"):
        begun(gecko).save(tmp_path / "nowhere" / "s")
    with pytest.raises(LabError, match="nothing was read"):
        Session(gecko, BYTES).save(tmp_path / "s")
    session = begun(gecko)
    session.save(tmp_path / "s")
    before = (tmp_path / "s").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    session.read("more")
    with pytest.raises(LabError, match="No space left"):
        session.save(tmp_path / "s")
    monkeypatch.undo()
    assert (tmp_path / "s").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book.txt", "s"]
    session.save(tmp_path / "s")
    assert Session.load(tmp_path / "s", gecko, BYTES).length == session.length


def test_what_cannot_be_read(gecko: LanguageModel) -> None:
    session = Session(gecko, BYTES)
    for nothing in ("", []):
        with pytest.raises(LabError, match="empty"):
            session.read(nothing)
    with pytest.raises(LabError, match="unknown token 257"):
        session.read([1, 257])
    with pytest.raises(LabError, match="unknown token -1"):
        Batch(gecko, [[1], [-1]], 3)
    with pytest.raises(LabError, match="no tokenizer"):
        Session(gecko).read("text")
    with pytest.raises(LabError, match="nothing was read"):
        list(Session(gecko).tokens(3))
    with pytest.raises(LabError, match="prompt 1 is empty"):
        Batch(gecko, [[1], []], 3)
    with pytest.raises(LabError, match="rows=0"):
        Batch(gecko, [[1]], 3, rows=0)
    assert session.length == 0


def test_one_document_without_bos(gecko: LanguageModel, tmp_path: Path) -> None:
    session = Session(gecko)
    session.read([1, 2, 3])
    session.save(tmp_path / "s")
    expected = [int(t) for t in generate(gecko, torch.tensor([[1, 2, 3]]), 12, temperature=0)]
    assert list(Session.load(tmp_path / "s", gecko).tokens(12, GREEDY)) == expected
    assert list(session.tokens(12, GREEDY)) == expected
