"""gecko_lab: a modular lab for Gecko, language models that read sequences of any length."""

from pathlib import Path as _Path

__version__ = "0.1.0"

for _link in ("components", "kernels", "conf"):
    if not (_Path(__file__).parent / _link).is_dir():
        raise ImportError(
            f"gecko_lab/{_link} is not a folder: this copy was made without symbolic links (a .zip download, or git on "
            "Windows with core.symlinks=false). Clone again with `git clone -c core.symlinks=true`, or install the wheel."
        )
