"""Decodes image files to upright sRGB pixels, within limits, and encodes results."""

from img2img_server.images.decoding import (
    READ_FORMATS,
    check_header,
    decode,
    decode_data_uri,
    decode_mask,
    header_size,
    media_type,
)
from img2img_server.images.encoding import WriteFormat, check_side, encode, encode_pixels, holds
from img2img_server.images.masks import MAX_BLUR, MaskRule, paste
from img2img_server.images.sizes import ImageLimits, SizeRule, least_size, prepare, result_size, target_size

__all__ = [
    "MAX_BLUR",
    "READ_FORMATS",
    "ImageLimits",
    "MaskRule",
    "SizeRule",
    "WriteFormat",
    "check_header",
    "check_side",
    "decode",
    "decode_data_uri",
    "decode_mask",
    "encode",
    "encode_pixels",
    "header_size",
    "holds",
    "least_size",
    "media_type",
    "paste",
    "prepare",
    "result_size",
    "target_size",
]
