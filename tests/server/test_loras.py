"""Requests with LoRAs of their own, in one batch: images as diffusers draws them with the LoRAs set, to 1/255."""

import dataclasses
import functools
import hashlib
import inspect
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import nightly_but
from diffusers import AutoPipelineForImage2Image
from drawing import Counted, alone, together
from drawing import load as load_stepped
from fakes import FakePipeline, make_request
from img2img.v1 import image_to_image_pb2 as pb
from img2img_client import Client, InvalidRequest, read_provenance
from img2img_export.verify.images import sample_image
from img2img_server.api.loras import check_loras
from img2img_server.bundle.adapter_files import AdapterProblem, LoraFiles
from img2img_server.bundle.manifest import read_manifest
from img2img_server.config import LoraFolder
from img2img_server.engine.cache import Cache
from img2img_server.engine.engine import Engine
from img2img_server.engine.interface import Span
from img2img_server.engine.request import Completed, Event, Failed, LoraUse, Request
from img2img_server.errors import InvalidField
from img2img_server.models.memory import least_slots
from img2img_server.models.registry import Model, ModelRegistry
from img2img_server.runtime.diffusion.stepped import SteppedPipeline
from img2img_server.runtime.execution import Execution
from img2img_server.runtime.loader import load_pipeline
from img2img_server.runtime.lora.adapters import LoraSettings
from img2img_server.runtime.lora.graph import AdaptedGraph
from img2img_server.runtime.lora.reading import read_layers
from lora_making import CONVOLUTIONS, Pairs, make, write_diffusers, write_kohya, write_kohya_flux
from running import running, store
from safetensors.torch import load_file, save_file

Get = Callable[[str], Path]
Loras = tuple[tuple[str, float], ...]

DENOISER = (
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "norm1.linear", "add_k_proj"),
    *("to_qkv_mlp_proj", "ff.linear_in", "single_stream_modulation.linear"),  # klein
    *("img_mlp.net.0.proj", "txt_mod.1", "feed_forward.w1", "adaLN_modulation.0"),  # Qwen-Image, Z-Image
)
"""Layers of UNets and transformers, as far as each has them."""
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
SETTINGS: dict[str, Any] = {"prompt": "a lake", "strength": 0.8, "num_inference_steps": 4, "guidance_scale": 5.0}
CALLS = 4
"""Calls of the denoiser for a request with SETTINGS: PNDM repeats the first step."""
MIXES: tuple[Loras, ...] = (
    (),
    (("all", 1.0),),
    (("text", 0.8),),
    (("all", -0.5),),
    (("all", 0.7), ("text", 0.6)),
    (("large", 1.0), ("all", 0.3)),
    (("folder/one", 1.5),),
    (),
)
"""The LoRAs of the requests in a batch: none, one, another scale, several, ranks of two buckets together."""


def small(pairs: Pairs, factor: float) -> Pairs:
    return {module: (factor * down, factor * up) for module, (down, up) in pairs.items()}


