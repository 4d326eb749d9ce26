"""The bytes in a "data:" URI."""

import base64
import binascii

from img2img_server.errors import InvalidField
from img2img_server.images.sizes import ImageLimits


def decode_data_uri(uri: str, limits: ImageLimits, field: str) -> bytes:
    """The bytes in a "data:" URI (RFC 2397). Raises InvalidField, naming `field`, for one that is malformed or too large."""
    header, comma, body = uri.partition(",")
    if not comma:
        raise InvalidField(field, "a data: URI needs a comma before its data")
    if len(body) > 4 * limits.max_bytes:
        raise InvalidField(field, f"the URI has {len(body)} characters, too many for a file of {limits.max_bytes} bytes")
    # As unquote_to_bytes, but for escapes that are none: that takes seconds and gigabytes where everything is escaped.
    raw = binascii.a2b_qp(body.encode().replace(b"=", b"=3D").replace(b"%", b"=")) if "%" in body else body.encode()
    if not header.endswith(";base64"):
        return raw
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error as error:
        raise InvalidField(field, f"the base64 data is malformed: {error}") from None
