"""Tokenizers: text comes back, every source byte is counted once, mistakes are named."""

import base64
import importlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gecko_lab.data import DataError, Tokenizer, load_tokenizer

KINDS = ["bytes", "hf", "spm", "tiktoken"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n    return x + 1",
    "na\u00efve caf\u00e9 \u4f60\u597d",
] * 20


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: load_tokenizer(_make(kind, folder)) for kind in KINDS}


def _make(kind: str, folder: Path) -> str:
    if kind == "bytes":
        return kind
    if kind == "hf":
        hf = pytest.importorskip("tokenizers")
        model = hf.Tokenizer(hf.models.BPE())
        model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = hf.decoders.ByteLevel()
        alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
        trainer = hf.trainers.BpeTrainer(
            vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
        )
        model.train_from_iterator(CORPUS, trainer)
        model.save(str(folder / "hf.json"))
        return f"hf:{folder / 'hf.json'}"
    if kind == "spm":
        spm = pytest.importorskip("sentencepiece")
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=str(folder / "spm"), vocab_size=320, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
            hard_vocab_limit=False,
        )  # fmt: skip
        return f"spm:{folder / 'spm.model'}"
    pytest.importorskip("tiktoken")
    pieces = [bytes([b]) for b in range(256)] + [b"th", b"the"]
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)]
    (folder / "ranks.tiktoken").write_bytes(b"".join(lines))
    return f"tiktoken:{folder / 'ranks.tiktoken'}"


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=60)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@settings(max_examples=60, deadline=None)
def test_text_comes_back_and_every_byte_is_counted(tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.encode(text.encode()) == ids).all()
    assert ids.dtype == tokenizer.dtype
    assert not len(ids) or (int(ids.max()) < tokenizer.vocab_size and not (ids.astype(int) == tokenizer.bos_id).any())
    assert tokenizer.count_bytes(ids) - (tokenizer.prefix_bytes if len(ids) else 0) == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_written_in_a_text_are_text(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.decode(tokenizer.encode("a <s> b")) == "a <s> b"
    assert tokenizer.byte_lengths[tokenizer.bos_id] == 0
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)


def test_bytes_are_their_own_ids() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.dtype) == (257, 256, np.dtype("uint8"))
    assert tokenizer.encode("h\u00e9").tolist() == [104, 195, 169]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("word", "must be bytes, hf:FILE.json, spm:FILE.model or tiktoken"),
        ("hf:", "must be bytes"),
        ("hf:nowhere.json", "nowhere.json: No such file"),
        ("spm:nowhere.model", "nowhere.model: No such file"),
        ("hf:BAD", "not a tokenizers JSON file"),
        ("spm:BAD", "not a SentencePiece model"),
        ("tiktoken:BAD", "not a file of tiktoken ranks"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "bad").write_text("not a tokenizer")
    with pytest.raises(DataError, match=message):
        load_tokenizer(name.replace("BAD", str(tmp_path / "bad")))


@pytest.mark.parametrize("kind", ["hf", "spm", "tiktoken"])
def test_a_missing_package_names_the_extra(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"pip install 'gecko-lab\[data\]'"):
        load_tokenizer(f"{kind}:{tmp_path / 'file'}")


def test_fingerprints_differ(tokenizers: dict[str, Tokenizer]) -> None:
    assert len({t.fingerprint for t in tokenizers.values()}) == len(tokenizers)
