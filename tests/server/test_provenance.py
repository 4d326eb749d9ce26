"""Provenance of images: the record in each file, and reproducing an image from its file."""

import datetime
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import c2pa  # type: ignore[import-untyped]
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from fake_image_service import image_bytes
from fakes import FakePipeline
from img2img.v1 import image_to_image_pb2 as pb
from img2img_cli.__main__ import main
from img2img_client import Client, ImageFormat, ImageInput, read_provenance
from img2img_server import images
from img2img_server.config import MAX_PROMPT, AssetSettings, ProvenanceSettings
from img2img_server.images.provenance import DIGITAL_SOURCE_TYPE, parameters
from img2img_server.sources.reading import asset_of
from PIL import Image
from running import RunningServer, running, store

OPTIONS: dict[str, Any] = {
    "prompt": 'a lake, "deep" & <blue>\nat night \U0001f319',
    "negative_prompt": "blurry",
    "strength": 0.6,
    "num_inference_steps": 5,
    "guidance_scale": 4.5,
    "seed": 12,
}
FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    assets = AssetSettings(url=str(tmp_path_factory.mktemp("assets")))
    with running(lambda: store(m=FakePipeline()), assets=assets) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Any:
    with Client(f"127.0.0.1:{server.port}", timeout=60) as client:
        yield client


@pytest.mark.parametrize("format_", FORMATS)
def test_each_image_has_its_record(client: Client, format_: ImageFormat) -> None:
    result = client.transform(image_bytes(size=(32, 16)), format=format_, quality=80, image_count=2, **OPTIONS)
    records = [read_provenance(image.data) for image in result.images]
    assert [record and record["seed"] for record in records] == [12, 13]
    record = records[0]
    assert record is not None
    for name in ("prompt", "negative_prompt", "strength", "num_inference_steps", "guidance_scale"):
        assert record[name] == OPTIONS[name]
    assert (record["model"], record["repo_id"], record["revision"], record["engine"]) == ("m", "acme/m", "r1", "fake:cpu")
    assert (record["width"], record["height"], record["format"]) == (32, 16, format_)
    assert record["quality"] == (None if format_ == "png" else 80)
    assert re.fullmatch("[0-9a-f]{64}", record["bundle_digest"])
    assert record["source_asset"] is None


