"""Companions: models of one graph, which requests to other models use. The name of their family is that of their component.

Standard library only: the exporter imports this module, too.
"""

from img2img_server.bundle import controls, image_encoders

NAMES = {controls.FAMILY: "a ControlNet", image_encoders.FAMILY: "an image encoder"}
"""The families of companions, with their names for messages."""
FAMILIES = {
    controls.FAMILY: f"{NAMES[controls.FAMILY]}, which other models' requests name in controls",
    image_encoders.FAMILY: f"{NAMES[image_encoders.FAMILY]}, which other models' requests with image prompts use",
}
"""The families of companions, with a description for messages."""
