"""LiteLLM's proxy, configured as in docs/http.md, between OpenAI's client and the HTTP front."""

import contextlib
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import REPOSITORY
from fakes import FakePipeline
from granting import grant
from http_calls import PATIENCE, opened, port_of, serving
from img2img_server.support.model_fields import GUIDED, FieldRule
from kserve_calls import ending
from messages import png
from other_clients import HeldPipeline, blocks

DOCUMENT = REPOSITORY / "docs" / "http.md"
KEY = "sk-of-the-tests"
HELD = """\
  - model_name: held
    litellm_params:
      {model: openai/held, api_base: http://localhost:8000/v1, api_key: os.environ/IMG2IMG_TOKEN, timeout: 6, num_retries: 0}
"""


@dataclass(frozen=True, slots=True)
class Proxy:
    """The proxy's address, and the models behind it."""

    port: int
    demo: FakePipeline
    held: HeldPipeline

    def client(self, path: str = "/v1", key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}{path}", api_key=key, max_retries=0, timeout=PATIENCE)


@contextlib.contextmanager
def started(config: Path, token: str) -> Iterator[int]:
    """Runs the proxy, and yields its port."""
    variables = {"IMG2IMG_TOKEN": token, "LITELLM_MASTER_KEY": KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [os.environ["TESTS_LITELLM"], "--config", str(config), "--host", "127.0.0.1", "--port", "0"]
    log = []
    with subprocess.Popen(
        command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        reader = None
        try:
            for line in process.stdout:
                log.append(line)
                if found := re.search(r"Uvicorn running on http://127\.0\.0\.1:(\d+)", line):
                    # So that the pipe never fills.
                    reader = threading.Thread(target=process.stdout.read)
                    reader.start()
                    yield int(found[1])
                    return
            raise AssertionError(f"the proxy did not start: {''.join(log)}")
        finally:
            process.terminate()
            process.wait(PATIENCE)
            if reader is not None:
                reader.join(PATIENCE)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    folder = tmp_path_factory.mktemp("litellm")
    token = grant(folder / "tokens.toml", "litellm")
    demo, held = FakePipeline(), HeldPipeline()
    demo.fields = {**GUIDED, "reference_images": FieldRule()}
    (config,) = blocks(DOCUMENT, "yaml")
    config = config.replace("general_settings:", HELD + "general_settings:")
    with serving(pipelines={"demo": demo, "held": held}, tokens=folder / "tokens.toml") as server:
        (folder / "litellm.yaml").write_text(config.replace("localhost:8000", f"127.0.0.1:{port_of(server)}"))
        with started(folder / "litellm.yaml", token) as port:
            yield Proxy(port, demo, held)
        held.may_step.release(1000)


def test_edit_accepts_openai_fields_and_extensions(proxy: Proxy) -> None:
    with proxy.client() as client:
        assert [model.id for model in client.models.list()] == ["demo", "held"]
        more = {"seed": 7, "strength": 0.5, "num_inference_steps": 8, "negative_prompt": "fog", "guidance_scale": 3}
        result = client.images.edit(
            image=("lake.png", png()),
            prompt="a lake",
            model="demo",
            n=2,
            size="32x16",
            output_format="webp",
            output_compression=70,
            user="alice",
            extra_body=more,
        )
        assert result.data is not None
        images = [opened(one.b64_json) for one in result.data]
        assert [(image.format, image.size) for image in images] == [("WEBP", (32, 16))] * 2
        asked = proxy.demo.prepared[-1].request
        found = asked.prompt, asked.seeds, asked.strength, asked.num_inference_steps, asked.negative_prompt, asked.guidance_scale
        assert found == ("a lake", (7, 8), 0.5, 8, "fog", 3)
        client.images.edit(image=[png(), png()], prompt="both", model="demo")
        assert len(proxy.demo.prepared[-1].request.references) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"extra_body": {"strength": 3}}, r"strength: 3.0 is not in \(0, 1\]"),
        ({"extra_body": {"promt": "a lake"}}, "promt: unknown field"),
        ({"size": "1x1"}, "size: "),
        ({"mask": png()}, "does not take a mask"),
    ],
)
def test_errors_keep_their_status_and_text(proxy: Proxy, more: dict[str, Any], message: str) -> None:
    with proxy.client() as client, pytest.raises(openai.BadRequestError, match=message):
        client.images.edit(image=png(), prompt="a lake", model="demo", **more)


def test_pass_through_path_supports_streams_and_variations(proxy: Proxy) -> None:
    with proxy.client("/img2img/v1") as client:
        assert [model.id for model in client.models.list()] == ["demo", "held"]
        stream = client.images.edit(image=png(), prompt="a lake", model="demo", stream=True, partial_images=2)
        kinds = [event.type for event in stream]
        assert kinds.count("image_edit.partial_image") == 2
        assert kinds[-1] == "image_edit.completed"
        with pytest.warns(DeprecationWarning, match="deprecated"):
            result = client.images.create_variation(image=png(), model="demo", extra_body={"seed": 5})
        assert result.data is not None
        assert (result.data[0].model_extra or {})["seed"] == 5
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(image=png(), prompt="a lake", model="demo", extra_body={"strength": 3})
        assert (caught.value.param, caught.value.code) == ("strength", "INVALID_FIELD")


def test_proxy_timeout_frees_the_device(proxy: Proxy) -> None:
    began = threading.Event()
    proxy.held.before_call = began.set
    with ending() as proxy.held.calls, proxy.client() as client:
        with pytest.raises(openai.APIStatusError) as caught:
            client.images.edit(image=png(), prompt="a lake", model="held", extra_body={"num_inference_steps": 12})
        assert caught.value.status_code == 408
        assert began.is_set()
        assert proxy.held.end_of_call("edits") == "CANCELLED"


@pytest.mark.parametrize("path", ["/v1", "/img2img/v1"])
def test_unknown_proxy_key_reaches_no_model(proxy: Proxy, path: str) -> None:
    before = len(proxy.demo.prepared)
    with proxy.client(path, "sk-wrong") as client, pytest.raises(openai.APIStatusError) as caught:
        client.images.edit(image=png(), prompt="a lake", model="demo")
    assert 400 <= caught.value.status_code < 500
    assert len(proxy.demo.prepared) == before