def write_loras(model: Path, folder: Path) -> Path:
    """The LoRAs of MIXES for a model, as several trainers write them."""
    (folder / "folder").mkdir(parents=True)
    write_diffusers(small(make(model, 1, DENOISER, (8,)), 0.3), folder / "all.safetensors")
    write_diffusers(small(make(model, 3, ("to_q", "to_k"), (24, 48)), 0.2), folder / "large.safetensors")
    text = small(make(model, 2, DENOISER + TEXT, (4,)), 0.5)
    if (model / "unet").is_dir():
        write_kohya(text, folder / "text.safetensors", lambda module: 2.0)
        write_kohya(small(make(model, 4, ("to_v",), (1,)), 0.5), folder / "folder" / "one.safetensors", lambda module: 1.0)
        convolutions = small(make(model, 5, (*CONVOLUTIONS, "conv2", "0.conv", "time_emb_proj", "to_q"), (4, 8)), 0.15)
        write_kohya(convolutions, folder / "conv.safetensors", lambda module: 4.0)
        return folder
    if (model / "text_encoder_3").is_dir():  # diffusers reads no other names for Stable Diffusion 3
        write_diffusers(text, folder / "text.safetensors")
    elif (model / "text_encoder_2").is_dir():
        write_kohya_flux(model, 2, folder / "text.safetensors", 4, 0.4)
    else:  # no CLIP, and no LoRA for its texts
        write_diffusers(small(make(model, 2, DENOISER, (4,)), 0.4), folder / "text.safetensors")
    last = small(make(model, 4, ("to_v", "proj_out", "all_final_layer.2-1.linear"), (1,)), 0.7)
    write_diffusers(last, folder / "folder" / "one.safetensors")
    return folder


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory, tiny_model: Get) -> Get:
    """The folder of LoRAs for a tiny model."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = write_loras(tiny_model(name), tmp_path_factory.mktemp("loras") / name)
        return made[name]

    return get


def load(bundle: Path, folder: Path | None, slots: int = 8, cache: Cache | None = None) -> SteppedPipeline:
    settings = None if folder is None else LoraSettings(LoraFiles(folder), cache or Cache(2**28), slots)
    return load_stepped(bundle, loras=settings)


def uses(folder: Path, *loras: tuple[str, float]) -> tuple[LoraUse, ...]:
    return tuple(LoraUse(name, scale, LoraFiles(folder).find(name).digest) for name, scale in loras)


def requests(folder: Path, mixes: Sequence[Loras] = MIXES, **changes: Any) -> list[Request]:
    settings = {"negative_prompt": None, "image": sample_image(64, 64), **SETTINGS, **changes}
    return [make_request(seeds=(5 + index,), loras=uses(folder, *mix), **settings) for index, mix in enumerate(mixes)]


@pytest.fixture(scope="module")
def oracle(tiny_model: Get, loras: Get) -> Callable[[str, Loras, int], np.ndarray]:
    """diffusers' own image with its LoRA loader."""
    pipes: dict[str, Any] = {}

    def draw(name: str, mix: Loras, seed: int) -> np.ndarray:
        if name not in pipes:
            pipe = AutoPipelineForImage2Image.from_pretrained(tiny_model(name), use_safetensors=True, local_files_only=True)
            pipe.set_progress_bar_config(disable=True)
            for file in sorted(loras(name).rglob("*.safetensors")):
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")
                    pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=file.stem)
            pipes[name] = pipe
        pipe = pipes[name]
        if mix:
            pipe.enable_lora()
            pipe.set_adapters([name.rpartition("/")[2] for name, _ in mix], [scale for _, scale in mix])
        else:
            pipe.disable_lora()
        generator = torch.Generator().manual_seed(seed)
        known = inspect.signature(pipe.__call__).parameters
        given = {key: value for key, value in {**SETTINGS, "width": 64, "height": 64}.items() if key in known}
        return np.asarray(pipe(image=sample_image(64, 64), generator=generator, **given).images[0], int)

    return draw


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, bundle: Get, loras: Get) -> Iterator[Client]:
    """A server of two families, whose folder has the LoRAs of both below `sd1` and `sdxl`."""
    models, folder = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("folder")
    for name in ("sd1", "sdxl"):
        (models / name).symlink_to(bundle(name))
        (folder / name).symlink_to(loras(name))
    settings = LoraSettings(LoraFiles(folder), Cache(2**28), 8)

    def load_models() -> ModelRegistry:
        return ModelRegistry.load(
            models, lambda path, manifest: load_pipeline(path, manifest, Execution("cpu"), Cache(2**24), loras=settings)
        )

    with running(load_models, loras=LoraFolder(folder)) as server, Client(f"localhost:{server.port}", timeout=120) as client:
        yield client


