"""The output of `img2img transform`: files, standard output, or assets on the server."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from img2img_client.values import FORMAT_OF_SUFFIX, ImageFormat, Progress, TransformEvent, TransformResult


@dataclass(frozen=True, slots=True)
class Output:
    """The destination of the images: `path` None is standard output, or the server if `as_asset`. `format` None is the server's
    default."""

    path: Path | None
    count: int
    format: ImageFormat | None
    as_asset: bool = False

    def paths(self, count: int) -> tuple[Path, ...]:
        """The files of `count` images: OUT for one, numbered from 1 for several."""
        if self.path is None:
            return ()
        if count == 1:
            return (self.path,)
        return tuple(self.path.with_stem(f"{self.path.stem}-{number}") for number in range(1, count + 1))

    def check_writable(self) -> None:
        """Raises OSError if a file cannot be opened for writing. Existing files are not changed."""
        for path in self.paths(self.count):
            existed = path.exists()
            path.open("ab").close()
            if not existed:
                path.unlink()

    def write_preview(self, event: TransformEvent) -> None:
        """Writes an event's preview, if any, beside the image."""
        if self.path is not None and isinstance(event, Progress) and event.preview is not None:
            number = str(event.step).zfill(len(str(event.step_count)))
            self.path.with_name(f"{self.path.stem}-step-{number}.jpg").write_bytes(event.preview)

    def write(self, result: TransformResult) -> tuple[str, ...]:
        """Writes the images. Returns the place of each: a file, "standard output" or an asset's address."""
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
    """The destination and format. Raises ValueError for contradicting flags before the server is called."""
    count = max(1, arguments.image_count or 1)
    if arguments.as_asset:
        if arguments.preview_every:
            raise ValueError("--preview-every writes files beside OUT and cannot be combined with --as-asset: use --output FILE")
        return Output(None, count, arguments.format, as_asset=True)
    if arguments.output == "-":
        if count > 1:
            raise ValueError("--output - writes a single image: use --output FILE for an --image-count above 1")
        if arguments.json:
            raise ValueError("--output - and --json both write to standard output: use --output FILE")
        if arguments.preview_every:
            raise ValueError("--preview-every writes files beside OUT and cannot be combined with --output -: use --output FILE")
        return Output(None, count, arguments.format)
    path = Path(arguments.output)
    expected = FORMAT_OF_SUFFIX.get(path.suffix.lower())
    if expected is None and arguments.format is None:
        raise ValueError(f"--output {path}: the name must end in {', '.join(FORMAT_OF_SUFFIX)}, or --format must be given")
    if expected is not None and arguments.format not in (None, expected):
        raise ValueError(f"--output {path}: the suffix means {expected}, but --format is {arguments.format}")
    return Output(path, count, arguments.format or expected)
