"""Mistakes that a user can make, as one family: commands print them without a traceback and exit with code 2."""


class LabError(ValueError):
    """Something the user gave cannot work; the message says what was wrong, what is allowed and what to do."""


class ConfigError(LabError):
    """An override, preset, component or value that the configuration refuses."""


class RunError(LabError):
    """A run folder, checkpoint or device that cannot be used as asked."""
