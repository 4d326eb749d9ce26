"""Fetching URLs reaches only the public internet, whatever the host name, spelling, redirect or resolver."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trustme
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from img2img_server.errors import InvalidField
from img2img_server.sources import fetching
from img2img_server.sources.fetching import Fetcher, is_public
from img2img_server.support.call import Call, answering
from messages import png

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Names(AbstractResolver):
    """A resolver that returns a name's next addresses for each look-up, and then always the last ones."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self._answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self._answers:
            raise OSError("no such name")
        answers = self._answers[host]
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0, flags=0,
            )
            for address in addresses
        ]  # fmt: skip

    async def close(self) -> None:
        pass


class Site:
    """A web server on 127.0.0.1 and 127.0.0.2, which is one of the internet and one of the inside for these tests."""

    def __init__(self) -> None:
        self.port = 0
        self.seen: list[tuple[str, web.Request]] = []
        self.answers: dict[str, Handler] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        self.seen.append((request.transport.get_extra_info("sockname")[0], request))
        return await self.answers[request.path](request)


@asynccontextmanager
async def serving(tls: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    site = Site()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", site.handle)
    runner = web.AppRunner(application)
    await runner.setup()
    first = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await first.start()
    site.port = runner.addresses[0][1]
    await web.TCPSite(runner, "127.0.0.2", site.port, ssl_context=tls).start()
    try:
        yield site
    finally:
        await runner.cleanup()


@asynccontextmanager
async def fetcher(
    site: Site, names: AbstractResolver | None = None, seconds: float = 30.0, **settings: Any
) -> AsyncIterator[Fetcher]:
    """One for which 127.0.0.1 is the internet."""
    allowed: dict[str, Any] = {"allowed": lambda address: address == "127.0.0.1", "ports": (site.port,)}
    made = Fetcher(seconds, 100_000, resolver=names, **{**allowed, **settings})
    try:
        yield made
    finally:
        await made.close()


def answer(**settings: Any) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(**settings)

    return handle


def redirect(location: str, status: int = 302) -> Handler:
    return answer(status=status, headers={"Location": location})


async def refusal(fetched: Awaitable[bytes]) -> str:
    with pytest.raises(InvalidField) as caught:
        await fetched
    assert caught.value.field == "image.uri"
    return caught.value.description


UNREACHABLE = "the image cannot be fetched from this address"


async def test_fetching_an_image_reveals_nothing_about_the_server() -> None:
    async with serving() as site, fetcher(site, Names(images=[["127.0.0.1"]])) as web_:
        site.answers["/a.png"] = answer(body=png(), headers={"Set-Cookie": "a=b"}, content_type="text/html")
        for _ in range(2):
            assert await web_.fetch(f"http://images:{site.port}/a.png") == png()
        for _, request in site.seen:
            assert request.method == "GET"
            assert set(request.headers) == {"Host", "User-Agent", "Accept", "Accept-Encoding", "Connection"}
            assert request.headers["Accept-Encoding"] == "identity"


async def test_proxy_variables_and_netrc_are_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    async with serving() as site, fetcher(site) as web_:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.2:{site.port}")
        site.answers["/a.png"] = answer(body=png())
        assert await web_.fetch(f"http://127.0.0.1:{site.port}/a.png") == png()
        assert [(where, "Authorization" in request.headers) for where, request in site.seen] == [("127.0.0.1", False)]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_followed_and_checked_again(status: int) -> None:
    async with serving() as site, fetcher(site, Names(inside=[["127.0.0.2"]], outside=[["127.0.0.1"]])) as web_:
        site.answers["/a.png"] = answer(body=png())
        site.answers["/good"] = redirect("/a.png", status)
        site.answers["/bad"] = redirect(f"http://inside:{site.port}/a.png", status)
        site.answers["/literal"] = redirect(f"http://127.0.0.2:{site.port}/a.png", status)
        site.answers["/mapped"] = redirect(f"http://[::ffff:127.0.0.2]:{site.port}/a.png", status)
        assert await web_.fetch(f"http://outside:{site.port}/good") == png()
        for path in ("bad", "literal", "mapped"):
            assert await refusal(web_.fetch(f"http://outside:{site.port}/{path}")) == UNREACHABLE
        assert {where for where, _ in site.seen} == {"127.0.0.1"}, "nothing inside heard of it"


async def test_redirects_to_forbidden_addresses_are_refused() -> None:
    async with serving() as site, fetcher(site) as web_:
        never = {
            "file:///etc/passwd": "only http and https",
            "ftp://127.0.0.1/a": "only http and https",
            f"http://user@127.0.0.1:{site.port}/": "user or password",
            "http://127.0.0.1:22/": "port 22",
            "http://[": "malformed",
            "": "more than 3 times",
        }
        for location, said in never.items():
            site.answers["/"] = redirect(location)
            assert said in await refusal(web_.fetch(f"http://127.0.0.1:{site.port}/"))
        assert len(site.seen) == 5 + 4, "nothing but the first of each was asked, and the one that leads to itself"


async def test_at_most_three_redirects_are_followed() -> None:
    async with serving() as site, fetcher(site) as web_:
        for count in range(1, 6):
            site.answers[f"/{count}"] = redirect(f"/{count - 1}")
        site.answers["/0"] = answer(body=png())
        assert await web_.fetch(f"http://127.0.0.1:{site.port}/3") == png()
        assert "more than 3" in await refusal(web_.fetch(f"http://127.0.0.1:{site.port}/4"))


async def test_dns_rebinding_does_not_reach_forbidden_addresses() -> None:
    """The check is on the address of the connection, not on an earlier DNS answer."""
    names = Names(rebound=[["127.0.0.1"], ["127.0.0.2"]])
    async with serving() as site, fetcher(site, names) as web_:
        site.answers["/a.png"] = answer(body=png())
        site.answers["/again"] = redirect(f"http://rebound:{site.port}/a.png")
        assert await refusal(web_.fetch(f"http://rebound:{site.port}/again")) == UNREACHABLE
        assert await refusal(web_.fetch(f"http://rebound:{site.port}/a.png")) == UNREACHABLE
        assert {where for where, _ in site.seen} == {"127.0.0.1"}
        assert names.asked == ["rebound"] * 3, "once for each connection: no other answer is there to be checked"


async def test_fetching_connects_only_to_allowed_addresses() -> None:
    async with serving() as site, fetcher(site, Names(both=[["127.0.0.2", "127.0.0.1"]], none=[["127.0.0.2", "::1"]])) as web_:
        site.answers["/a.png"] = answer(body=png())
        assert await web_.fetch(f"http://both:{site.port}/a.png") == png()
        assert await refusal(web_.fetch(f"http://none:{site.port}/a.png")) == UNREACHABLE
        assert {where for where, _ in site.seen} == {"127.0.0.1"}


SPELLINGS = [
    "127.0.0.1", "127.1", "0x7f.1", "0x7f000001", "2130706433", "0177.0.0.1", "017700000001", "0", "0.0.0.0", "localhost",
    "LOCALHOST", "localhost.", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]",
    "169.254.169.254", "[fd00:ec2::254]", "[64:ff9b::127.0.0.1]",
    "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "\u24dbocalhost",
]  # fmt: skip


