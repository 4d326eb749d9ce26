"""The default folders of caches."""

from pathlib import Path

from platformdirs.unix import Unix


def user_cache(name: str) -> Path:
    """The folder `name` of img2img in the user's cache directory (~/.cache, also on macOS). Raises RuntimeError without a
    home."""
    return Unix("img2img").user_cache_path / name
