"""The token file: it round-trips, and errors name file and key."""

import contextlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from img2img_server.access import tokens
from img2img_server.access.access import Access
from img2img_server.access.tokens import Token, editing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


HASH = "0" * 64


@pytest.mark.parametrize(
    ("content", "why"),
    [("tokens = 3", "tokens: expected tables"), ("[tokens]\nx = 3", "tokens.x: expected a table"),
     ("[token.x]", "unknown key 'token'"), ("[tokens.x]", "tokens.x: sha256 is missing"),
     ("[tokens.x]\nsha256 = 'AB'", "tokens.x.sha256: expected 64"),
     (f"[tokens.x]\nsha256 = '{HASH}'\nmodel = ['a']", "unknown key 'model'"),
     (f"[tokens.x]\nsha256 = '{HASH}'\nmodels = []", "tokens.x.models: expected a list"),
     (f"[tokens.x]\nsha256 = '{HASH}'\nmodels = 'a'", "tokens.x.models: expected a list"),
     (f"[tokens.x]\nsha256 = '{HASH}'\nmodels = ['']", "tokens.x.models: '' is not a valid pattern"),
     (f"[tokens.x]\nsha256 = '{HASH}'\nrequests_per_minute = 0", "requests_per_minute: expected an integer of at least 1"),
     (f"[tokens.x]\nsha256 = '{HASH}'\nconcurrency = true", "tokens.x.concurrency: expected an integer of at least 1"),
     (f"[tokens.x]\nsha256 = '{HASH}'\nadmin = 'yes'", "tokens.x.admin: expected true or false"),
     (f"[tokens.x]\nsha256 = '{HASH}'\nexpires = 'soon'", "tokens.x.expires: 'soon' is not a date"),
     (f"[tokens.x]\nsha256 = '{HASH}'\nexpires = 12:00:00", "tokens.x.expires: expected a date"),
     (f"[tokens.x]\nsha256 = '{HASH}'\n[tokens.y]\nsha256 = '{HASH}'", "two tokens have the same"),
     (f"[tokens.'../x']\nsha256 = '{HASH}'", "not a valid token name"), ("[", "not valid TOML"), ("\x00", "not valid TOML")],
)  # fmt: skip
def test_invalid_token_file_error_names_file_and_key(content: str, why: str, path: Path) -> None:
    path.write_text(content)
    with pytest.raises(ValueError, match=why) as caught:
        Access(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
PATTERNS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.isprintable)
TOKENS = st.builds(
    Token,
    NAMES,
    st.binary(min_size=32, max_size=32).map(bytes.hex),
    st.none() | st.lists(PATTERNS, min_size=1, max_size=3).map(tuple),
    st.none() | st.integers(1, 2**62),
    st.none() | st.integers(1, 2**62),
    st.booleans(),
    st.none() | st.datetimes(datetime(1000, 1, 1), timezones=st.just(UTC)),
)


@given(st.lists(TOKENS, unique_by=(lambda token: token.name, lambda token: token.sha256), max_size=4))
@settings(deadline=None, max_examples=60)
def test_written_tokens_round_trip(made: list[Token]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.toml"
        with editing(path) as known:
            known.update({token.name: token for token in made})
        assert list(tokens.read(path).values()) == made


@given(st.binary(max_size=200) | st.text().map(str.encode))
@settings(deadline=None)
def test_parsing_any_bytes_raises_only_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        tokens.parse(data, Path("tokens.toml"))
