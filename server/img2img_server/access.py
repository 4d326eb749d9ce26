"""Who may call, how often, and which models: bearer tokens, hashed at rest."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from img2img_server.calls import Call


class Access:
    """Admits calls. Without a file of tokens everybody may call, and is known by address."""

    def __init__(self, tokens: Path | None = None) -> None:
        self._tokens = tokens

    @contextmanager
    def admitted(self, call: Call, metadata: Sequence[tuple[str, str | bytes]]) -> Iterator[Call]:
        """Within the block the call is one of its client's; it is given back with what its token allows.

        Raises Unauthenticated, RateLimited or ClientBusy.
        """
        yield call
