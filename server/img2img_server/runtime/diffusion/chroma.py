"""Chroma: the order of calls is that of ChromaImg2ImgPipeline.__call__."""

from img2img_server.runtime.diffusion.conditioning import Embedding
from img2img_server.runtime.diffusion.flux import AnyFlux
from img2img_server.runtime.schedulers.flow import FluxSchedulers
from img2img_server.support.source_rule import MaskUse


class Chroma(AnyFlux):
    """Flux with a negative prompt instead of CLIP's embedding and the guidance input. All texts have the same number of tokens:
    the transformer also reads the padding."""

    scheduler_cache = FluxSchedulers
    mask_use: MaskUse = "optional"
    pooled_name = "prompt_mask"

    def _encode_texts(self, texts: list[str]) -> list[Embedding]:
        hidden_states, _, mask, *_ = self._pipe.encode_prompt(texts, do_classifier_free_guidance=False)
        return Embedding.split(hidden_states, mask)
