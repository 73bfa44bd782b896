"""The main job: ``python -m gecko_lab.train [overrides]`` trains a language model and says what it learned.

Nothing is built before every name, field and size is known to be good, and before the run folder is known to be free.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from .config import TrainConfig, TrainerConfig
from .errors import LabError, RunError

log = logging.getLogger(__name__)
TEXT = "Trains a language model; the run lands in runs/DATE_TIME (hydra.run.dir=FOLDER to choose)."


def make_trainer(config: Any, folder: Any, callbacks: list[Any], logger: Any) -> Any:
    """Lightning's Trainer over one endless epoch of batches."""
    import lightning as L
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    from .checkpoint import SafeCheckpointIO
    from .precision import trainer_options
    from .progress import ProgressBar
    from .strategies import make_strategy

    options = config.trainer
    precision, plugins = trainer_options(options.precision, options.accelerator)
    if options.progress:
        callbacks = [*callbacks, ProgressBar()]
    # callbacks.Interrupt requeues
    cluster = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=make_strategy(options.strategy, options.devices * options.num_nodes),
        precision=precision,
        max_steps=options.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        val_check_interval=config.log.validate_every_n_steps * options.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=config.log.every_n_steps,
        deterministic="warn" if options.deterministic else False,
        use_distributed_sampler=False,
        # FSDP2 gathers parameters into views, and a view made in inference mode cannot be trained afterwards
        inference_mode=options.strategy != "fsdp",
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=callbacks,
        logger=logger,
        plugins=[SafeCheckpointIO(), *plugins, *cluster],
        default_root_dir=folder.path,
    )


def train(config: TrainConfig, run_dir: str | Path, callbacks: Sequence[Any] = ()) -> dict[str, float]:
    """Run the whole job in ``run_dir``, with further Lightning callbacks; returns the final validation metrics.

    Raises LabError for what the user can mend. Exits with code 75 when a signal stopped the run after a checkpoint.
    """
    from .run import RunFolder, disk_errors

    folder = RunFolder(run_dir)
    try:
        with disk_errors(folder.path):
            return _train(config, folder, callbacks)
    finally:
        folder.release()


def _train(config: TrainConfig, folder: Any, callbacks: Sequence[Any]) -> dict[str, float]:
    import lightning as L
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from . import checkpoint as checkpoints
    from . import resume
    from .callbacks import Interrupt, Interrupted, Saver
    from .data.module import lab_data
    from .kernels import backend
    from .lit import LitLanguageModel
    from .nonfinite import NonFiniteGuard
    from .run import environment
    from .strategies import whole_model
    from .telemetry import Recorder
    from .telemetry.layout import flat, write_hyperparameters
    from .telemetry.record import last_validation

    _quiet()
    _check_devices(config.trainer)
    first = _is_first_process()
    if first:
        folder.check_free(config.resume)
        folder.claim()
    backend.set_mode(config.kernels)
    L.seed_everything(config.seed, workers=True, verbose=False)

    batches = config.trainer.max_steps * config.trainer.accumulate
    data = lab_data(config.data, config.seed, config.trainer.batch_size, total_batches=batches)
    data.setup()
    facts = data.describe()
    if data.vocab_size > config.model.vocab_size:
        raise RunError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer {facts['tokenizer']} has "
            f"{data.vocab_size} tokens; set model.vocab_size={data.vocab_size} or more"
        )
    module = LitLanguageModel(config, bos_id=data.bos_id, stream=config.data.mode == "stream")
    facts = {"parameters": module.model.num_parameters(), **facts}
    start = resume.find(config.resume, folder.checkpoints, config.model)
    resolved = OmegaConf.structured(config)
    if first:
        config_yaml = OmegaConf.to_yaml(resolved, resolve=True)
        changed = folder.changed(config_yaml)
        resumed = {"resumed_from": str(start.path), "step": start.step, "changed": changed} if config.resume else {}
        folder.record(config_yaml, environment(kernels=config.kernels, seed=config.seed, data=facts, **resumed))
        aside = checkpoints.tidy(folder.checkpoints, start.step)
        _introduce(config, module, facts, folder)
        if config.resume:
            resume.say(start, config.trainer.max_steps, changed, aside)

    saver = Saver(folder.checkpoints, config.checkpoint)
    recorder = Recorder(folder.path, config.log)
    if first and start.step >= config.trainer.max_steps:
        recorder.validated = last_validation(recorder.file.rewind(start.step))
    guard = NonFiniteGuard(folder.path, config.trainer, config.kernels)
    logger = TensorBoardLogger(save_dir=str(folder.path), name="", version="tensorboard", default_hp_metric=False)
    trainer = make_trainer(config, folder, [recorder, guard, saver, Interrupt(saver), *callbacks], logger)
    if first:
        write_hyperparameters(logger.experiment, flat(OmegaConf.to_container(resolved)))
    try:
        trainer.fit(module, datamodule=data, ckpt_path=str(start.path) if start.path else None)
    except (Interrupted, SIGTERMException):  # Lightning's own, exit code 0, when the signal came before the first step
        if first:
            print(f"\nStopped at step {trainer.global_step}. Continue with: python -m gecko_lab.train ... "
                  f"hydra.run.dir={folder.path} resume=auto", flush=True)
        sys.exit(Interrupt.EXIT_CODE)

    trainer.validate(module, datamodule=data, verbose=False)
    results = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
    model = whole_model(module.model)  # every process takes part in gathering it
    if trainer.is_global_zero:
        logger.save()
        _conclude(config, model, data, results, folder, logger)
    return results