def test_png_parameters_are_in_the_form_of_automatic1111(client: Client) -> None:
    data = client.transform(image_bytes(size=(32, 16)), **OPTIONS).images[0].data
    text = Image.open(io.BytesIO(data)).info["parameters"]
    prompt, negative, settings = re.fullmatch(r"(.*)\nNegative prompt: (.*)\n(Steps: .*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    assert (prompt, negative) == (OPTIONS["prompt"], "blurry")
    pairs = dict(re.findall(r'(\w[\w ]+): ("(?:\\.|[^"])*"|[^,]*)(?:, |$)', settings))  # as the web UI reads it
    assert (pairs["Steps"], pairs["CFG scale"], pairs["Seed"]) == ("5", "4.5", "12")
    assert (pairs["Size"], pairs["Denoising strength"], pairs["Model"]) == ("32x16", "0.6", "m")


@pytest.mark.parametrize("format_", ["jpeg", "webp"])
def test_xmp_names_the_digital_source_type_and_is_well_formed(client: Client, format_: ImageFormat) -> None:
    from xml.etree import ElementTree

    data = client.transform(image_bytes(size=(32, 16)), format=format_, **OPTIONS).images[0].data
    packet = Image.open(io.BytesIO(data)).info["xmp"]
    root = ElementTree.fromstring(packet)
    assert DIGITAL_SOURCE_TYPE in [element.text for element in root.iter()]


@pytest.mark.parametrize("letter", ["&", "<", '"', "\x01", "\0", "\x85", "\ufffe", "\U0001f319", "]", "\\", "\r"])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_record_holds_prompts_of_maximum_length_in_any_script(file_format: images.WriteFormat, letter: str) -> None:
    values = record(prompt=letter * MAX_PROMPT, negative_prompt=letter * MAX_PROMPT)
    data = images.encode(Image.new("RGB", (8, 8)), file_format, 90, json.dumps(values, ensure_ascii=False))
    assert read_provenance(data) == values


def test_missing_record_is_distinguished_from_a_damaged_one() -> None:
    assert read_provenance(image_bytes()) is None
    with pytest.raises(ValueError, match="cannot be read"):
        read_provenance(b"no image")
    for text in ("[1]", "{", "[" * 100_000):
        with pytest.raises(ValueError, match="damaged"):
            read_provenance(_png_with(text))


def test_mode_none_writes_no_record() -> None:
    with (
        running(lambda: store(m=FakePipeline()), provenance=ProvenanceSettings("none")) as server,
        Client(f"127.0.0.1:{server.port}") as client,
    ):
        for format_ in FORMATS:
            image = Image.open(io.BytesIO(client.transform(image_bytes(size=(32, 16)), format=format_).images[0].data))
            image.load()
            assert not {"img2img", "parameters", "xmp"} & set(image.info)


@pytest.mark.parametrize("format_", FORMATS)
def test_reproduce_makes_the_same_image_from_file_and_source(
    server: RunningServer, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_: ImageFormat
) -> None:
    source, file = tmp_path / "source.png", tmp_path / "result"
    source.write_bytes(image_bytes("green", (32, 16)))
    file.write_bytes(client.transform(source, format=format_, **OPTIONS).images[0].data)
    again = tmp_path / "again"
    assert reproduce(server, file, "--image", str(source), "--output", str(again), "--max-difference", "0") == 0
    assert capsys.readouterr().out == "identical\n"
    assert again.read_bytes() == file.read_bytes()


def test_reproduce_reads_the_source_from_the_assets(
    server: RunningServer, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asset = client.upload(image_bytes("red", (16, 16)))
    sources: tuple[ImageInput, ...] = (asset, asset.uri)
    for number, source in enumerate(sources):
        file = tmp_path / f"{number}.png"
        file.write_bytes(client.transform(source, **OPTIONS).images[0].data)
        assert reproduce(server, file) == 0
        assert capsys.readouterr().out == "identical\n"


@pytest.mark.parametrize(
    ("source", "asset"),
    [
        (pb.ImageSource(asset_id="ab"), "ab"),
        (pb.ImageSource(uri="asset:ab"), "ab"),
        (pb.ImageSource(uri="ASSET:ab"), "ab"),
        (pb.ImageSource(uri="https://example.org/asset:ab"), ""),
        (pb.ImageSource(data=b"asset:ab"), ""),
    ],
)
def test_asset_source_is_recognized_by_field_or_uri(source: pb.ImageSource, asset: str) -> None:
    assert asset_of(source) == asset


def test_reproduce_reports_the_difference_for_another_source(
    server: RunningServer, client: Client, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other = tmp_path / "result.png", tmp_path / "other.png"
    file.write_bytes(client.transform(image_bytes("black", (16, 16)), **OPTIONS).images[0].data)
    other.write_bytes(image_bytes("white", (16, 16)))
    assert reproduce(server, file, "--image", str(other), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["largest"] > 0
    assert told["psnr"] is not None
    assert "the source image is not the one that was used" in told["notes"][0]
    assert reproduce(server, file, "--image", str(other), "--max-difference", "3") == 1
    assert "the limit is 3" in capsys.readouterr().err


def test_reproduce_names_missing_inputs(server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, bare, odd = tmp_path / "plain.png", tmp_path / "bare.png", tmp_path / "odd.png"
    plain.write_bytes(image_bytes())
    bare.write_bytes(_png_with(json.dumps(record())))
    odd.write_bytes(_png_with(json.dumps(record(seed="7"))))
    cases = ((plain, (), "no img2img record"), (bare, (), "--image SOURCE"), (odd, ("--image", str(plain)), "seed is '7'"))
    for file, flags, message in cases:
        assert reproduce(server, file, *flags) == 2
        assert message in capsys.readouterr().err


def test_c2pa_manifests_are_valid_and_cover_the_record(tmp_path: Path) -> None:
    settings = ProvenanceSettings("c2pa", *certificate(tmp_path, ec.generate_private_key(ec.SECP256R1())))
    with running(lambda: store(m=FakePipeline()), provenance=settings) as server, Client(f"127.0.0.1:{server.port}") as client:
        for format_ in FORMATS:
            data = client.transform(image_bytes(size=(32, 16)), format=format_, **OPTIONS).images[0].data
            told = validate(data, format_)
            assert told["validation_state"] == "Valid"
            assert DIGITAL_SOURCE_TYPE in json.dumps(told)
            saved = read_provenance(data)
            assert saved is not None
            assert saved["seed"] == 12
            assert validate(data.replace(b'"seed": 12', b'"seed": 13'), format_)["validation_state"] == "Invalid"


@pytest.mark.parametrize(
    "key",
    [ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate(), rsa.generate_private_key(65537, 2048)],
    ids=["p384", "ed25519", "rsa"],
)
def test_every_supported_key_type_can_sign(tmp_path: Path, key: Any) -> None:
    from img2img_server.api.provenance import Provenance

    Provenance(ProvenanceSettings("c2pa", *certificate(tmp_path, key)))


def test_unusable_signing_files_are_refused_at_start(tmp_path: Path) -> None:
    from img2img_server.api.provenance import Provenance

    chain, key = certificate(tmp_path, ec.generate_private_key(ec.SECP256R1()))
    other = certificate(_folder(tmp_path / "other"), ec.generate_private_key(ec.SECP256R1()))[1]
    server_only, server_key = certificate(
        _folder(tmp_path / "tls"), ec.generate_private_key(ec.SECP256R1()), ExtendedKeyUsageOID.SERVER_AUTH
    )
    curve = certificate(_folder(tmp_path / "curve"), ec.generate_private_key(ec.SECP256K1()))
    for files in ((chain, other), (key, key), (chain, tmp_path / "none.pem"), (server_only, server_key), curve):
        with pytest.raises(ValueError, match="c2pa_certificate"):
            Provenance(ProvenanceSettings("c2pa", *files))
    for settings in ({"mode": "c2pa"}, {"mode": "c2pa", "key": key}, {"mode": "text", "certificate": chain, "key": key}):
        with pytest.raises(ValueError, match="c2pa_certificate and c2pa_key"):
            ProvenanceSettings(**settings)


def test_parameters_omit_unset_fields() -> None:
    text = parameters(record(negative_prompt=None, scheduler=None))
    assert "Negative prompt" not in text
    assert "Sampler" not in text
    assert 'Sampler: "DPM++ 2M, Karras"' in parameters(record(scheduler="DPM++ 2M, Karras"))


def record(**values: object) -> Mapping[str, Any]:
    """A record as the server writes it."""
    return {
        "img2img": "1.0", "model": "m", "repo_id": None, "revision": None, "bundle_digest": "0" * 64, "engine": "fake:cpu",
        "prompt": "a lake", "negative_prompt": None, "strength": 0.8, "num_inference_steps": 25, "guidance_scale": 7.5,
        "scheduler": None, "seed": 1, "width": 8, "height": 8, "format": "png", "quality": None, "source_digest": "",
        "source_asset": None, **values,
    }  # fmt: skip


def reproduce(server: RunningServer, file: Path, *flags: str) -> int:
    return main(["reproduce", str(file), "--target", f"127.0.0.1:{server.port}", *flags])


def validate(data: bytes, format_: ImageFormat) -> dict[str, Any]:
    with c2pa.Reader(f"image/{format_}", io.BytesIO(data)) as reader:
        return {**json.loads(reader.json()), "validation_state": reader.get_validation_state()}


def certificate(folder: Path, key: Any, usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION) -> tuple[Path, Path]:
    """A chain of two for `key`, and the key, in PEM."""
    now, pem = datetime.datetime.now(datetime.UTC), serialization.Encoding.PEM
    root_key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(root_key.public_key())
    signed = []
    for name, public, authority, usages in (
        ("signer", key.public_key(), False, x509.KeyUsage(True, False, False, False, False, False, False, False, False)),
        ("root", root_key.public_key(), True, x509.KeyUsage(True, False, False, False, False, True, False, False, False)),
    ):
        subject, issuer = (
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Acme")])
            for text in (name, "root")
        )
        builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number(), now, now + datetime.timedelta(9))
        builder = builder.add_extension(x509.BasicConstraints(authority, None), True).add_extension(usages, True)
        builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), False)
        if authority:
            builder = builder.add_extension(identifier, False)
        else:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
        signed.append(builder.sign(root_key, hashes.SHA256()).public_bytes(pem))
    chain, private = folder / "chain.pem", folder / "key.pem"
    chain.write_bytes(b"".join(signed))
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return chain, private


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _png_with(text: str) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    info.add_itxt("img2img", text)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=info)
    return file.getvalue()