@pytest.mark.parametrize("host", SPELLINGS)
async def test_every_spelling_of_a_forbidden_address_is_refused(host: str) -> None:
    """With the real policy and the system's own resolver."""
    async with serving() as site, fetcher(site, allowed=is_public) as web_:
        site.answers["/"] = answer(body=png())
        assert await refusal(web_.fetch(f"http://{host}:{site.port}/")) in (UNREACHABLE, "the address is malformed")
        assert site.seen == []


ADDRESSES = {
    "http://user:secret@example.com/a.png": "user or password",
    "http://user@example.com/a.png": "user or password",
    "http://:secret@example.com/a.png": "user or password",
    "http://[fe80::1%25eth0]/a.png": "zone",
    "http://example.com:22/a.png": "port 22",
    "http://example.com:0/a.png": "port 0",
    "https://example.com:8443/a.png": "port 8443",
    "http://example.com:99999/a.png": "malformed",
    "http://[::1/a.png": "malformed",
    "http://exa\\mple.com/": "malformed",
    "http:///a.png": "with a host",
    "http://": "with a host",
    "https:a.png": "with a host",
    "ftp://example.com/": "only http and https",
    f"http://example.com/{'a' * 5000}": "characters",
}


@pytest.mark.parametrize("address", ADDRESSES)
async def test_malformed_or_unsupported_urls_are_refused_without_a_request(address: str) -> None:
    with pytest.raises(InvalidField, match=ADDRESSES[address]):
        Fetcher(1.0, 1).check(address)


async def test_ordinary_urls_pass_the_first_check() -> None:
    for address in ("http://example.com", "https://example.com:443/a.png?x=1#y", "HTTP://EXAMPLE.COM:80/ä.png"):
        Fetcher(1.0, 1).check(address)


async def test_forbidden_and_missing_assets_give_the_same_error() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        async with serving() as site, fetcher(site, Names(), ports=(site.port, port)) as web_:
            said = {
                await refusal(web_.fetch(f"http://127.0.0.2:{site.port}/")),
                await refusal(web_.fetch(f"http://127.0.0.2:{port}/")),
                await refusal(web_.fetch(f"http://127.0.0.1:{port}/")),
                await refusal(web_.fetch(f"http://no-such-name:{site.port}/")),
                await refusal(web_.fetch(f"http://{'a' * 70}.example:{site.port}/")),
            }
    assert said == {UNREACHABLE}


async def test_invalid_host_names_are_unreachable() -> None:
    async with serving() as site, fetcher(site) as web_:
        for host in ("a" * 70, "a..b"):
            assert await refusal(web_.fetch(f"http://{host}:{site.port}/")) in (UNREACHABLE, "the address is malformed")


