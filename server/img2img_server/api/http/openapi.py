"""The OpenAPI document of the HTTP API, from the table of fields that parses the forms, and an HTML page that shows it."""

import functools
import html
import json
from collections.abc import Iterator
from typing import Any

from img2img_server.api.http import json_lists
from img2img_server.api.http.exchange import EVENTS, JSON, TIMEOUT, Exchange
from img2img_server.api.http.fields import FIELDS, FormField
from img2img_server.support import distribution
from img2img_server.support.call import Call

_ERROR = {"$ref": "#/components/schemas/Error"}
_IMAGE_FIELD = {
    "type": "string",
    "format": "binary",
    "description": "The source image: a file, or its address as text: data:, asset: and, if the server allows them, https:, "
    "http: and file:. The name image[] is accepted, too. Models with reference images accept several images",
}
_MASK_FIELD = {
    "type": "string",
    "format": "binary",
    "description": "The mask: a PNG or WebP file whose transparent areas are redrawn, or its address as text, like image",
}
_CONTROL_IMAGE_FIELD = {
    "type": "string",
    "format": "binary",
    "description": "A control image for the field controls: a file, or its address as text. Repeat it, also as "
    "control_image[], in the order of the controls that have no image (extension)",
}
_PROMPT_IMAGE_FIELD = {
    "type": "string",
    "format": "binary",
    "description": "An image for the field image_prompts: a file, or its address as text. Repeat it, also as prompt_image[]. If "
    "one image prompt has no images, all are for it; if several have none, each gets one, in order (extension)",
}
_REQUEST_HEADERS = [
    (TIMEOUT, "Maximum duration of the request in seconds, such as 30. A deadline that cannot be met is refused (504)"),
    ("x-request-id", "Id of the request in the server's log: 1 to 64 letters, digits and _ . : -"),
    ("traceparent", "W3C trace context"),
]
_IMAGES = {
    "type": "object",
    "properties": {
        "created": {"type": "integer"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "b64_json": {"type": "string", "description": "The image's file in base64"},
                    "url": {"type": "string", "description": "The image's address, if response_format is url"},
                    "asset_id": {"type": "string", "description": "The id of the image's asset, if response_format is url"},
                    "seed": {"type": "integer"},
                    "width": {"type": "integer"},
                    "height": {"type": "integer"},
                },
            },
        },
        "output_format": {"type": "string"},
        "size": {"type": "string"},
        "model": {"type": "string"},
        "engine": {"type": "string"},
        "timings": {"type": "object", "description": "Milliseconds"},
        "warnings": {"type": "array", "items": {"type": "object"}},
    },
}
_PAGE = """\
<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>img2img HTTP API</title><style>
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}
table{border-collapse:collapse;width:100%%}td,th{text-align:left;vertical-align:top;padding:.3rem .6rem}
code{font-size:.9em}</style></head><body><h1>img2img HTTP API</h1>
<p>OpenAI's image API over this server's models. The document for tools: <a href="openapi.json">openapi.json</a>.</p>
%s</body></html>
"""


async def answer(exchange: Exchange, call: Call) -> None:
    """Answers GET /openapi.json and GET /docs."""
    if call.method.endswith(".json"):
        await exchange.answer(200, json.dumps(document()).encode(), {})
        return
    policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    await exchange.answer(200, page().encode(), policy, "text/html; charset=utf-8")


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document. https://spec.openapis.org/oas/v3.1.0"""
    one = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "img2img", "version": distribution.version(), "description": "OpenAI's image API over img2img"},
        "security": [{"bearer": []}],
        "paths": {
            "/v1/images/edits": {"post": _form("Edits an image by a prompt", ["image", "prompt"])},
            "/v1/images/variations": {"post": _form("Generates variations of an image", ["image"])},
            "/v1/models": {"get": _operation("Lists the models that the client may use", {JSON: {"schema": {"type": "object"}}})},
            "/v1/models/{id}": {"get": _operation("Describes one model", {JSON: {"schema": {"type": "object"}}}, one)},
            "/v1/assets/{id}": {"get": _operation("Returns a stored image as a file", {"image/*": {}}, one)},
            "/health": {"get": {**_operation("Liveness: 200 if the process responds", {JSON: {}}), "security": []}},
            "/ready": {
                "get": {**_operation("Readiness: 200 if the server accepts requests, else 503", {JSON: {}}), "security": []}
            },
        },
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Images": _IMAGES,
                "Error": {
                    "type": "object",
                    "properties": {
                        "error": {
                            "type": "object",
                            "properties": {
                                "message": {"type": "string"},
                                "type": {"type": "string"},
                                "param": {"type": ["string", "null"], "description": "The invalid field"},
                                "code": {
                                    "type": "string",
                                    "description": "The stable reason, such as INVALID_FIELD or QUEUE_FULL",
                                },
                            },
                        }
                    },
                },
            },
        },
    }


@functools.cache
def page() -> str:
    """The document as an HTML page without external resources."""
    return _PAGE % "".join(_sections())


def _form(summary: str, required: list[str]) -> dict[str, Any]:
    images = {"image": _IMAGE_FIELD, "mask": _MASK_FIELD}
    images |= {json_lists.CONTROL_IMAGES: _CONTROL_IMAGE_FIELD, json_lists.PROMPT_IMAGES: _PROMPT_IMAGE_FIELD}
    properties = {**images, **{one.name: _schema(one) for one in FIELDS}}
    schema = {"type": "object", "required": required, "properties": properties}
    headers = [
        {"name": name, "in": "header", "description": text, "schema": {"type": "string"}} for name, text in _REQUEST_HEADERS
    ]
    content = {
        JSON: {"schema": {"$ref": "#/components/schemas/Images"}},
        EVENTS.partition(";")[0]: {"schema": {"type": "string", "description": "image_edit.* events, if stream is true"}},
    }
    body = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    return {**_operation(summary, content, headers), "requestBody": body}


def _schema(one: FormField) -> dict[str, Any]:
    return {**one.schema, "description": f"{one.help}{' (extension)' if one.extension else ''}"}


def _operation(summary: str, content: dict[str, Any], parameters: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    responses = {
        "200": {"description": "Success", "content": content},
        "default": {"description": "Error", "content": {JSON: {"schema": _ERROR}}},
    }
    return {"summary": summary, "parameters": parameters or [], "responses": responses}


def _sections() -> Iterator[str]:
    for path, operations in document()["paths"].items():
        for verb, operation in operations.items():
            yield f"<h2><code>{verb.upper()} {html.escape(path)}</code></h2><p>{html.escape(operation['summary'])}.</p>"
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["multipart/form-data"]["schema"]
                yield "<table><tr><th>field<th>type<th>default<th>meaning"
                yield from (_row(name, found, name in schema["required"]) for name, found in schema["properties"].items())
                yield "</table><p>Headers: "
                yield ", ".join(f"<code>{name}</code> ({html.escape(text)})" for name, text in _REQUEST_HEADERS)
                yield ".</p>"


def _row(name: str, schema: dict[str, Any], required: bool) -> str:
    default = "required" if required else schema.get("default", "")
    kind = ", ".join(schema["enum"]) if "enum" in schema else schema.get("format", schema["type"])
    cells = (f"<code>{html.escape(name)}</code>", *(html.escape(str(cell)) for cell in (kind, default, schema["description"])))
    return "<tr>" + "".join(f"<td>{cell}" for cell in cells)
