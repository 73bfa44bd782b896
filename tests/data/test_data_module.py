"""Corpora and LabData: formats, splits, errors, validation, restarts."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch

from gecko_lab.data import DataError, corpora, load_tokenizer
from gecko_lab.data.config import DataConfig
from gecko_lab.data.module import LabData
from gecko_lab.data.source import unigram_entropy

BYTES = load_tokenizer("bytes")
STORY = "It was a dark and stormy night; the rain fell in torrents. \u4f60\u597d\n" * 120


def lab(path: Any, batch_size: int = 2, seed: int = 0, rank: int = 0, world_size: int = 1, **options: Any) -> LabData:
    options = {"name": "text", "seq_len": 32, "path": None if path is None else path, **options}
    return LabData(DataConfig(**options), seed, batch_size, 40, rank=rank, world_size=world_size)


def books(folder: Path, count: int = 12) -> Path:
    for i in range(count):
        (folder / f"book{i}.txt").write_text(f"Book {i}. {STORY[: 300 + 40 * i]}", encoding="utf-8")
    return folder


def zst(data: bytes) -> bytes:
    library = pytest.importorskip("zstandard")
    half = len(data) // 2  # two frames: both must be read
    return bytes(library.compress(data[:half]) + library.compress(data[half:]))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zst,
}


@pytest.mark.parametrize("suffix", PACKERS)
def test_plain_and_compressed_files_are_the_same_text(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"{i} {STORY}", "id": i} for i in range(20)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    (tmp_path / f"a.jsonl{suffix}").write_bytes(PACKERS[suffix](lines))
    (tmp_path / f"b.txt{suffix}").write_bytes(PACKERS[suffix](STORY.encode()))
    train, val, _ = corpora.text(str(tmp_path / f"a.jsonl{suffix}"), BYTES, "text", None)
    assert val is not None
    assert (train.documents, val.documents) == (18, 2)  # the last tenth of the rows
    assert BYTES.decode(val.document(1)) == rows[19]["text"]
    train, val, _ = corpora.text(str(tmp_path / f"b.txt{suffix}"), BYTES, "text", None)
    assert val is not None
    assert BYTES.decode(train.document(0)) + BYTES.decode(val.document(0)) == STORY
    assert abs(val.byte_count / len(STORY.encode()) - 0.1) < 0.001


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".zst"])
@pytest.mark.parametrize("cut", [0.5, 0.97])
def test_a_cut_compressed_file_is_refused(tmp_path: Path, suffix: str, cut: float) -> None:
    noise = np.random.default_rng(0).integers(97, 123, 20_000).astype(np.uint8).tobytes()
    packed = PACKERS[suffix](noise)
    (tmp_path / f"a.txt{suffix}").write_bytes(packed[: int(len(packed) * cut)])
    with pytest.raises(DataError, match=rf"a\.txt\{suffix}: damaged or truncated"):
        corpora.text(str(tmp_path / f"a.txt{suffix}"), BYTES, "text", None)


def test_files_are_split_by_name_and_folders_may_move(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        books(tmp_path / name)
    one, two = (corpora.text(str(tmp_path / name), BYTES, "text", 0.3) for name in ("one", "two"))
    globbed = corpora.text(str(tmp_path / "one" / "*.txt"), BYTES, "text", 0.3)
    assert one.val is not None
    assert one.train.documents + one.val.documents == 12
    assert one.val.documents >= 1
    assert one.train.fingerprint == two.train.fingerprint == globbed.train.fingerprint
    (tmp_path / "two" / "book3.txt").write_text("changed")
    changed = corpora.text(str(tmp_path / "two"), BYTES, "text", 0.3)
    assert changed.val is not None
    assert (changed.train.fingerprint, changed.val.fingerprint) != (one.train.fingerprint, one.val.fingerprint)


def test_the_standard_library_is_the_default() -> None:
    data = LabData(DataConfig(seq_len=64), seed=0, batch_size=2)
    facts = data.describe()
    assert facts["train_documents"] > 300
    assert 0.01 < facts["val_documents"] / (facts["train_documents"] + facts["val_documents"]) < 0.1
    assert 3.5 < facts["val_unigram_bits_per_byte"] < 5.5
    batch = next(iter(data.train_dataloader()))
    assert batch["tokens"].shape == batch["targets"].shape == (2, 64)
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert set(batch) == {"tokens", "targets", "bytes"}
    assert int(batch["bytes"]) == int((batch["targets"] != 256).sum())


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.asarray([4, 4, 4, 4, 0])) == 2.0
    assert unigram_entropy(np.asarray([9, 0])) == 0.0


MISTAKES: list[tuple[str, dict[str, bytes], dict[str, Any], str]] = [
    ("nothing", {}, {}, "nothing: no such file or folder"),
    ("*.md", {}, {}, "no file matches"),
    ("empty", {"empty/.hidden": b"x"}, {}, "the folder holds no files"),
    ("a.txt", {"a.txt": b""}, {}, "a.txt: empty, no text in 1 file"),
    ("d", {"d/a.txt": b"", "d/b.txt": b""}, {}, "d: empty, no text in 2 file"),
    ("a.txt", {"a.txt": b"text\0text"}, {}, "a.txt: binary file, NUL byte at byte offset 4"),
    ("a.txt", {"a.txt": "text".encode("utf-16")}, {}, "UTF-16"),
    ("a.txt", {"a.txt": "caf\u00e9 noir".encode("latin-1")}, {}, r"a.txt: not UTF-8 at byte offset 3 \(byte 0xe9\)"),
    ("d", {"d/a.txt": b"ok", "d/b.txt": b"\xff"}, {}, "b.txt: not UTF-8 at byte offset 0"),
    ("a.jsonl", {"a.jsonl": b'{"text": "x"}\n\n{"body": "y"}'}, {}, "a.jsonl:3: no text in field 'text' .it has body"),
    ("a.jsonl", {"a.jsonl": b'{"text": 3}'}, {}, "a.jsonl:1: no text in field"),
    ("a.jsonl", {"a.jsonl": b"[1]"}, {}, "a.jsonl:1: no text in field 'text' .the row is no object"),
    ("a.jsonl", {"a.jsonl": b'{"text": "x"}\n{"text": '}, {}, "a.jsonl:2: not a JSON row"),
    ("a.jsonl", {"a.jsonl": b'{"text": "\\ud800"}'}, {}, "a.jsonl:1: field 'text' is not Unicode text"),
    ("a.jsonl", {"a.jsonl": b'{"text": ""}\n{"text": ""}'}, {}, "empty, no text"),
    ("a.jsonl", {"a.jsonl": b'{"text": "x"}'}, {}, "too little text to hold out 10%"),
    ("a.txt", {"a.txt": STORY.encode()[:200]}, {}, "too little validation text"),
    ("d", {"d/a.txt": b"one", "d/b.txt": b""}, {}, "too little to hold out files"),
    ("a.txt", {"a.txt": STORY.encode()}, {"val_path": "gone"}, "gone: no such file"),
    ("a.txt", {"a.txt": STORY.encode()}, {"weights": [1.0, 2.0]}, "2 weights for 1 paths"),
    ("a.txt", {"a.txt": STORY.encode()}, {"weights": [-1.0]}, "must be a positive number"),
    ("a.txt", {"a.txt": STORY.encode()}, {"tokenizer": "words"}, "tokenizer 'words': must be"),
    ("a.txt", {"a.txt": STORY.encode()}, {"mode": "rows"}, "data.mode='rows': must be pack or stream"),
    ("a.txt", {"a.txt": STORY.encode()}, {"mode": "stream", "truncate": True}, "data.truncate=true"),
    ("a.txt", {"a.txt": STORY.encode()}, {"seq_len": 0}, "data.seq_len=0: must be at least 1"),
    ("a.txt", {"a.txt": STORY.encode()}, {"val_fraction": 1.5}, "data.val_fraction=1.5: must be between"),
    ("a.txt", {"a.txt": STORY.encode()}, {"workers": -1}, "data.workers=-1"),
    ("a.txt", {"a.txt": STORY.encode()}, {"name": "web"}, "data.name='web': must be stdlib, text or store"),
    ("a.txt", {"a.txt": STORY.encode()}, {"name": "stdlib"}, "data=text or data=store to read a path"),
    ("", {}, {"path": None}, "data=text needs data.path"),
    ("", {}, {"path": None, "mixture": [{"path": "a"}]}, "needs path and weight"),
]


@pytest.mark.parametrize(("path", "files", "options", "message"), MISTAKES)
def test_mistakes_are_named(
    tmp_path: Path, path: str, files: dict[str, bytes], options: dict[str, Any], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        lab(**{"path": str(tmp_path / path), **options}).setup()


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "" if i % 3 == 0 else STORY[:50]} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    facts = lab(str(tmp_path / "a.jsonl")).describe()
    assert facts["empty_documents_skipped"] == 20
    assert facts["train_documents"] + facts["val_documents"] == 40


def test_validation_is_the_same_every_time_and_on_any_number_of_ranks(tmp_path: Path) -> None:
    books(tmp_path)
    tokens = [b["tokens"].tolist() for b in lab(str(tmp_path), batch_size=4, val_fraction=0.3).val_dataloader()]
    again = lab(str(tmp_path), batch_size=4, seed=9, val_fraction=0.3).val_dataloader()
    assert tokens == [b["tokens"].tolist() for b in again]
    halves = [
        [b["tokens"].tolist() for b in lab(str(tmp_path), 2, rank=r, world_size=2, val_fraction=0.3).val_dataloader()]
        for r in (0, 1)
    ]
    assert tokens == [a + b for a, b in zip(*halves)]
    data = lab(str(tmp_path), batch_size=4, val_fraction=0.3, val_batches=2)
    assert len(data.val_dataloader()) == len(list(data.val_dataloader())) == 2


def test_all_validation_batches_cover_the_split_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(STORY, encoding="utf-8")
    data = lab(str(tmp_path / "a.txt"), batch_size=1, val_batches=0)
    targets = torch.cat([b["targets"].flatten() for b in data.val_dataloader()]).tolist()
    text = data.val_source.document(0).tolist()
    assert targets == text[: len(targets)]
    assert len(text) - len(targets) < 32


def test_validation_of_its_own_and_mixtures(tmp_path: Path) -> None:
    books(tmp_path)
    (tmp_path / "val.md").write_text(STORY, encoding="utf-8")
    names = [str(tmp_path / f"book{i}.txt") for i in (1, 2)]
    val = str(tmp_path / "val.md")
    one = lab(names, weights=[1.0, 3.0], val_path=val)
    two = lab(None, mixture=[{"path": p, "weight": w} for p, w in zip(names, (1, 3))], val_path=val)
    assert one.fingerprint == two.fingerprint
    assert one.describe()["val_bytes"] == len(STORY.encode())
    for a, b, _ in zip(one.train_dataloader(), two.train_dataloader(), range(5)):
        assert a["tokens"].tolist() == b["tokens"].tolist()
    held = lab(names)  # without val_path the end of each is held out
    assert held.describe()["val_documents"] == 2
    assert len(list(held.val_dataloader())) == 1


def test_other_data_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    books(tmp_path)
    state = lab(str(tmp_path)).state_dict()
    lab(str(tmp_path)).load_state_dict(state)
    lab(str(tmp_path), batch_size=1, world_size=2).load_state_dict(state)
    for other in (lab(str(tmp_path), seed=1), lab(str(tmp_path), batch_size=4), lab(str(tmp_path), mode="stream")):
        with pytest.raises(DataError, match=r"the data changed since the run began: (seed|global_batch|mode) was"):
            other.load_state_dict(state)
    (tmp_path / "book1.txt").write_text("changed")
    with pytest.raises(DataError, match="fingerprint was"):
        lab(str(tmp_path)).load_state_dict(state)


class Witness(lightning.LightningModule):
    """Notes the batches that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        self.seen.append(batch["tokens"].tolist())
        return self.weight * 0

    def validation_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        assert int(batch["bytes"]) > 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", ["pack", "stream"])
def test_lightning_resumes_with_the_very_next_batch(tmp_path: Path, mode: str, accumulate: int) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    books(corpus)

    def fit(steps: int, resume: Path | None = None) -> tuple[Witness, lightning.Trainer]:
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=steps, accumulate_grad_batches=accumulate, val_check_interval=2,
            check_val_every_n_epoch=None, limit_val_batches=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module = Witness()
        trainer.fit(module, datamodule=lab(str(corpus), mode=mode, val_fraction=0.3), ckpt_path=resume)
        return module, trainer

    whole, _ = fit(8)
    assert len(whole.seen) == 8 * accumulate
    first, trainer = fit(3)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    second, _ = fit(8, tmp_path / "run.ckpt")
    assert first.seen + second.seen == whole.seen
