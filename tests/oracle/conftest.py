"""Fixtures over the files that prepare.py has made, with the names used in the other tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from oracle.prepare import FOLDER


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Path]:
    """Gives the directory of a tiny model, which the old versions saved."""
    return lambda name: FOLDER / "models" / name


@pytest.fixture(scope="session")
def bundle() -> Callable[[str], Path]:
    """Gives the bundle of a tiny model, which the versions of requirements.lock exported."""
    return lambda name: FOLDER / "bundles" / name
