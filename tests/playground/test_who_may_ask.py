"""Who gets an answer of the playground: this machine's names, and keys that are known; without a browser."""

from pathlib import Path

from playing import Stand, ask, playground


def test_nobody_elses_page_can_use_it(address: str) -> None:
    status, headers = ask(address, "GET", "/")
    assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    # A name of somebody else's that was made to lead to this machine
    for path in ("/", "/_nicegui_ws/socket.io/?EIO=4&transport=polling"):
        assert ask(address, "GET", path, Host="rebound.example:7860")[0] == 400
    for method, path in (("PUT", "/tabs/guessed/source"), ("GET", "/tabs/guessed/pictures/guessed")):
        assert ask(address, method, path)[0] == 404


def test_another_address_is_warned_of(stand: Stand, tmp_path: Path) -> None:
    warning = "img2img playground: everybody who reaches 0.0.0.0 can use this page, and the server through it\n"
    with playground(stand.target, tmp_path, "--host", "0.0.0.0", warning=warning) as address:
        assert ask(address, "GET", "/", Host="my-machine.example:7860")[0] == 200


def test_another_address_of_this_machine_is_told_as_it_is(stand: Stand, tmp_path: Path) -> None:
    with playground(stand.target, tmp_path, "--host", "127.0.0.2") as address:
        assert address.startswith("http://127.0.0.2:")
        assert ask(address, "GET", "/")[0] == 200
        assert ask(address, "GET", "/", Host="rebound.example:7860")[0] == 400
