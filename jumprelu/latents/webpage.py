"""One self-contained HTML file from a template, a style, a script and data.

- the file asks for nothing: its Content-Security-Policy forbids every request and every script and
  style but its own, which it names by their hashes; `require-trusted-types-for 'script'` forbids to
  make HTML of text.
- text of a corpus goes into the file as JSON without `<`, and onto the page as text, never as HTML.

The assets are in `assets/`: `<name>.html`, `.css` and `.js`, after `common.css` and `common.js`.
"""

import base64
import hashlib
import html
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

ASSETS = Path(__file__).with_name("assets")


def page(
    name: str, title: str, first: Mapping[str, Any], later: Mapping[str, str] | None = None
) -> str:
    """The HTML file of the assets `name`, with data.

    title: of the document. first: what the page needs at once, by id, as values for JSON; it stands
    before the script. later: text by id, from :func:`data_text` or :func:`pack`; it stands after
    the script, which runs while the rest is read.
    """
    style = _asset("common.css") + _asset(f"{name}.css")
    script = _asset("common.js") + _asset(f"{name}.js")
    blocks = {
        "first": "\n".join(_block(id, data_text(value)) for id, value in first.items()),
        "later": "\n".join(_block(id, text) for id, text in (later or {}).items()),
    }
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; connect-src 'none'; base-uri 'none'; form-action 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    fields = {"policy": html.escape(policy), "title": html.escape(title), **blocks}
    fields |= {"style": style, "script": script}
    parts = _asset(f"{name}.html").split("%%")  # text, name of a field, text, …
    return "".join(fields[part] if i % 2 else part for i, part in enumerate(parts))


def data_text(value: Any) -> str:
    """`value` as compact JSON that cannot end a script element: `<` is written as an escape. Raises
    ValueError for NaN."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is not text
    return text.replace("<", "\\u003c")


def pack(arrays: Mapping[str, np.ndarray]) -> str:
    """Arrays one after the other, row by row, little-endian, compressed (zlib), in base64;
    :func:`layout` describes them."""
    raw = b"".join(
        np.ascontiguousarray(a, dtype=a.dtype.newbyteorder("<")).tobytes() for a in arrays.values()
    )
    return base64.b64encode(zlib.compress(raw, 6)).decode()


def layout(arrays: Mapping[str, np.ndarray]) -> list[list[Any]]:
    """[name, dtype, shape without the first axis] of each array, for the script to unpack them; all
    share the first axis."""
    return [[name, str(a.dtype), list(a.shape[1:])] for name, a in arrays.items()]


def vocabulary(*ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The distinct ids ≥ 0 of all `ids`, sorted, [v]; and each of `ids` written as 1 + place among
    them, 0 where negative."""
    known = torch.cat([each[each >= 0] for each in ids]).unique()
    return known, [torch.where(each >= 0, torch.searchsorted(known, each) + 1, 0) for each in ids]


def narrow(index: torch.Tensor) -> np.ndarray:
    """Indices ≥ 0 as uint16, or as uint32 where they need it."""
    few = not index.numel() or int(index.max()) < 2**16
    return index.numpy().astype(np.uint16 if few else np.uint32)


def shades(acts: torch.Tensor, maximum: torch.Tensor) -> np.ndarray:
    """Activations [m, n, w] as bytes, 255 for the latent's `maximum` [m], rounded up: whatever is
    positive stays above 0."""
    scale = maximum.clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]
    return (acts.clamp_min(0) / scale * 255).ceil().clamp_max(255).to(torch.uint8).numpy()


def token_texts(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    """The text of each id in `ids` [v], as it stands behind another token, because some tokenizers
    drop a leading space; `#id` without a tokenizer.

    A token of part of a character gives U+FFFD.
    """
    if tokenizer is None:
        return [f"#{id}" for id in ids.tolist()]
    if not len(ids):
        return []
    anchor = next(id for id in range(len(tokenizer)) if tokenizer.decode([id]).isalnum())
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode([anchor], **options)
    texts = tokenizer.batch_decode([[anchor, id] for id in ids.tolist()], **options)
    return [text.removeprefix(before) for text in texts]


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def _block(id: str, text: str) -> str:
    return f'<script type="application/json" id="{html.escape(id)}">{text}</script>'


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