@pytest.mark.parametrize(
    "name",
    nightly_but(["sd1", "sdxl", "sd3", "flux-dev", "klein", "qwenimage", "zimage"], "sd1", "sdxl", "flux-dev", "klein"),
)
def test_mixed_batch_matches_diffusers(
    name: str, bundle: Get, loras: Get, oracle: Callable[[str, Loras, int], np.ndarray]
) -> None:
    """Each request gets the bits that it gets alone. Rows without a LoRA are those of a pipeline that opened no LoRA graph.

    Graphs of tokens differ in their last bits between numbers of rows, with LoRAs and without.
    """
    pipeline, plain = load(bundle(name), loras(name)), load(bundle(name), None)
    batch = requests(loras(name))
    drawn = together(pipeline, batch)
    bare = together(plain, [dataclasses.replace(request, loras=()) for request in batch])
    for index, (request, image, without) in enumerate(zip(batch, drawn, bare, strict=True)):
        expected = oracle(name, MIXES[index], 5 + index)
        assert np.abs(image - expected).max() <= 1, MIXES[index]
        if name not in ("klein", "qwenimage", "zimage"):
            assert np.array_equal(image, alone(pipeline, request)), MIXES[index]
        assert np.array_equal(image, without) == (not request.loras), MIXES[index]
        assert not request.loras or np.abs(image - without).mean() > 3, "a LoRA that changes nothing would prove nothing"


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_loras_of_convolutions_share_a_batch(
    name: str, bundle: Get, loras: Get, oracle: Callable[[str, Loras, int], np.ndarray]
) -> None:
    mixes: tuple[Loras, ...] = ((), (("conv", 1.0),), (("all", 1.0),), (("conv", -0.5), ("all", 0.5)))
    pipeline, plain = load(bundle(name), loras(name)), load(bundle(name), None)
    batch = requests(loras(name), mixes)
    drawn = together(pipeline, batch)
    for index, (request, image) in enumerate(zip(batch, drawn, strict=True)):
        assert np.abs(image - oracle(name, mixes[index], 5 + index)).max() <= 1, mixes[index]
        assert np.array_equal(image, alone(pipeline, request)), mixes[index]
        without = alone(plain, dataclasses.replace(request, loras=()))
        assert np.array_equal(image, without) == (not request.loras), mixes[index]
        assert not request.loras or np.abs(image - without).mean() > 3, "a LoRA that changes nothing would prove nothing"


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_requests_with_different_loras_match_the_oracle(
    name: str, client: Client, oracle: Callable[[str, Loras, int], np.ndarray]
) -> None:
    def ask(index: int) -> np.ndarray:
        wanted = {f"{name}/{lora}": scale for lora, scale in MIXES[index]}
        result = client.transform(sample_image(64, 64), model=name, seed=5 + index, loras=wanted, **SETTINGS)
        record = read_provenance(result.images[0].data) or {}
        assert {lora["id"]: lora["scale"] for lora in record.get("loras", [])} == wanted
        return np.asarray(result.images[0].image, int)

    with ThreadPoolExecutor(len(MIXES)) as pool:
        for index, image in enumerate(pool.map(ask, range(len(MIXES)))):
            assert np.abs(image - oracle(name, MIXES[index], 5 + index)).max() <= 1, MIXES[index]


def test_requests_with_different_loras_share_a_call(bundle: Get, loras: Get) -> None:
    spans: list[Span] = []
    engine = Engine({"m": load(bundle("sd1"), loras("sd1"))}, observe=spans.append)
    endings: list[Event] = []
    for request in requests(loras("sd1")):
        engine.submit(dataclasses.replace(request, model="m"), lambda event: endings.append(event))
    while engine.step():
        pass
    assert sum(isinstance(event, Completed) for event in endings) == len(MIXES)
    assert max(span.requests for span in spans if span.stage == "denoise") == len(MIXES)


def counted(pipeline: SteppedPipeline) -> tuple[Counted, Counted]:
    """Counts the denoiser's calls of the plain graph and of the LoRA graph."""
    (graph,) = pipeline._denoiser.graphs
    assert isinstance(graph, AdaptedGraph)
    graph._runner, graph._lora = Counted(graph._runner), Counted(graph._lora)
    return graph._runner, graph._lora


def test_the_plain_graph_runs_if_no_row_has_a_lora(bundle: Get, loras: Get) -> None:
    pipeline = load(bundle("sd1"), loras("sd1"))
    plain, lora = counted(pipeline)
    together(pipeline, requests(loras("sd1"), [(), ()]))
    assert (plain.rows, lora.rows) == ([4] * CALLS, [])
    together(pipeline, requests(loras("sd1"), [(), (("all", 1.0),)]))
    assert (plain.rows, lora.rows) == ([4] * CALLS, [4] * CALLS)


def slot_bytes_of(module: Any) -> int:
    """The memory of two slots and the zeros at rank 16, in fp32, without LoRAs of 3 x 3 convolutions."""
    (graph,) = module.graphs
    values: int = sum((1 if layer.taps > 1 else 16) * (layer.taps * layer.ins + layer.outs) for layer in graph.layers)
    return 3 * 4 * values


