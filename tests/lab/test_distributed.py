"""Two processes on the CPU over gloo train what one process with twice the batch trains; the real command line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gecko_lab import checkpoint
from gecko_lab.strategies import _renamed
from gecko_lab.train import _is_first_process

SIZES = ["model.num_layers=1", "model.dim=16", "model.ffn_dim=24", "model.z_dim=16", "model.value_dim=16",
         "model.chunk_size=8", "model.norm_groups=4", "model.ema_modes=2", "data.seq_len=32", "data.val_batches=1"]
RUN = ["data=text", "trainer.accelerator=cpu", "trainer.max_steps=4", "trainer.progress=false", "log.sample_tokens=4",
       "log.every_n_steps=1", "log.validate_every_n_steps=2", "checkpoint.every_n_steps=2", "optim.warmup_steps=2"]
TWO = ["trainer.devices=2", "trainer.batch_size=2"]


def train(folder: Path, text: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A run to its end; all its processes are gone afterwards, whatever happened."""
    command = [sys.executable, "-m", "gecko_lab.train", *SIZES, *RUN, f"data.path={text}", f"hydra.run.dir={folder}"]
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
           "HOME": str(folder.parent)}
    with subprocess.Popen([*command, *overrides], cwd=folder.parent, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=150)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, err
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def curve(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        sentence = "The gecko climbs the wall and sees the moon. "
        (folder / f"{i:02}.txt").write_text(f"Document {i}. " + sentence * (5 + i))
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("single") / "run"
    train(folder, text, "trainer.batch_size=4")
    return folder


def assert_same_run(folder: Path, single: Path) -> None:
    for name in ("train/loss", "val/loss", "train/gradient_norm"):
        assert curve(folder, name) == pytest.approx(curve(single, name), rel=1e-4)
    assert len(curve(folder, "train/loss")) == 4
    ours, theirs = (checkpoint.load(f / "checkpoints" / "step-00000004.ckpt") for f in (folder, single))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, rtol=1e-3, atol=1e-4)
    a, b = ours["optimizer_states"][0], theirs["optimizer_states"][0]
    assert [g["params"] for g in a["param_groups"]] == [g["params"] for g in b["param_groups"]]
    for i, saved in b["state"].items():
        torch.testing.assert_close(a["state"][i]["exp_avg"], saved["exp_avg"], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_ddp_on_two_processes_is_one_process_with_twice_the_batch(tmp_path: Path, text: Path, single: Path) -> None:
    done = train(tmp_path / "run", text, *TWO, "trainer.strategy=ddp", "trainer.piece_len=12")
    assert_same_run(tmp_path / "run", single)
    assert done.stdout.count("run folder:") == 1  # only rank 0 speaks


@pytest.mark.slow
def test_fsdp_is_the_same_run_and_resumes_from_its_one_file(tmp_path: Path, text: Path, single: Path) -> None:
    folder = tmp_path / "run"
    done = train(folder, text, *TWO, "trainer.strategy=fsdp", "trainer.piece_len=12")
    assert done.stdout.count("run folder:") == 1
    assert_same_run(folder, single)
    last = folder / "checkpoints" / "step-00000004.ckpt"
    weights = checkpoint.load(last)["state_dict"]
    last.unlink()
    train(folder, text, *TWO, "trainer.strategy=fsdp", "trainer.piece_len=12", "resume=auto")
    for name, weight in checkpoint.load(last)["state_dict"].items():
        assert torch.equal(weight, weights[name])


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),  # torchrun, second node
        ({"LOCAL_RANK": "1"}, False),  # Lightning's launcher
        ({"NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "3"}, False),
        ({"SLURM_PROCID": "0"}, True),
    ],
)
def test_one_process_of_all_is_the_first(
    variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _is_first_process() is first


def test_an_optimizer_state_keeps_its_values_under_other_names() -> None:
    state = {"state": {"b": 1, "a": 2}, "param_groups": [{"params": ["a"], "lr": 1.0}, {"params": ["b"], "lr": 2.0}]}
    numbered = _renamed(state, {"a": 0, "b": 1})
    assert numbered["state"] == {0: 2, 1: 1}
    assert _renamed(numbered, {0: "a", 1: "b"}) == state
