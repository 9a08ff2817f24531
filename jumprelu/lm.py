"""The language model under study, loaded and fingerprinted.

Notable here:
- a hub model is downloaded to the cache first and then read as a local folder, so there is one way
  to load and it works offline.
- weights are read from safetensors only; pickles and repositories that bring their own code are
  refused.
- attention is eager: soft-capped logits (Gemma 2) need it, and every device then computes the same
  formula.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from .corpus import as_tokens
from .files import SUBJECT, digest, read_json, sha256, tensor_digest
from .hub_access import hub_access
from .store import torch_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = "jumprelu-lm"
"""Name of the model that comes with the package; `load_lm(EMBEDDED)` is `load_lm()`."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


@dataclass(frozen=True, eq=False)
class LM:
    """A causal language model and what goes with it, in evaluation mode: no dropout."""

    model: PreTrainedModel = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    """A transformers tokenizer, or None: everything but reading text works without."""
    name: str = "unnamed"
    """A hub id, a folder's name, or `EMBEDDED`; stores and SAEs remember it for people to read."""
    folder: Path | None = field(default=None, repr=False)
    """Where the weights were read from, if from files; the fingerprint is then theirs."""

    def __post_init__(self) -> None:
        self.model.eval()

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.model.config.get_text_config()

    d_model = property(lambda self: self.config.hidden_size, doc="Width of the residual stream.")
    n_layers = property(lambda self: self.config.num_hidden_layers)
    device = property(lambda self: self.model.device)
    dtype = property(lambda self: self.model.dtype)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of BOS, EOS and padding, from the model's configuration and the tokenizer, sorted.

        A position that holds one of them gives no activation to training or evaluation, wherever
        it stands in the row; the model itself sees it.
        """
        found: set[int] = set()
        for owner in (self.config, self.tokenizer):
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                value = getattr(owner, name, None)
                found.update(value if isinstance(value, list | tuple) else [value])
        return tuple(sorted(found - {None}))

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
        config = self.model.config.to_dict()
        config.pop("transformers_version", None)
        config = {name: value for name, value in config.items() if name[0] != "_"}
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
        ids = as_tokens(ids).ids
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
                "with a smaller context_size"
            )
        return ids.to(self.device)


# ---- loading


def load_lm(
    name: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> LM:
    """Load a causal language model for inference.

    name: None for the embedded model; a local folder as written by `save_pretrained`, with or
    without a tokenizer; or a hub id such as "google/gemma-2-2b". device: by default "cuda" if there
    is one, else "cpu". dtype: "float32", "bfloat16", "float16"; by default float32 on a CPU and for
    the embedded model, and else what the weights are stored in.

    Raises FileNotFoundError, PermissionError or ConnectionError if the model cannot be had (see
    hub_access.py), ValueError if it is damaged, incomplete, pickled, or brings its own code.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name, folder = _find(name)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" or name == EMBEDDED else "auto"
    elif not isinstance(dtype, torch.dtype):
        dtype = torch_dtype(dtype)
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
            f"first {missing[0]}: they belong to another config.json, or the copy is incomplete; "
            "copy or download the folder again"
        )
    tokenizer = None
    if any((folder / file).exists() for file in TOKENIZER_FILES):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return LM(model.requires_grad_(False).to(device), tokenizer, name, folder)


def _find(name: str | Path | None) -> tuple[str, Path]:
    """Name and local folder of a model; downloads it where it is a hub id."""
    if name is None or name == EMBEDDED:
        if not (SUBJECT / "config.json").exists():
            raise FileNotFoundError(
                f"the embedded model is not in {SUBJECT}: `make lm` trains it and writes it there"
            )
        return EMBEDDED, SUBJECT
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder.resolve().name, folder
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name))
    if isinstance(name, Path) or folder.exists() or not is_hub_id:
        raise FileNotFoundError(
            f"no model folder at {str(name)!r}. Expected a folder with config.json and "
            "model.safetensors, a hub id such as google/gemma-2-2b, or None for the embedded model"
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
            f"{folder} has no config.json: expected a folder that `save_pretrained` wrote"
        )
    config = read_json(folder / "config.json")
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder} brings its own Python code (auto_map in config.json), which is never run: "
            "refused. Choose a model that transformers has a class for"
        )
    for path in weight_files(folder):
        if not path.exists():
            pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
            if pickles:
                raise ValueError(
                    f"{folder} holds its weights as pickles ({pickles[0]}), which can run any "
                    "code when read: refused. Choose a copy with model.safetensors, or convert it "
                    "with `model.save_pretrained(folder)` where you trust it"
                )
            raise FileNotFoundError(
                f"{folder} lacks {path.name}: the download or copy is incomplete, make it again"
            )
        try:
            with safe_open(path, framework="pt"):  # compares the header with the file's length
                pass
        except SafetensorError as error:
            why = f"{path} is truncated or not safetensors ({error})"
            raise ValueError(f"{why}: delete it, and copy or download it again") from error
