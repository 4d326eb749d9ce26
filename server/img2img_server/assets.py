"""Assets: pictures that are kept for clients, by content, in any filesystem that fsspec opens."""

from img2img_server.config import AssetSettings


class AssetStore:
    """Keeps files by the SHA-256 of their content, apart for each owner."""

    def __init__(self, settings: AssetSettings) -> None:
        self._settings = settings

    async def open(self) -> None:
        """Finds out what is there, and begins to delete what is too old. Raises OSError where the place cannot be used."""

    async def close(self) -> None:
        """Stops."""