def test_slots_count_in_the_memory_of_a_model_once_they_are_made(bundle: Get, loras: Get) -> None:
    """Slots are made separately for each padded rank; slots for 3 x 3 convolutions are tiny if no LoRA adapts these. The slots of
    the smallest rank count in the expected memory of the model from the start."""
    folder = loras("sd1")
    pipeline = load(bundle("sd1"), folder, slots=2)
    least = least_slots(pipeline)
    model = Model("m", pipeline=pipeline, memory=1000, slots=least)
    assert (model.slot_memory, model.expected_memory) == (0, 1000 + least)
    assert dataclasses.replace(model, pipeline=None).expected_memory == 1000 + least, "before it is loaded again"
    of_text, of_unet = (slot_bytes_of(part) for part in (pipeline._pipe.text_encoder, pipeline._denoiser))
    assert least == of_text + of_unet
    sizes = []
    for mix in ((("all", 1.0),), (("all", 0.5),), (("large", 1.0),), (("conv", 1.0),), (("text", 1.0),)):
        together(pipeline, requests(folder, [mix]))
        sizes.append(model.slot_memory)
    assert sizes[0] == sizes[1] < sizes[2] < sizes[3] < sizes[4], "rank 16, again, 64, convolutions, the text encoder"
    assert sizes[0] == of_unet
    assert model.expected_memory == 1000 + sizes[-1] > 1000 + least
    pipeline.close()
    assert model.slot_memory == 0


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_call_with_more_loras_than_slots_is_split(slots: int, bundle: Get, loras: Get) -> None:
    """The images have the same bits with any division."""
    expected = together(load(bundle("sd1"), loras("sd1")), requests(loras("sd1")))
    pipeline = load(bundle("sd1"), loras("sd1"), slots)
    plain, lora = counted(pipeline)
    found = together(pipeline, requests(loras("sd1")))
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert len(lora.rows) == CALLS * math.ceil(6 / slots)
    assert sum(plain.rows) + sum(lora.rows) == CALLS * 2 * len(MIXES)


def test_rows_without_loras_run_separately_if_providers_differ(bundle: Get, loras: Get) -> None:
    expected = together(load(bundle("sd1"), loras("sd1")), requests(loras("sd1")))
    pipeline = load(bundle("sd1"), loras("sd1"))
    plain, lora = counted(pipeline)
    pipeline._denoiser.graphs[0]._mixes = False
    assert all(np.array_equal(*pair) for pair in zip(together(pipeline, requests(loras("sd1"))), expected, strict=True))
    assert (plain.rows, lora.rows) == ([2, 2] * CALLS, [12] * CALLS)


def test_evicted_lora_is_read_again(bundle: Get, loras: Get) -> None:
    expected = together(load(bundle("sd1"), loras("sd1")), requests(loras("sd1")))
    cache = Cache(1)
    found = together(load(bundle("sd1"), loras("sd1"), cache=cache), requests(loras("sd1")))
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert cache.stats.bytes == 0
    cache = Cache(2**28)
    pipeline = load(bundle("sd1"), loras("sd1"), cache=cache)
    together(pipeline, requests(loras("sd1")))
    assert cache.stats.entries == 4
    pipeline.close()
    assert cache.stats.entries == 0


def test_texts_are_encoded_again_only_for_loras_that_adapt_the_text_encoder(bundle: Get, loras: Get) -> None:
    pipeline = load(bundle("sd1"), loras("sd1"))
    pipeline.prepare(requests(loras("sd1"), [()]))
    encoded: list[list[str]] = []
    encode = pipeline._encode_texts
    pipeline._encode_texts = lambda texts: encoded.append(texts) or encode(texts)  # type: ignore[method-assign, func-returns-value]
    pipeline.prepare(requests(loras("sd1"), [(("all", 1.0),), (("large", 1.0),)]))
    assert encoded == []
    pipeline.prepare(requests(loras("sd1"), [(("text", 1.0),), (("text", 0.5),), (("text", 1.0), ("all", 2.0))]))
    assert encoded == [["a lake", ""] * 3]
    pipeline.prepare(requests(loras("sd1"), [(("text", 0.5),)]))
    assert len(encoded) == 1


