"""A NodeTool node that transforms an image on an img2img server, with the defaults of NodeTool's own ImageToImage."""

import os
from typing import ClassVar

from img2img_client import AsyncClient, Completed, ImagePrompt, Progress, TransformOptions, taken_options
from nodetool.metadata.types import ImageRef
from nodetool.workflows.base_node import BaseNode
from nodetool.workflows.processing_context import ProcessingContext
from nodetool.workflows.types import NodeProgress
from pydantic import Field


class Img2ImgServerTransform(BaseNode):
    """
    Transform an image with a text prompt on an img2img server.
    image, transformation, AI, image-to-image, i2i
    """

    _expose_as_tool: ClassVar[bool] = True

    image: ImageRef = Field(default=ImageRef(), description="Input image to transform")
    prompt: str = Field(
        default="A beautiful landscape with mountains and a lake at sunset",
        description="Text prompt describing the desired transformation",
    )
    negative_prompt: str = Field(default="", description="Text prompt describing what to avoid")
    strength: float = Field(default=0.8, gt=0.0, le=1.0, description="How far to leave the source")
    num_inference_steps: int = Field(default=25, ge=1, le=100, description="Steps of the whole schedule")
    guidance_scale: float = Field(
        default=7.5, ge=0.0, le=30.0, description="Classifier-free guidance; at 1 and below there is none"
    )
    seed: int = Field(default=-1, ge=-1, description="Seed of the image; -1 draws one")
    scheduler: str = Field(default="", description="Scheduler, such as DPM++ 2M Karras; empty for the model's own")
    model: str = Field(default="", description="Id of the model on the server; empty for the server's default")
    image_prompt: ImageRef = Field(default=ImageRef(), description="Image whose content and style the result takes over")
    image_adapter: str = Field(default="", description="IP-Adapter of the server that reads image_prompt; empty for none")
    image_prompt_scale: float = Field(default=1.0, ge=-10.0, le=10.0, description="Factor of the image prompt's effect")
    target: str = Field(default="localhost:50051", description="The server: host:port, or https://host:port for TLS")

    async def process(self, context: ProcessingContext) -> ImageRef:
        """The transformed image. Errors are img2img_client's, such as InvalidRequest."""
        source = await context.asset_to_bytes(self.image)
        token = os.environ.get("IMG2IMG_TOKEN")
        asked: TransformOptions = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "strength": self.strength,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "scheduler": self.scheduler or None,
            "model": self.model or None,
        }
        async with AsyncClient(self.target, token=token) as client:
            options = taken_options(asked, await client.models())  # models that edit have no strength
            if self.image_adapter:
                data = await context.asset_to_bytes(self.image_prompt)
                options["image_prompts"] = [ImagePrompt(self.image_adapter, [data], self.image_prompt_scale)]
            async with client.transform_stream(source, **options) as events:
                async for event in events:
                    if isinstance(event, Progress):
                        context.post_message(NodeProgress(node_id=self.id, progress=event.step, total=event.step_count))
                    if isinstance(event, Completed):
                        return await context.image_from_bytes(event.result.images[0].data)
        raise AssertionError("a stream ends with Completed or an error")

    @classmethod
    def get_basic_fields(cls) -> list[str]:
        """The fields that the node shows first."""
        return ["image", "prompt", "strength", "seed", "target"]
