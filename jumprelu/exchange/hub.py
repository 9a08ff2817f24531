"""Files of one repository on the Hugging Face hub: which there are, and a local copy of one.

huggingface_hub does the work: it asks again after HTTP 429 and 5xx (and waits as long as the hub
says), goes on with a broken download by a Range request, compares lengths, and renames a file into
the cache only when it is whole. Without network, the files in the cache stand for the repository.
Errors are those of :func:`jumprelu.hub_access`; none repeats a token.
"""

import warnings
from pathlib import Path

from ..hub_access import hub_access, needs


def list_files(repo: str, revision: str | None = None) -> list[str]:
    """Paths of all files of a model repository; where the hub cannot be reached, of those in the
    cache, with a warning. revision: branch, tag or commit, by default main."""
    with needs("lm"):
        from huggingface_hub import HfApi

    try:
        with hub_access(repo):
            return HfApi().list_repo_files(repo, revision=revision)
    except ConnectionError:
        folder = _cached_folder(repo, revision)
        if folder is None:
            raise
        warnings.warn(
            f"the hub cannot be reached: only what is in the cache of {repo} can be chosen from",
            stacklevel=2,
        )
        files = [path for path in folder.rglob("*") if path.is_file()]
        return sorted(path.relative_to(folder).as_posix() for path in files)


def fetch(repo: str, path: str, revision: str | None = None) -> Path:
    """The local path of a repository's file, downloaded to the cache unless it is there."""
    with needs("lm"):
        from huggingface_hub import HfApi

    with hub_access(repo):
        return Path(HfApi().hf_hub_download(repo, path, revision=revision))


def _cached_folder(repo: str, revision: str | None) -> Path | None:
    """Where the cache has files of this revision, not necessarily all; None without any."""
    with needs("lm"):
        from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        # with a path, where some files are there and some are known to lack
        path = getattr(error, "snapshot_path", None)
        return None if path is None else Path(path)
