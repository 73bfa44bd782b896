"""A tiny run for the command, and a tiny model of bytes for everything else."""

import sys
from pathlib import Path

import pytest
import torch

from gecko_lab.build import build_model
from gecko_lab.data.tokenizers import load_tokenizer
from gecko_lab.tasks import Subject

sys.path.insert(0, str(Path(__file__).parents[1] / "lab"))
from trained import make_run

TINY = ["model.num_layers=1", "model.dim=16", "model.ffn_dim=16", "model.z_dim=8", "model.value_dim=16",
        "model.num_heads=1", "model.chunk_size=32", "model.norm_groups=2", "model.ema_modes=2"]  # fmt: skip


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("tasks")
    make_run(folder, "model.num_layers=1")
    return folder / "run"


@pytest.fixture(scope="session")
def subject() -> Subject:
    """An untrained model of one layer; its attention sees 64 tokens."""
    torch.manual_seed(0)
    return Subject(build_model(*TINY).eval(), load_tokenizer("bytes"), torch.device("cpu"))
