"""Access to the playground: only this machine's host names and known keys, tested without a browser."""

from pathlib import Path
from typing import Any

import pytest
from playing import Stand, ask, playground


def test_pages_of_other_origins_are_refused(address: str) -> None:
    status, headers = ask(address, "GET", "/")
    assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    # A foreign name that resolves to this machine
    for path in ("/", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
        assert ask(address, "GET", path, Host="rebound.example:7860")[0] == 400
    for method, path in (("PUT", "/tabs/guessed/source"), ("GET", "/tabs/guessed/images/guessed")):
        assert ask(address, method, path)[0] == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("PUT", "/tabs/guessed/source"), ("GET", "/_nicegui_ws/socket.io/?EIO=4&transport=polling")],
)
def test_request_from_another_origin_is_refused(address: str, method: str, path: str) -> None:
    host = address.removeprefix("http://")
    for origin in (
        "https://evil.example",
        "http://localhost:1",
        f"http://evil.example/{host}",
        f"http://{host}.evil.example",
        "null",
    ):
        assert ask(address, method, path, Origin=origin)[0] == 403
    assert ask(address, "GET", "/", Origin=address)[0] == 200


def test_a_page_of_another_origin_opens_no_websocket(address: str) -> None:
    path = "/_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    upgrade: dict[str, Any] = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
    }
    assert ask(address, "GET", path, Origin="https://evil.example", **upgrade)[0] == 403
    assert ask(address, "GET", path, Origin=address, **upgrade)[0] == 101


def test_listening_beyond_loopback_prints_a_warning(stand: Stand, tmp_path: Path) -> None:
    warning = "img2img playground: warning: everyone who can reach 0.0.0.0 can use this page, and through it the server\n"
    with playground(stand.target, tmp_path, "--host", "0.0.0.0", warning=warning) as address:
        assert ask(address, "GET", "/", Host="my-machine.example:7860")[0] == 200


def test_other_local_addresses_are_shown_unchanged(stand: Stand, tmp_path: Path) -> None:
    with playground(stand.target, tmp_path, "--host", "127.0.0.2") as address:
        assert address.startswith("http://127.0.0.2:")
        assert ask(address, "GET", "/")[0] == 200
        assert ask(address, "GET", "/", Host="rebound.example:7860")[0] == 400
