"""Fuzz targets: each takes bytes and raises if the code violates a rule.

A target is made within atheris' instrumentation, so it imports the code under test itself.
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from fuzz_parts import seeds

Try = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class Target:
    """`make` returns the function that runs an input; its stack is closed at the end. `corpus` returns the seed inputs."""

    make: Callable[[contextlib.ExitStack], Try]
    corpus: Callable[[], Sequence[bytes]]
    most_bytes: int = 4096


def _rpc(index: int) -> Target:
    """Raw bytes as the message or messages of a call to a real server in this process."""

    def make(stack: contextlib.ExitStack) -> Try:
        import grpc

        from fuzz_parts import rpcs
        from fuzz_parts.serving import served

        method = rpcs.METHODS[index]
        server = stack.enter_context(served())
        channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{server.port}"))

        def attempt(data: bytes) -> None:
            messages = list(seeds.unpack(data)) if method.client_streaming else [data]
            rpcs.check(method, *rpcs.send(channel, method, messages), messages)
            if not rpcs.is_unchanged(server.folder):
                raise rpcs.Finding("the server wrote outside its folders")

        return attempt

    def corpus() -> Sequence[bytes]:
        from fuzz_parts import rpcs

        method = rpcs.METHODS[index]
        valid = [message.SerializeToString() for message in seeds.VALID[method.input_type.name]]
        return [seeds.pack(valid), *map(seeds.pack, zip(valid))] if method.client_streaming else valid

    return Target(make, corpus)


def _image(stack: contextlib.ExitStack) -> Try:
    from img2img_server import images
    from img2img_server.codecs.jobs import LoadImage
    from img2img_server.errors import InvalidField

    limits = images.ImageLimits(max_bytes=2**16, max_source_pixels=100_000, max_pixels=4_096)
    job = LoadImage("image.data", limits, images.SizeRule(), 1, "PNG")

    def attempt(data: bytes) -> None:
        with contextlib.suppress(InvalidField):
            loaded, pixels = job.run(data, lambda size, seconds: None)
            assert len(pixels) == 3 * loaded.size[0] * loaded.size[1], loaded.size
            assert loaded.size[0] * loaded.size[1] <= limits.max_pixels, loaded.size

    return attempt


def _uri(stack: contextlib.ExitStack) -> Try:
    from img2img.v1 import image_to_image_pb2 as pb
    from img2img_server import images
    from img2img_server.assets.store import AssetStore
    from img2img_server.config import AssetSettings, SourceSettings
    from img2img_server.errors import InvalidField
    from img2img_server.sources.reading import Sources

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    limits = images.ImageLimits(max_bytes=2**16)
    store = AssetStore(AssetSettings(url=str(folder / "assets")))
    settings = SourceSettings(allow_http=True, file_root=folder)
    loop = asyncio.new_event_loop()
    stack.callback(loop.close)
    sources = Sources(settings, store, limits)
    for opened in (store, sources):
        loop.run_until_complete(opened.open())
        stack.callback(_close, loop, opened.close)

    def attempt(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        with contextlib.suppress(InvalidField):
            sources.check(pb.ImageSource(uri=text))
            sources.check(pb.ImageSource(asset_id=text))
        with contextlib.suppress(InvalidField):
            read = images.decode_data_uri(text, limits, "image.uri")
            assert isinstance(read, bytes)

    return attempt


def _close(loop: asyncio.AbstractEventLoop, close: Callable[[], Coroutine[None, None, None]]) -> None:
    loop.run_until_complete(close())


def _manifest(stack: contextlib.ExitStack) -> Try:
    from img2img_server.bundle.manifest import MANIFEST_NAME, Manifest, check_bundle, read_manifest
    from img2img_server.errors import BundleError

    bundle = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def attempt(data: bytes) -> None:
        (bundle / MANIFEST_NAME).write_bytes(data)
        with contextlib.suppress(BundleError):
            manifest = read_manifest(bundle)
            assert isinstance(manifest, Manifest)
            check_bundle(bundle, manifest)

    return attempt


def _settings(stack: contextlib.ExitStack) -> Try:
    from img2img_server.config import ServerConfig
    from img2img_server.settings.sources import Configured, Environment, SettingError, as_toml, resolve

    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "server.toml"

    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        with contextlib.suppress(SettingError):
            found: Configured[ServerConfig] = resolve(ServerConfig, {}, Environment({}, "IMG2IMG_"), file)
            # Printed settings must be read as the same settings.
            file.write_text(as_toml(found), encoding="utf-8")
            again: Configured[ServerConfig] = resolve(ServerConfig, {}, Environment({}, "IMG2IMG_"), file)
            assert again.config == found.config

    return attempt


def _tokens(stack: contextlib.ExitStack) -> Try:
    from img2img_server.access import tokens

    def attempt(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            for name, token in tokens.parse(data, Path("tokens.toml")).items():
                assert tokens.check_name(name) == token.name

    return attempt


def _metadata(stack: contextlib.ExitStack) -> Try:
    from img2img_server.api.interceptors import call_of

    def attempt(data: bytes) -> None:
        parts = [part.decode("latin-1") for part in seeds.unpack(data)]
        keys = ("x-request-id", "traceparent", "authorization")
        call = call_of("/m/M", tuple(zip(keys, parts, strict=False)), "ipv4:127.0.0.1:1")
        assert 0 < len(call.request_id) <= 64, call.request_id
        assert call.request_id.isascii(), call.request_id
        assert call.request_id.isprintable(), call.request_id

    return attempt


def _structure(stack: contextlib.ExitStack) -> Try:
    """The parsers of an image file that run before its decoder: blocks and metadata."""
    from img2img_server.codecs import structure
    from img2img_server.errors import InvalidField
    from img2img_server.images.essentials import essentials

    def attempt(data: bytes) -> None:
        with contextlib.suppress(InvalidField):
            structure.check(data, "image.data")
            assert len(essentials(data).data) <= 2 * len(data) + 2**10  # a TIFF's directory is repeated

    return attempt


def _wire(stack: contextlib.ExitStack) -> Try:
    """The check of a message before parsing: an accepted message is parsed by protobuf within the returned size, or refused."""
    from google.protobuf.message import DecodeError
    from img2img.v1 import image_to_image_pb2 as pb
    from img2img_server.api import wire
    from img2img_server.errors import InvalidField, MalformedMessage

    def attempt(data: bytes) -> None:
        with contextlib.suppress(InvalidField, MalformedMessage, DecodeError):
            assert wire.check(data, pb.TransformRequest.DESCRIPTOR) >= len(data)
            pb.TransformRequest.FromString(data)

    return attempt


def _weights(stack: contextlib.ExitStack) -> Try:
    """The header of a safetensors file of a checkpoint or a LoRA, and its quantization metadata."""
    from img2img_export.errors import ExportError
    from img2img_export.read import scaled, weights_file

    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.safetensors"

    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(ExportError):
            tensors, notes = weights_file.read_header(path)
            scaled.refuse_other_quantization(str(path), tensors, notes)

    return attempt


def _adapter(stack: contextlib.ExitStack) -> Try:
    """The header of an image adapter."""
    from img2img_server.bundle.adapter_files import AdapterProblem
    from img2img_server.bundle.image_adapters import needs_of, read_shapes

    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter.safetensors"

    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(AdapterProblem):
            needs_of(read_shapes(path))

    return attempt


def _lora(stack: contextlib.ExitStack) -> Try:
    """A LoRA for a UNet of one weight: it is fused or refused, and the weight stays finite."""
    from img2img_export.errors import ExportError
    from img2img_export.options import LoraFile
    from img2img_export.progress import Progress
    from img2img_export.read import lora
    from img2img_export.read.checkpoint import Layout
    from safetensors.torch import load

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    stack.enter_context(patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder / "cache")}))
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(seeds.CONFIGURATIONS[0], encoding="utf-8")
    file, path = folder / "unet" / "model.safetensors", folder / "style.safetensors"
    layout = Layout("StableDiffusionImg2ImgPipeline", {"unet": ("diffusers", "UNet2DConditionModel")}, ())

    def attempt(data: bytes) -> None:
        file.write_bytes(seeds.adapted_weight())
        path.write_bytes(data)
        with contextlib.suppress(ExportError):
            lora.fuse(folder, layout, [LoraFile(path)], Progress())
        assert all(bool(weight.isfinite().all()) for weight in load(file.read_bytes()).values())
        assert {entry.name for entry in folder.iterdir()} <= {"unet", "style.safetensors", "cache"}

    return attempt


def _tokenizer(stack: contextlib.ExitStack) -> Try:
    """A tokenizer.json: it is refused, or makes a bounded number of tokens of a text."""
    from img2img_server.bundle.unsafe_files import refuse_unsafe_config
    from tokenizers import Tokenizer

    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "tokenizer.json"

    def attempt(data: bytes) -> None:
        path.write_bytes(data)
        try:
            refuse_unsafe_config(path)
            tokens = Tokenizer.from_str(data.decode()).encode("a lake with a mountain aaaaaaaa").ids
        except Exception:  # noqa: BLE001 - a BundleError, or an error of the library, which has no class of its own
            return
        assert len(tokens) <= 2**21

    return attempt


def _configs(stack: contextlib.ExitStack) -> Try:
    """A configuration or an index of a bundle: it is read or refused with a BundleError."""
    from img2img_server.bundle import unsafe_files
    from img2img_server.errors import BundleError
    from img2img_server.runtime.onnx import components

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

    def attempt(data: bytes) -> None:
        for name, refuse in (
            ("model_index.json", unsafe_files.refuse_unsafe_config),
            ("config.json", unsafe_files.refuse_unsafe_config),
            ("model.safetensors.index.json", unsafe_files.refuse_unsafe_parts),
        ):
            (folder / name).write_bytes(data)
            with contextlib.suppress(BundleError):
                refuse(folder / name)
        with contextlib.suppress(BundleError):
            components.read_index(folder)

    return attempt


def _manifests() -> Sequence[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        return [seeds.manifest(Path(folder)), b"[" * 2000]


def targets() -> dict[str, Target]:
    """All targets by name."""
    from fuzz_parts import http_front, rpcs

    found = {rpcs.name_of(method): _rpc(index) for index, method in enumerate(rpcs.METHODS)}
    return found | {
        "images": Target(_image, lambda: seeds.IMAGES),
        "uris": Target(_uri, lambda: [uri.encode() for uri in seeds.URIS]),
        "manifests": Target(_manifest, _manifests),
        "image structures": Target(_structure, lambda: seeds.IMAGES, 2**16),
        "wire": Target(_wire, lambda: [message.SerializeToString() for message in seeds.VALID["TransformRequest"]]),
        "weights": Target(_weights, lambda: seeds.WEIGHTS),
        "loras": Target(_lora, seeds.loras),
        "image adapters": Target(_adapter, lambda: seeds.ADAPTERS),
        "tokenizers": Target(_tokenizer, lambda: [text.encode() for text in seeds.TOKENIZERS]),
        "configurations": Target(_configs, lambda: [text.encode() for text in seeds.CONFIGURATIONS]),
        "http": Target(http_front.connection, http_front.requests),
        "http forms": Target(http_front.body, http_front.forms),
        "settings": Target(_settings, lambda: [text.encode() for text in seeds.SETTINGS]),
        "tokens": Target(_tokens, lambda: [text.encode() for text in seeds.TOKENS]),
        "metadata": Target(
            _metadata, lambda: [seeds.pack([b"a-1", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01", b"Bearer x"])]
        ),
    }