def test_removed_or_replaced_lora_fails_only_its_own_requests(bundle: Get, loras: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(loras("sd1"), tmp_path / "loras"))
    engine = Engine({"m": load(bundle("sd1"), folder, cache=Cache(0))})
    endings: dict[str, Event] = {}
    for request in requests(folder, [(("all", 1.0),), (), (("text", 1.0),), (("large", 1.0),)]):
        name = request.loras[0].id if request.loras else "none"
        engine.submit(dataclasses.replace(request, model="m"), functools.partial(endings.__setitem__, name))
    (folder / "all.safetensors").unlink()
    shutil.copy(folder / "folder" / "one.safetensors", folder / "text.safetensors")
    while engine.step():
        pass
    assert isinstance(endings["none"], Completed)
    assert isinstance(endings["large"], Completed)
    for name, reason in (
        ("all", "is not in this server's folder of LoRAs, which has conv, folder/one, large"),
        ("text", "was replaced"),
    ):
        ending = endings[name]
        assert isinstance(ending, Failed)
        assert isinstance(ending.error, InvalidField)
        assert ending.error.field == "loras[0].id"
        assert reason in ending.error.description


def odd(model: Path, how: str, path: Path) -> None:
    """Writes a LoRA that does not fit the model."""
    pairs = make(model, 1, DENOISER, (4,))
    first = next(iter(pairs))
    down, up = pairs[first]
    if how == "kernel":
        pairs = {module: (down[:, :, :2], up) for module, (down, up) in make(model, 1, ("resnets.0.conv1",), (4,)).items()}
    elif how == "conv":
        pairs["unet.down_blocks.0.attentions.0.no_such"] = (down.reshape(*down.shape[:2], 1, 1).expand(-1, -1, 3, 3), up.clone())
    elif how == "layer":
        pairs["unet.down_blocks.0.attentions.0.no_such"] = (down.clone(), up.clone())
    elif how == "width":
        pairs[first] = (down[:, :-1].contiguous(), up)
    elif how == "rank":
        pairs = make(model, 1, ("to_q",), (65,))
    elif how == "NaN":
        pairs[first] = (down, torch.full_like(up, math.nan))
    write_diffusers({module: (down.contiguous(), up) for module, (down, up) in pairs.items()}, path)
    if how == "DoRA":
        tensors = load_file(path)
        tensors[f"{first}.lora_magnitude_vector"] = torch.ones(len(up))
        save_file(tensors, path)
    if how == "damaged":
        path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (
            "kernel",
            r"does not fit the model: unet\.\S+conv1 has 144 inputs and 16 outputs in the model, and 96 and 16 in the LoRA",
        ),
        ("conv", r"adapts unet\.\S+no_such, a convolution of 3 x 3, which requests cannot adapt in this model"),
        ("layer", r"adapts unet\.down_blocks\.0\.attentions\.0\.no_such, which is not a layer"),
        ("width", r"does not fit the model: unet\.\S+ has 16 inputs and 16 outputs in the model, and 15 and 16 in the LoRA"),
        ("rank", "has rank 65 in unet, the maximum is 64"),
        ("NaN", "is damaged: .* NaN or infinite numbers"),
        ("DoRA", "is a DoRA, not a plain LoRA"),
        ("damaged", "is damaged or not a safetensors file"),
    ],
)
def test_lora_of_the_wrong_shape_is_refused_and_names_the_layer(
    how: str, reason: str, bundle: Get, tiny_model: Get, tmp_path: Path
) -> None:
    odd(tiny_model("sd1"), how, tmp_path / "odd.safetensors")
    pipeline = load(bundle("sd1"), tmp_path)
    with pytest.raises(InvalidField, match=f"^loras\\[0\\]\\.id: LoRA 'odd' {reason}"):
        pipeline.plan(requests(tmp_path, [(("odd", 1.0),)])[0])


def test_a_lora_of_another_family_is_refused(bundle: Get, loras: Get) -> None:
    pipeline = load(bundle("sd1"), loras("sdxl"))
    with pytest.raises(InvalidField, match=r"^loras\[0\]\.id: LoRA 'all' (adapts|does not fit the model: ) ?unet\."):
        pipeline.plan(requests(loras("sdxl"), [(("all", 1.0),)])[0])


