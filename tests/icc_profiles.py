"""Small ICC profiles, made from the specification (ICC.1:2022), as tests need them."""

import itertools
import struct

from PIL import Image, ImageCms

_WHITE = (0.9642, 1.0, 0.8249)  # D50, as every profile has it


def display_p3() -> bytes:
    """The profile of Apple's screens and phones: DCI-P3's primaries, D65 adapted to D50, and sRGB's curve."""
    curve = b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return _rgb((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407), curve)


def linear_srgb() -> bytes:
    """sRGB's primaries without its curve."""
    return _rgb((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410), _gamma(1.0))


def gray(gamma: float) -> bytes:
    """A gray profile with this gamma."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(*_WHITE), b"kTRC": _gamma(gamma)})


def cmyk() -> bytes:
    """A printer's profile whose inks are the complements of sRGB's primaries."""
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    grid = b""
    for inks in itertools.product((0, 1), repeat=4):
        light = tuple(255 * (1 - ink) * (1 - inks[3]) for ink in inks[:3])
        converted = to_lab.apply(Image.new("RGB", (1, 1), light))
        lightness, a, b = converted.tobytes()
        grid += bytes([lightness, (a + 128) % 256, (b + 128) % 256])  # Pillow's a and b are signed.
    same = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1) + same * 4 + grid + same * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(*_WHITE), b"A2B0": lut, b"A2B1": lut})


def _rgb(red: tuple[float, ...], green: tuple[float, ...], blue: tuple[float, ...], curve: bytes) -> bytes:
    colorants = {b"rXYZ": _xyz(*red), b"gXYZ": _xyz(*green), b"bXYZ": _xyz(*blue)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return _profile(b"mntr", b"RGB ", b"XYZ ", {b"wtpt": _xyz(*_WHITE), **colorants, **curves})


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    table, body = struct.pack(">L", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        value = value.ljust(-(-len(value) // 4) * 4, b"\0")
        table += name + struct.pack(">LL", start + len(body), len(value))
        body += value
    head = struct.pack(">L4sL4s4s4s", start + len(body), b"", 0x04300000, kind, space, connection)
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _fixed(*_WHITE)
    return head.ljust(128, b"\0") + table + body


def _xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">LH", 1, round(value * 256))


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}l", *(round(value * 65536) for value in values))
