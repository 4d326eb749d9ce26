"""The two parts of the page that the library does not have, each a small Vue component beside this file."""

from collections.abc import Callable

from nicegui.element import Element
from nicegui.events import GenericEventArguments

from img2img_playground.pictures import FORMATS, MAX_BYTES


class PictureStage(Element, component="picture_stage.js"):
    """Shows the source alone, with a preview over it, or beside the result, with a slider between them."""

    def show(
        self, size: tuple[int, int], before: tuple[str, str], after: str = "", preview: str = "", *, busy: bool = False
    ) -> None:
        """`size` is of what is shown, in pixels; `before` the source's address and name; `after` and `preview` are addresses."""
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


class PicturePicker(Element, component="picture_picker.js"):
    """Takes an image and PUTs it to `url`. `refused` is called with a file's name and its bytes, -1 where it was not that."""

    def __init__(self, url: str, refused: Callable[[str, int], None]) -> None:
        super().__init__()
        self.props.update(
            {
                "url": url,
                "accept": ",".join(f"image/{name.lower()}" for name in FORMATS),
                "mostBytes": MAX_BYTES,
                "compact": False,
                "hint": f"or paste one, or choose a file. {', '.join(FORMATS)}, up to {MAX_BYTES // 2**20} MiB.",
            }
        )

        def tell(event: GenericEventArguments) -> None:
            refused(str(event.args["name"]), int(event.args["size"]))

        self.on("refused", tell)

    def show(self, *, compact: bool) -> None:
        """A button, where there is an image already, or a large place to drop one."""
        if self.props["compact"] != compact:
            self.props["compact"] = compact
            self.update()
