"""Training on the GPU: bf16-mixed learns, kernels follow references, compiled follows eager, a resume continues."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gecko_lab
from gecko_lab import checkpoint
from gecko_lab.kernels import backend
from gecko_lab.pieces import row_losses

ROOT = Path(__file__).parents[2]
SIZES = ["model.num_layers=2", "model.dim=128", "model.z_dim=64", "model.value_dim=128", "model.ffn_dim=192",
         "model.chunk_size=64"]
FAMILIES = ["gecko", "megalodon", "llama"]


def sized(family: str) -> list[str]:
    own = ("model.z_dim", "model.value_dim") if family == "llama" else ()
    return [f"model={family}", *(s for s in SIZES if not s.startswith(own))]


def model_of(family: str, device: torch.device) -> gecko_lab.LanguageModel:
    torch.manual_seed(0)
    return gecko_lab.build_model(*sized(family)).to(device)


def a_batch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    row = torch.randint(0, 256, (4, 257), generator=torch.Generator().manual_seed(1))
    row[:, 0], row[0, 100] = 256, 256
    return row[:, :-1].to(device), row[:, 1:].to(device)


def trained(model: gecko_lab.LanguageModel, device: torch.device, piece_len: int = 0) -> list[float]:
    """Losses of five bf16-mixed steps on one batch."""
    x, y = a_batch(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    losses = []
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            loss = row_losses(model, x, y, bos_id=256, piece_len=piece_len)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_five_bf16_steps_lower_the_loss_and_kernels_follow_the_references(family: str, cuda: torch.device) -> None:
    with backend.use("strict"):
        ours = trained(model_of(family, cuda), cuda)
        pieces = trained(model_of(family, cuda), cuda, piece_len=96)
    with backend.use("reference"):
        reference = trained(model_of(family, cuda), cuda)
    assert ours[-1] < ours[0] - 0.1
    assert ours == pytest.approx(reference, rel=0.02)
    assert pieces == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize("family", ["gecko", "llama"])
@pytest.mark.parametrize("mode", ["auto", "reference"])
def test_compiled_blocks_train_like_eager_ones(family: str, mode: str, cuda: torch.device) -> None:
    compiled = model_of(family, cuda)
    torch._dynamo.reset()
    with backend.use(mode), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        eager = trained(model_of(family, cuda), cuda)
        for block in compiled.blocks:
            block.compile()
        assert trained(compiled, cuda) == pytest.approx(eager, rel=0.02)


def test_pieces_need_the_memory_of_one(cuda: torch.device) -> None:
    model = model_of("gecko", cuda)
    tokens = torch.randint(0, 256, (1, 16384), device=cuda)

    def peak(piece_len: int) -> int:
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            row_losses(model, tokens, tokens, bos_id=256, piece_len=piece_len)[0].mean().backward()
        return torch.cuda.max_memory_allocated() - before

    peak(2048)
    assert peak(2048) < peak(0) / 3


def train(folder: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "gecko_lab.train", *sized("gecko"), "data=text", f"data.path={ROOT / 'docs'}/*.md",
               "data.seq_len=128", "data.val_batches=2", "trainer.batch_size=4", "log.sample_tokens=8",
               "log.every_n_steps=1", "checkpoint.every_n_steps=3", "trainer.progress=false", f"hydra.run.dir={folder}"]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def assert_close_runs(one: Path, other: Path) -> None:
    a, b = (checkpoint.load(f / "checkpoints" / "step-00000006.ckpt")["state_dict"] for f in (one, other))
    for name, weight in a.items():
        assert float((weight - b[name]).abs().max()) <= 1e-2 * float(weight.abs().max()) + 1e-4, name


def test_a_resumed_run_ends_close_to_the_uninterrupted_one(tmp_path: Path) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    train(run, "trainer.max_steps=6", "trainer.accelerator=gpu")
    again.mkdir()
    for part in run.iterdir():
        subprocess.run(["cp", "-r", str(part), str(again)], check=True)
    (again / "checkpoints" / "step-00000006.ckpt").unlink()
    train(again, "trainer.max_steps=6", "trainer.accelerator=gpu", "resume=auto")
    assert_close_runs(run, again)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_train_like_one_with_twice_the_batch(strategy: str, tmp_path: Path) -> None:
    exact = ["trainer.max_steps=6", "trainer.accelerator=gpu", "trainer.precision=32-true"]
    train(tmp_path / "one", *exact)
    train(tmp_path / "two", *exact, "trainer.devices=2", f"trainer.strategy={strategy}", "trainer.batch_size=2")
    assert_close_runs(tmp_path / "one", tmp_path / "two")
