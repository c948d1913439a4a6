"""Exceptions. A message says what was got, what was expected, for which parameter, and what to do."""


class MicroAdamError(Exception):
    """Base class of every error raised on purpose by this package."""


class ConfigError(MicroAdamError, ValueError):
    """A setting is unknown or outside its range."""


class UnsupportedLayoutError(MicroAdamError, NotImplementedError):
    """A parameter is sharded or stored in a way the optimizer cannot map to row-major intervals."""


class BackendUnavailableError(MicroAdamError, RuntimeError):
    """The backend that was asked for by name cannot run here."""


class CheckpointMismatchError(MicroAdamError, RuntimeError):
    """A checkpoint, or state put into the optimizer, does not fit it. The optimizer is left as it was."""
