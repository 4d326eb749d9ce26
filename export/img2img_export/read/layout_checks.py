"""Checks whether a directory or repository is complete and in diffusers' layout, by file names and configurations.

diffusers detects these problems late, with unspecific messages.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from img2img_export.errors import ExportError, first_line
from img2img_export.read.identify import CHANNELS, FLUX_CHANNELS, FLUX_CONTROL, FLUX_FILL, INPAINTING, PIX2PIX, refuse_kind
from img2img_export.read.texts import read_json
from img2img_export.read.weights_file import PICKLE_REASON, is_pickle, is_safetensors, read_header, refuse_pointer

INDEX_NAME = "model_index.json"

_DENOISERS = ("unet", "transformer")
_FLUX_PATCH = 4
"""Latents that become a token of Flux."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_COPY = "copy {what} from the original model"
_FOLDERS_OF_VAE = ("vae_encoder", "vae_decoder")
"""Optimum's folders for a VAE."""


def why_no_index(source: object, names: Iterable[str]) -> str:
    """The error message for a directory or repository with the files `names` and no model_index.json."""
    paths = [PurePosixPath(name) for name in names]
    folders = {path.parts[0] for path in paths if len(path.parts) > 1}
    inner = sorted({path.parts[0] for path in paths if len(path.parts) == 2 and path.name == INDEX_NAME})
    here = [path.name for path in paths if len(path.parts) == 1]
    start = f"{source} is not in diffusers' layout: it has no {INDEX_NAME}"
    if inner:
        return f"{start}, but {inner[0]}/ has one: choose that directory"
    if not folders.isdisjoint((*_DENOISERS, "vae", "text_encoder")):
        found = ", ".join(f"{folder}/" for folder in sorted(folders))
        advice = _COPY.format(what="it")
        return f"{start}, only {found}: {advice}; it names the pipeline's class and its components"
    if "config.json" in here:
        return (
            f"{start}, but a config.json: it is a component or a transformers model; choose the directory of the complete model"
        )
    if files := sorted(name for name in here if is_safetensors(name)):
        return f"{start}, but {files[0]}: for a complete model in one file, choose that file"
    if any(name.lower().endswith(".gguf") for name in here):
        return f"{start}, but a GGUF file, whose weights are quantized: choose the original safetensors model"
    if files := sorted(name for name in here if is_pickle(name)):
        return f"{start}, but {files[0]}: {PICKLE_REASON}"
    return start if here or folders else f"{source} is empty: it has no {INDEX_NAME}"


def refuse_incomplete(
    source: object, components: Mapping[str, tuple[str, str]], names: Iterable[str], wants_weights: bool
) -> None:
    """Raises ExportError if a component of model_index.json has no folder among the files `names`, or if required files are
    missing from it. `wants_weights`: weights are required too, not only configurations."""
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, slash, file = name.partition("/")
        if slash:
            folders.setdefault(folder, set()).add(file)
    for component, (_, kind) in components.items():
        present = folders.get(component, set())
        if not present and component == "vae" and folders.keys() >= set(_FOLDERS_OF_VAE):
            continue
        advice = _COPY.format(what=f"{component}/")
        if not present:
            raise ExportError(f"{source} has no folder {component}/, which {INDEX_NAME} lists (a {kind}): {advice}")
        if "Tokenizer" in kind and present.isdisjoint(_VOCABULARIES):
            raise ExportError(f"{source}: {component}/ has no vocabulary ({', '.join(_VOCABULARIES[:2])} or similar): {advice}")
        if kind.endswith("Scheduler") and present.isdisjoint(("scheduler_config.json", "config.json")):
            raise ExportError(f"{source}: {component}/ has no scheduler_config.json: {advice}")
        if wants_weights and "config.json" not in present and any(is_safetensors(name) or is_pickle(name) for name in present):
            raise ExportError(f"{source}: {component}/ has weights but no config.json: {_COPY.format(what='it')}")


def refuse_unreadable_files(directory: Path, files: Iterable[str]) -> None:
    """Raises ExportError for git-lfs pointers, damaged JSON and truncated weights among the files."""
    for name in files:
        path = directory / name
        refuse_pointer(path)
        if is_safetensors(name):
            read_header(path)
        elif name.endswith(".json"):
            try:
                read_json(path)
            except ValueError as error:
                raise ExportError(f"{path} is damaged: it is not JSON ({first_line(error)}); download or copy it again") from None


def refuse_configurations(directory: Path, pipeline_class: str, components: Iterable[str]) -> None:
    """Raises ExportError if a component in `directory` is quantized, or if the denoiser has extra inputs."""
    configs = {name: _config(directory / name / "config.json") for name in components}
    for name, config in configs.items():
        if (quantization := config.get("quantization_config")) is not None:
            kind = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
            method = f"{kind or 'an unknown method'} (quantization_config in its config.json)"
            raise ExportError(f"{directory / name} is quantized with {method}: export the model in fp16, bf16 or fp32")
    vae = configs.get("vae") or configs.get("movq") or {}
    unet, transformer = configs.get("unet", {}), configs.get("transformer", {})
    taken, latents = unet.get("in_channels"), vae.get("latent_channels")
    wanted = 2 * latents if pipeline_class == PIX2PIX and isinstance(latents, int) else latents
    if pipeline_class in INPAINTING and isinstance(latents, int) and taken == 2 * latents + 1:
        wanted = taken
    if isinstance(taken, int) and isinstance(wanted, int) and taken != wanted and taken in CHANNELS:
        refuse_kind(directory / "unet", CHANNELS[taken], taken)
    if isinstance(taken, int) and isinstance(wanted, int) and taken != wanted:
        given = f"{pipeline_class} provides {wanted}, since the VAE's latents have {latents}"
        raise ExportError(f"{directory / 'unet'} takes {taken} channels, but {given}: the two do not belong to one model")
    taken = transformer.get("in_channels")
    if pipeline_class == FLUX_FILL:
        return
    if pipeline_class in FLUX_CONTROL and isinstance(taken, int) and isinstance(latents, int):
        if taken != 2 * _FLUX_PATCH * latents:
            raise ExportError(
                f"{directory / 'transformer'} takes {taken} channels, but {pipeline_class} provides {2 * _FLUX_PATCH * latents}: "
                "the latents of an image and of a control image"
            )
        return
    if transformer.get("_class_name") == "FluxTransformer2DModel" and isinstance(taken, int) and taken in FLUX_CHANNELS:
        refuse_kind(directory / "transformer", FLUX_CHANNELS[taken], taken)


def own_class(directory: Path, pipeline_class: str) -> str:
    """The class of the model in `directory`: an ordinary model may have been saved by its inpainting pipeline, which has the same
    components."""
    vae, unet = (_config(directory / name / "config.json") for name in ("vae", "unet"))
    is_ordinary = unet.get("in_channels") == vae.get("latent_channels")
    return INPAINTING.get(pipeline_class, pipeline_class) if is_ordinary else pipeline_class


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = read_json(path)
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
