"""One server, one playground and one browser for all tests of a module; a browser's context, and so a tab, for each test."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from playing import Stand, Visitor, browsing, playground
from playwright.async_api import Browser


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with Stand() as stand:
        yield stand


@pytest.fixture(scope="module")
def address(stand: Stand, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with playground(stand.target, Path(tmp_path_factory.mktemp("playground"))) as address:
        yield address


@pytest_asyncio.fixture(loop_scope="module")
async def visit(browser: Browser, stand: Stand, address: str) -> AsyncIterator[Callable[..., Awaitable[Visitor]]]:
    """Opens the page, as often as one likes. The server is up, its gate open."""
    visitors: list[Visitor] = []

    async def open_page(width: int = 1280, dark: bool = False) -> Visitor:
        visitors.append(await Visitor.open(browser, address, width=width, dark=dark))
        return visitors[-1]

    yield open_page
    stand.gate.open()
    for visitor in visitors:
        await visitor.leave()


@pytest_asyncio.fixture(loop_scope="module")
async def visitor(visit: Callable[[], Awaitable[Visitor]]) -> Visitor:
    return await visit()
