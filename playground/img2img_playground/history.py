"""What was made in a tab: newest first, and never more than the bounds."""

from collections.abc import Iterator
from dataclasses import dataclass

from img2img_client.values import TransformWarning

from img2img_playground.pictures import Picture
from img2img_playground.settings import Settings

MAX_ENTRIES = 30
MAX_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """One transform that is done. `settings` have the seed that was drawn, so they make the result again."""

    source: Picture
    settings: Settings
    result: Picture
    model_id: str
    engine: str
    seconds: float
    warnings: tuple[TransformWarning, ...] = ()

    @property
    def id(self) -> str:
        """Its result's."""
        return self.result.id


class History:
    """Keeps entries, at most `entries` of them with `most_bytes` of images in all; the oldest go first, the newest stays.

    An image that several entries share, as the same source, is kept and counted once.
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
        """Bytes that the images take."""
        return sum(len(picture.data) for picture in self._pictures().values())

    def add(self, entry: Entry) -> None:
        """Puts it first."""
        self._entries.insert(0, entry)
        while len(self._entries) > 1 and (len(self._entries) > self._most_entries or self.size > self._most_bytes):
            self._entries.pop()

    def find(self, entry_id: str) -> Entry | None:
        """The entry of that id, None where it has gone."""
        return next((entry for entry in self._entries if entry.id == entry_id), None)

    def picture(self, picture_id: str) -> Picture | None:
        """A source or result of that id."""
        return self._pictures().get(picture_id)

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()

    def _pictures(self) -> dict[str, Picture]:
        return {picture.id: picture for entry in self._entries for picture in (entry.source, entry.result)}
