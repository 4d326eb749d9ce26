"""Folders of this user: where caches are kept unless a setting names another place."""

from pathlib import Path

from platformdirs.unix import Unix


def user_cache(name: str) -> Path:
    """`name` of img2img in the user's cache directory (on macOS, too, ~/.cache). Raises RuntimeError if this user has no home."""
    return Unix("img2img").user_cache_path / name
