"""The sessions of the open tabs; a session ends with the last page of its tab."""

from collections.abc import Callable

from img2img_playground.session import Session

MOST_TABS = 64
"""Maximum open tabs; each may hold about 200 MiB of images."""


class TooManyTabs(Exception):
    """The maximum number of tabs is open."""


class Sessions:
    """Sessions by tab: a reloaded page finds the session of its tab again. `make` creates a session."""

    def __init__(self, make: Callable[[], Session]) -> None:
        self._make = make
        self._by_tab: dict[str, Session] = {}
        self._pages: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._by_tab)

    def enter(self, tab: str) -> Session:
        """The session for a new page of a tab. Raises TooManyTabs."""
        if tab not in self._by_tab:
            if len(self._by_tab) >= MOST_TABS:
                raise TooManyTabs(f"{MOST_TABS} tabs are open already")
            self._by_tab[tab] = self._make()
        self._pages[tab] = self._pages.get(tab, 0) + 1
        return self._by_tab[tab]

    async def leave(self, tab: str) -> None:
        """Records that a page of the tab has closed. Closes the session with the last one."""
        if tab not in self._pages:  # close() has already closed all sessions.
            return
        self._pages[tab] -= 1
        if not self._pages[tab]:
            del self._pages[tab]
            await self._by_tab.pop(tab).close()

    def find(self, key: str) -> Session | None:
        """The session with this key, which only its own page knows, or None."""
        return next((session for session in self._by_tab.values() if session.key == key), None)

    async def close(self) -> None:
        """Closes all sessions."""
        sessions = list(self._by_tab.values())
        self._by_tab.clear()
        self._pages.clear()
        for session in sessions:
            await session.close()
