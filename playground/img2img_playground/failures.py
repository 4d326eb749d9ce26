"""Error messages for the page, with the control that they belong to."""

import re
from dataclasses import dataclass

from img2img_client.errors import (
    DeadlineExceeded,
    Img2ImgError,
    ModelNotFound,
    ModelUnavailable,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from img2img_client.values import TransformWarning


@dataclass(frozen=True, slots=True)
class Failure:
    """A message: `title` is one short line, `text` the details. `field` is the invalid field of the request, such as
    "num_inference_steps", or "". `may_pass`: the same request may succeed later. `disconnected`: the server did not answer."""

    title: str
    text: str
    field: str = ""
    may_pass: bool = False
    disconnected: bool = False

    def index(self, field: str) -> int | None:
        """The index of the element of the list `field` that it is about, -1 for the whole list, None for neither."""
        if self.field != field:
            return None
        found = re.search(rf"{field}\[(\d+)\]", self.text)
        return -1 if found is None else int(found[1])


def explain(error: Img2ImgError, target: str) -> Failure:
    """The message for a call's error."""
    if error.fields:
        field, _ = error.fields[0]
        # The first part names the control: "image.data" is the image, "model.path" the model, "loras[0].id" the LoRAs.
        text = "\n".join(f"{name}: {description}" for name, description in error.fields)
        return Failure("The server refused the request.", text, re.split(r"[.\[]", field)[0])
    if isinstance(error, Overloaded):
        again = "" if error.retry_after is None else f" Retry in {error.retry_after:.3g} s."
        return Failure("The server is busy.", f"{_sentence(error.message)}{again}", may_pass=error.retry_after is not None)
    if isinstance(error, Unavailable):
        title = f"No response from {target}." if not error.reason else "The server is not available."
        return Failure(title, _sentence(error.message), may_pass=True, disconnected=True)
    if isinstance(error, DeadlineExceeded):
        long = "" if error.estimate is None else f" It would take about {error.estimate:.3g} s."
        return Failure("The request takes too long.", f"{_sentence(error.message)}{long}", may_pass=True)
    if isinstance(error, Unauthenticated):
        return Failure(
            "The server requires an access token.", f"{_sentence(error.message)} Start the playground with --token-file."
        )
    if isinstance(error, PermissionDenied):
        return Failure("The token does not allow this.", _sentence(error.message))
    request = f" (request {error.request_id})" if error.request_id else ""
    field = "model" if isinstance(error, ModelNotFound | ModelUnavailable) else ""
    return Failure("The request failed.", f"{_sentence(error.message)}{request}", field)


def describe(warning: TransformWarning) -> str:
    """A warning as one line."""
    return f"{warning.field.replace('_', ' ').capitalize()}: {warning.description}"


def _sentence(words: str) -> str:
    words = words.strip()
    return f"{words[:1].upper()}{words[1:]}{'' if words.endswith(('.', '!', '?')) else '.'}" if words else ""
