"""Downloading a model of the Hugging Face hub: only the files that will be read, chosen before any is fetched."""

from pathlib import Path

from img2img_export.checkpoint import INDEX_NAME, choose, names_below, read_index
from img2img_export.errors import ExportError, first_line
from img2img_export.options import ExportOptions


def download(options: ExportOptions) -> tuple[Path, list[str]]:
    """Fetches the files of `options.source` into the hub's cache: their directory, and the names of the repository's files.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to huggingface_hub. Offline, what the cache holds is
    taken. Raises ExportError where the repository or its files cannot be had.
    """
    import requests
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo_id = options.source
    try:
        if constants.HF_HUB_OFFLINE:
            snapshot = Path(snapshot_download(repo_id, revision=options.revision, local_files_only=True))
            return snapshot, names_below(snapshot)
        found = HfApi().model_info(repo_id, revision=options.revision)
        names = [sibling.rfilename for sibling in found.siblings or ()]
        if INDEX_NAME not in names:
            raise ExportError(f"{repo_id} is not in diffusers' layout: it has no {INDEX_NAME}")
        index = read_index(Path(hf_hub_download(repo_id, INDEX_NAME, revision=found.sha)))
        _, files = choose(index, names, options)
        # By the name that was asked for, not the commit: so the cache knows the name, too, when it is asked offline.
        return Path(snapshot_download(repo_id, revision=options.revision, allow_patterns=files)), files
    except requests.ConnectionError:
        raise ExportError(f"{repo_id} is no directory here, and the hub cannot be reached at {constants.ENDPOINT}") from None
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, requests.RequestException) as error:
        reason = first_line(error)
        raise ExportError(f"{repo_id} could not be downloaded (no such directory here either): {reason}") from None
