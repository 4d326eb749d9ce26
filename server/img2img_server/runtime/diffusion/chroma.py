"""Chroma: the order of calls is that of ChromaImg2ImgPipeline.__call__."""

from img2img_server.engine.request import Request
from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.flux import AnyFlux
from img2img_server.runtime.schedulers.flow import FluxSchedulers
from img2img_server.support.source_rule import MaskUse


class Chroma(AnyFlux):
    """Flux with a negative prompt in place of CLIP and the input for guidance. Every text has as many tokens, with its padding,
    which the transformer reads."""

    scheduler_cache = FluxSchedulers
    mask_use: MaskUse = "optional"
    pooled_name = "prompt_mask"

    def _is_guided(self, request: Request) -> bool:
        return request.guidance_scale > 1

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        hidden_states, _, mask, *_ = self._pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        return Embedding.split(hidden_states, mask)
