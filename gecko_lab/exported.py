"""An exported folder: model.safetensors and config.json, with its checksums, in our names or the official ones.

Our config.json holds everything about the model. Under official names config.json has the official keys alone, and
gecko_lab.json beside it holds what ours would say; a folder of official origin has no gecko_lab.json.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .artifacts import Artifact, build, model_config, sha256
from .errors import RunError
from .interop import from_official

FORMAT = "gecko_lab model"
VERSION = 1
WEIGHTS, CONFIG, FACTS = "model.safetensors", "config.json", "gecko_lab.json"


def seal(facts: dict[str, Any]) -> str:
    """JSON text of ``facts`` with a checksum over them."""
    return json.dumps({**facts, "checksum": _checksum(facts)}, indent=2) + "\n"


def read_export(folder: Path) -> Artifact:
    """The model of an exported folder. LabError: a missing, damaged or foreign file, or weights that do not fit."""
    values = _json(folder / CONFIG)
    ours = values.get("format") == FORMAT
    if ours or (folder / FACTS).exists():
        facts = values if ours else _json(folder / FACTS)
        _check(facts, folder / (CONFIG if ours else FACTS))
        for name, digest in facts["sha256"].items():
            file = folder / Path(name).name
            if not file.is_file():
                raise RunError(f"{file}: missing; export the run again")
            if sha256(file) != digest:
                raise RunError(f"{file}: damaged or changed since the export, its checksum does not match")
    else:
        facts = {}
    weights = _weights(folder / WEIGHTS)
    if ours:
        model = build(model_config(values["model"], folder / CONFIG), weights, folder / WEIGHTS)
    else:
        try:
            model = from_official(values, weights).eval()
        except (TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{folder / CONFIG}: not a configuration of an official Gecko ({error})") from None
    source = facts.get("source", {})
    return Artifact(
        kind="export",
        file=folder / WEIGHTS,
        model=model,
        step=source.get("step"),
        data_fingerprint=source.get("data_fingerprint"),
        seq_len=source.get("seq_len"),
        _tokenizer=facts.get("tokenizer"),
    )


def _check(facts: dict[str, Any], file: Path) -> None:
    checksum = facts.pop("checksum", None)
    if facts.get("format") != FORMAT or not isinstance(facts.get("sha256"), dict):
        raise RunError(f"{file}: not the description of a model by gecko_lab")
    if facts.get("version") != VERSION:
        raise RunError(f"{file}: format version {facts.get('version')}, this program reads version {VERSION}")
    if checksum != _checksum(facts):
        raise RunError(f"{file}: damaged or edited, its checksum does not match; export the run again")


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise RunError(f"{file}: {error.strerror}; an exported folder holds {WEIGHTS} and {CONFIG}") from None
    except ValueError:
        raise RunError(f"{file}: damaged, not JSON") from None
    if not isinstance(values, dict):
        raise RunError(f"{file}: not the description of a model")
    return values


def _weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise RunError(f"{file}: missing; an exported folder holds {WEIGHTS} and {CONFIG}")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise RunError(f"{file}: damaged, or not a safetensors file ({error})") from None


def _checksum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
