"""The origin of the images that leave the server: a record of each, in its file, and a C2PA manifest that the operator signs."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from img2img_server import images
from img2img_server.api.parsing import ParsedRequest
from img2img_server.config import ProvenanceSettings
from img2img_server.engine.request import UsedSpeedup
from img2img_server.images.provenance import DIGITAL_SOURCE_TYPE
from img2img_server.support import distribution
from img2img_server.support.fair_queue import FairThreads

_MEDIA_TYPES: dict[images.WriteFormat, str] = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}

_SIGNING = 2
"""Threads that sign."""

Sign = Callable[[bytes, images.WriteFormat], bytes]
"""An image file -> the same image with a signed C2PA manifest."""


class Provenance:
    """Marks images as the settings say.

    Raises ValueError for C2PA if the package is missing, or the certificate or the key cannot sign.
    """

    def __init__(self, settings: ProvenanceSettings) -> None:
        self._records = settings.mode != "none"
        self._sign: Sign | None = None
        self._threads = FairThreads(_SIGNING, "img2img-sign")
        if settings.certificate is not None and settings.key is not None:
            self._sign = _signer(settings.certificate, settings.key)

    def record(self, job: ParsedRequest, engine: str, seed: int, speedup: UsedSpeedup | None = None) -> str:
        """The record of the image of `seed`, a JSON object; empty if the settings want none. `engine` made the image, with a
        `speedup`."""
        if not self._records:
            return ""
        model, request = job.model, job.request
        assert model.manifest is not None, "a model that runs has a manifest"
        source = model.manifest.source
        width, height = request.result_size
        values: dict[str, Any] = {
            "img2img": distribution.version(),
            "model": model.id,
            "repo_id": source.repo_id,
            "revision": source.revision,
            "bundle_digest": model.manifest.digest,
            "engine": engine,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "strength": request.strength if "strength" in job.fields else None,
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance_scale if "guidance_scale" in job.fields else None,
            "true_cfg_scale": request.true_cfg_scale,
            "scheduler": request.scheduler,
            "seed": seed,
            "width": width,
            "height": height,
            "format": job.file_format.lower(),
            "quality": None if job.file_format == "PNG" else job.quality,
            "source_digest": request.image_digest.hex(),
            "source_asset": job.source_asset or None,
        }
        if request.loras:
            values["loras"] = [{"id": lora.id, "scale": lora.scale, "digest": lora.digest} for lora in request.loras]
        if not request.fidelity.is_exact:
            values["fidelity"] = str(request.fidelity)
            values["speedup"] = None if speedup is None else speedup.name
        if request.controls:
            values["controls"] = [
                {
                    "model": use.model,
                    "scale": use.scale,
                    "start": use.start,
                    "end": use.end,
                    **({} if use.mode is None else {"control_mode": use.mode}),
                    "bundle_digest": use.digest,
                    "digest": use.image_digest.hex(),
                    "asset": asset or None,
                }
                for use, asset in zip(request.controls, job.control_assets, strict=True)
            ]
        if request.image_prompts:
            values["image_prompts"] = [
                {
                    "adapter": use.adapter,
                    "scale": use.scale,
                    "digest": use.digest,
                    "encoder": use.encoder,
                    "encoder_digest": use.encoder_digest,
                    "images": [
                        {"digest": digest.hex(), "asset": asset or None}
                        for digest, asset in zip(use.image_digests, assets, strict=True)
                    ],
                }
                for use, assets in zip(request.image_prompts, job.prompt_assets, strict=True)
            ]
        if request.mask is not None and job.mask_rule is not None:
            values["mask"] = {
                **asdict(job.mask_rule),
                "paste": request.mask.paste,
                "digest": request.mask.digest.hex(),
                "asset": job.mask_asset or None,
            }
        if request.references:
            values["reference_digests"] = [digest.hex() for digest in request.reference_digests]
            values["reference_assets"] = [asset or None for asset in job.reference_assets]
        return json.dumps(values, ensure_ascii=False)

    async def sign(self, data: bytes, file_format: images.WriteFormat) -> bytes:
        """The file with a C2PA manifest if the settings want one, else the file itself."""
        return data if self._sign is None else await self._threads.run(self._sign, data, file_format)


def _signer(certificate: Path, key: Path) -> Sign:
    """Signs with these files, both in PEM. One image is signed at once, so that errors are found at start."""
    try:
        import c2pa  # type: ignore[import-untyped]
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
        from cryptography.x509 import load_pem_x509_certificates
    except ImportError:
        raise ValueError(f"provenance c2pa needs the package c2pa-python: {distribution.install_hint('c2pa')}") from None
    try:
        chain = certificate.read_text(encoding="ascii")
        private = key.read_text(encoding="ascii")
        public = load_pem_x509_certificates(chain.encode())[0].public_key()
    except (OSError, ValueError) as error:
        raise ValueError(f"c2pa_certificate {certificate} and c2pa_key {key} must be readable and in PEM: {error}") from None
    if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name in _CURVES:
        algorithm = _CURVES[public.curve.name]
    elif isinstance(public, ed25519.Ed25519PublicKey):
        algorithm = "ed25519"
    elif isinstance(public, rsa.RSAPublicKey):
        algorithm = "ps256"
    else:
        raise ValueError(f"c2pa_certificate {certificate}: its key must be ECDSA (P-256, P-384, P-521), Ed25519 or RSA")
    manifest = json.dumps(_manifest())
    info = c2pa.C2paSignerInfo(algorithm, chain.encode(), private.encode(), None)

    # A thumbnail would make small images eight times as large.
    context = c2pa.Context.from_dict({"builder": {"thumbnail": {"enabled": False}}})

    def sign(data: bytes, file_format: images.WriteFormat) -> bytes:
        signed = io.BytesIO()
        with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest, context) as builder:
            builder.sign(signer, _MEDIA_TYPES[file_format], io.BytesIO(data), signed)
        return signed.getvalue()

    try:
        sign(images.encode(Image.new("RGB", (8, 8)), "PNG", 100), "PNG")
    except c2pa.C2paError as error:
        raise ValueError(f"c2pa_certificate {certificate} and c2pa_key {key} cannot sign C2PA manifests: {error}") from None
    return sign


def _manifest() -> dict[str, Any]:
    agent = {"name": "img2img", "version": distribution.version()}
    created = {"action": "c2pa.created", "digitalSourceType": DIGITAL_SOURCE_TYPE, "softwareAgent": agent}
    return {"claim_generator_info": [agent], "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}]}
