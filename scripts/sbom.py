"""The Python part of `scripts/sbom`: converts a serving lock to a CycloneDX bill of materials with licences."""

import argparse
import functools
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import ExternalReference, ExternalReferenceType, HashAlgorithm, HashType, XsUri
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output.json import JsonV1Dot6
from img2img_server.support.distribution import NAME
from packageurl import PackageURL
from serving_lock import EXTRAS, ROOT, needs_of, pins, read

if TYPE_CHECKING:
    from cyclonedx.validation.json import JsonStrictValidator

_EPILOG = """\
examples:
  scripts/sbom cpu --output img2img-cpu.cdx.json
  scripts/sbom cuda --ray | jq .

Each package has its version, package URL, SHA-256 of its files, dependencies, and, if it is installed here, its declared licence
(CUDA's libraries are not installed). The base image's Debian packages are not included: use an image scanner such as syft.
"""


def bill(image: str, ray: bool = False) -> Bom:
    """The packages of a container image by its lock, as dependencies of img2img. Raises KeyError for an unknown image."""
    text = read(image) + (read("ray") if ray else "")
    extras = (*EXTRAS[image], *(("ray",) if ray else ()))
    components = {name: _component(name, version, text) for name, version in pins(text).items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bom = Bom(components=components.values())
    bom.metadata.component = Component(
        name=NAME,
        version=project["version"],
        type=ComponentType.APPLICATION,
        bom_ref=NAME,
        description=project["description"],
    )
    bom.register_dependency(bom.metadata.component, _known(components, needs_of(NAME, extras)))
    for name, component in components.items():
        bom.register_dependency(component, _known(components, needs_of(name, ())))
    return bom


def _component(name: str, version: str, lock: str) -> Component:
    block = re.search(rf"^{re.escape(name)}==.*\\\n(?:    --hash=.*\n?)+", lock, re.MULTILINE)
    hashes = re.findall(r"sha256:([0-9a-f]{64})", block[0]) if block else []
    files = ExternalReference(
        type=ExternalReferenceType.DISTRIBUTION,
        url=XsUri(f"https://pypi.org/project/{name}/"),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=content) for content in hashes],
    )
    return Component(
        name=name,
        version=version,
        type=ComponentType.LIBRARY,
        bom_ref=name,
        purl=PackageURL("pypi", name=name, version=version),
        external_references=[files],
        licenses=_licences(name),
    )


def _licences(name: str) -> "list[License]":
    """The declared licence of an installed package: an SPDX expression, or else its classifiers."""
    try:
        about = metadata.metadata(name).json
    except metadata.PackageNotFoundError:
        return []
    if "license_expression" in about:
        return [LicenseFactory().make_from_string(str(about["license_expression"]))]
    classifiers = [one.rpartition(" :: ")[2] for one in about.get("classifier", ()) if one.startswith("License :: ")]
    named = str(about.get("license", "")).strip()
    if classifiers:
        return [LicenseFactory().make_with_name(one) for one in classifiers]
    return [LicenseFactory().make_from_string(named)] if named and "\n" not in named else []


def _known(components: dict[str, Component], names: Iterable[str]) -> list[Component]:
    return [components[name] for name in sorted(set(names)) if name in components]


def as_json(bom: Bom) -> str:
    """The bill as CycloneDX 1.6. Raises ValueError if it does not match the schema."""
    text = JsonV1Dot6(bom).output_as_string(indent=2)
    error = _validator().validate_str(text)
    if error is not None:
        raise ValueError(f"the bill of materials is not valid: {error}")
    return text


@functools.cache
def _validator() -> "JsonStrictValidator":
    """The schema validator, cached and imported here, since each takes a second or two."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6)


def main() -> int:
    """Writes the bill. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="scripts/sbom",
        description="Writes the Python packages of a serving container image as CycloneDX JSON.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", choices=tuple(EXTRAS), help="container image")
    parser.add_argument("--ray", action="store_true", help="include the packages of the extra ray")
    parser.add_argument("--output", type=Path, metavar="FILE", help="output file (default: standard output)")
    arguments = parser.parse_args()
    bom = bill(arguments.image, arguments.ray)
    text = as_json(bom)
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text + "\n", encoding="utf-8")
    silent = sum(1 for component in bom.components if not component.licenses)
    print(f"sbom: {len(bom.components)} packages, {silent} without a known licence", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
