"""The sessions of tabs. A session outlives its tab for a while, so that a reloaded or restored tab finds it again."""

import asyncio
from collections.abc import Callable

from img2img_playground.session import Session

MOST_TABS = 64
"""Maximum tabs, open or left; each may hold about 200 MiB of images."""
SECONDS_TO_RETURN = 1800.0
"""Time for a tab to come back, for example one that a phone closed in the background."""


class TooManyTabs(Exception):
    """The maximum number of tabs is open."""


class Sessions:
    """Sessions by tab: a reloaded page finds the session of its tab again. `make` creates a session.

    A session without a page is closed after `seconds_to_return`, or if its place is needed for another tab. Its run is cancelled
    at once.
    """

    def __init__(self, make: Callable[[], Session], most: int = MOST_TABS, seconds_to_return: float = SECONDS_TO_RETURN) -> None:
        self._make, self._most, self._seconds_to_return = make, most, seconds_to_return
        self._by_tab: dict[str, Session] = {}
        self._pages: dict[str, int] = {}
        self._left: dict[str, asyncio.TimerHandle] = {}  # The one that was left first comes first.
        self._closing: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._by_tab)

    def enter(self, tab: str) -> Session:
        """The session for a new page of a tab. Raises TooManyTabs."""
        left = self._left.pop(tab, None)
        if left is not None:
            left.cancel()
        if tab not in self._by_tab:
            if len(self._by_tab) >= self._most:
                if not self._left:
                    raise TooManyTabs(f"{self._most} tabs are open already")
                self._end(next(iter(self._left)))
            self._by_tab[tab] = self._make()
        self._pages[tab] = self._pages.get(tab, 0) + 1
        return self._by_tab[tab]

    def leave(self, tab: str) -> None:
        """Records that a page of the tab has closed. With the last one, cancels the run."""
        if tab not in self._pages:  # close() has already closed all sessions.
            return
        self._pages[tab] -= 1
        if not self._pages[tab]:
            del self._pages[tab]
            self._by_tab[tab].cancel()
            loop = asyncio.get_running_loop()
            self._left[tab] = loop.call_later(self._seconds_to_return, self._end, tab)

    def find(self, key: str) -> Session | None:
        """The session with this key, which only its own page knows, or None."""
        return next((session for session in self._by_tab.values() if session.key == key), None)

    async def close(self) -> None:
        """Closes all sessions."""
        self._pages.clear()
        for tab in tuple(self._by_tab):
            self._end(tab)
        await asyncio.gather(*self._closing)

    def _end(self, tab: str) -> None:
        left = self._left.pop(tab, None)
        if left is not None:
            left.cancel()
        task = asyncio.create_task(self._by_tab.pop(tab).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
