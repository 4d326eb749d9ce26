"""The exporter's one error, and how it quotes the errors of others."""

FAILURES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError, ImportError)
"""What torch, its exporter, diffusers and transformers raise for a model that they cannot run. A full disk is no such thing."""


class ExportError(Exception):
    """The model was not exported. The message says why, in one line, to the person who asked for it."""


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def may_fall_back(error: Exception) -> bool:
    """Whether another backend may do better: not if the machine refused something, as a full or read-only disk does. The
    libraries' own OSErrors, for a model that they do not take, have no errno."""
    return not (isinstance(error, OSError) and error.errno is not None)
