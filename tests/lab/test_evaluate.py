"""The evaluate command repeats a run's validation to the bit, and streaming reads what reading at once reads."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from trained import make_run

import gecko_lab
from gecko_lab import checkpoint
from gecko_lab import evaluate as evaluate_command
from gecko_lab import export as export_command
from gecko_lab import generate as generate_command
from gecko_lab.artifacts import open_artifact
from gecko_lab.data.prepare import Request, prepare
from gecko_lab.evaluate import main
from gecko_lab.evaluation import evaluate
from gecko_lab.export import export

Trained = tuple[Path, dict[str, float]]


def test_the_runs_own_validation_to_the_bit(trained: Trained) -> None:
    run, final = trained
    results = evaluate(open_artifact(run, "last"))
    assert {f"val/{k}": results[k] for k in ("loss", "perplexity", "bits_per_byte")} == {
        k: final[k] for k in ("val/loss", "val/perplexity", "val/bits_per_byte")
    }
    assert results["trained_on_fingerprint"] == results["data_fingerprint"]
    best = checkpoint.load(run / "checkpoints" / "best.ckpt")["callbacks"]["Saver"]["best"]
    assert evaluate(open_artifact(run))["loss"] == best
    assert evaluate(open_artifact(run), batches=1)["tokens"] < results["tokens"]


def test_the_precision_and_the_pieces_of_the_run(tmp_path: Path) -> None:
    final = make_run(tmp_path, "trainer.precision=bf16-true", "trainer.piece_len=32", "model.num_layers=1",
                     "data.val_batches=2", "trainer.max_steps=1")  # fmt: skip
    results = evaluate(open_artifact(tmp_path / "run", "last"))
    assert results["precision"] == "bf16-true"
    assert results["loss"] == final["val/loss"]
    assert results["bits_per_byte"] == final["val/bits_per_byte"]
    full = evaluate(open_artifact(tmp_path / "run", "last"), precision="32-true")
    assert full["loss"] != results["loss"]
    assert full["loss"] == pytest.approx(results["loss"], abs=0.02)


def test_streaming_equals_reading_each_document_at_once(trained: Trained, tmp_path: Path) -> None:
    artifact, text = open_artifact(trained[0]), tmp_path
    for i, length in enumerate((1, 48, 170, 171, 20)):
        (text / f"{i}.txt").write_text(("The gecko sees the moon. " * 9)[:length])
    nats, positions = [], []
    for file in sorted(text.iterdir()):
        tokens = torch.tensor([256, *file.read_bytes()])[None]
        with torch.no_grad():
            logits, _ = artifact.model(tokens[:, :-1], bos_id=256)
        nats.append(F.cross_entropy(logits[0], tokens[0, 1:], reduction="none").double().numpy())
        positions.append(np.arange(tokens.shape[1] - 1))
    losses, places = np.concatenate(nats), np.concatenate(positions)
    size = sum(f.stat().st_size for f in text.iterdir())
    for batch_size, seq_len in ((1, 37), (3, 64), (9, 4096)):
        results = evaluate(artifact, str(text), stream=True, seq_len=seq_len, batch_size=batch_size, batches=0)
        assert results["tokens"] == results["bytes"] == size == len(losses)
        assert results["loss"] == pytest.approx(losses.mean(), abs=1e-5)
        assert results["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
        assert results["bits_per_byte"] == pytest.approx(losses.sum() / math.log(2) / size, rel=1e-5)
        assert sum(row["tokens"] for row in results["by_position"]) == size
        for row in results["by_position"]:
            inside = (places >= row["from"]) & (places <= row["to"])
            assert row["tokens"] == inside.sum()
            assert row["loss"] == pytest.approx(losses[inside].mean(), abs=1e-5)
    few = evaluate(artifact, str(text), stream=True, batch_size=2, batches=2)
    assert few["batches"] == 2
    assert few["tokens"] < size


def test_one_document_as_a_row_and_as_a_stream(trained: Trained, tmp_path: Path) -> None:
    artifact, file = open_artifact(trained[0]), tmp_path / "one.txt"
    file.write_text("One document, read whole. " * 20)
    size = file.stat().st_size
    whole = evaluate(artifact, str(file), seq_len=size, batch_size=1)
    stream = evaluate(artifact, str(file), seq_len=33, batch_size=1, stream=True)
    assert whole["tokens"] == stream["tokens"] == whole["bytes"] == stream["bytes"] == size
    assert stream["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    for a, b in zip(whole["by_position"], stream["by_position"], strict=True):
        assert b == pytest.approx(a, abs=1e-5)


def test_a_store_an_export_and_the_parts_of_the_data(trained: Trained, tmp_path: Path) -> None:
    run, text = trained[0], trained[0].parent / "text"
    store = str(prepare(Request(sources=[str(text)], out=tmp_path / "s", val_fraction=0.4)).path)
    artifact = open_artifact(export(open_artifact(run, "last"), tmp_path / "out"))
    fast = {"stream": True, "batches": 0, "batch_size": 12, "seq_len": 512}
    parts = {s: evaluate(artifact, store, s, **fast) for s in ("train", "val", "all")}
    assert parts["train"]["tokens"] + parts["val"]["tokens"] == parts["all"]["tokens"]
    assert evaluate(artifact, store, batches=1)["split"] == "val"
    own = {s: evaluate(open_artifact(run), split=s, **fast)["tokens"] for s in ("train", "val", "all")}
    assert own["train"] + own["val"] == own["all"] == parts["all"]["tokens"]
    plain = evaluate(artifact, str(text), **fast)
    assert plain["loss"] == pytest.approx(parts["all"]["loss"], abs=1e-6)
    assert artifact.seq_len == evaluate(artifact, str(text), batches=1)["seq_len"] == 64


def test_the_command_prints_and_writes_the_same_numbers(trained: Trained, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert main([str(trained[0]), "--json", str(file), "--checkpoint", "last"]) == 0
    out, err = capsys.readouterr()
    written = json.loads(file.read_text())
    assert written["loss"] == trained[1]["val/loss"]
    assert written["notes"] == []
    assert "warning" not in err
    for words in (f"{written['loss']:.4f} nats", f"{written['bits_per_byte']:.4f} bits per byte", "step-00000002.ckpt",
                  "32 - 63", f"{written['by_position'][0]['loss']:.4f}"):  # fmt: skip
        assert words in out


def test_changed_data_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "model.num_layers=1", "trainer.max_steps=1")
    (tmp_path / "text" / "03.txt").write_text("Another text. " * 50)
    assert main([str(tmp_path / "run")]) == 0
    assert "the data changed since the run" in capsys.readouterr().err
    for file in (tmp_path / "text").iterdir():
        file.unlink()
    assert main([str(tmp_path / "run")]) == 2
    assert str(tmp_path / "text") in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seq-len", "0"], "--seq-len 0"),
        (["--batches", "-1"], "--batches -1"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--seq-len", "999999"], "smaller --seq-len"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "one.txt", "--split", "train", "--seq-len", "9"], "too little"),
        (["--data", "store", "--split", "val"], "no documents in this part"),
        (["--data", "other"], "tokenizer"),
        (["--device", "abacus"], "abacus"),
        (["--json", "no/folder/x.json"], "no/folder"),
        (["--checkpoint", "nowhere.ckpt"], "nowhere.ckpt"),
    ],
    ids=lambda v: "-".join(v).strip("-") if isinstance(v, list) else "",
)
def test_mistakes(arguments: list[str], words: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("x")
    if "store" in arguments:
        prepare(Request(sources=[str(trained[0].parent / "text" / "01.txt")], out=Path("store"), val_fraction=0.0))
    if "other" in arguments:
        tokenizers = pytest.importorskip("tokenizers")
        model = tokenizers.models.BPE(vocab={c: i for i, c in enumerate("abc")}, merges=[], unk_token="a")
        tokenizers.Tokenizer(model).save("t.json")
        prepare(Request(sources=["one.txt"], out=Path("other"), tokenizer="hf:t.json", val_fraction=0.0))
    assert main([str(trained[0]), *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""


def test_an_export_needs_data_and_a_name(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export(open_artifact(trained[0]), tmp_path / "out")
    assert main([str(out)]) == 2
    assert "--data" in capsys.readouterr().err
    assert main([str(out), "--checkpoint", "last"]) == 2
    assert "--checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("command", [evaluate_command, export_command, generate_command], ids=lambda c: c.__name__)
def test_help_and_documentation_explain_every_option(command: object) -> None:
    page = (Path(gecko_lab.__file__).parents[1] / "docs" / "commands.md").read_text()
    parser = command.parser()  # type: ignore[attr-defined]
    text = " ".join(parser.format_help().split())
    assert f"python -m {command.__name__}" in page  # type: ignore[attr-defined]
    for action in parser._actions:
        assert action.help, action.dest
        assert action.help in text
        for option in action.option_strings:
            if option not in ("-h", "--help"):
                assert f"`{option}" in page, option
