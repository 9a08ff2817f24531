"""What is missing on the way to the Hugging Face hub, a package or an answer, as an error of
Python's own that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

HTTP_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"}
"""What huggingface_hub, datasets and fsspec speak to the hub with, in their several versions."""


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports: an ImportError says which extra of this package brings what is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        how = f'{error.name} is not installed: run pip install "jumprelu[{extra}]"'
        raise ImportError(how, name=error.name) from error


@contextmanager
def hub_access(name: str, kind: str = "model") -> Iterator[None]:
    """Within it, an error of huggingface_hub, datasets or their HTTP clients is translated.

    name: hub id; kind: "model" or "dataset". Raises PermissionError (gated repository, refused
    token), FileNotFoundError (no such repository, revision or file, or a private one) or
    ConnectionError (no network, offline mode, server error, interrupted download); other errors
    pass unchanged. A message never repeats the library's text, so no token can be in it.
    """
    try:
        yield
    except Exception as error:
        translated = _translated(error, name, kind)
        if translated is None:
            raise
        raise translated from None  # the library's text could repeat a header


def _chain(error: BaseException | None) -> list[BaseException]:
    """`error`, what caused it, what caused that …"""
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return links


def _translated(error: BaseException, name: str, kind: str) -> OSError | None:
    from huggingface_hub import constants, errors

    links = _chain(error)

    def has(*types: type) -> bool:
        return any(isinstance(link, types) for link in links)

    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    download = f"`hf download {name}{' --repo-type dataset' if kind == 'dataset' else ''}`"
    without = (
        f"Without network: {download} on a machine that has one, copy its cache (HF_HOME) here "
        "and set HF_HUB_OFFLINE=1, or give the path of a local folder instead of the id"
    )
    # datasets has one error for gated and missing repositories, and forgets the cause
    of_datasets = [str(link) for link in links if type(link).__name__ == "DatasetNotFoundError"]
    answers = [link.response for link in links if isinstance(link, errors.HfHubHTTPError)]
    status = getattr(answers[0], "status_code", None) if answers else None

    if has(errors.GatedRepoError) or any("gated" in text for text in of_datasets):
        return PermissionError(
            f"the {kind} {name} is gated. Accept the licence at {page}, then log in with `hf auth "
            "login` (or set HF_TOKEN), using a token that may read gated repositories"
        )
    if has(errors.RevisionNotFoundError):
        return FileNotFoundError(f"the {kind} {name} has no such revision: see {page}")
    if has(errors.RepositoryNotFoundError) or of_datasets:
        return FileNotFoundError(
            f"no {kind} {name} on the hub, or a private one that this login may not see: check the "
            f"spelling at {page}; if it is private, log in with `hf auth login`"
        )
    if has(errors.RemoteEntryNotFoundError):
        return FileNotFoundError(f"the {kind} {name} lacks a file that is needed: see {page}")
    if status in (401, 403):
        return PermissionError(
            f"the hub refused the login for the {kind} {name} (HTTP {status}): the token is wrong, "
            "expired or may not read this. Log in again with `hf auth login`, or unset HF_TOKEN"
        )
    missing = has(errors.LocalEntryNotFoundError)
    if has(errors.OfflineModeIsEnabled) or (missing and constants.HF_HUB_OFFLINE):
        return ConnectionError(
            f"HF_HUB_OFFLINE=1 is set and the {kind} {name} is not, or not wholly, in the cache: "
            f"unset it and run {download} once. {without}"
        )
    if status is not None:
        return ConnectionError(
            f"the hub answered HTTP {status} for the {kind} {name}: wait a little and run again. "
            + without
        )
    if (
        missing
        or has(ConnectionError, TimeoutError, errors.XetDownloadError)
        or any(type(link).__module__.split(".")[0] in HTTP_CLIENTS for link in links)
        or any("Consistency check failed" in str(link) for link in links)
    ):
        return ConnectionError(
            f"the hub could not be reached for the {kind} {name}, or the download was interrupted: "
            "run again, it goes on where it stopped. Check the network and its proxy settings "
            f"(HTTPS_PROXY). {without}"
        )
    return None
