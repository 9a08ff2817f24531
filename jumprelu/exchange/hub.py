"""Files of one repository on the Hugging Face hub: which there are, and a local copy of one.

Notable here:
- huggingface_hub does the work: it asks again after HTTP 429 and 5xx (and waits as long as the hub
  says), goes on with a broken download by a Range request, compares lengths, and renames a file
  into the cache only when it is whole. Added here is what it leaves out: a second try when the
  place where the bytes lie answers 5xx or breaks off a connection.
- without network, the files in the cache stand for the repository, and a warning says so.
- errors are those of :func:`jumprelu.lm.hub_access`; none repeats a token.
"""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

from huggingface_hub import HfApi, errors, snapshot_download
from huggingface_hub.hf_api import RepoFile

from ..lm import hub_access

log = logging.getLogger(__name__)

WAITS = (1.0, 4.0, 16.0)
"""Seconds before the second, third and fourth try of a download."""


def list_files(repo: str, revision: str | None = None) -> list[str]:
    """Paths of all files of a model repository; where the hub cannot be reached, of those in the
    cache, with a warning.

    revision: branch, tag or commit, by default main. Raises PermissionError, FileNotFoundError or
    ConnectionError as :func:`jumprelu.lm.hub_access` does, the last only if nothing of the
    repository is in the cache.
    """
    try:
        with hub_access(repo):
            return [
                item.path
                for item in HfApi().list_repo_tree(repo, recursive=True, revision=revision)
                if isinstance(item, RepoFile)
            ]
    except ConnectionError:
        folder = _cached_folder(repo, revision)
        if folder is None:
            raise
        warnings.warn(
            f"the hub cannot be reached: only what is in the cache of {repo} can be chosen from",
            stacklevel=2,
        )
        return sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
        )


def fetch(repo: str, path: str, revision: str | None = None) -> Path:
    """The file `path` of a model repository, downloaded to the cache unless it is there; its local
    path.

    Raises PermissionError, FileNotFoundError or ConnectionError as :func:`jumprelu.lm.hub_access`
    does.
    """
    with hub_access(repo):
        for wait in WAITS:
            try:
                return Path(HfApi().hf_hub_download(repo, path, revision=revision))
            except Exception as error:
                if not _passing(error):
                    raise
                log.warning(
                    "the download of %s of %s broke off (%s): again in %g s",
                    path,
                    repo,
                    type(error).__name__,
                    wait,
                )
                time.sleep(wait)
        return Path(HfApi().hf_hub_download(repo, path, revision=revision))


def _passing(error: Exception) -> bool:
    """Whether an error of a download may be gone at the next try: 5xx, or a connection that broke
    off."""
    if isinstance(error, errors.HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return type(error).__name__ in (
        "ReadError",
        "RemoteProtocolError",
    ) or "Consistency check failed" in str(error)


def _cached_folder(repo: str, revision: str | None) -> Path | None:
    """Where the cache has files of this revision, not necessarily all; None without any."""
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except (
        errors.LocalEntryNotFoundError
    ) as error:  # with a path, where some files are there and some are known to lack
        path = getattr(error, "snapshot_path", None)
        return None if path is None else Path(path)
