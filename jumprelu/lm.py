"""The language model under study: loaded, fingerprinted, and explained when it cannot be had.

Notable here:
- one `load_lm` for the embedded model, a local folder and a hub id. A hub model is downloaded to
  the cache first and then read as a local folder, so there is one way to load and it works offline.
- weights are read from safetensors only; pickles and repositories that bring their own code are
  refused.
- attention is eager: soft-capped logits (Gemma 2) need it, and every device then computes the same
  formula.
- `hub_access` turns the many errors of huggingface_hub, transformers, datasets and their HTTP
  clients into three of Python's own, each of which says what to do. A message never repeats the
  library's text, so no token can be in it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from .activations import DTYPES, check_dtype
from .files import SUBJECT, digest, read_json, sha256, tensor_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = "jumprelu-lm"
"""Name of the model that comes with the package; `load_lm(EMBEDDED)` is `load_lm()`."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True, eq=False)
class LM:
    """A causal language model and what goes with it. The model is put in evaluation mode: no
    dropout."""

    model: PreTrainedModel = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    """A transformers tokenizer, or None: everything but reading text works without."""
    name: str = "unnamed"
    """A hub id, a folder's name, or `EMBEDDED`; remembered by stores and SAEs, for people to
    read."""
    folder: Path | None = field(default=None, repr=False)
    """Where the weights were read from. The fingerprint is then that of the files; None: that of
    the tensors."""

    def __post_init__(self) -> None:
        self.model.eval()

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def n_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of BOS, EOS and padding, from the model's configuration and the tokenizer, sorted.

        This is the package's one rule on special positions: a position that holds one of these ids
        gives no activation to training or evaluation, wherever it stands in the row; the model
        itself sees it.
        """
        found: set[int] = set()
        for owner in (self.config, self.tokenizer):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = getattr(owner, name, None)
                found.update(
                    value if isinstance(value, list | tuple) else [] if value is None else [value]
                )
        return tuple(sorted(found))

    def is_special(self, ids: torch.Tensor) -> torch.Tensor:
        """Where `ids`, any integers, hold a special token (:attr:`special_ids`): bool, same shape
        and device."""
        return torch.isin(ids, torch.tensor(self.special_ids, dtype=ids.dtype, device=ids.device))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of configuration, weights and dtype: two models with one fingerprint give the same
        activations."""
        if self.folder is not None:
            files = [self.folder / "config.json", *weight_files(self.folder)]
            return digest({path.name: sha256(path) for path in files}, str(self.dtype))
        config = {
            k: v
            for k, v in self.model.config.to_dict().items()
            if k != "transformers_version" and not k.startswith("_")
        }
        return digest(config, tensor_digest(self.model.state_dict()), str(self.dtype))

    def rows_at_once(self, context_size: int, most: int = 8) -> int:
        """Rows of a forward pass whose logits stay below 2²⁸ numbers (1 GiB in float32): at most
        `most`, at least 1."""
        return max(1, min(most, 2**28 // (context_size * self.config.vocab_size)))

    def check_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """`ids` as int64 on the model's device. ids: integers, shape [rows, positions].

        Raises ValueError for another shape or type, ids outside the vocabulary, or rows longer than
        the model's context.
        """
        if (
            not isinstance(ids, torch.Tensor)
            or ids.ndim != 2
            or ids.is_floating_point()
            or not ids.numel()
        ):
            given = (
                f"{tuple(ids.shape)} of {ids.dtype}"
                if isinstance(ids, torch.Tensor)
                else type(ids).__name__
            )
            raise ValueError(
                f"ids must be a tensor of integers of shape [rows, positions], got {given}"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token ids span {low} to {high}, the vocabulary of {self.name} is 0 to "
                f"{self.config.vocab_size - 1}: the tokens were made with another model's tokenizer"
            )
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest is not None and ids.shape[1] > longest:
            raise ValueError(
                f"rows of {ids.shape[1]} tokens, {self.name} reads at most {longest}: tokenize "
                "with a smaller "
                "context_size"
            )
        return ids.to(self.device, torch.long)


# ---- loading


def load_lm(
    name: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> LM:
    """Load a causal language model for inference.

    name: None for the embedded model; a local folder as written by `save_pretrained`, with or
    without a tokenizer; or a hub id such as "google/gemma-2-2b". device: "cuda" if there is one,
    else "cpu". dtype: "float32", "bfloat16", "float16"; by default float32 on a CPU and for the
    embedded model, and else what the weights are stored in.

    Raises FileNotFoundError, PermissionError or ConnectionError if the model cannot be had (see
    :func:`hub_access`), ValueError if it is damaged, incomplete, pickled, or brings its own code.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name, folder = _find(name)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" or name == EMBEDDED else "auto"
    elif not isinstance(dtype, torch.dtype):
        check_dtype(dtype)
        dtype = DTYPES[dtype]
    _check_folder(folder)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager",
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"the weights in {folder} lack {len(missing)} tensors of a {type(model).__name__}, "
            f"first {missing[0]}: "
            "they belong to another config.json, or the copy is incomplete; copy or download the "
            "folder again"
        )
    has_tokenizer = any((folder / file).exists() for file in TOKENIZER_FILES)
    tokenizer = (
        AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_tokenizer else None
    )
    return LM(model.requires_grad_(False).to(device), tokenizer, name, folder)


def _find(name: str | Path | None) -> tuple[str, Path]:
    """Name and local folder of a model; downloads it where it is a hub id."""
    if name is None or name == EMBEDDED:
        folder = SUBJECT
        if not (folder / "config.json").exists():
            raise FileNotFoundError(
                f"the embedded model is not in {folder}: `make lm` trains it and writes it there"
            )
        return EMBEDDED, folder
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder.resolve().name, folder
    if (
        isinstance(name, Path)
        or folder.exists()
        or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    ):
        raise FileNotFoundError(
            f"no model folder at {str(name)!r}. Expected a folder with config.json and "
            "model.safetensors, "
            "a hub id such as google/gemma-2-2b, or None for the embedded model"
        )
    from huggingface_hub import snapshot_download

    with hub_access(name, "model"):
        # weights in the root only: sub-folders hold copies for other frameworks
        folder = snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"],
            ignore_patterns=["*/*", "consolidated*"],
        )
    return name, Path(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as its index names them; they need not exist."""
    index = folder / "model.safetensors.index.json"
    if not (folder / "model.safetensors").exists() and index.exists():
        return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return [folder / "model.safetensors"]


def _check_folder(folder: Path) -> None:
    """Raise unless `folder` holds a configuration and whole safetensors, and needs no code of its
    own."""
    from transformers import CONFIG_MAPPING

    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} has no config.json: expected a folder written by `save_pretrained` or `hf "
            "download`"
        )
    config = read_json(folder / "config.json")
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder} brings its own Python code (auto_map in config.json), which is never run: "
            "refused. Choose a "
            "model that transformers has a class for"
        )
    for path in weight_files(folder):
        if not path.exists():
            pickles = sorted(
                p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"}
            )
            if pickles:
                raise ValueError(
                    f"{folder} holds its weights as pickles ({pickles[0]}), which can run any "
                    "code when read: "
                    "refused. Choose a copy with model.safetensors, or convert it with "
                    "`model.save_pretrained(folder)` where you trust it"
                )
            raise FileNotFoundError(
                f"{folder} lacks {path.name}: the download or copy is incomplete. `hf download` "
                "of the "
                "model goes on where it stopped"
            )
        try:
            with safe_open(path, framework="pt"):  # compares the header with the file's length
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} is truncated or not safetensors ({error}): delete it, and copy or "
                "download it "
                "again"
            ) from error


