"""gecko_lab: a modular lab for Gecko, language models that read sequences of any length."""

from pathlib import Path as _Path

__version__ = "0.1.0"

for _link in ("components", "kernels", "conf", "sweeps"):
    if not (_Path(__file__).parent / _link).is_dir():
        raise ImportError(
            f"gecko_lab/{_link} is not a folder: this copy was made without symbolic links (a .zip download, or git on "
            "Windows with core.symlinks=false). Clone again with git clone -c core.symlinks=true, or install the wheel."
        )

_LAZY = {
    "LanguageModel": "model",
    "ModelConfig": "model",
    "ModelState": "model",
    "Sampling": "generation",
    "Session": "generation",
    "build_config": "build",
    "build_model": "build",
    "load": "artifacts",
    "load_tokenizer": "artifacts",
}


def __getattr__(name: str) -> object:
    """Public names, imported on first use so that ``import gecko_lab.kernels`` needs torch only."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module 'gecko_lab' has no attribute {name!r}")


__all__ = [
    "LanguageModel",
    "ModelConfig",
    "ModelState",
    "Sampling",
    "Session",
    "__version__",
    "build_config",
    "build_model",
    "load",
    "load_tokenizer",
]
