"""Out of memory: the recognized errors, and the engine's reaction, on a fake pipeline whose steps the test makes."""

import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fakes import Caller, FakePipeline, make_engine, run_out
from img2img_server.engine.costs import Costs
from img2img_server.engine.scheduler import QueueLimits
from img2img_server.errors import OutOfMemory
from img2img_server.runtime.common import out_of_memory, torch_calls
from img2img_server.runtime.common.out_of_memory import is_out_of_memory
from img2img_server.runtime.common.torch_calls import host_call, torch_call
from onnx import TensorProto, helper
from PIL import Image

WIDE = Image.new("RGB", (16, 8))
PIXELS = 64


def rows_of_calls(pipeline: FakePipeline) -> list[int]:
    return [sum(len(state.request.seeds) for state in batch) for batch in pipeline.batches]


def test_batch_that_runs_out_of_memory_is_halved() -> None:
    engine, pipeline, _ = make_engine()
    callers = [Caller(engine).submit(num_inference_steps=3) for _ in range(4)]
    engine.step()
    pipeline.memory = 2 * PIXELS
    engine.step()
    assert rows_of_calls(pipeline) == [4, 2, 2], "no more calls than it takes"
    pipeline.memory = None
    run_out(engine)
    assert [caller.error for caller in callers] == [None] * 4
    assert [caller.steps for caller in callers] == [[1, 2, 3]] * 4


def test_memory_limit_applies_to_later_batches_of_any_shape() -> None:
    engine, pipeline, _ = make_engine()
    pipeline.memory = 6 * PIXELS
    for _ in range(8):
        Caller(engine).submit(num_inference_steps=4)
    run_out(engine)
    assert ("denoise", 8) in pipeline.refused
    pipeline.refused.clear()
    for image in (None, WIDE):
        for _ in range(6):
            Caller(engine).submit(num_inference_steps=4, **({} if image is None else {"image": image}))
        run_out(engine)
    assert "denoise" not in dict(pipeline.refused), "what had no room is not tried again"
    assert max(rows_of_calls(pipeline)) > 2, "and what has room goes on to be"


