"""The inputs that graphs are compared with: PyTorch is exact with them, as a reference has to be."""

import copy
from types import SimpleNamespace

import numpy as np
import torch
from img2img_export.convert.parts import vae_parts
from img2img_export.verify.parity import make_cases
from img2img_export.verify.recorded_inputs import Recorder
from tiny_parts import vae


def test_reference_of_a_vae_is_exact_for_pixels_that_are_channels_last() -> None:
    """As diffusers' image processors make them. PyTorch's group normalization is then up to 1e-3 off: graphs were refused."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = vae(0.3611, channels=16, shift_factor=0.1159)
        model.encoder.conv_in.bias.add_(3.0)
        pixels = torch.rand(1, 384, 384, 3).permute(0, 3, 1, 2) * 2 - 1
        with Recorder(SimpleNamespace(vae=model), ("vae",)) as recorder:
            model.encode(pixels)
        encoder, _ = vae_parts(model)
        case, *_ = make_cases(encoder, model, recorder.calls["vae_encoder"])
        exact = copy.deepcopy(model).double().encode(pixels.double()).latent_dist.parameters.numpy()
    difference = np.linalg.norm(case.expected["latent_parameters"] - exact) / np.linalg.norm(exact)
    assert difference < 1e-5
