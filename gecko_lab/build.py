"""From overrides to a configuration to a model, in one grammar for the command line, sweeps and Python.

Hydra composes; what it refuses is explained here with the nearest names before anything is built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from . import config as schema
from .components import KINDS
from .components.registry import nearest
from .config import TrainConfig
from .data.synthetic import TASKS
from .errors import ConfigError
from .model import LanguageModel

CONFIG_MODULE = "gecko_lab.conf"


def options(group: str) -> list[str]:
    """Names that ``group=NAME`` accepts: the YAML files of conf/GROUP, the registry's components, synthetic tasks."""
    folder = resources.files(CONFIG_MODULE).joinpath(*group.split("/"))
    files = [f.name for f in folder.iterdir()] if folder.is_dir() else []
    names = [name.removesuffix(".yaml") for name in files if name.endswith(".yaml")]
    kind = group.removeprefix("model/")
    if group != kind and kind in KINDS:
        names += KINDS[kind].names()
    if group == "data":
        names += TASKS
    return sorted(set(names))


def groups() -> list[str]:
    """Every group of the configuration that ``train`` composes."""
    return ["model", *(f"model/{kind}" for kind in KINDS), "data", "ablation", "experiment"]


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra over our own configuration, also inside a program that already runs Hydra over another."""
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().clear()
        if running is not None:
            GlobalHydra.instance().initialize(running)


def compose(overrides: Sequence[str] = (), *, config_name: str = "train", with_hydra: bool = False) -> DictConfig:
    """The composed, typed configuration.

    Raises ConfigError for an unknown group, option, field or a value of the wrong type, naming the nearest ones.
    """
    schema.register()
    with _hydra():
        try:
            return hydra_compose(config_name, list(overrides), return_hydra_config=with_hydra)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_explain(list(overrides), error)) from error


def build_config(*overrides: str) -> TrainConfig:
    """The checked configuration of a run as dataclasses."""
    return to_config(compose(overrides))


def to_config(node: DictConfig) -> TrainConfig:
    """Typed dataclasses out of a composed node; raises ConfigError for values that no run can have."""
    try:
        values: dict[str, Any] = {str(k): v for k, v in node.items() if k != "hydra"}
        values = {k: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for k, v in values.items()}
        config = TrainConfig(**values)
        schema.check(config)
    except (ValueError, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    return config


def build_model(*overrides: str) -> LanguageModel:
    """A model with fresh weights, from the command line's overrides.

    ``build_model("model=gecko", "model/memory=none", "model.dim=256")``. Raises ConfigError (a ValueError) for unknown
    names and impossible sizes. ``with torch.device("meta")`` around it builds without memory.
    """
    return LanguageModel(build_config(*overrides).model)


def _explain(overrides: list[str], error: Exception) -> str:
    """Say which override is wrong, and the nearest right ones; else the library's own words."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except (HydraException, OmegaConfBaseException) as bad:
        return f"cannot read the overrides {' '.join(overrides)}: {bad}"
    chosen_groups = [text for text, override in zip(overrides, parsed) if override.key_or_group in groups()]
    for override in parsed:
        key, value = override.key_or_group, override.value()
        if key in groups():
            chosen = value if isinstance(value, list) else [value]
            for name in chosen:
                if isinstance(name, str) and name not in options(key):
                    return f"unknown {key.removeprefix('model/')} {name!r}. {nearest(name, options(key))}"
            if key in ("ablation", "experiment") and not override.is_add():
                return f"write +{key}={value} (with a plus): none is chosen by default"
    for override in parsed:  # after the groups: the fields are those of what they choose
        key = override.key_or_group
        message = None if key in groups() or override.is_add() else _unknown_field(key, chosen_groups)
        if message is not None:
            return message
    cause = error.__cause__ or error
    lines = [line for line in str(error).splitlines() if line.strip()]
    if cause is not error:
        lines.append(str(cause).splitlines()[0])
    return "\n".join(dict.fromkeys(lines))


def _unknown_field(key: str, chosen: list[str]) -> str | None:
    """A message about its first unknown part when the dotted key names nothing in the configuration so chosen."""
    if key.startswith("hydra"):
        return None
    node: Any = hydra_compose("train", chosen)
    path: list[str] = []
    for part in key.replace("/", ".").split("."):
        if not isinstance(node, DictConfig) or part not in node:
            names = [str(k) for k in node] if isinstance(node, DictConfig) else []
            return f"unknown field {'.'.join([*path, part])!r}. {nearest(part, names)}"
        path.append(part)
        node = node[part]
    return None
