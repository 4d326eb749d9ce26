"""The tabs that are open, each with its session; a session ends with the last page of its tab."""

from collections.abc import Callable

from img2img_playground.session import Session

MOST_TABS = 64
"""At once: each may hold some 200 MiB of images at worst."""


class TooManyTabs(Exception):
    """No room for one more tab."""


class Sessions:
    """Sessions by their tab. A page that is loaded anew in its tab finds the session of the page before it.

    `make` makes a new one.
    """

    def __init__(self, make: Callable[[], Session]) -> None:
        self._make = make
        self._by_tab: dict[str, Session] = {}
        self._pages: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._by_tab)

    def enter(self, tab: str) -> Session:
        """The session of a tab, for one more page of it. Raises TooManyTabs."""
        if tab not in self._by_tab:
            if len(self._by_tab) >= MOST_TABS:
                raise TooManyTabs(f"{MOST_TABS} tabs are open already")
            self._by_tab[tab] = self._make()
        self._pages[tab] = self._pages.get(tab, 0) + 1
        return self._by_tab[tab]

    async def leave(self, tab: str) -> None:
        """A page of the tab has gone. With the last one, the session is closed."""
        if tab not in self._pages:  # All of them were closed meanwhile.
            return
        self._pages[tab] -= 1
        if not self._pages[tab]:
            del self._pages[tab]
            await self._by_tab.pop(tab).close()

    def find(self, key: str) -> Session | None:
        """The session that has this key; only its own page knows it."""
        return next((session for session in self._by_tab.values() if session.key == key), None)

    async def close(self) -> None:
        """Closes all of them."""
        sessions = list(self._by_tab.values())
        self._by_tab.clear()
        self._pages.clear()
        for session in sessions:
            await session.close()
