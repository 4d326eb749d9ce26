"""Seed inputs: valid messages and files that fuzzers mutate."""

import io
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from img2img.v1 import asset_pb2, model_pb2
from img2img.v1 import image_to_image_pb2 as pb
from PIL import Image

_MOST_MESSAGES = 8


def image_file(kind: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    """The file of an image of one color."""
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, kind)
    return file.getvalue()


def _transform(**fields: object) -> pb.TransformRequest:
    values = {"image": pb.ImageSource(data=image_file()), "seed": 5, "num_inference_steps": 4, **fields}
    return pb.TransformRequest(**values)  # type: ignore[arg-type]


_URI = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
_FULL = _transform(
    model=pb.ModelReference(path="m", repo_id="acme/m", revision="r1"),
    prompt="p",
    negative_prompt="n",
    strength=0.5,
    guidance_scale=2.0,
    image_count=2,
    output=pb.OutputOptions(format=pb.OUTPUT_FORMAT_WEBP, quality=80, as_asset=True),
    width=16,
    height=16,
    scheduler="DDIMScheduler",
    preview_interval=1,
)
_EDIT = _transform(reference_images=[pb.ImageSource(data=image_file()), pb.ImageSource(uri=_URI)])
_PROMPTED = _transform(image_prompts=[pb.ImagePrompt(adapter="a", images=[pb.ImageSource(uri=_URI)], scale=0.5)])
VALID: dict[str, Sequence[Message]] = {
    "TransformRequest": [_transform(), _FULL, _transform(image=pb.ImageSource(uri=_URI)), _EDIT, _PROMPTED],
    "TransformStreamRequest": [pb.TransformStreamRequest(request=_transform()), pb.TransformStreamRequest(request=_FULL)],
    "TransformBatchRequest": [pb.TransformBatchRequest(request=_transform()), pb.TransformBatchRequest(request=_FULL)],
    "ListModelsRequest": [model_pb2.ListModelsRequest()],
    "GetModelRequest": [model_pb2.GetModelRequest(id="m")],
    "LoadModelRequest": [
        model_pb2.LoadModelRequest(id="second"),
        model_pb2.LoadModelRequest(source=pb.ModelReference(repo_id="acme/second")),
    ],
    "UnloadModelRequest": [model_pb2.UnloadModelRequest(id="second")],
    "UploadAssetRequest": [
        asset_pb2.UploadAssetRequest(info=asset_pb2.UploadAssetInfo(media_type="image/png", size=len(image_file()))),
        asset_pb2.UploadAssetRequest(chunk=image_file()),
    ],
    "GetAssetRequest": [asset_pb2.GetAssetRequest(id="0" * 64)],
    "DeleteAssetRequest": [asset_pb2.DeleteAssetRequest(id="0" * 64)],
    "HealthCheckRequest": [health_pb2.HealthCheckRequest(service="models/m")],
    "ServerReflectionRequest": [
        reflection_pb2.ServerReflectionRequest(list_services="*"),
        reflection_pb2.ServerReflectionRequest(file_by_filename="img2img/v1/model.proto"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="img2img.v1.ModelService"),
    ],
}
"""Seeds by the name of the message type."""
IMAGES = tuple(image_file(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))
URIS = (_URI, "data:,a%20b", "asset:" + "0" * 64, "https://example.com/a.png", "http://[::1]:80/", "file:///a/b.png", "DATA:;x,")
SETTINGS = (
    'models = "models"\nport = 0\n[limits]\nmax_waiting = 3\n[residency]\npreload = ["a", "b"]\nmodels_memory = "1.5GiB"\n',
    'models = "m"\n[execution]\nbuckets = "512x512:2"\n[assets]\nassets_max_age = "24h"\n[telemetry]\nlog_format = "json"\n',
)
TOKENS = (
    f'[tokens.ci]\nsha256 = "{"0" * 64}"\nmodels = ["demo-*"]\nrequests_per_minute = 60\nconcurrency = 4\nadmin = true\n'
    "expires = 2027-01-31T18:00:00Z\n",
)


def weights(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(header)) + header + data


