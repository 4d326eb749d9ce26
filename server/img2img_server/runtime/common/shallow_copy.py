"""Views of a diffusers pipeline: the same object, but for parts that one request has of its own."""

import copy
from typing import Any


def view_of(pipe: Any, **parts: Any) -> Any:
    """A shallow copy of `pipe` with other `parts`, set past diffusers' __setattr__, which would note their classes in a
    configuration that nobody reads."""
    view = copy.copy(pipe)
    view.__dict__.update(parts)
    return view
