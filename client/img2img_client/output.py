"""Where `img2img transform` puts images: files, standard output, or the server, which keeps them."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from img2img_client.values import FORMAT_OF_SUFFIX, ImageFormat, Progress, TransformEvent, TransformResult


@dataclass(frozen=True, slots=True)
class Output:
    """Where the images go: `path` None is standard output, or the server where `as_asset`. `format` None leaves it to the
    server."""

    path: Path | None
    count: int
    format: ImageFormat | None
    as_asset: bool = False

    def paths(self, count: int) -> tuple[Path, ...]:
        """The files of so many images: OUT itself for one, numbered from 1 for more."""
        if self.path is None:
            return ()
        if count == 1:
            return (self.path,)
        return tuple(self.path.with_stem(f"{self.path.stem}-{number}") for number in range(1, count + 1))

    def check_writable(self) -> None:
        """OSError where a file cannot be written, found by opening it. What is there already stays as it is."""
        for path in self.paths(self.count):
            existed = path.exists()
            path.open("ab").close()
            if not existed:
                path.unlink()

    def write_preview(self, event: TransformEvent) -> None:
        """Writes an event's preview, if it has one, beside the image."""
        if self.path is not None and isinstance(event, Progress) and event.preview is not None:
            number = str(event.step).zfill(len(str(event.step_count)))
            self.path.with_name(f"{self.path.stem}-step-{number}.jpg").write_bytes(event.preview)

    def write(self, result: TransformResult) -> tuple[str, ...]:
        """Writes the images, and returns where each is: files, "standard output" or addresses of assets."""
        if self.as_asset:
            return tuple(f"asset:{image.asset_id}" for image in result.images)
        paths = self.paths(len(result.images))
        for path, image in zip(paths, result.images, strict=False):
            path.write_bytes(image.data)
        if self.path is None:
            sys.stdout.buffer.write(result.images[0].data)
            sys.stdout.buffer.flush()
            return ("standard output",)
        return tuple(map(str, paths))


def plan_output(arguments: argparse.Namespace) -> Output:
    """Where to write and in which format. ValueError for what cannot work, before anything is asked of the server."""
    count = max(1, arguments.image_count or 1)
    if arguments.as_asset:
        if arguments.preview_every:
            raise ValueError("--as-asset: --preview-every writes beside OUT, so give --output FILE instead")
        return Output(None, count, arguments.format, as_asset=True)
    if arguments.output == "-":
        if count > 1:
            raise ValueError("--output -: standard output takes one picture, not --image-count of them")
        if arguments.json:
            raise ValueError("--output -: the picture and --json cannot both go to standard output")
        if arguments.preview_every:
            raise ValueError("--output -: --preview-every writes beside OUT, so OUT must be a file")
        return Output(None, count, arguments.format)
    path = Path(arguments.output)
    promised = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if promised is None and arguments.format is None:
        raise ValueError(f"--output {path}: its name should end in {', '.join(FORMAT_OF_SUFFIX)}, or give --format")
    if promised is not None and arguments.format not in (None, promised):
        raise ValueError(f"--output {path}: its name says {promised}, --format says {arguments.format}")
    return Output(path, count, arguments.format or promised)
