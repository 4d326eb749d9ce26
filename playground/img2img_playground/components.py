"""Elements that NiceGUI does not provide: two Vue components, whose JavaScript is beside this file, and a thumbnail."""

from collections.abc import Callable

from nicegui import ui
from nicegui.element import Element
from nicegui.events import GenericEventArguments

from img2img_playground.images import FORMATS, MAX_BYTES, ImageFile


class ImageStage(Element, component="image_stage.js"):
    """Shows the source, with a preview over it, or a comparison of source and result with a slider."""

    def __init__(self, mask_url: str) -> None:
        """`mask_url` is where a drawn mask is PUT."""
        super().__init__()
        self.props["maskUrl"] = mask_url

    def show(
        self,
        size: tuple[int, int],
        before: tuple[str, str],
        after: str = "",
        preview: str = "",
        *,
        mask: str | None = None,
        busy: bool = False,
    ) -> None:
        """`size` is in pixels; `before` is the source's address and name; `after` and `preview` are addresses. `mask` is the
        mask's address, "" if there is none, None if none can be drawn."""
        wanted = {
            "width": size[0],
            "height": size[1],
            "before": before[0],
            "beforeName": before[1],
            "after": after,
            "preview": preview,
            "masking": mask is not None,
            "mask": mask or "",
            "busy": busy,
        }
        if any(self.props.get(name) != value for name, value in wanted.items()):
            self.props.update(wanted)
            self.update()


class ImagePicker(Element, component="image_picker.js"):
    """Accepts an image and PUTs it to `url`. Calls `refused` with the file's name and size in bytes if it is too large, or with
    size -1 if the upload fails. `label` is that of its button; `everywhere`: it also takes dropped and pasted images; `multiple`:
    it takes several images at once, and PUTs them in turn."""

    def __init__(
        self, url: str, refused: Callable[[str, int], None], label: str, *, everywhere: bool, multiple: bool = False
    ) -> None:
        super().__init__()
        self.props.update(
            {
                "url": url,
                "accept": ",".join(f"image/{name.lower()}" for name in FORMATS),
                "mostBytes": MAX_BYTES,
                "compact": not everywhere,
                "label": label,
                "everywhere": everywhere,
                "multiple": multiple,
                "hint": f"or paste an image, or choose a file. {', '.join(FORMATS)}, up to {MAX_BYTES // 2**20} MiB.",
            }
        )

        def on_refused(event: GenericEventArguments) -> None:
            refused(str(event.args["name"]), int(event.args["size"]))

        self.on("refused", on_refused)

    def send_to(self, url: str) -> None:
        """PUTs images to another address from now on."""
        self.props["url"] = url
        self.update()

    def show(self, *, compact: bool) -> None:
        """Shows a button if `compact` (there is an image), else a large drop area."""
        if self.props["compact"] != compact:
            self.props["compact"] = compact
            self.update()


def thumbnail(image: ImageFile, address: Callable[[str], str], remove: Callable[[ImageFile], None]) -> None:
    """Adds the image to the element that is being built. `address` maps its id to its address."""
    with ui.element("div").classes("reference"):
        ui.element("img").props.update({"src": address(image.id), "alt": image.name})
        button = ui.button(icon="close", on_click=lambda: remove(image)).props("flat round dense")
        button.props["aria-label"] = f"Remove {image.name}"
