"""The reference images: thumbnails that can be removed, and a picker, for models that take them."""

from collections.abc import Callable

from nicegui import ui

from img2img_playground.components import ImagePicker, thumbnail
from img2img_playground.images import ImageFile
from img2img_playground.session import Session


class ReferenceList:
    """`upload` is where images are PUT; `address` maps an image's id to its address; `remove` removes one."""

    def __init__(
        self,
        upload: str,
        address: Callable[[str], str],
        refused: Callable[[str, int], None],
        remove: Callable[[ImageFile], None],
    ) -> None:
        self._address, self._remove = address, remove
        self._shown: tuple[ImageFile, ...] = ()
        with ui.element("div").classes("references").props('role=group aria-label="Reference images"') as self._box:
            self._hint = ui.label().classes("control-hint")
            self._row = ui.element("div").classes("reference-row")
            self._picker = ImagePicker(upload, refused, "Add a reference", everywhere=False)

    def show(self, session: Session) -> None:
        """Shows the session's references if its model takes them."""
        most, images = session.most_references, session.extras.references
        self._box.set_visibility(most > 0)
        self._hint.text = f"Reference images, up to {most}: an object, a style, a person"
        self._picker.set_visibility(len(images) < most)
        if images != self._shown:
            self._shown = images
            self._row.clear()
            with self._row:
                for image in images:
                    thumbnail(image, self._address, self._remove)
