"""Folders of this user: where caches are kept unless a setting names another place."""

import os
from pathlib import Path


def user_cache(name: str) -> Path:
    """The folder `name` of img2img in the user's cache directory. Raises RuntimeError if this user has no home."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    return base / "img2img" / name
