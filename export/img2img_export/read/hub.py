"""Downloads from the Hugging Face hub: only the files that will be read, chosen before any is fetched.

A partial file in the hub's cache has a name that ends in .incomplete. huggingface_hub resumes a file if the connection breaks; a
later run downloads only the incomplete files. Progress is the size of the partial file, because huggingface_hub reports progress
only to its own bars.
"""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from img2img_export.errors import ExportError, first_line
from img2img_export.progress import Advance, Progress
from img2img_export.read.checkpoint import CONFIG_NAME, INDEX_NAME, is_component, names_below, read_index
from img2img_export.read.layout_checks import why_no_index

Choose = Callable[[Any, list[str]], list[str]]
"""Which files to fetch, by the contents of model_index.json (a component's config.json) and the names of all files."""

_ACCESS = "for a gated repository, request access on its page, then set HF_TOKEN or run `hf auth login`"
_WATCH_SECONDS = 0.5


def download(repo_id: str, revision: str | None, choose: Choose, progress: Progress) -> tuple[Path, list[str]]:
    """Fetches files of a repository into the hub's cache. Returns their directory and the names of the files in it.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE work as in huggingface_hub; offline, only the cache is used. Raises
    ExportError if the repository or its files are not available.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    http = sys.modules[HTTPError.__module__]  # httpx, or httpx2 from huggingface_hub 2 on

    try:
        if constants.HF_HUB_OFFLINE:
            # Requests the index only: files that an earlier run did not choose are not in the cache.
            snapshot = Path(
                snapshot_download(repo_id, revision=revision, allow_patterns=[INDEX_NAME, CONFIG_NAME], local_files_only=True)
            )
            return snapshot, names_below(snapshot)
        found = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        names = [sibling.rfilename for sibling in found.siblings or ()]
        if INDEX_NAME not in names and not is_component(names):
            raise ExportError(why_no_index(repo_id, names))
        index_name = CONFIG_NAME if is_component(names) else INDEX_NAME
        index = read_index(Path(hf_hub_download(repo_id, index_name, revision=found.sha)))
        files = choose(index, names)
        _fetch(found, [sibling for sibling in found.siblings if sibling.rfilename in files], progress)
        # By the requested revision, not the commit, so that the cache can resolve the revision offline.
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=files)), files
    except (http.ConnectError, http.ConnectTimeout):
        raise ExportError(f"{repo_id} is not a local directory, and the hub cannot be reached at {constants.ENDPOINT}") from None
    except (http.NetworkError, http.TimeoutException, http.RemoteProtocolError) as error:
        raise ExportError(
            f"the download of {repo_id} was interrupted ({first_line(error)}): run the same command again to resume it"
        ) from None
    except (HTTPError, http.InvalidURL, HFValidationError, LocalEntryNotFoundError) as error:
        if (status := _status(error)) in (401, 403):
            raise ExportError(
                f"the hub refuses access to {repo_id} ({status}): it does not exist, is private or is gated; {_ACCESS}"
            ) from None
        reason = first_line(error)
        raise ExportError(f"{repo_id} is not a local directory and could not be downloaded: {reason}") from None


def _fetch(found: Any, siblings: list[Any], progress: Progress) -> None:
    """Downloads files one at a time, so that an interrupted download stops at once with one incomplete file."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=found.id, repo_type="model"), "blobs")
    total = sum(sibling.size or 0 for sibling in siblings)
    with _without_bars(), progress.task(f"downloading {found.id}", total) as advance:
        for sibling in siblings:
            blob = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            with _watched(blobs, blob, sibling.size or 0, advance):
                hf_hub_download(found.id, sibling.rfilename, revision=found.sha)


@contextlib.contextmanager
def _watched(blobs: Path, blob: str, size: int, advance: Advance) -> Iterator[None]:
    """Reports the growth of the file `blob`, of `size` bytes, to `advance` from a thread, and the rest at the end.

    The file is BLOB.incomplete, or BLOB.RANDOM.incomplete in newer releases of huggingface_hub. Stale files of the latter kind,
    left by a killed process, are not counted.
    """
    reported, over = 0, threading.Event()
    stale = set(blobs.glob(f"{blob}.*.incomplete"))

    def written() -> int:
        growing = {*blobs.glob(f"{blob}*.incomplete")} - stale
        return max((path.stat().st_size for path in growing), default=0)

    def report() -> None:
        nonlocal reported
        while not over.wait(_WATCH_SECONDS):
            with contextlib.suppress(FileNotFoundError):
                now = max(reported, min(written(), size))
                advance(now - reported)
                reported = now

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    advance(size - reported)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Disables huggingface_hub's progress bars within the block."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _status(error: Exception) -> int | None:
    """The HTTP status of an error of huggingface_hub or of its cause, else None."""
    response = getattr(error, "response", None)
    if response is None:
        response = getattr(error.__cause__, "response", None)
    return None if response is None else int(response.status_code)