def test_total_lora_rank_of_a_request_is_limited(bundle: Get, loras: Get, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(loras("sd1"), tmp_path / "loras"))
    shutil.copy(folder / "all.safetensors", folder / "again.safetensors")
    pipeline = load(bundle("sd1"), folder)
    most = (("large", 1.0), ("all", 1.0), ("text", 1.0), ("folder/one", 1.0))
    pipeline.plan(requests(folder, [most])[0])
    with pytest.raises(InvalidField, match=r"^loras: their ranks together are 69 in unet, the maximum is 64"):
        pipeline.plan(requests(folder, [(*most, ("again", 1.0))])[0])


def test_models_without_lora_graphs_refuse_loras_with_the_reason(bundle: Get, loras: Get, tmp_path: Path) -> None:
    request = requests(loras("sd1"), [(("all", 1.0),)])[0]
    with pytest.raises(InvalidField, match=r"^loras: this model takes no LoRAs: it was loaded without a folder of LoRAs"):
        load(bundle("sd1"), None).plan(request)
    bare = tmp_path / "bare"
    shutil.copytree(bundle("sd1"), bare)
    manifest = read_manifest(bare)
    parts = tuple(dataclasses.replace(part, lora="", fused_lora="") for part in manifest.components)
    settings = LoraSettings(LoraFiles(loras("sd1")), Cache(0), 8)
    older = dataclasses.replace(manifest, components=parts)
    with pytest.raises(InvalidField, match=r"^loras: this model takes no LoRAs: it has no LoRA graph: export it again"):
        load_pipeline(bare, older, Execution("cpu"), Cache(0), loras=settings).plan(request)


@pytest.mark.parametrize(
    ("wanted", "field", "reason"),
    [
        ({"sd1/all": 11.0}, r"loras\[0\]\.scale", "11 is not in -10 to 10"),
        ({"sd1/all": 1.0, "sd1/text": math.nan}, r"loras\[1\]\.scale", "nan is not in -10 to 10"),
        ({"": 1.0}, r"loras\[0\]\.id", "the id is empty"),
        (
            {"sd1/all": 1.0, "sd1/none": 1.0},
            r"loras\[1\]\.id",
            "'sd1/none' is not in this server's folder of LoRAs, which has sd1/all",
        ),
        ({"../sd1/all": 1.0}, r"loras\[0\]\.id", "is not a valid id"),
        ({"/etc/passwd": 1.0}, r"loras\[0\]\.id", "is not a valid id"),
        ({"sd1//all": 1.0}, r"loras\[0\]\.id", "is not a valid id"),
        ({"sd1\\all": 1.0}, r"loras\[0\]\.id", "is not a valid id"),
        ({"sd1/all\0": 1.0}, r"loras\[0\]\.id", "is not a valid id"),
        ({"a" * 5000: 1.0}, r"loras\[0\]\.id", f"LoRA '{'a' * 100}' is not in"),
        ({"sdxl/all": 1.0}, r"loras\[0\]\.id", "LoRA 'sdxl/all' "),
        ({str(index): 1.0 for index in range(9)}, "loras", "there are 9, the maximum of this server is 8"),
    ],
)
def test_an_invalid_field_is_named(wanted: dict[str, float], field: str, reason: str, client: Client) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: .*{reason}"):
        client.transform(sample_image(64, 64), model="sd1", loras=wanted, **SETTINGS)


def test_duplicate_lora_is_refused() -> None:
    with pytest.raises(InvalidField, match=r"^loras\[1\]\.id: LoRA 'a' is also loras\[0\]"):
        check_loras(pb.TransformRequest(loras=[pb.Lora(id="a"), pb.Lora(id="a", scale=0.5)]))


def test_loras_are_listed(client: Client) -> None:
    listed = client.loras()
    assert [lora.id for lora in listed] == [
        f"{name}/{lora}" for name in ("sd1", "sdxl") for lora in ("all", "conv", "folder/one", "large", "text")
    ]
    assert all(lora.size > 1000 for lora in listed)


def test_server_without_lora_folder_reports_it(tmp_path: Path) -> None:
    with running(lambda: store(m=FakePipeline())) as server, Client(f"localhost:{server.port}") as client:
        assert client.loras() == ()
        with pytest.raises(InvalidRequest, match=r"^loras: this model takes no LoRAs: it needs LoRA graphs, and a server with"):
            client.transform(sample_image(64, 64), loras={"a": 1.0})


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(AdapterProblem, match=r"^is a pickle \(\.ckpt\), which can run code when read"):
        LoraFiles(tmp_path).find("a")


