"""A small image with a button that removes it."""

from collections.abc import Callable

from nicegui import ui

from img2img_playground.images import ImageFile


def thumbnail(image: ImageFile, address: Callable[[str], str], remove: Callable[[ImageFile], None]) -> None:
    """Adds the image to the element that is being built. `address` maps its id to its address."""
    with ui.element("div").classes("reference"):
        ui.element("img").props.update({"src": address(image.id), "alt": image.name})
        button = ui.button(icon="close", on_click=lambda: remove(image)).props("flat round dense")
        button.props["aria-label"] = f"Remove {image.name}"