def _check_devices(options: TrainerConfig) -> None:
    """Raise RunError for devices that this machine does not have."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.accelerator == "gpu" and not gpus:
        raise RunError("trainer.accelerator=gpu: no CUDA device here; use trainer.accelerator=cpu, or auto")
    if options.accelerator != "cpu" and gpus and options.devices > gpus:
        raise RunError(f"trainer.devices={options.devices}: this machine has {gpus} CUDA device(s)")


def _is_first_process() -> bool:
    """Whether this process has rank 0, before there is a trainer: as torchrun, Lightning's launcher or srun tell it."""
    env = os.environ
    if "RANK" in env:
        return env["RANK"] == "0"
    if "LOCAL_RANK" in env or "NODE_RANK" in env:
        return env.get("LOCAL_RANK", "0") == "0" and env.get("NODE_RANK", "0") == "0"
    return env.get("SLURM_PROCID", "0") == "0"


def _quiet() -> None:
    """Drop advice that does not apply here, so that what remains is worth reading."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*You're resuming from a checkpoint that ended before the epoch ended.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*lr_scheduler.step.*",
        ".*isinstance.treespec.*",
        ".*is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)


def _introduce(config: Any, module: Any, facts: dict[str, Any], folder: Any) -> None:
    from rich.console import Console

    model = config.model
    parts = " + ".join(getattr(model, kind).name for kind in ("norm", "ema", "attention", "memory", "feedforward"))
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"model     {model.family}: {facts['parameters']:,} parameters, {model.num_layers} layers of {parts}")
    console.print(f"data      {data_line(facts)}")
    if (baseline := facts.get("val_unigram_bits_per_byte")) is not None:
        console.print(f"baseline  {baseline:.3f} bits per byte: the unigram entropy of the validation text")
    console.print(f"run       {folder.path}")


def data_line(facts: dict[str, Any]) -> str:
    """One line on what is read."""
    if "answers" in facts:
        count = facts["train_examples"]
        examples = f"{count:,} examples again and again" if count else "new examples"
        return (
            f"{facts['data']}: {examples}, {facts['answers']} answers each, {facts['vocab_size']:,} tokens "
            f"(fingerprint {facts['fingerprint'][:12]})"
        )
    return (
        f"{facts['data']}: {facts['train_documents']:,} documents, {facts['train_bytes'] / 1e6:.1f} MB to train on, "
        f"{facts['val_documents']:,} documents, {facts['val_bytes'] / 1e6:.2f} MB to validate "
        f"(fingerprint {facts['fingerprint'][:12]})"
    )


def _conclude(config: Any, model: Any, data: Any, results: dict[str, float], folder: Any, logger: Any) -> None:
    from rich.console import Console
    from rich.rule import Rule

    from .generation import generate
    from .run import write_atomic

    console = Console(soft_wrap=True)
    facts = data.describe()
    if config.log.sample_tokens and "answers" not in facts:
        tokenizer = data.tokenizer
        prompt = [tokenizer.bos_id, *tokenizer.encode(config.log.sample_prompt).tolist()]
        device = model.embed.weight.device
        stream = generate(
            model,
            torch.tensor([prompt], device=device),
            config.log.sample_tokens,
            bos_id=tokenizer.bos_id,
            temperature=config.log.sample_temperature,
            seed=config.seed,
        )
        text = tokenizer.decode(prompt[1:] + [int(token) for token in stream])
        write_atomic(folder.path / "sample.txt", text)
        logger.experiment.add_text("sample", f"```\n{text}\n```", config.trainer.max_steps)
        console.print(Rule("a sample"), text, Rule(), markup=False, highlight=False)
    if "answers" in facts:
        console.print(
            f"validation: {results['val/accuracy']:.2%} of the answers right, {results['val/exact']:.2%} of the rows "
            f"(loss {results['val/loss']:.3f} nats an answer)",
            highlight=False,
        )
    else:
        _conclude_text(console, facts["val_unigram_bits_per_byte"], results)
    console.print(f"run folder: {folder.path}", highlight=False)
    console.print(f"curves:     tensorboard --logdir {folder.path.parent}", highlight=False)


def _conclude_text(console: Any, baseline: float, results: dict[str, float]) -> None:
    ours = results["val/bits_per_byte"]
    console.print(
        f"validation: {ours:.3f} bits per byte "
        f"(loss {results['val/loss']:.3f} nats, perplexity {results['val/perplexity']:.2f}), "
        f"{abs(1 - ours / baseline):.0%} {'below' if ours < baseline else 'above'} the unigram model's {baseline:.3f}",
        highlight=False,
    )


def main() -> int:
    """Entry point of ``python -m gecko_lab.train``."""
    from . import build, cli

    arguments = sys.argv[1:]
    if any(a in ("-h", "--help") for a in arguments):
        config = build.build_config(*(a for a in arguments if not a.startswith("-")))
        cli.print_help("gecko_lab.train", TEXT, config, {g: build.options(g) for g in build.groups()})
        return 0
    return cli.guarded(lambda: _main(arguments))


def _main(arguments: list[str]) -> int:
    import hydra

    from . import build, cli
    from .model import LanguageModel
    from .run import RunFolder

    overrides = [a for a in arguments if not a.startswith("-")]
    if not any(a in ("-m", "--multirun") for a in arguments):
        node = build.compose(overrides, with_hydra=True)
        config = build.to_config(node)
        try:
            with torch.device("meta"):
                LanguageModel(config.model)
        except ValueError as error:
            raise LabError(str(error)) from error
        if not any(a.startswith("--") for a in arguments) and _is_first_process():
            RunFolder(node.hydra.run.dir).check_free(config.resume)

    code = 0

    @hydra.main(version_base="1.3", config_path="pkg://gecko_lab.conf", config_name="train")
    def task(node: DictConfig) -> float | None:
        nonlocal code
        from hydra.core.hydra_config import HydraConfig

        try:
            config = build.to_config(node)
            return train(config, HydraConfig.get().runtime.output_dir)["val/loss"]
        except LabError as error:
            cli.complain(error)
            code = cli.USER_ERROR
            return None

    task()
    return code


if __name__ == "__main__":
    sys.exit(main())
