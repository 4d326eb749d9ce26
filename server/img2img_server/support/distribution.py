"""The installed distribution: its name on a package index, its version, how to install its extras, and its cache folder.

The command and the contract's import name are `img2img`; the project `img2img` on PyPI is another one.
"""

import functools
from pathlib import Path

NAME = "img2img-server"


@functools.cache
def version() -> str:
    """The installed version, read from the disk once. Raises PackageNotFoundError if the packages are on the path but not
    installed."""
    from importlib import metadata  # here: it imports email, csv, zipfile and others, which nothing else needs

    return metadata.version(NAME)


def install_hint(*extras: str) -> str:
    """The command that installs these extras of pyproject.toml, for error messages."""
    return f"pip install '{NAME}[{','.join(extras)}]'"


def user_cache(name: str) -> Path:
    """The folder `name` of img2img in the user's cache directory (~/.cache, also on macOS). Raises RuntimeError without a
    home."""
    from platformdirs.unix import Unix  # here: most commands do not need it

    return Unix("img2img").user_cache_path / name
