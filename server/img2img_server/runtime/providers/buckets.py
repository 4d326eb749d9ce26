"""Graphs of fixed shapes for common sizes, and one graph for all other shapes, opened when calls need them.

A row's result depends on its image's size only, not on the rows beside it: all calls of a size that has graphs run in these. The
graph for any shape differs from them: in float32 in the last bits, in bfloat16 by 4 % of the demo UNet's output for random
inputs. Graphs of one size for different numbers of rows are used together only if they compute the same bits.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from img2img_server.errors import BundleError
from img2img_server.runtime.onnx.graph_sizes import Shapes
from img2img_server.runtime.onnx.providers import ERRORS
from img2img_server.runtime.onnx.runners import Later, Runner, dtype_of
from img2img_server.support.device_lock import is_measuring

_log = logging.getLogger(__name__)

Size = tuple[int, int]
"""Width and height of an image in pixels."""


class LaterRunner(Later[Runner]):
    """A runner that `open_runner` opens when it is first needed, on any thread. Its inputs and outputs are known before. It takes
    about `size` bytes of memory when it is open."""

    def __init__(self, inputs: Sequence[Any], outputs: Sequence[Any], open_runner: Callable[[], Runner], size: int = 0) -> None:
        super().__init__(open_runner)
        self.inputs = inputs
        self.outputs = outputs
        self._size = size

    @property
    def opened_bytes(self) -> int:
        """The memory that it takes, about."""
        return self._size if self.opened is not None else 0

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs the graph."""
        return self.get().run(feed)


class RowGraphs:
    """Graphs of one size for different numbers of rows, the first axis of all inputs and outputs. `base` has `rows` and is open;
    `later` has functions that open others, by their rows, or raise BundleError; each takes about `size` bytes of memory.

    A call runs in parts: in the graph of most rows as often as it can, then in that of fewer rows; what is left is filled up with
    copies of its last row. A call that others would divide better opens them in the background, on a thread of their own, and
    runs in the open ones. In warm-up and other measurements it waits for them.
    """

    def __init__(self, name: str, rows: int, base: Runner, later: Mapping[int, Callable[[], Runner]], size: int = 0) -> None:
        self._name = name
        self._size = size
        self._base_rows = rows
        self._base = base
        self._open: dict[int, Runner] = {rows: base}
        self._later = dict(later)
        self._known = frozenset((rows, *later))
        self._threads: dict[int, threading.Thread] = {}
        self._lock = threading.Lock()

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs a call of any number of rows."""
        count = len(next(iter(feed.values())))
        for rows in divided(count, self._known):
            self._want(rows)
        graphs = self._open
        results, start = [], 0
        for rows in divided(count, graphs):
            results.append(graphs[rows].run({name: _part(tensor, start, rows) for name, tensor in feed.items()}))
            start += rows
        if start == count and len(results) == 1:
            return results[0]
        return [torch.cat(pieces)[:count] for pieces in zip(*results, strict=True)]

    @property
    def opened_bytes(self) -> int:
        """The memory of the graphs that were opened later, about."""
        return self._size * (len(self._open) - 1)

    def open_all(self) -> None:
        """Opens the other graphs."""
        for rows in self._known:
            self._want(rows)

    def _want(self, rows: int) -> None:
        """Begins to open the graph of so many rows, unless that was done before."""
        if rows in self._open:
            return
        with self._lock:
            if (opening := self._later.pop(rows, None)) is not None:
                # Not a daemon: OpenVINO aborts the process if it ends meanwhile.
                thread = threading.Thread(target=self._add, args=(rows, opening), name="img2img-graph", daemon=False)
                self._threads[rows] = thread
                thread.start()
        if is_measuring():
            self._threads[rows].join()

    def _add(self, rows: int, opening: Callable[[], Runner]) -> None:
        begun = time.monotonic()
        try:
            runner = opening()
            equal = self._equals_base(rows, runner)
        except (*ERRORS, BundleError, RuntimeError) as error:
            _log.info("%s: no graph for calls of %s: %s", self._name, _rows(rows), str(error).splitlines()[0])
            return
        if not equal:
            why = f"its results differ from those of the graph of {_rows(self._base_rows)}"
            _log.info("%s: no graph for calls of %s: %s", self._name, _rows(rows), why)
            return
        self._open = {**self._open, rows: runner}  # calls on other threads read it
        _log.info("%s: the graph for calls of %s was opened in %.1f s", self._name, _rows(rows), time.monotonic() - begun)

    def _equals_base(self, rows: int, runner: Runner) -> bool:
        """Whether the graph computes the same bits as the base, for random inputs."""
        generator = torch.Generator().manual_seed(0)
        feed = {}
        for item in runner.inputs:
            dtype = dtype_of(item)
            made = torch.randn(item.shape, generator=generator) if dtype.is_floating_point else torch.zeros(item.shape)
            feed[item.name] = made.to(dtype)
        alone = RowGraphs(self._name, self._base_rows, self._base, {})
        return all(map(torch.equal, runner.run(feed), alone.run(feed)))


class BucketRunner:
    """A runner for any shape, and graphs for some sizes of images.

    `by_row` has graphs by the shapes of their inputs without the first axis, which is the rows. `exact` has runners of whole
    shapes, for graphs with another first axis. `by_size` has the graphs of `by_row` by the images' sizes.
    """

    def __init__(
        self,
        any_shape: LaterRunner,
        by_row: Mapping[Shapes, RowGraphs],
        exact: Mapping[Shapes, Runner],
        by_size: Mapping[Size, RowGraphs],
    ) -> None:
        self._any_shape = any_shape
        self._by_row = by_row
        self._exact = exact
        self._by_size = by_size
        self.inputs: Sequence[Any] = any_shape.inputs
        self.outputs: Sequence[Any] = any_shape.outputs
        self._names = [item.name for item in self.inputs]

    def open_for(self, width: int, height: int) -> None:
        """Opens the graph for any shape if calls for images of this size need it; before measurements, all graphs of the size."""
        graphs = self._by_size.get((width, height))
        if graphs is None:
            self._any_shape.get()
        elif is_measuring():
            graphs.open_all()

    @property
    def opened_bytes(self) -> int:
        """The memory of the graphs that were opened later, about."""
        return self._any_shape.opened_bytes + sum(graphs.opened_bytes for graphs in self._by_row.values())

    def run(self, feed: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Runs the graph on CPU tensors."""
        shapes = tuple(tuple(feed[name].shape) for name in self._names)
        if (exact := self._exact.get(shapes)) is not None:
            return exact.run(feed)
        of_size = self._by_row.get(of_one_row(shapes))
        if of_size is not None and len({shape[0] for shape in shapes}) == 1:
            return of_size.run({name: feed[name] for name in self._names})
        return self._any_shape.run(feed)


def divided(count: int, sizes: Iterable[int]) -> list[int]:
    """The numbers of rows of the graphs that `count` rows run in, of those in `sizes`. The last may have more rows than are
    left."""
    parts: list[int] = []
    for rows in sorted(sizes, reverse=True):
        parts += [rows] * (count // rows)
        count %= rows
    return [*parts, min(sizes)] if count else parts


def of_one_row(shapes: Shapes) -> Shapes:
    """The shapes without their first axis."""
    return tuple(shape[1:] for shape in shapes)


def _part(tensor: torch.Tensor, start: int, rows: int) -> torch.Tensor:
    """The rows from `start` on; copies of the last one follow if there are fewer."""
    part = tensor[start : start + rows]
    missing = rows - len(part)
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"
