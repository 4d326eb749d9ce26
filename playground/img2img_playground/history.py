"""The finished transforms of a tab, newest first, with bounded memory."""

import io
import itertools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

from img2img_client.values import TransformWarning

from img2img_playground.extras import NO_EXTRAS, Extras
from img2img_playground.images import ImageFile
from img2img_playground.settings import Settings

MAX_ENTRIES = 30
MAX_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished transform. `settings` include the seed used, so they reproduce the result."""

    source: ImageFile
    settings: Settings
    result: ImageFile
    model_id: str
    engine: str
    seconds: float
    warnings: tuple[TransformWarning, ...] = ()
    extras: Extras = NO_EXTRAS

    @property
    def id(self) -> str:
        """The id of its result."""
        return self.result.id

    @property
    def images(self) -> tuple[ImageFile, ...]:
        """All its images."""
        return (self.source, self.result, *self.extras.images)


class History:
    """The results of a session: at most `entries` entries and `most_bytes` bytes of images. The oldest are evicted first; the
    newest is always kept.

    An image that several entries share, such as a common source, counts once.
    """

    def __init__(self, entries: int = MAX_ENTRIES, most_bytes: int = MAX_BYTES) -> None:
        self._most_entries, self._most_bytes = entries, most_bytes
        self._entries: list[Entry] = []

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size(self) -> int:
        """Total bytes of the images."""
        return sum(len(image.data) for image in self._images().values())

    def add(self, entry: Entry) -> None:
        """Adds the newest entry, and evicts old ones."""
        self._entries.insert(0, entry)
        while len(self._entries) > 1 and (len(self._entries) > self._most_entries or self.size > self._most_bytes):
            self._entries.pop()

    def find(self, entry_id: str) -> Entry | None:
        """The entry with this id, or None."""
        return next((entry for entry in self._entries if entry.id == entry_id), None)

    def image(self, image_id: str) -> ImageFile | None:
        """The source or result with this id, or None."""
        return self._images().get(image_id)

    def archive(self) -> bytes:
        """A ZIP file of all results, oldest first, under distinct names."""
        file, names = io.BytesIO(), set[str]()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for entry in reversed(self._entries):
                stem, suffix = entry.result.stem, entry.result.name.removeprefix(entry.result.stem)
                numbered = (f"{stem}{f'-{number}' if number > 1 else ''}{suffix}" for number in itertools.count(1))
                name = next(name for name in numbered if name not in names)
                names.add(name)
                archive.writestr(name, entry.result.data)
        return file.getvalue()

    def clear(self) -> None:
        """Removes all entries."""
        self._entries.clear()

    def _images(self) -> dict[str, ImageFile]:
        return {image.id: image for entry in self._entries for image in entry.images}