@pytest.mark.parametrize("where", ["prepare", "denoise", "finish"])
def test_request_that_exceeds_memory_alone_fails_without_side_effects(where: str) -> None:
    engine, pipeline, _ = make_engine()
    large = Caller(engine).submit(prompt=f"full {where}", seeds=(1, 2), image=WIDE)
    others = [Caller(engine).submit(image=WIDE) for _ in range(3)]
    run_out(engine)
    assert isinstance(large.error, OutOfMemory)
    assert (large.error.status, large.error.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
    assert "2 images of 16 x 8 pixels" in str(large.error)
    assert [other.error for other in others] == [None] * 3
    assert len(pipeline.released) == len(pipeline.prepared)
    later = Caller(engine).submit()
    run_out(engine)
    assert later.error is None


@pytest.mark.parametrize("stage", ["prepare", "finish"])
def test_encoding_and_decoding_are_split_on_out_of_memory(stage: str) -> None:
    """For requests that fit into one call of the model: a VAE may need more memory for an image than a step does."""
    engine, pipeline, _ = make_engine(QueueLimits(max_admitted=4))
    calls: list[int] = []

    def only_in(where: str, requests: object, rows: list[int]) -> None:
        if where == stage:
            calls.append(sum(rows))
            if sum(rows) > 2:
                raise OutOfMemory("the fake ran out of memory")

    pipeline._allocate = only_in  # type: ignore[method-assign, assignment]
    for _ in range(2):
        callers = [Caller(engine).submit(num_inference_steps=2) for _ in range(4)]
        run_out(engine)
        assert [caller.error for caller in callers] == [None] * 4
    assert calls == [4, 2, 2, 2, 2], "the second time it is known"


def test_batch_size_that_exceeded_memory_is_retried_rarely() -> None:
    """Memory may have been another's at that time. The price: one failing call among a thousand, and then fewer still."""
    costs, group = Costs(), ("m", "shape")
    caps, failures = [], 0
    for _ in range(4000):
        cap = costs.cap(group, PIXELS, 16)
        if cap > 11:
            costs.forbid("m", PIXELS, cap, largest=cap // 2)
            failures += 1
        else:
            caps.append(cap)
            costs.record("denoise", group, PIXELS, cap, 1.0)
    assert failures <= 3
    assert min(caps) == 8, "the first half has room"
    for _ in range(12000):
        costs.record("denoise", group, PIXELS, 8, 1.0)
    assert costs.cap(group, PIXELS, 16) == 16, "the memory came back, and so do large batches"


@pytest.mark.parametrize("arena", [True, False])
def test_onnx_runtime_out_of_memory_error_is_recognized(tmp_path: Path, arena: bool) -> None:
    """A real error, of a tensor of 4 TiB: its texts with an arena, as on CUDA, and without."""
    graph = helper.make_graph(
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        "large",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    path = tmp_path / "large.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), str(path))
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = arena
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    class Pipeline:
        threads = 1

        @torch_call
        def denoise(self, size: int) -> object:
            return session.run(None, {"x": np.ones(1, np.float32), "shape": np.array([size])})

    with pytest.raises(OutOfMemory):
        Pipeline().denoise(2**40)
    assert Pipeline().denoise(2), "it goes on"


def test_memory_of_a_failed_call_is_freed_before_the_next() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    class Pipeline:
        threads = 1

        @torch_call
        def denoise(self) -> torch.Tensor:
            latents = torch.zeros(4)
            held.append(weakref.ref(latents))
            return latents + torch.empty(2**50)

    with pytest.raises(OutOfMemory) as caught:
        Pipeline().denoise()
    assert held[0]() is None, "though the error is still at hand"
    assert "2**50" not in str(caught.value)


class Keeper:
    """A session that keeps device memory; one that belongs to the model `owner`."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.given_back = 0

    def give_back(self) -> None:
        self.given_back += 1


@pytest.fixture
def keepers(monkeypatch: pytest.MonkeyPatch) -> list[Keeper]:
    """Two pipelines of the model "a", one of "b", on a fake GPU."""
    made = [Keeper("a"), Keeper("a"), Keeper("b")]
    monkeypatch.setattr(out_of_memory, "KEEPERS", made)
    monkeypatch.setattr(out_of_memory, "_given_back", {})
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch_calls, "enter_stream", lambda: None)
    return made


class Short:
    """A pipeline of a model whose calls run out of memory `failures` times."""

    threads = 1

    def __init__(self, owner: str | None, failures: int) -> None:
        self.owner = owner
        self.failures = failures

    @torch_call
    def denoise(self) -> str:
        if self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "done"


def refused(pipeline: Short) -> bool:
    with pytest.raises(OutOfMemory) as caught:
        pipeline.denoise()
    return caught.value.again


@pytest.mark.parametrize(
    ("owner", "given", "again"),
    [
        ("a", [[1, 1, 0], [2, 2, 1], [3, 3, 2]], [True, True, False]),
        ("b", [[0, 0, 1], [1, 1, 2], [2, 2, 3]], [True, True, False]),
        ("has no sessions", [[0, 0, 0], [1, 1, 1], [2, 2, 2]], [True, True, False]),
        (None, [[1, 1, 1], [2, 2, 2]], [True, False]),
    ],
)
def test_failing_model_frees_memory_first_then_the_others(
    owner: str | None, given: list[list[int]], again: list[bool], keepers: list[Keeper]
) -> None:
    pipeline = Short(owner, len(given))
    for counts, worth in zip(given, again, strict=True):
        assert refused(pipeline) is worth
        assert [keeper.given_back for keeper in keepers] == counts
    assert pipeline.denoise() == "done"


def test_successful_call_resets_the_order_of_freeing_memory(keepers: list[Keeper]) -> None:
    for _ in range(3):
        pipeline = Short("a", 1)
        assert refused(pipeline)
        assert pipeline.denoise() == "done"
    assert [keeper.given_back for keeper in keepers] == [3, 3, 0]


def test_calls_of_another_model_do_not_reset_the_order_of_freeing(keepers: list[Keeper]) -> None:
    full, other = Short("a", 2), Short("b", 0)
    assert refused(full)
    assert other.denoise() == "done"
    assert refused(full)
    assert [keeper.given_back for keeper in keepers] == [2, 2, 1]


@pytest.mark.parametrize("where", ["prepare", "denoise", "advance", "finish"])
@pytest.mark.parametrize(("failures", "answered"), [(1, True), (2, True), (3, False)])
def test_call_is_retried_while_memory_is_being_freed(where: str, failures: int, answered: bool) -> None:
    engine, pipeline, _ = make_engine()
    left = failures

    def fail() -> None:
        nonlocal left
        if left:
            left -= 1
            error = OutOfMemory("the fake ran out of memory")
            error.again = left > 0 or failures < 3
            raise error

    pipeline.before[where] = fail
    caller = Caller(engine).submit(num_inference_steps=2)
    run_out(engine)
    assert (caller.error is None) == answered
    assert len(pipeline.released) == len(pipeline.prepared)
    later = Caller(engine).submit(num_inference_steps=2)
    run_out(engine)
    assert later.error is None


def test_thread_safe_methods_do_not_use_the_device(keepers: list[Keeper], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may be recording a call."""
    monkeypatch.setattr(torch_calls, "enter_stream", lambda: pytest.fail("it entered the stream"))

    class Pipeline:
        threads = 1

        @host_call
        def plan(self) -> None:
            raise MemoryError

    with pytest.raises(OutOfMemory):
        Pipeline().plan()
    assert [keeper.given_back for keeper in keepers] == [0, 0, 0]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA failure 2: out of memory ; GPU=0 ; hostname=h ; expr=cudaMalloc((void**)&p, size);",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0 ; expr=cublasCreate(&cublas_handle_);",
        "CUDNN failure 5003: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "Available memory of 1024 is smaller than requested bytes of 4096",
    ],
)
def test_cuda_out_of_memory_messages_are_recognized(message: str) -> None:
    """The texts are those of ONNX Runtime's and CUDA's sources: no GPU was asked."""
    assert is_out_of_memory(RuntimeError(message))


def test_other_errors_are_not_out_of_memory() -> None:
    for error in (RuntimeError("the sizes of tensors must match"), ValueError("memory"), FloatingPointError("not finite")):
        assert not is_out_of_memory(error)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
