"""Two Vue components that NiceGUI does not provide; their JavaScript is beside this file."""

from collections.abc import Callable

from nicegui.element import Element
from nicegui.events import GenericEventArguments

from img2img_playground.images import FORMATS, MAX_BYTES


class ImageStage(Element, component="image_stage.js"):
    """Shows the source, with a preview over it, or a comparison of source and result with a slider."""

    def show(
        self, size: tuple[int, int], before: tuple[str, str], after: str = "", preview: str = "", *, busy: bool = False
    ) -> None:
        """`size` is in pixels; `before` is the source's address and name; `after` and `preview` are addresses."""
        wanted = {
            "width": size[0],
            "height": size[1],
            "before": before[0],
            "beforeName": before[1],
            "after": after,
            "preview": preview,
            "busy": busy,
        }
        if any(self.props.get(name) != value for name, value in wanted.items()):
            self.props.update(wanted)
            self.update()


class ImagePicker(Element, component="image_picker.js"):
    """Accepts an image and PUTs it to `url`. Calls `refused` with the file's name and size in bytes if it is too large, or with
    size -1 if the upload fails."""

    def __init__(self, url: str, refused: Callable[[str, int], None]) -> None:
        super().__init__()
        self.props.update(
            {
                "url": url,
                "accept": ",".join(f"image/{name.lower()}" for name in FORMATS),
                "mostBytes": MAX_BYTES,
                "compact": False,
                "hint": f"or paste an image, or choose a file. {', '.join(FORMATS)}, up to {MAX_BYTES // 2**20} MiB.",
            }
        )

        def on_refused(event: GenericEventArguments) -> None:
            refused(str(event.args["name"]), int(event.args["size"]))

        self.on("refused", on_refused)

    def show(self, *, compact: bool) -> None:
        """Shows a button if `compact` (there is an image), else a large drop area."""
        if self.props["compact"] != compact:
            self.props["compact"] = compact
            self.update()
