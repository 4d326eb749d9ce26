"""Compares the two graphs of a text encoder that sees images with transformers' whole module."""

from collections.abc import Sequence
from typing import Any

import torch
from img2img_server.runtime.onnx.vision import FEATURES, TOWER, places

from img2img_export.convert.parts import Part, Tensors
from img2img_export.convert.seeing import CLASSES, language_part, tower_part
from img2img_export.errors import ExportError
from img2img_export.verify.parity import Case
from img2img_export.verify.recorded_inputs import Calls

_GRIDS = ((4, 6), (10, 26), (34, 8))
"""Height and width of random images in patches: within one window, in parts of windows, and in several."""


def described(name: str, module: Any, calls: Calls) -> tuple[Part, Tensors, list[Case]]:
    """The graph `name`, inputs to trace it with, and its comparisons; the module must compute in fp32. Raises ExportError for
    a module of another class, and if the pipeline reads no hidden states."""
    if type(module).__name__ not in CLASSES:
        raise ExportError(f"{name} is a {type(module).__name__}; of text encoders that see images img2img exports {CLASSES[0]}")
    if not calls.states:
        raise ExportError(f"{name}: img2img exports hidden states, and the pipeline reads none")
    generator = torch.Generator().manual_seed(0)
    recorded = [call for kept in calls.by_shape.values() for call in kept if "pixel_values" in call]
    real, scale = recorded[0], recorded[0]["pixel_values"].std()
    if name == TOWER:
        part = tower_part(module)
        cases = [_tower_case(part, module, "real", real)]
        cases += [
            _tower_case(part, module, f"random, {h} x {w}", _random(module, [[(h, w)]], scale, generator)) for h, w in _GRIDS
        ]
        return part, cases[2].inputs, cases
    made = {
        "random, one image": _random(module, [_GRIDS[:1]], scale, generator),
        "random, other numbers of images": _random(module, [_GRIDS[:1], _GRIDS[1:]], scale, generator),
        "random, three rows": _random(module, [[grid] for grid in _GRIDS], scale, generator),
    }
    part = language_part(name, module, sorted(calls.states))
    cases = [_text_case(part, module, text, call) for text, call in {"real": real, **made}.items()]
    return part, cases[2].inputs, cases


def _random(module: Any, rows: Sequence[Sequence[tuple[int, int]]], scale: torch.Tensor, generator: torch.Generator) -> Tensors:
    """A call with rows of random tokens around images of these grids, padded before the text, after it, and not at all."""
    config, vision = module.config, module.config.vision_config
    merge = vision.spatial_merge_size
    known = min(config.image_token_id, config.video_token_id, config.get_text_config().vocab_size)
    texts = []
    for number, grids in enumerate(rows):
        parts = [torch.randint(3, known, (5 + number,), generator=generator)]
        for height, width in grids:
            parts.append(torch.full((height * width // merge**2,), config.image_token_id))
            parts.append(torch.randint(3, known, (3,), generator=generator))
        texts.append(torch.cat(parts))
    longest = max(map(len, texts))
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    for number, text in enumerate(texts):
        start = longest - len(text) if number == 0 else 0
        ids[number, start : start + len(text)], mask[number, start : start + len(text)] = text, 1
    grids = [grid for row in rows for grid in row]
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(sum(height * width for height, width in grids), size, generator=generator) * scale
    return {
        "input_ids": ids, "attention_mask": mask, "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, *grid] for grid in grids]),
    }  # fmt: skip


def _features(module: Any, call: Tensors) -> torch.Tensor:
    found = module.model.get_image_features(call["pixel_values"], call["image_grid_thw"], return_dict=True).pooler_output
    return torch.cat(list(found))


def _tower_case(part: Part, module: Any, name: str, call: Tensors) -> Case:
    """The comparison for the call's first image."""
    _, height, width = call["image_grid_thw"][0].tolist()
    first = {"pixel_values": call["pixel_values"][: height * width], "image_grid_thw": call["image_grid_thw"][:1]}
    with torch.no_grad():
        expected = _features(module, first)
    config = module.config.vision_config.to_dict()
    inputs = {"pixel_values": first["pixel_values"], **places(config, height, width)}
    return Case(f"{name}, {height} x {width} patches", inputs, {FEATURES: expected.float().numpy()}, name != "real")


def _text_case(part: Part, module: Any, name: str, call: Tensors) -> Case:
    with torch.no_grad():
        found = module.base_model(**call, output_hidden_states=True, use_cache=False).hidden_states
        features = _features(module, call)
    states = {output: found[int(output.rpartition(".")[2])].float().numpy() for output in part.outputs}
    inputs = {"input_ids": call["input_ids"], "attention_mask": call["attention_mask"], FEATURES: features}
    return Case(f"{name}, {call['input_ids'].shape[1]} tokens", inputs, states, name != "real")
