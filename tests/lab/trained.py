"""A tiny trained run for the tests of the commands that read one."""

from pathlib import Path

from gecko_lab.build import build_config
from gecko_lab.train import train

SIZES = ["model.num_layers=2", "model.dim=32", "model.ffn_dim=48", "model.z_dim=32", "model.value_dim=32",
         "model.chunk_size=16", "model.norm_groups=4", "model.ema_modes=4", "data.seq_len=64", "trainer.batch_size=2",
         "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.progress=false", "log.sample_tokens=0",
         "log.validate_every_n_steps=1", "checkpoint.every_n_steps=1"]  # fmt: skip


def make_run(folder: Path, *overrides: str) -> dict[str, float]:
    """Train two steps in ``folder``/run on ``folder``/text; the final validation's numbers."""
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for i in range(12):
        (text / f"{i:02}.txt").write_text(f"Document {i}. " + "The gecko climbs, \u58c1 and \u00e9. " * (4 + 2 * i))
    config = build_config(*SIZES, "data=text", f"data.path={text}", "data.val_fraction=0.3", *overrides)
    return train(config, folder / "run")

