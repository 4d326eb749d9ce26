"""The exporter's error class, and helpers for errors of libraries."""

FAILURES = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, AssertionError, ImportError)
"""Errors of torch, its exporter, diffusers and transformers for a model that they cannot run (not OSError: a full disk)."""


class ExportError(Exception):
    """The export failed. The message is one line for the user."""


def first_line(error: Exception) -> str:
    """The first non-empty line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def may_fall_back(error: Exception) -> bool:
    """Whether to try another backend: not after a system error such as a full disk. OSErrors of libraries for a model they cannot
    load have no errno."""
    return not (isinstance(error, OSError) and error.errno is not None)
