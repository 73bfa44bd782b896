"""A session on disk: one safetensors file, its description as JSON in the header. Nothing executes from it.

The description names the model by a fingerprint of its configuration and weights, and ends with a checksum over
itself and the tensors, so that another model's, a cut or a changed file is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import __version__
from ..data.tokenizers import Tokenizer
from ..errors import RunError
from ..model import LanguageModel
from ..run import write_atomic

if TYPE_CHECKING:
    from .session import Mark

FORMAT = "gecko_lab session"
VERSION = 1
KEY = "gecko_lab"
BLOCK = 1 << 24  # elements hashed at a time
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save(path: Path, model: LanguageModel, tokenizer: Tokenizer | None, bos_id: int | None, mark: Mark) -> None:
    """Write atomically. RunError: nothing was read yet, ``path`` is another kind of file, or it cannot be written."""
    check_target(path)
    if mark.logits is None:
        raise RunError(f"{path}: nothing was read yet, so there is no session to save")
    leaves = pytree.tree_flatten_with_path(mark.state)[0]
    named = {f"state{pytree.keystr(where)}": leaf for where, leaf in leaves}
    tensors = {name: leaf for name, leaf in named.items() if isinstance(leaf, Tensor)}
    tensors |= {"logits": mark.logits, "seen": mark.seen}
    tensors = {name: _plain(tensor) for name, tensor in tensors.items()}
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"gecko_lab {__version__}",
        "model": fingerprint(model),
        "model_family": model.config.family,
        "tokenizer": None if tokenizer is None else {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint},
        "bos_id": bos_id,
        "length": mark.length,
        "tail": list(mark.tail),
        "counters": {name: leaf for name, leaf in named.items() if isinstance(leaf, int)},
    }
    facts["checksum"] = _checksum(facts, tensors)
    try:
        write_atomic(path, to_bytes(tensors, metadata={KEY: json.dumps(facts)}))
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); an earlier session is kept") from error


def load(path: Path, model: LanguageModel, tokenizer: Tokenizer | None) -> tuple[int | None, Mark]:
    """bos_id and the saved place, on the model's device. RunError: no session of this model, or a damaged one."""
    from .session import Mark

    facts, tensors = _open(path)
    if facts.get("version") != VERSION:
        raise RunError(
            f"{path}: a session of format version {facts.get('version')} ({facts.get('written_by')}), this program "
            f"reads version {VERSION}; read the document again and save a new one"
        )
    if facts.pop("checksum", None) != _checksum(facts, tensors):
        raise RunError(f"{path}: damaged or changed, its checksum does not match; read the document again")
    if facts["model"] != fingerprint(model):
        raise RunError(
            f"{path}: a session of another model ({facts['model_family']}), or of another checkpoint or precision of "
            "this one; a state continues only with the weights that made it"
        )
    known = facts["tokenizer"]
    if tokenizer is not None and known is not None and known["fingerprint"] != tokenizer.fingerprint:
        raise RunError(f"{path}: read with the tokenizer {known['name']}, which is not this {tokenizer.name}")
    device = model.embed.weight.device
    with torch.no_grad():  # a state of one token has the same structure
        like = model.features(torch.zeros(1, 1, dtype=torch.int64, device=device), None, facts["bos_id"])[1]
    leaves: list[Any] = []
    for where, leaf in pytree.tree_flatten_with_path(like)[0]:
        name = f"state{pytree.keystr(where)}"
        if isinstance(leaf, Tensor) and name in tensors:
            tensor = tensors.pop(name).to(device)
            leaves.append(torch.view_as_complex(tensor) if leaf.is_complex() else tensor)
        elif isinstance(leaf, int) and name in facts["counters"]:
            leaves.append(facts["counters"][name])
        elif leaf is None:
            leaves.append(None)
        else:
            raise RunError(f"{path}: has no {name}: saved by another version of a component; read the document again")
    state = pytree.tree_unflatten(leaves, pytree.tree_structure(like))
    logits, seen = tensors["logits"].to(device), tensors["seen"].to(device)
    return facts["bos_id"], Mark(state, logits, seen, facts["length"], tuple(facts["tail"]))


def check_target(path: Path) -> None:
    """RunError unless a session can be written there: the folder exists, and what it replaces is a session."""
    if not path.absolute().parent.is_dir():
        raise RunError(f"{path}: the folder {path.absolute().parent} does not exist")
    if path.exists():
        try:
            _describe(path)
        except RunError:
            raise RunError(f"{path}: exists and is no session; it is not overwritten") from None


def fingerprint(model: LanguageModel) -> str:
    """Hexadecimal digest of the configuration and the weights, dtypes included, the same on every device."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(model.config), sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {_sums(weight)}".encode())
    return digest.hexdigest()


def _sums(weight: Tensor) -> list[int]:
    """Two 64-bit sums over the bits, the second weighted by position: exact, so the order of summation is free."""
    bits = weight.detach().contiguous().flatten().view(INTEGERS[weight.element_size()])
    plain = weighted = torch.zeros((), dtype=torch.int64, device=bits.device)
    for i, part in enumerate(bits.split(BLOCK)):
        wide = part.to(torch.int64)
        plain = plain + wide.sum()
        weighted = weighted + (wide * (torch.arange(len(wide), device=bits.device) * 2 + 2 * i * BLOCK + 1)).sum()
    return [int(plain), int(weighted)]


def _describe(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get(KEY, "null"))
    except FileNotFoundError:
        raise RunError(f"{path}: no such file; --save-session and Session.save write one") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(f"{path}: not a session, or one that was cut or damaged ({error})") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise RunError(f"{path}: a safetensors file, but no session of gecko_lab")
    return facts


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    facts = _describe(path)
    with safe_open(path, "pt") as file:  # clones: what it gives is the mapped file, not aligned for complex numbers
        return facts, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)


def _plain(tensor: Tensor) -> Tensor:
    """As the file holds it: on the CPU, real."""
    tensor = tensor.detach().cpu()
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # contiguous() keeps odd strides of a single element


def _checksum(facts: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
