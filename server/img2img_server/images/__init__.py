"""Decodes image files to upright sRGB pixels, within limits, and encodes results."""

from img2img_server.images.decoding import READ_FORMATS, check_header, decode, decode_data_uri, header_size, media_type
from img2img_server.images.encoding import WriteFormat, check_side, encode, holds
from img2img_server.images.sizes import ImageLimits, SizeRule, least_size, prepare, result_size, target_size

__all__ = [
    "READ_FORMATS",
    "ImageLimits",
    "SizeRule",
    "WriteFormat",
    "check_header",
    "check_side",
    "decode",
    "decode_data_uri",
    "encode",
    "header_size",
    "holds",
    "least_size",
    "media_type",
    "prepare",
    "result_size",
    "target_size",
]
