"""Companions: models of one graph, which requests to other models use. The name of their family is that of their component.

Standard library only: the exporter imports this module, too.
"""

from img2img_server.bundle import controls, image_encoders

FAMILIES = {
    controls.FAMILY: "a ControlNet, which other models' requests name in controls",
    image_encoders.FAMILY: "an image encoder, which other models' requests with image prompts use",
}
"""The families of companions, and what they are, for messages."""
