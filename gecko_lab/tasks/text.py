"""The text that a task's ``data`` and ``split`` name, and what to say when it is not there."""

from __future__ import annotations

from ..data.errors import DataError
from ..evaluation import Text, find_text
from .subject import Subject

FORMATS = (
    "data= takes UTF-8 text or .jsonl rows with a field 'text' (a file, folder or glob, also .xz, .gz or .zst), "
    "the folder of a token store, or stdlib"
)


def text_of(subject: Subject, data: str | None, split: str | None) -> Text:
    """The documents; LabError that names the file, what is wrong with it, and the formats that can be read."""
    try:
        return find_text(subject.artifact, data, split, subject.tokenizer)
    except DataError as error:
        raise DataError(f"{error} [{FORMATS}]") from None