WEIGHTS = (
    weights(b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
    weights(b'{"__metadata__":{"format":"pt","_quantization_metadata":"{\\"layers\\":{}}"},"a.weight":{"dtype":"F8_E4M3","shape":[],'
            b'"data_offsets":[0,1]}}', b"1"),
)  # fmt: skip
_LAYER = (
    b'"ip_adapter.1.to_k_ip.weight":{"dtype":"F16","shape":[8,4]},"ip_adapter.1.to_v_ip.weight":{"dtype":"F16","shape":[8,4]}'
)
ADAPTERS = tuple(
    weights(b"{" + _LAYER + b"," + projection + b"}")
    for projection in (
        b'"image_proj.proj.weight":{"shape":[16,6]},"image_proj.norm.weight":{"shape":[4]}',
        b'"image_proj.proj.0.weight":{"shape":[6,6]},"image_proj.proj.3.weight":{"shape":[4]}',
        b'"image_proj.latents":{"shape":[1,4,8]},"image_proj.proj_in.weight":{"shape":[8,6]}',
    )
)
"""Headers of image adapters: plain, full and plus."""
CONFIGURATIONS = (
    '{"_class_name": "UNet2DConditionModel", "layers_per_block": 2, "block_out_channels": [32, 64]}',
    '{"_class_name": "StableDiffusionImg2ImgPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}',
    '{"metadata": {"total_size": 4}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}',
)


TOKENIZERS = (
    '{"version":"1.0","added_tokens":[{"id":3,"content":"<s>","special":true,"single_word":false,"lstrip":false,"rstrip":false,'
    '"normalized":false}],"normalizer":{"type":"Sequence","normalizers":[{"type":"NFC"},{"type":"Replace","pattern":{"Regex":'
    '"\\\\s+"},"content":" "},{"type":"Lowercase"}]},"pre_tokenizer":{"type":"Split","pattern":{"Regex":"[a-z]+|[0-9]"},'
    '"behavior":"Removed","invert":true},"model":{"type":"BPE","vocab":{"a":0,"l":1,"al":2},"merges":[["a","l"]]}}',
    '{"version":"1.0","truncation":{"max_length":9,"strategy":"LongestFirst","stride":0,"direction":"Right"},"padding":{"strategy":'
    '{"Fixed":12},"direction":"Right","pad_to_multiple_of":null,"pad_id":1,"pad_type_id":0,"pad_token":"a"},"added_tokens":[],'
    '"pre_tokenizer":{"type":"Metaspace","replacement":"_","prepend_scheme":"always","split":true},"post_processor":{"type":'
    '"TemplateProcessing","single":[{"Sequence":{"id":"A","type_id":0}},{"SpecialToken":{"id":"b","type_id":0}}],"pair":[{"Sequence":'
    '{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"b":{"id":"b","ids":[1],"tokens":["b"]}}},"model":'
    '{"type":"Unigram","unk_id":0,"vocab":[["a",0.0],["b",-1.0]],"byte_fallback":false}}',
)


def adapted_weight() -> bytes:
    """The weights of a UNet with one weight of shape [4, 6], filled with ones."""
    import torch
    from safetensors.torch import save

    return save({f"{_ADAPTED}.weight": torch.ones(4, 6)})


def loras() -> Sequence[bytes]:
    """LoRAs of that weight in the formats of peft, diffusers and kohya."""
    import torch
    from safetensors.torch import save

    down, up, alpha = torch.ones(2, 6), torch.ones(4, 2), torch.tensor(1.0)
    config = {"lora_adapter_metadata": '{"unet.lora_alpha": 4, "unet.alpha_pattern": {"to_q": 6}, "unet.use_rslora": true}'}
    peft = {f"unet.{_ADAPTED}.lora_A.weight": down, f"unet.{_ADAPTED}.lora_B.weight": up}
    old = {f"unet.{_ADAPTED}.lora.down.weight": down, f"unet.{_ADAPTED}.lora.up.weight": up}
    name = f"lora_unet_{_ADAPTED.replace('.', '_')}"
    kohya = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    return [save(peft), save(peft, config), save(old), save(kohya)]


_ADAPTED = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
PAST: tuple[tuple[str, bytes], ...] = (
    ("uris", b"http://[:Y]:2@"),  # IndexError in yarl
    ("manifests", b"[" * 100_000),  # RecursionError in json, which prevented the start of the server
    ("settings", b"a=" + b"[" * 100_000),  # RecursionError in tomllib
    ("tokens", b"a=" + b"[" * 100_000),
    ("weights", weights(b"[" * 100_000)),
    ("weights", weights(b'{"__metadata__":' + b"[" * 100_000)),
    ("configurations", b"[" * 100_000),
    ("tokenizers", b"[" * 100_000),
)
"""Inputs of earlier findings, by target."""


def pack(messages: Sequence[bytes]) -> bytes:
    """Packs several messages into one fuzzer input: each after its length in two bytes."""
    return b"".join(struct.pack(">H", len(data)) + data for data in messages)


def unpack(data: bytes) -> Iterator[bytes]:
    """Unpacks the messages of an input. The last may be shorter than its length says."""
    for _ in range(_MOST_MESSAGES):
        if len(data) < 2:
            return
        (length,) = struct.unpack(">H", data[:2])
        yield data[2 : 2 + length]
        data = data[2 + length :]


def manifest(folder: Path) -> bytes:
    """The manifest of a bundle made in `folder`."""
    from soak_parts.stand_in import plant

    return (plant(folder, "seed") / "manifest.json").read_bytes()