async def test_download_stops_at_the_maximum_source_size() -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(50_000))
            sent += 50_000

    async with serving() as site, fetcher(site) as web_:
        site.answers["/announced"] = answer(body=bytes(100_001))
        site.answers["/endless"] = endless
        site.answers["/most"] = answer(body=bytes(100_000))
        assert len(await web_.fetch(f"http://127.0.0.1:{site.port}/most")) == 100_000
        for path in ("announced", "endless"):
            assert "more than 100000 bytes" in await refusal(web_.fetch(f"http://127.0.0.1:{site.port}/{path}"))
    assert sent < 50_000_000


async def test_compressed_and_unsuccessful_responses_are_refused() -> None:
    async with serving() as site, fetcher(site) as web_:
        site.answers["/gzip"] = answer(body=b"x", headers={"Content-Encoding": "gzip"})
        site.answers["/404"] = answer(status=404)
        site.answers["/206"] = answer(status=206, body=png()[:50])
        site.answers["/304"] = answer(status=304)
        assert "compressed" in await refusal(web_.fetch(f"http://127.0.0.1:{site.port}/gzip"))
        for status in ("404", "206", "304"):
            assert f"status {status}" in await refusal(web_.fetch(f"http://127.0.0.1:{site.port}/{status}"))


async def test_other_protocols_are_unreachable() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    site = Site()
    site.port = server.sockets[0].getsockname()[1]
    async with server, fetcher(site) as web_:
        assert await refusal(web_.fetch(f"http://127.0.0.1:{site.port}/")) == UNREACHABLE


async def test_timeout_and_cancellation_end_a_download() -> None:
    begun, left = asyncio.Event(), asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        begun.set()
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b".")
                await asyncio.sleep(0.01)
        finally:
            left.set()

    async with serving() as site, fetcher(site) as web_:
        site.answers["/"] = hang
        fetching_ = asyncio.create_task(web_.fetch(f"http://127.0.0.1:{site.port}/"))
        await asyncio.wait_for(begun.wait(), 120)
        fetching_.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching_
        await asyncio.wait_for(left.wait(), 120)
        async with fetcher(site, seconds=0.2) as quick:
            assert "longer than 0.2 seconds" in await refusal(quick.fetch(f"http://127.0.0.1:{site.port}/"))


async def test_concurrent_downloads_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    here, most, go = 0, 0, asyncio.Event()
    full = asyncio.Event()

    async def count(request: web.Request) -> web.StreamResponse:
        nonlocal here, most
        here += 1
        most = max(most, here)
        if here == 2:
            full.set()
        await go.wait()
        here -= 1
        return web.Response(body=b"x")

    monkeypatch.setattr(fetching, "_AT_ONCE", 3)
    async with serving() as site, fetcher(site) as web_:
        site.answers["/"] = count
        fetches = [asyncio.create_task(web_.fetch(f"http://127.0.0.1:{site.port}/")) for _ in range(8)]
        await asyncio.wait_for(full.wait(), 120)
        go.set()
        assert await asyncio.gather(*fetches) == [b"x"] * 8
    assert most == 2, "one is left for other clients"


async def test_https_checks_the_certificate_and_does_not_fall_back_to_http() -> None:
    authority = trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("images").configure_cert(server_side)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    names = Names(images=[["127.0.0.1"]], other=[["127.0.0.1"]])
    async with serving(server_side) as secure, serving() as plain:
        ports = (secure.port, plain.port)
        plain.answers["/a.png"] = answer(body=png())
        plain.answers["/up"] = redirect(f"https://images:{secure.port}/a.png")
        secure.answers["/a.png"] = answer(body=png())
        secure.answers["/down"] = redirect(f"http://images:{plain.port}/a.png")
        async with fetcher(secure, names, ports=ports, tls=trusting) as web_:
            assert await web_.fetch(f"https://images:{secure.port}/a.png") == png()
            assert await web_.fetch(f"http://images:{plain.port}/up") == png()
            assert "from https to http" in await refusal(web_.fetch(f"https://images:{secure.port}/down"))
            assert await refusal(web_.fetch(f"https://other:{secure.port}/a.png")) == UNREACHABLE
        async with fetcher(secure, names, ports=ports) as untrusting:
            assert await refusal(untrusting.fetch(f"https://images:{secure.port}/a.png")) == UNREACHABLE


async def test_slow_sites_of_one_client_do_not_delay_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has all of its downloads hanging leaves one for others, and the other's do not wait for its."""
    go, hanging, asked = asyncio.Event(), asyncio.Event(), list[str]()

    async def hang(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        if len(asked) == 2:
            hanging.set()
        await go.wait()
        return web.Response(body=b"slow")

    monkeypatch.setattr(fetching, "_AT_ONCE", 3)
    async with serving() as site, fetcher(site) as web_:
        site.answers["/slow"], site.answers["/quick"] = hang, answer(body=b"quick")
        with answering(Call("", "", client="greedy")):
            slow = [asyncio.create_task(web_.fetch(f"http://127.0.0.1:{site.port}/slow")) for _ in range(8)]
        await asyncio.wait_for(hanging.wait(), 120)
        with answering(Call("", "", client="other")):
            assert await web_.fetch(f"http://127.0.0.1:{site.port}/quick") == b"quick"
        assert len(asked) == 2, "its others wait"
        go.set()
        assert await asyncio.gather(*slow) == [b"slow"] * 8
