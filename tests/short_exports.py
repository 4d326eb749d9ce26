"""Exports cut short, for tests that look at something else than the images that are compared at an export's end."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from img2img_export.verify import images, latent_preview


@contextmanager
def cut_short(count: int = 1) -> Iterator[None]:
    """Within it, an export compares `count` images and fits no preview. Do not ask for a shared bundle inside."""
    all_cases = images.image_cases
    with patch.object(images, "image_cases", lambda *arguments: all_cases(*arguments)[:count]), without_preview():
        yield


@contextmanager
def without_preview() -> Iterator[None]:
    """Within it, an export fits no preview, which takes a fifth of the export of a tiny model."""
    with patch.object(latent_preview, "fit", lambda pipeline: ()):
        yield
