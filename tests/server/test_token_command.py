"""`img2img token`: a token is shown once, and only its hash is stored."""

import hashlib
import stat
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from img2img_cli.__main__ import main
from img2img_server.access import tokens
from img2img_server.access.access import Access
from img2img_server.errors import Unauthenticated
from img2img_server.support.call import Call


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


def add(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["token", "add", *words, "--tokens", str(path)]) == 0
    out, _ = capsys.readouterr()
    (secret,) = out.split()
    return secret


def admitted(path: Path, secret: str) -> Call:
    call = Call("/img2img.v1.ImageToImageService/Transform", "id")
    with Access(path).admitted(call, (("authorization", f"Bearer {secret}"),)) as found:
        return found


def test_added_tokens_are_accepted_and_removed_tokens_refused(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alice, bob = add(path, capsys, "alice"), add(path, capsys, "bob", "--admin", "--models", "sd*", "demo")
    assert alice != bob
    assert (admitted(path, alice).client, admitted(path, alice).admin, admitted(path, alice).models) == ("alice", False, None)
    assert (admitted(path, bob).client, admitted(path, bob).admin, admitted(path, bob).models) == ("bob", True, ("sd*", "demo"))
    assert main(["token", "remove", "alice", "--tokens", str(path)]) == 0
    with pytest.raises(Unauthenticated):
        admitted(path, alice)
    assert admitted(path, bob).client == "bob"


def test_only_the_hash_is_stored_and_only_the_owner_can_read_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = add(path, capsys, "alice")
    assert secret.startswith("img2img_")
    assert len(secret.removeprefix("img2img_")) == 43, "256 bits in base64url"
    assert tomllib.loads(path.read_text())["tokens"]["alice"] == {"sha256": hashlib.sha256(secret.encode()).hexdigest()}
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [item.name for item in path.parent.iterdir()] == [path.name], "nothing is left beside it"


def test_group_read_permission_of_the_file_is_kept(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server's user may read it by its group, and others never."""
    add(path, capsys, "alice")
    path.chmod(0o664)
    add(path, capsys, "bob")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_all_limits_and_permissions_are_written(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(path, capsys, "ci", "--requests-per-minute", "60", "--concurrency", "4", "--expires", "2027-01-31", "--models", "a", "b*")
    token = tokens.read(path)["ci"]
    assert (token.requests_per_minute, token.concurrency, token.models) == (60, 4, ("a", "b*"))
    assert token.expires == datetime(2027, 1, 31, tzinfo=UTC)


def test_the_list_shows_all_but_hashes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = add(path, capsys, "alice", "--expires", "2020-01-01", "--concurrency", "3", "--models", "sd*")
    add(path, capsys, "bob", "--admin")
    assert main(["token", "list", "--tokens", str(path)]) == 0
    out, _ = capsys.readouterr()
    assert tokens.digest(secret) not in out
    header, alice, bob = [line.split("  ") for line in out.splitlines()]
    assert header[0] == "NAME"
    assert [word.strip() for word in alice if word] == ["alice", "sd*", "any", "3", "no", "2020-01-01T00:00:00+00:00 (expired)"]
    assert [word.strip() for word in bob if word] == ["bob", "all", "any", "any", "yes", "never"]


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [(["add", "a/b"], 2, "not a valid token name"), (["add", "../x"], 2, "not a valid token name"),
     (["add", "x", "--expires", "soon"], 2, "is not a date"), (["add", "x", "--concurrency", "0"], 2, "the minimum is 1"),
     (["add", "x", "--requests-per-minute", "-1"], 2, "the minimum is 1"),
     (["add", "x", "--models", ""], 2, "is not a valid pattern"),
     (["add", "alice"], 1, "already has a token 'alice'"), (["remove", "bob"], 1, "has no token 'bob'; it has alice")],
)  # fmt: skip
def test_refused_token_commands_explain_in_one_line_and_change_nothing(
    words: list[str], status: int, why: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(path, capsys, "alice")
    before = path.read_bytes()
    assert main(["token", *words, "--tokens", str(path)]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert why in err
    assert err.count("\n") == 1
    assert path.read_bytes() == before


def test_token_file_is_set_by_flag_or_environment(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IMG2IMG_TOKENS", raising=False)
    assert main(["token", "list"]) == 2
    assert "give --tokens FILE or set IMG2IMG_TOKENS" in capsys.readouterr().err
    for action in (["list"], ["remove", "x"]):
        assert main(["token", *action, "--tokens", str(path)]) == 1
        assert "No such file" in capsys.readouterr().err
    assert not path.exists()
    monkeypatch.setenv("IMG2IMG_TOKENS", str(path))
    assert main(["token", "add", "alice"]) == 0
    assert list(tokens.read(path)) == ["alice"]


def test_damaged_token_file_is_not_overwritten(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_text("[tokens.alice]\nsha = 3\n")
    assert main(["token", "add", "bob", "--tokens", str(path)]) == 1
    assert f"{path}: tokens.alice: unknown key 'sha'" in capsys.readouterr().err
    assert path.read_text() == "[tokens.alice]\nsha = 3\n"


def test_concurrent_additions_are_all_kept(path: Path) -> None:
    """Each reads, changes and writes the file alone."""
    command = [sys.executable, "-m", "img2img_cli", "token", "add"]
    processes = [subprocess.Popen([*command, f"t{index}", "--tokens", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                 for index in range(6)]  # fmt: skip
    secrets = [process.communicate(timeout=60)[0].decode().strip() for process in processes]
    assert sorted(tokens.read(path)) == [f"t{index}" for index in range(6)]
    assert [admitted(path, secret).client for secret in secrets] == [f"t{index}" for index in range(6)]
