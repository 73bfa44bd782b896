"""The one exception for text, tokens and stores that cannot be used as asked."""

from gecko_lab.errors import LabError


class DataError(LabError):
    """What is wrong with the data and what to do, in one message that a command prints without a traceback."""
