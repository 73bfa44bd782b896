"""The main job as a user starts it, on a small text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gecko_lab.build import options

FAMILIES = ["gecko", "megalodon", "mega", "llama"]
TINY = [
    "model.num_layers=1", "model.dim=32", "model.ffn_dim=48", "model.z_dim=32", "model.value_dim=32",
    "model.chunk_size=16", "model.norm_groups=4", "model.ema_modes=4", "data.seq_len=64", "trainer.batch_size=2",
    "log.sample_tokens=8", "data.val_batches=2", "log.every_n_steps=1", "trainer.accelerator=cpu",
]


def command(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "gecko_lab.train", *overrides]
    source = str(Path(__file__).parents[2])
    env = {"PYTHONPATH": source, "PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(run, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(30):
        text = f"Document {i}. " + "The gecko climbs the wall and sees the moon. " * (5 + i)
        (folder / f"{i:02}.txt").write_text(text)
    return folder


@pytest.mark.parametrize("choice", [f"model={f}" for f in FAMILIES] + [f"+ablation={a}" for a in options("ablation")])
def test_five_steps_of_every_family_and_ablation(choice: str, text: Path, tmp_path: Path) -> None:
    data = ["data=text", f"data.path={text}"]
    done = command(choice, *TINY, *data, "trainer.max_steps=5", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "checkpoints" / "step-00000005.ckpt").exists()
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))
    assert "bits per byte" in done.stdout
    assert str(tmp_path / "run") in done.stdout
    assert "tensorboard --logdir" in done.stdout


def test_a_run_folder_is_not_overwritten(text: Path, tmp_path: Path) -> None:
    arguments = [*TINY, "data=text", f"data.path={text}", "trainer.max_steps=1", "hydra.run.dir=run"]
    assert command(*arguments, cwd=tmp_path).returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = command(*arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model/memory=adaptiv"], "adaptive_working"),
        (["data=text", "data.path=nowhere.txt"], "nowhere.txt"),
        (["data=text", "data.path=binary.txt"], "binary"),
        (["data=text", "data.path=latin.txt"], "latin.txt"),
        (["model.vocab_size=100"], "vocab_size"),
        (["resume=auto"], "holds no run"),
        (["trainer.accelerator=gpu", "trainer.devices=64"], "CUDA device"),
    ],
    ids=lambda v: v[-1].replace("/", ".") if isinstance(v, list) else "",
)
def test_mistakes_end_with_a_message_and_code_2(overrides: list[str], words: str, text: Path, tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2" * 1000)
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 1000)
    base = [] if any("data=text" in o for o in overrides) else ["data=text", f"data.path={text}"]
    done = command(*TINY, *base, *overrides, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_help_names_every_field_and_choice(tmp_path: Path) -> None:
    done = command("--help", cwd=tmp_path)
    assert done.returncode == 0
    for words in ("optim.lr", "model.chunk_size", "+ablation", "no_awm", "sliding_chunk", "checkpoint.every_n_steps"):
        assert words in done.stdout
