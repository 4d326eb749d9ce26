"""One call of the service, as everything that it passes through knows it: who makes it, and under which name logs have it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase

from img2img_server.errors import PermissionDenied


@dataclass(frozen=True, slots=True)
class Call:
    """An RPC that is being answered.

    `method` is such as "/img2img.v1.ImageToImageService/Transform". `request_id` is the caller's own, or made for it. `client` is
    the name of its token, or its address where nobody needs a token. `models` are patterns of the ids of models that it may
    use, None for all. An `admin` may load and unload models. `traceparent` is the caller's W3C trace context, "" for none. A call
    is `authenticated` where `client` is the name of a token, and not an address, which anybody behind it shares.
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
        """Raises PermissionDenied where this caller may not load and unload models."""
        if not self.admin:
            raise PermissionDenied(f"'{self.client}' is not allowed to load or unload models: use an admin token")


_NONE = Call("", "")
_CURRENT: ContextVar[Call] = ContextVar("img2img_call", default=_NONE)


def current() -> Call:
    """The call that is being answered on this task; one without a method outside of any."""
    return _CURRENT.get()


@contextmanager
def answering(call: Call) -> Iterator[None]:
    """Within the block, `call` is the current one."""
    before = _CURRENT.get()
    _CURRENT.set(call)  # set back by value: a stream that is dropped is closed in another context, where no token would hold
    try:
        yield
    finally:
        _CURRENT.set(before)
