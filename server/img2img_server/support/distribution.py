"""The distribution that these packages belong to: its name on a package index, its version, and how to install extras of it.

The command is `img2img` and so is the import name of the contract; `img2img` on PyPI is another project.
"""

NAME = "img2img-server"


def version() -> str:
    """The version of what is installed. Raises PackageNotFoundError if the packages are only on the path, not installed."""
    from importlib import metadata  # here: it brings email, csv, zipfile and others, which no other part of a command needs

    return metadata.version(NAME)


def install_hint(*extras: str) -> str:
    """The command that adds these extras of pyproject.toml, for the end of an error message."""
    return f"pip install '{NAME}[{','.join(extras)}]'"
