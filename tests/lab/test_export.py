"""What a run leaves behind can be exported and read back to the bit, and nothing else is taken for it."""

import dataclasses
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gecko_lab
from gecko_lab import checkpoint
from gecko_lab.artifacts import open_artifact
from gecko_lab.errors import LabError
from gecko_lab.export import export, main
from gecko_lab.interop import from_official

TOKENS = torch.arange(150).remainder(257).view(2, 75)
Trained = tuple[Path, dict[str, float]]


def logits(model: gecko_lab.LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, bos_id=256)[0]


def test_run_checkpoint_and_both_exports_are_the_same_model(trained: Trained, tmp_path: Path) -> None:
    run, _ = trained
    assert main([str(run), "--checkpoint", "last", "--out", str(tmp_path / "ours")]) == 0
    assert main([str(run), "--checkpoint", "last", "--out", str(tmp_path / "theirs"), "--official"]) == 0
    file = run / "checkpoints" / "step-00000002.ckpt"
    expected = logits(gecko_lab.load(file))
    saved = checkpoint.load(file)["state_dict"]
    for name, value in gecko_lab.load(tmp_path / "ours").state_dict().items():
        assert torch.equal(value, saved[f"model.{name}"]), name
    for path in (tmp_path / "ours", tmp_path / "theirs", tmp_path / "ours" / "model.safetensors"):
        model = gecko_lab.load(path)
        assert not model.training
        assert torch.equal(logits(model), expected)
        assert gecko_lab.load_tokenizer(path).name == "bytes"
    official = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert torch.equal(logits(from_official(official, load_file(tmp_path / "theirs" / "model.safetensors"))), expected)
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert ours["model"] == dataclasses.asdict(gecko_lab.load(file).config)
    assert ours["source"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert ours["source"]["step"] == 2


def test_loading_leaves_the_random_state_alone(trained: Trained) -> None:
    before = torch.get_rng_state()
    gecko_lab.load(trained[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_gives_its_best_checkpoint_then_the_latest_whole_one(trained: Trained, tmp_path: Path) -> None:
    run = shutil.copytree(trained[0], tmp_path / "run")
    assert open_artifact(run).file.name == "best.ckpt"
    assert open_artifact(run / "checkpoints").file.name == "best.ckpt"
    assert open_artifact(run, "last").file.name == "step-00000002.ckpt"
    for name, then in (("best.ckpt", "step-00000002.ckpt"), ("step-00000002.ckpt", "step-00000001.ckpt")):
        damage(run / "checkpoints" / name)
        artifact = open_artifact(run)
        assert artifact.file.name == then
        assert name in artifact.notes[-1]
    damage(run / "checkpoints" / "step-00000001.ckpt")
    with pytest.raises(LabError, match="none of its 3 checkpoints"):
        open_artifact(run)


@pytest.mark.parametrize("official", [False, True])
def test_tied_weights_stay_tied(official: bool, trained: Trained, tmp_path: Path) -> None:
    artifact = open_artifact(trained[0])
    artifact.model.head.weight = artifact.model.embed.weight
    artifact.model.config.tie_embeddings = True
    again = gecko_lab.load(export(artifact, tmp_path / "out", official))
    assert again.head.weight is again.embed.weight
    assert again.num_parameters() == artifact.model.num_parameters()
    assert torch.equal(logits(again), logits(artifact.model))


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(trained: Trained, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    assert main([str(trained[0]), "--out", str(out)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["mine"]
    artifact = open_artifact(trained[0])
    artifact.model.config.attention = gecko_lab.build_config("model/attention=chunk").model.attention
    with pytest.raises(LabError, match="attention=chunk"):
        export(artifact, tmp_path / "official", official=True)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(LabError, match="cannot be written"):
        export(open_artifact(trained[0]), file / "inner")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]
    (tmp_path / "empty").mkdir()
    assert gecko_lab.load(export(open_artifact(trained[0]), tmp_path / "empty")).num_parameters()


def damage(file: Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("official", [False, True])
def test_every_damaged_file_of_an_export_is_refused(official: bool, trained: Trained, tmp_path: Path) -> None:
    good = export(open_artifact(trained[0]), tmp_path / "good", official)
    for name in [p.name for p in good.iterdir()]:
        for kind in ("flip 0.001", "flip 0.4", "flip 0.7", "cut", "gone", "empty"):
            bad = shutil.copytree(good, tmp_path / "bad", dirs_exist_ok=True)
            file = bad / name
            match kind.split():
                case ["flip", at]:
                    damage(file, float(at))
                case ["cut"]:
                    file.write_bytes(file.read_bytes()[:-10])
                case ["gone"]:
                    file.unlink()
                case ["empty"]:
                    file.write_bytes(b"")
            if name == "gecko_lab.json" and kind == "gone":
                assert gecko_lab.load(bad).num_parameters()  # as a folder of official origin
            else:
                with pytest.raises(LabError, match=name):
                    gecko_lab.load(bad)


def test_damaged_and_foreign_checkpoints_are_refused(trained: Trained, tmp_path: Path) -> None:
    data = (trained[0] / "checkpoints" / "best.ckpt").read_bytes()
    bad = tmp_path / "bad.ckpt"
    for content in (b"", data[:100], data[:-1], data[: len(data) // 2], b"\0" + data[1:], data[:-5] + b"00000"):
        bad.write_bytes(content)
        with pytest.raises(LabError, match=r"bad\.ckpt"):
            gecko_lab.load(bad)
    checkpoint.save(bad, {"something": 1})
    with pytest.raises(LabError, match="no model configuration"):
        gecko_lab.load(bad)
    bad.write_bytes(data)
    with pytest.raises(LabError, match="which tokenizer"):
        gecko_lab.load_tokenizer(bad)


class Smuggled:
    """Calls a function when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.file,)


def test_nothing_executes_from_a_file(trained: Trained, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    pickle.loads(pickle.dumps(Smuggled(proof)))
    assert proof.exists()  # the attack works where it is let
    proof.unlink()
    checkpoint.save(tmp_path / "a.ckpt", {"gecko_lab": {}, "state_dict": Smuggled(proof)})
    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Smuggled(proof)))
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Smuggled(proof)))
    for path in (tmp_path / "a.ckpt", tmp_path / "b.ckpt", folder):
        with pytest.raises(LabError):
            gecko_lab.load(path)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copy(trained[0] / "checkpoints" / "best.ckpt", run / "checkpoints")
    (run / "config.yaml").write_text(f"data: !!python/object/apply:pathlib.Path.touch [{proof}]\n")
    with pytest.raises(LabError, match=r"config\.yaml"):
        gecko_lab.load(run)
    assert not proof.exists()


def test_weights_that_do_not_fit_are_all_listed(trained: Trained, tmp_path: Path) -> None:
    good = export(open_artifact(trained[0]), tmp_path / "good", official=True)
    (good / "gecko_lab.json").unlink()
    weights = load_file(good / "model.safetensors")
    weights["layers.0.mega.wz.weight"] = torch.zeros(2, 2)
    del weights["layers.1.mega.wv.bias"]
    save_file({**weights, "extra": torch.zeros(1)}, good / "model.safetensors")
    with pytest.raises(LabError, match=r"wz.weight: shape .*missing layers.1.mega.wv.bias.*unexpected extra"):
        gecko_lab.load(good)
    saved = checkpoint.load(trained[0] / "checkpoints" / "best.ckpt")
    saved["state_dict"]["model.head.weight"] = torch.zeros(3, 3)
    saved["state_dict"]["model.extra"] = saved["state_dict"].pop("model.final_norm.bias")
    checkpoint.save(tmp_path / "odd.ckpt", saved)
    with pytest.raises(LabError, match=r"head.weight: shape .*missing final_norm.bias.*unexpected extra"):
        gecko_lab.load(tmp_path / "odd.ckpt")


def test_a_tokenizer_file_travels_with_the_export(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from trained import make_run

    model = tokenizers.models.BPE(vocab={c: i for i, c in enumerate("abcdefgh The")}, merges=[], unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tok.json"))
    make_run(tmp_path, f"data.tokenizer=hf:{tmp_path / 'tok.json'}", "trainer.max_steps=1", "model.num_layers=1")
    out = export(open_artifact(tmp_path / "run"), tmp_path / "out")
    (tmp_path / "tok.json").unlink()
    with pytest.raises(LabError, match=r"tok\.json"):
        gecko_lab.load_tokenizer(tmp_path / "run")
    assert gecko_lab.load_tokenizer(out).encode("cab").tolist() == [2, 0, 1]
    damage(out / "tokenizer.json", 0.9)
    with pytest.raises(LabError, match=r"tokenizer\.json"):
        gecko_lab.load(out)


@pytest.mark.parametrize("path", ["nowhere", "folder", "run"])
def test_other_paths_are_explained(path: str, tmp_path: Path) -> None:
    (tmp_path / "folder" / "2026").mkdir(parents=True)
    (tmp_path / "folder" / "2026" / "config.yaml").write_text("data: {}\n")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    words = {"nowhere": "no such file", "folder": r"holds these runs: .*2026", "run": "no checkpoint yet"}
    with pytest.raises(LabError, match=words[path]):
        gecko_lab.load(tmp_path / path)