# ---- the hub


_HTTP_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"}
_INTERRUPTED = (
    "XetDownload",
    "IncompleteSnapshot",
    "IncompleteRead",
    "ReadError",
    "RemoteProtocolError",
    "PayloadError",
)
"""Parts of the names of the errors that the libraries raise when a transfer breaks off."""


@contextmanager
def hub_access(name: str, kind: str = "model") -> Iterator[None]:
    """Within it, an error on the way to the hub becomes one of Python's own that says what to do.

    name: hub id; kind: "model" or "dataset". Raises PermissionError (gated or disabled repository,
    refused token), FileNotFoundError (no such repository or revision, or a private one) or
    ConnectionError (no network, offline mode, server error, interrupted download); other errors
    pass unchanged.
    """
    try:
        yield
    except Exception as error:
        translated = _explain(error, name, kind)
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


def _explain(error: BaseException, name: str, kind: str) -> OSError | None:
    from huggingface_hub import constants, errors

    links = _chain(error)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    download = f"`hf download {name}{' --repo-type dataset' if kind == 'dataset' else ''}`"
    without = (
        f"Without network: {download} on a machine that has one, and either copy the cache "
        "(HF_HOME) here and set "
        "HF_HUB_OFFLINE=1, or give the path of a local folder instead of the id"
    )

    def first(*types: type) -> BaseException | None:
        return next((link for link in links if isinstance(link, types)), None)

    def named(text: str) -> bool:
        return any(text in type(link).__name__ for link in links)

    status = getattr(getattr(first(errors.HfHubHTTPError), "response", None), "status_code", None)
    # datasets has one error for gated and missing repositories, and forgets the cause
    if first(errors.GatedRepoError) or any(
        named("DatasetNotFound") and "gated" in str(link) for link in links
    ):
        return PermissionError(
            f"the {kind} {name} is gated: its authors ask for an agreement first. Accept the "
            "licence at "
            f"{page}, then log in with `hf auth login` (or set HF_TOKEN), using a token that may "
            "read gated "
            "repositories"
        )
    if first(errors.DisabledRepoError):
        return PermissionError(
            f"access to the {kind} {name} is disabled on the hub: see {page}, or use another copy"
        )
    if first(errors.RevisionNotFoundError):
        return FileNotFoundError(f"the {kind} {name} has no such revision: see {page}")
    if first(errors.RepositoryNotFoundError) or named("DatasetNotFound"):
        return FileNotFoundError(
            f"no {kind} {name} on the hub, or a private one that this login may not see: check "
            "the spelling "
            f"at {page}; if it is private, log in with `hf auth login`"
        )
    if status in (401, 403):
        return PermissionError(
            f"the hub refused the login for the {kind} {name} (HTTP {status}): the token is "
            "wrong, expired or "
            "may not read this. Log in again with `hf auth login`, or unset HF_TOKEN if it holds "
            "an old one"
        )
    if first(errors.OfflineModeIsEnabled) or (
        first(errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE
    ):
        return ConnectionError(
            f"HF_HUB_OFFLINE=1 is set and the {kind} {name} is not, or not wholly, in the cache: "
            "unset it and "
            f"run {download} once. {without}"
        )
    if first(errors.RemoteEntryNotFoundError) or status == 404:
        return FileNotFoundError(f"the {kind} {name} lacks a file that is needed: see {page}")
    if status is not None:
        return ConnectionError(
            f"the hub answered HTTP {status} for the {kind} {name}: wait a little and run again. "
            f"{without}"
        )
    if any("Consistency check failed" in str(link) for link in links) or any(
        map(named, _INTERRUPTED)
    ):
        return ConnectionError(
            f"the download of the {kind} {name} was interrupted: run again, it goes on where it "
            "stopped. " + without
        )
    if first(errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) or any(
        type(link).__module__.split(".")[0] in _HTTP_CLIENTS for link in links
    ):
        return ConnectionError(
            f"the hub could not be reached for the {kind} {name}: check the network and its proxy "
            "settings "
            f"(HTTPS_PROXY), then run again. {without}"
        )
    return None
