"""Token stores: the same however they are made, refused when damaged, finished after any interruption."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gecko_lab
from gecko_lab.data import DataError, load_tokenizer
from gecko_lab.data.config import DataConfig
from gecko_lab.data.module import LabData
from gecko_lab.data.prepare import Request, prepare
from gecko_lab.data.shards import START, TOKENS, VAL
from gecko_lab.data.store import open_store
from gecko_lab.prepare import main

ROOT = Path(gecko_lab.__file__).parent.parent


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "\u4f60\u597d", "\n"]
    rows = [{"text": " ".join(rng.choices(words, k=rng.randrange(1, 90)))} for _ in range(200)]
    rows[17]["text"] = ""
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "b.txt").write_text("A text of its own. " * 40)
    return folder


def request(corpus: Path, out: Path, **options: object) -> Request:
    return Request(**{"sources": [str(corpus)], "out": out, "shard_bytes": 4096, "val_fraction": 0.2, **options})  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != ".lock"}


def test_every_document_stands_in_the_store(corpus: Path, tmp_path: Path) -> None:
    store = prepare(request(corpus, tmp_path / "s"))
    texts = [json.loads(line)["text"] for line in (corpus / "a.jsonl").read_text().splitlines()]
    texts = [t for t in [*texts, (corpus / "b.txt").read_text()] if t]
    source, tokenizer = store.everything(), store.tokenizer()
    assert [tokenizer.decode(source.document(i)) for i in range(source.documents)] == texts
    assert source.byte_count == store.manifest["bytes"] == store.manifest["token_bytes"] == source.token_count
    assert sum(store.manifest["document_length_histogram"].values()) == store.manifest["documents"] == 200
    assert store.manifest["empty_documents_skipped"] == 1
    assert len(store.manifest["shards"]) > 5
    split = store.split()
    assert split.val is not None
    assert split.train.documents + split.val.documents == 200
    assert 0.08 < split.val.documents / 200 < 0.35
    assert sum(np.bincount(split.val.document(i), minlength=256) for i in range(split.val.documents)).tolist() == (
        split.val.byte_counts.tolist()
    )


def test_the_number_of_workers_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    prepare(request(corpus, tmp_path / "one"))
    prepare(request(corpus, tmp_path / "two", workers=2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    shutil.copytree(corpus, tmp_path / "moved" / "elsewhere")
    prepare(request(tmp_path / "moved" / "elsewhere", tmp_path / "three"))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_a_killed_run_is_finished_by_the_next(corpus: Path, tmp_path: Path) -> None:
    prepare(request(corpus, tmp_path / "whole", shard_bytes=512))
    out = tmp_path / "s"
    code = (
        "import sys; from pathlib import Path; from gecko_lab.data.prepare import Request, prepare;"
        "prepare(Request(sources=[sys.argv[1]], out=Path(sys.argv[2]), shard_bytes=512, val_fraction=0.2))"
    )
    kept = 0
    for stop in (3, 20):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-c", code, str(corpus), str(out)], env=environment)
        while process.poll() is None and not (out / f"shard-{stop:05d}.tokens").exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (out / "manifest.json").exists():
            break  # it was faster than the signal
        with pytest.raises(DataError, match=r"an unfinished store; run the same gecko_lab\.prepare command again"):
            open_store(out)
        kept = max(kept, len(list(out.glob("shard-*.json"))))
    assert kept >= 3
    if not (out / "manifest.json").exists():
        before = (out / "shard-00000.tokens").stat()
        prepare(request(corpus, out, shard_bytes=512))
        assert (out / "shard-00000.tokens").stat().st_ino == before.st_ino  # kept, not written again
    assert contents(out) == contents(tmp_path / "whole")


def test_only_shards_of_the_same_text_and_options_are_kept(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    prepare(request(corpus, out))
    (out / "manifest.json").unlink()
    text = (corpus / "a.jsonl").read_text()
    (corpus / "a.jsonl").write_text(text.replace("alpha", "omega"))
    prepare(request(corpus, out, shard_bytes=8192))
    prepare(request(corpus, tmp_path / "fresh", shard_bytes=8192))
    assert contents(out) == contents(tmp_path / "fresh")
    with pytest.raises(DataError, match="holds a finished store"):
        prepare(request(corpus, out))
    prepare(request(corpus, out, overwrite=True))
    assert open_store(out).manifest["shards"] != open_store(tmp_path / "fresh").manifest["shards"]


def test_every_flipped_bit_is_found(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    prepare(request(corpus, out, shard_bytes=1 << 14))
    rng = random.Random(1)
    files = [f for f in sorted(out.iterdir()) if f.suffix in (".tokens", ".npy") or f.name == "manifest.json"]
    for turn in range(120):
        file = files[turn % len(files)]
        good = file.read_bytes()
        place = rng.randrange(len(good))
        file.write_bytes(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1 :])
        with pytest.raises(DataError, match=r"damaged|not the manifest|store version|changed"):
            open_store(out, full=True)
        if file.suffix != ".tokens":
            with pytest.raises(DataError):
                open_store(out)
        file.write_bytes(good)
    open_store(out, full=True)


def test_truncated_and_missing_files_are_found_without_reading_all(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    prepare(request(corpus, out, shard_bytes=1 << 15))
    for file in [f for f in sorted(out.iterdir()) if f.suffix in (".tokens", ".npy") or f.name == "manifest.json"]:
        good = file.read_bytes()
        for size in (0, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:size])
            with pytest.raises(DataError, match=r"damaged|truncated or changed"):
                open_store(out)
        file.write_bytes(good + b"x")
        with pytest.raises(DataError):
            open_store(out)
        file.unlink()
        with pytest.raises(DataError, match=r"missing|an unfinished store"):
            open_store(out)
        file.write_bytes(good)
    open_store(out)


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; make a store with"):
        open_store(tmp_path / "gone")
    with pytest.raises(DataError, match="not a token store"):
        open_store(tmp_path)
    (tmp_path / "manifest.json").write_text('{"version": 1, "checksum": ""}')
    with pytest.raises(DataError, match="not the manifest of a token store"):
        open_store(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "gecko_lab token store", "version": 99, "checksum": ""}')
    with pytest.raises(DataError, match="store version 99"):
        open_store(tmp_path)


def test_a_full_disk_leaves_no_store_and_the_next_run_goes_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [0], os.fsync

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="disk full"):
        prepare(request(corpus, tmp_path / "s"))
    assert not list((tmp_path / "s").glob(".tmp-*"))
    monkeypatch.undo()
    with pytest.raises(DataError, match="an unfinished store"):
        open_store(tmp_path / "s")
    prepare(request(corpus, tmp_path / "s"))
    prepare(request(corpus, tmp_path / "fresh"))
    assert contents(tmp_path / "s") == contents(tmp_path / "fresh")


def test_training_from_a_store(corpus: Path, tmp_path: Path) -> None:
    prepare(request(corpus, tmp_path / "s"))
    config = DataConfig(name="store", path=str(tmp_path / "s"), seq_len=32)
    one, two = LabData(config, 0, 2, 10), LabData(config, 0, 2, 10)
    assert one.describe()["val_documents"] > 0
    config.workers = 1
    spread = LabData(config, 0, 2, 10)
    for a, b, c in zip(one.train_dataloader(), two.train_dataloader(), spread.train_dataloader()):
        assert a["tokens"].tolist() == b["tokens"].tolist() == c["tokens"].tolist()
    state = one.state_dict()
    (corpus / "b.txt").write_text("another text")
    prepare(request(corpus, tmp_path / "s", overwrite=True))
    changed = LabData(config, 0, 2, 10)
    with pytest.raises(DataError, match="the data changed since the run began: fingerprint"):
        changed.load_state_dict(state)


def test_validation_sources_and_mixtures_of_stores(corpus: Path, tmp_path: Path) -> None:
    store = prepare(
        request(corpus, tmp_path / "s", sources=[str(corpus / "a.jsonl")], val_sources=[str(corpus / "b.txt")])
    )
    split = store.split()
    assert split.val is not None
    assert split.val.documents == 1
    assert load_tokenizer("bytes").decode(split.val.document(0)) == (corpus / "b.txt").read_text()
    with pytest.raises(DataError, match="given for training and for validation"):
        prepare(request(corpus, tmp_path / "t", val_sources=[str(corpus / "b.txt")]))
    prepare(request(corpus, tmp_path / "plain", sources=[str(corpus / "a.jsonl")], val_fraction=0.0))
    with pytest.raises(DataError, match="nothing is held out for validation"):
        LabData(DataConfig(name="store", path=str(tmp_path / "plain")), 0, 1).setup()
    paths = [str(tmp_path / "plain"), str(tmp_path / "s")]
    mixed = LabData(DataConfig(name="store", path=paths, weights=[1.0, 1.0], seq_len=16), 0, 2, 10)
    assert mixed.describe()["val_documents"] == 1


def test_a_store_brings_its_tokenizer(corpus: Path, tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    lines = (corpus / "a.jsonl").read_text().splitlines()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(json.loads(line)["text"] for line in lines), model_prefix=str(tmp_path / "spm"),
        vocab_size=300, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    prepare(request(corpus, tmp_path / "s", tokenizer=f"spm:{tmp_path / 'spm.model'}"))
    (tmp_path / "spm.model").unlink()
    store = open_store(tmp_path / "s", full=True)
    assert store.manifest["token_bytes"] == store.manifest["bytes"]
    assert store.manifest["tokens"] < store.manifest["bytes"] / 2
    source = store.everything()
    assert store.tokenizer().decode(source.document(0)) == json.loads(lines[0])["text"]
    data = LabData(DataConfig(name="store", path=str(tmp_path / "s"), seq_len=16), 0, 2, 5)
    batch = next(iter(data.train_dataloader()))
    assert int(batch["tokens"].max()) < data.tokenizer.vocab_size
    (tmp_path / "s" / "tokenizer.model").unlink()
    with pytest.raises(DataError, match="tokenizer file is missing"):
        open_store(tmp_path / "s")
    prepare(request(corpus, tmp_path / "bytes"))
    prepare(request(corpus, tmp_path / "plain"))
    assert store.manifest["tokenizer"]["file"] == "tokenizer.model"


def test_index_columns(corpus: Path, tmp_path: Path) -> None:
    store = prepare(request(corpus, tmp_path / "s"))
    index = np.load(tmp_path / "s" / "shard-00000.index.npy")
    assert index.dtype == np.int64
    assert (index[1:, START] == np.cumsum(index[:-1, TOKENS])).all()
    assert set(index[:, VAL].tolist()) <= {0, 1}
    size = (tmp_path / "s" / "shard-00000.tokens").stat().st_size
    assert size == index[:, TOKENS].sum() * np.dtype(store.manifest["dtype"]).itemsize


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "--out", "OUT"], "gone: no such file or folder"),
        (["CORPUS", "--out", "OUT", "--text-field", "body"], "a.jsonl:1: no text in field 'body'"),
        (["CORPUS", "--out", "OUT", "--val-fraction", "2"], "val_fraction=2.0: must be in"),
        (["CORPUS", "--out", "OUT", "--workers", "0"], "workers=0: must be at least 1"),
        (["CORPUS", "--out", "CORPUS/b.txt"], "b.txt: File exists"),
        (["--verify", "CORPUS"], "not a token store"),
    ],
)
def test_the_command_answers_mistakes_with_a_message_and_code_2(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    filled = [a.replace("CORPUS", str(corpus)).replace("OUT", str(tmp_path / "s")) for a in arguments]
    assert main(filled) == 2
    assert message in capsys.readouterr().err


def test_the_command_makes_and_verifies(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "s")
    assert main([str(corpus), "--out", out, "--workers", "1"]) == 0
    assert f"data=store data.path={out}" in capsys.readouterr().out
    assert main(["--verify", out]) == 0
    file = tmp_path / "s" / "shard-00000.tokens"
    file.write_bytes(b"?" + file.read_bytes()[1:])
    assert main(["--verify", out]) == 2
    assert "damaged" in capsys.readouterr().err
    with pytest.raises(SystemExit) as code:
        main([])
    assert code.value.code == 2


def test_two_processes_in_one_folder(corpus: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "s").mkdir()
    with (tmp_path / "s" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="works in this folder"):
            prepare(request(corpus, tmp_path / "s"))
    prepare(request(corpus, tmp_path / "s"))
