"""The origin of an image, in its file: how it was made, for people and for programs.

PNG files have two text chunks: `parameters` in the form of AUTOMATIC1111's web UI, which other tools read, and `img2img`, a
JSON object. JPEG and WebP files have both in an XMP packet, beside IPTC's digital source type.
"""

import html
import json
from collections.abc import Mapping
from typing import Any

from PIL.PngImagePlugin import PngInfo

JSON_KEY, PARAMETERS_KEY = "img2img", "parameters"
NAMESPACE = "https://img2img.dev/ns/1.0/"
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_MAX_XMP = 60_000
"""Bytes. A JPEG segment holds 65,502 of XMP; a record is always smaller than this (MAX_PROMPT bounds its texts)."""

_XMP = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:img2img="{namespace}">
<xmp:CreatorTool>{tool}</xmp:CreatorTool>
<Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>
{texts}</rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>"""


def png_info(record: str) -> PngInfo:
    """The text chunks of a PNG. `record` is a JSON object as api/provenance.py makes it."""
    info = PngInfo()
    info.add_itxt(PARAMETERS_KEY, parameters(json.loads(record)))
    info.add_itxt(JSON_KEY, record)
    return info


def xmp(record: str) -> bytes:
    """The XMP packet of a JPEG or WebP, UTF-8. The parameters are left out if they do not fit beside the record."""
    values = json.loads(record)
    texts = f"<img2img:record>{_xml(record)}</img2img:record>\n"
    more = f"<img2img:parameters>{_xml(parameters(values))}</img2img:parameters>\n"
    if len((texts + more).encode()) <= _MAX_XMP:
        texts += more
    tool = _xml(f"img2img {values['img2img']}")
    return _XMP.format(namespace=NAMESPACE, tool=tool, source_type=DIGITAL_SOURCE_TYPE, texts=texts).encode()


def parameters(values: Mapping[str, Any]) -> str:
    """The settings as one text: the prompt, the negative prompt, and a line of `Name: value` pairs.

    Control characters of prompts become spaces, as they end text chunks and are no XML.
    """
    pairs = {
        "Steps": values["num_inference_steps"],
        "Sampler": values["scheduler"],
        "CFG scale": values["guidance_scale"],
        "Seed": values["seed"],
        "Size": f"{values['width']}x{values['height']}",
        "Model hash": values["bundle_digest"][:10],
        "Model": values["model"],
        "Denoising strength": values["strength"],
        "Version": f"img2img {values['img2img']}",
    }
    lines = [_printable(values["prompt"])]
    if values["negative_prompt"]:
        lines.append(f"Negative prompt: {_printable(values['negative_prompt'])}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)


def _xml(text: str) -> str:
    return html.escape(text, quote=False)


def _quoted(value: object) -> str:
    """A value of a pair; quoted as JSON if it contains what separates pairs."""
    text = _printable(str(value))
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def _printable(text: str) -> str:
    return "".join(
        letter
        if letter in "\n\t" or (ord(letter) >= 32 and not 0x7F <= ord(letter) < 0xA0 and letter not in "\ufffe\uffff")
        else " "
        for letter in text
    )
