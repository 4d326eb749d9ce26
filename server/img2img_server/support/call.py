"""The context of one call of the service: its caller, its permissions, and its id in logs."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase

from img2img_server.errors import PermissionDenied


@dataclass(frozen=True, slots=True)
class Call:
    """An RPC in progress.

    `method` is such as "/img2img.v1.ImageToImageService/Transform". `request_id` was chosen by the caller or generated. `client`
    is the name of its token, or its address if the server requires no tokens. `models` are patterns of the ids of models that it
    may use, None for all. An `admin` may load and unload models. `traceparent` is the caller's W3C trace context, "" for none. A
    call is `authenticated` if `client` is the name of a token: several callers may share an address.
    """

    method: str
    request_id: str
    client: str = ""
    models: tuple[str, ...] | None = None
    admin: bool = True
    traceparent: str = ""
    authenticated: bool = False

    def may_use(self, model: str) -> bool:
        """Whether this caller may use the model with the id `model`."""
        return self.models is None or any(fnmatchcase(model, pattern) for pattern in self.models)

    def require_admin(self) -> None:
        """Raises PermissionDenied unless this caller may load and unload models."""
        if not self.admin:
            raise PermissionDenied(f"'{self.client}' is not allowed to load or unload models: use an admin token")


_NONE = Call("", "")
_CURRENT: ContextVar[Call] = ContextVar("img2img_call", default=_NONE)


def current() -> Call:
    """The call in progress on this task; outside of any call, one with an empty method."""
    return _CURRENT.get()


@contextmanager
def answering(call: Call) -> Iterator[None]:
    """Makes `call` the current one within the block."""
    before = _CURRENT.get()
    _CURRENT.set(call)  # restored by value: a dropped stream is closed in another context, where a reset token is invalid
    try:
        yield
    finally:
        _CURRENT.set(before)