def test_a_file_is_read_once_for_its_digest_by_all_that_look_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser and every model have their own LoraFiles. A file that was replaced is another one."""
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or digest(file, name))  # type: ignore[func-returns-value]
    (tmp_path / "a.safetensors").write_bytes(b"one")
    first = LoraFiles(tmp_path).find("a")
    assert LoraFiles(tmp_path).find("a") == first
    assert len(read) == 1
    (tmp_path / "b").write_bytes(b"two")
    (tmp_path / "b").replace(tmp_path / "a.safetensors")
    assert LoraFiles(tmp_path).find("a").digest == hashlib.sha256(b"two").hexdigest()


def read(tensors: dict[str, torch.Tensor], kind: str, path: Path) -> list[str]:
    save_file(tensors, path)
    components = ("transformer", "text_encoder", "text_encoder_2", "vae")
    return [f"{layer.component}.{layer.module}" for layer in read_layers(path, kind, components, None)]


def pair(name: str, ins: int, outs: int, ends: tuple[str, str] = ("lora_down", "lora_up")) -> dict[str, torch.Tensor]:
    return {f"{name}.{ends[0]}.weight": torch.randn(2, ins), f"{name}.{ends[1]}.weight": torch.randn(outs, 2)}


FLUX, KLEIN, QWEN, Z = (f"{name}Pipeline" for name in ("FluxImg2Img", "Flux2Klein", "QwenImageImg2Img", "ZImageImg2Img"))


@pytest.mark.parametrize(
    ("kind", "name", "outs", "modules"),
    [
        (FLUX, "lora_unet_double_blocks_3_img_attn_qkv", 24, [f"transformer_blocks.3.attn.to_{part}" for part in "qkv"]),
        (FLUX, "diffusion_model.double_blocks.3.txt_mlp.0", 8, ["transformer_blocks.3.ff_context.net.0.proj"]),
        (FLUX, "lora_unet_img_in", 8, ["x_embedder"]),
        (FLUX, "lora_unet_vector_in_in_layer", 8, ["time_text_embed.text_embedder.linear_1"]),
        (KLEIN, "lora_unet_single_blocks_1_linear1", 8, ["single_transformer_blocks.1.attn.to_qkv_mlp_proj"]),
        (QWEN, "lora_unet_transformer_blocks_2_attn_add_k_proj", 8, ["transformer_blocks.2.attn.add_k_proj"]),
        (Z, "lora_unet_layers_0_attention_to_q", 8, ["layers.0.attention.to_q"]),
    ],
)
def test_trainer_layer_names_map_to_transformer_layer_names(
    kind: str, name: str, outs: int, modules: list[str], tmp_path: Path
) -> None:
    assert read(pair(name, 8, outs), kind, tmp_path / "a.safetensors") == [f"transformer.{module}" for module in modules]


def test_layers_that_diffusers_would_leave_out_are_refused_by_name(tmp_path: Path) -> None:
    """It drops the layers of a T5 without an error; zeros have no effect."""
    known = pair("lora_unet_double_blocks_0_img_attn_proj", 8, 8)
    t5 = pair("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 8, 8)
    with pytest.raises(AdapterProblem, match=r"^adapts lora_te3_encoder_block_0_layer_0_SelfAttention_q, which LoRAs for Flux"):
        read(known | t5, FLUX, tmp_path / "a.safetensors")
    zeros = {key: torch.zeros_like(value) for key, value in t5.items()}
    assert read(known | zeros, FLUX, tmp_path / "b.safetensors") == ["transformer.transformer_blocks.0.attn.to_out.0"]


@pytest.mark.parametrize("name", ["text_model.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"])
def test_clip_has_its_names_of_any_version_of_transformers(name: str, bundle: Get, tmp_path: Path) -> None:
    """Most files say text_model; the installed transformers has no such module in some of its classes."""
    tensors = pair(f"lora_te_{name.replace('.', '_')}", 32, 64)
    save_file(tensors, tmp_path / "clip.safetensors")
    load(bundle("sd1"), tmp_path).plan(requests(tmp_path, [(("clip", 1.0),)])[0])
