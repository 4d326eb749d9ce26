"""Records the inputs of a pipeline's parts while it generates images; graphs are traced and compared with them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from img2img_server.bundle.manifest import is_text_encoder

from img2img_export.convert.parts import Tensors, bind, flatten

VAE = "vae"
_METHODS = {"encode": "vae_encoder", "decode": "vae_decoder"}
_NAMES = {"vae_encoder": "sample", "vae_decoder": "latent_sample"}


@dataclass(slots=True)
class Calls:
    """The calls of one part: the first and last of each size (all if `complete`), as tensors by name. `structure` is the first,
    not flattened."""

    structure: dict[str, Any]
    complete: bool = False
    by_shape: dict[tuple[Any, ...], list[Tensors]] = field(default_factory=dict)
    settings: dict[str, set[str]] = field(default_factory=dict)
    """The values of each non-tensor argument, as text."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """For a graph of tokens: the first call and the last of each size, only its first row."""
    states: set[int] = field(default_factory=set)
    """The indices of the hidden states that the pipeline read, from 0."""

    def add(self, tensors: Tensors) -> None:
        """Adds a call; unless `complete`, it replaces the last one of its size."""
        kept = self.by_shape.setdefault(tuple((name, tuple(value.shape)) for name, value in tensors.items()), [])
        if not self.complete:
            del kept[1:]
        kept.append(tensors)

    def add_row(self, row: dict[str, Any]) -> None:
        """Adds a call of one row; it replaces the last one of the same text and image."""
        same = [number for number, other in enumerate(self.rows) if _shapes(other) == _shapes(row)]
        if len(same) > 1:
            del self.rows[same[-1]]
        self.rows.append(row)

    def note(self, call: dict[str, Any]) -> None:
        """Records the non-tensor arguments, which a graph cannot have as inputs."""
        for name, value in call.items():
            if not isinstance(value, (torch.Tensor, Mapping)):
                self.settings.setdefault(name, set()).add(_text(value))

    @property
    def varying(self) -> list[str]:
        """The non-tensor arguments that had different values."""
        return [name for name, seen in self.settings.items() if len(seen) > 1]

    @property
    def has_images(self) -> bool:
        """Whether it is a text encoder that was called with images, too."""
        return isinstance(self.structure.get("pixel_values"), torch.Tensor)

    def all(self) -> list[Tensors]:
        """One call per size, only of calls with the same tensors as the first."""
        names = set(flatten(self.structure))
        return [kept[0] for kept in self.by_shape.values() if set(kept[0]) == names]

    def every(self) -> list[Tensors]:
        """Every recorded call, only of calls with the same tensors as the first."""
        names = set(flatten(self.structure))
        return [call for kept in self.by_shape.values() for call in kept if set(call) == names]

    def two_sizes(self) -> list[Tensors]:
        """The first call, and if there is one, a call whose first tensor differs in more than the number of rows."""
        first, *others = self.all()
        name = next(iter(first))
        return [first, *[call for call in others if call[name].shape[1:] != first[name].shape[1:]][:1]]


class Recorder:
    """Records the calls of the `components` of a diffusers pipeline within the block. A VAE has two parts.

    All calls of the parts `complete` are kept, of others the first and last of each size. `tokens` are components that become
    graphs of tokens, whose calls have lists and numbers besides tensors.
    """

    def __init__(
        self, pipeline: Any, components: tuple[str, ...], complete: tuple[str, ...] = (), tokens: tuple[str, ...] = ()
    ) -> None:
        self.calls: dict[str, Calls] = {}
        self._complete = complete
        self._tokens = tokens
        self._modules = {name: getattr(pipeline, name) for name in components}
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Recorder":
        for name, module in self._modules.items():
            if name == VAE:
                for method, part in _METHODS.items():
                    self._wrap(module, method, part)
            else:
                handle = module.register_forward_pre_hook(self._hook(name), with_kwargs=True, prepend=True)
                self._undo.append(handle.remove)
                if is_text_encoder(name):
                    self._undo.append(module.register_forward_hook(self._watch(name)).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()
        self._modules.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add(name, bind(module.forward, args, kwargs))

        return hook

    def _watch(self, name: str) -> Callable[..., None]:
        """A hook that records which hidden states of a text encoder's output are read."""

        def watch(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if getattr(output, "hidden_states", None) is not None:
                output.hidden_states = _ReadStates(output.hidden_states, self.calls[name].states)

        return watch

    def _wrap(self, vae: Any, method: str, part: str) -> None:
        function = getattr(vae, method)

        def wrapped(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            # A video's VAE takes an image as a video of one frame, and its graph the image.
            self._add(part, {_NAMES[part]: tensor[:, :, 0] if tensor.ndim == 5 else tensor})
            return function(tensor, *args, **kwargs)

        setattr(vae, method, wrapped)
        self._undo.append(lambda: delattr(vae, method))

    def _add(self, name: str, call: dict[str, Any]) -> None:
        if name in self._tokens:
            self.calls.setdefault(name, Calls({})).add_row(_first_row(call))
            return
        call = {key: _normal(key, value, call) for key, value in call.items()}
        # diffusers' pixels are channels last, which PyTorch's group normalization on the CPU sums inexactly.
        tensors = {key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in flatten(call).items()}
        calls = self.calls.setdefault(name, Calls(call, name in self._complete))
        calls.add(tensors)
        calls.note(call)


class _ReadStates(tuple[Any, ...]):
    """Hidden states that add an index to `read` when the state is read."""

    def __new__(cls, states: Iterable[Any], read: set[int]) -> Self:
        made = super().__new__(cls, states)
        made.read = read
        return made

    read: set[int]

    def __getitem__(self, index: Any) -> Any:
        self.read.update(range(len(self))[index] if isinstance(index, slice) else (range(len(self))[index],))
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def _text(value: Any) -> str:
    """The value as text. Of an object without a text of its own, which has its address, the class: addresses may be reused."""
    kind = type(value)
    has_none = vars(object)["__repr__"] is getattr(kind, "__repr__", None)
    return kind.__qualname__ if has_none else repr(value)


_WITHOUT_ROWS = ("img_ids", "txt_ids")
"""Arguments whose first axis may be that of tokens."""


def _first_row(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call for its first row alone, copied."""
    row: dict[str, Any] = {}
    for name, value in call.items():
        if isinstance(value, torch.Tensor):
            whole = name in _WITHOUT_ROWS and value.ndim == 2
            row[name] = (value if whole else value[:1]).detach().clone()
        elif isinstance(value, list):
            row[name] = [one.detach().clone() if isinstance(one, torch.Tensor) else one for one in value[:1]]
        else:
            row[name] = value
    return row


def _shapes(row: dict[str, Any]) -> list[tuple[int, ...]]:
    return [
        tuple(one.shape)
        for value in row.values()
        for one in (value if isinstance(value, list) else [value])
        if isinstance(one, torch.Tensor)
    ]


def _normal(name: str, value: Any, call: dict[str, Any]) -> Any:
    """Expands a timestep to one value per row, as graphs take it."""
    if name != "timestep":
        return value
    rows = len(next(iter(flatten(call).values())))
    return torch.as_tensor(value, dtype=torch.float32).reshape(-1).expand(rows).contiguous()
