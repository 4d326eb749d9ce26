"""The documents that `kubectl kustomize` would make of deploy/kubernetes, without kubectl.

Unknown keys of a kustomization are errors, so nothing is ignored silently.
"""

from pathlib import Path
from typing import Any

import yaml
from conftest import REPOSITORY

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"

_KNOWN = {"apiVersion", "kind", "namespace", "resources", "components", "configMapGenerator", "patches", "images"}
_NAMES = {"containers": "name", "env": "name", "volumes": "name", "volumeMounts": "mountPath", "ports": "containerPort"}
"""The key by which the elements of a list are matched when a patch is merged into it. Other lists are replaced."""

Document = dict[str, Any]


def build(folder: Path, components: tuple[str, ...] = ()) -> list[Document]:
    """The documents of a kustomization, with these components beside its own; generated names have no digest here."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if unknown := kustomization.keys() - _KNOWN:
        raise ValueError(f"{folder}: what {sorted(unknown)} do is not known here")
    documents: list[Document] = []
    for name in kustomization.get("resources", ()):
        path = folder / name
        documents += build(path) if path.is_dir() else read(path)
    for generated in kustomization.get("configMapGenerator", ()):
        data = {name: (folder / name).read_text(encoding="utf-8") for name in generated["files"]}
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": generated["name"]}, "data": data})
    folders = [folder / name for name in kustomization.get("components", ())]
    for component in (*folders, *(KUBERNETES / "components" / name for name in components)):
        inner = yaml.safe_load((component / "kustomization.yaml").read_text(encoding="utf-8"))
        documents += [document for name in inner.get("resources", ()) for document in read(component / name)]
        _patch(documents, component, inner)
    _patch(documents, folder, kustomization)
    for document in documents:
        if "namespace" in kustomization and document["kind"] != "Namespace":
            document["metadata"]["namespace"] = kustomization["namespace"]
    return documents


def read(path: Path) -> list[Document]:
    """The documents of a file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def _patch(documents: list[Document], folder: Path, kustomization: Document) -> None:
    for patch in kustomization.get("patches", ()):
        (change,) = read(folder / patch["path"])
        (target,) = (
            one for one in documents if (one["kind"], one["metadata"]["name"]) == (change["kind"], change["metadata"]["name"])
        )
        documents[documents.index(target)] = _merged(target, change)
    for image in kustomization.get("images", ()):
        for document in documents:
            if document["kind"] == "Deployment":
                for container in document["spec"]["template"]["spec"]["containers"]:
                    if container["image"] == image["name"]:
                        container["image"] = f"{image['newName']}:{image['newTag']}"


def _merged(into: Any, change: Any, key: str = "") -> Any:
    """A strategic merge: null takes away, elements that bear the same name are merged."""
    if isinstance(into, dict) and isinstance(change, dict):
        merged = {name: value for name, value in into.items() if change.get(name, ...) is not None}
        for name, value in change.items():
            if value is not None:
                merged[name] = _merged(into.get(name), value, name)
        return merged
    if isinstance(into, list) and isinstance(change, list) and key in _NAMES:
        by = _NAMES[key]
        named = {element[by]: element for element in into}
        return list((named | {one[by]: _merged(named.get(one[by]), one) for one in change}).values())
    return change
