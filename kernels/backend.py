"""Which implementation of an operation runs: its CUDA kernel or the reference in plain PyTorch.

``kernels/OP/cuda.py`` holds functions of the same names and signatures as ``reference.py``, and
``unsupported(<the same arguments>) -> str | None``, the reason why it cannot serve a call; a folder with several
functions may answer for one of them in ``unsupported_NAME``.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)
T = TypeVar("T")

MODES = ("auto", "reference", "strict")
ENVIRONMENT = "GECKO_LAB_KERNELS"


def _valid(mode: str, name: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{name} is {mode!r}; it must be one of {', '.join(MODES)}")
    return mode


_mode = _valid(os.environ.get(ENVIRONMENT, "auto"), ENVIRONMENT)
_modules: dict[str, ModuleType | str] = {}  # op -> its cuda.py, or why there is none
_noted: set[tuple[str, str]] = set()


def get_mode() -> str:
    """auto: the kernel where it can serve, else the reference; reference: always; strict: the kernel or an error."""
    return _mode


def set_mode(mode: str) -> None:
    """Set the mode for the whole process. Raises ValueError for a name that is not in MODES."""
    global _mode
    _mode = _valid(mode, "kernel mode")


@contextmanager
def use(mode: str) -> Iterator[None]:
    """The mode inside a with-block; the one before it returns afterwards."""
    before = _mode
    set_mode(mode)
    try:
        yield
    finally:
        set_mode(before)


@torch._dynamo.assume_constant_result
def load(op: str) -> ModuleType | str:
    """``kernels/op/cuda.py``, or the reason why there is none."""
    if op not in _modules:
        try:
            _modules[op] = importlib.import_module(f"{__package__}.{op}.cuda")
        except ImportError as error:
            missing = f"{__package__}.{op}.cuda"
            _modules[op] = "no kernel is written for it" if error.name == missing else f"cannot import: {error}"
    return _modules[op]


@torch._dynamo.assume_constant_result
def note(op: str, reason: str) -> None:
    """Say once that the reference serves a call on a GPU; under strict raise RuntimeError."""
    if _mode == "strict":
        raise RuntimeError(f"{op} has no CUDA kernel for this call: {reason} (kernels=strict)")
    if (op, reason) not in _noted:
        _noted.add((op, reason))
        log.warning("%s runs its reference, not its CUDA kernel: %s", op, reason)


def dispatch(op: str, reference: Callable[..., T], x: Tensor, *args: object, **kwargs: object) -> T:
    """Call ``reference`` or the function of its name in ``kernels/op/cuda.py`` with (x, *args, **kwargs).

    x decides by its device. References choose their own precision, so autocast is off inside them. Raises
    RuntimeError under strict when no kernel serves a CUDA tensor.
    """
    if x.is_cuda and _mode != "reference":
        name = reference.__name__
        module = _modules.get(op) or load(op)
        if isinstance(module, str):
            reason: str | None = module
        else:
            asks = getattr(module, f"unsupported_{name}", None) or module.unsupported
            reason = asks(x, *args, **kwargs)
            if reason is None:
                return getattr(module, name)(x, *args, **kwargs)
        note(name, reason or "")
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # the meta device has no autocast
        with torch.autocast(x.device.type, enabled=False):
            return reference(x, *args, **kwargs)
    return reference(x, *args, **kwargs)
