"""Replacing activations inside a language model, and what that does to its predictions.

Notable here:
- `Splicer` holds the package's rules on what is replaced and what is counted: BOS, EOS and padding
  are neither replaced nor counted, and "loss at position t" is the cross-entropy of the token at
  t + 1, counted where neither the token at t nor that at t + 1 is a special one.
- the model's own pass is computed once, and each spliced one begins behind the last block that the
  splicing cannot change.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from .corpus import Tokens, as_tokens, described
from .lm import LM
from .sae import SAE
from .sites import Key, attach, family_of, locate

Replace = Callable[[torch.Tensor], torch.Tensor]


def on_device(sae: SAE, device: torch.device) -> SAE:
    """The SAE itself if it is on `device`, else a copy there: the caller's stays where it is."""
    return sae if sae.W_enc.device == device else copy.deepcopy(sae).to(device)


def place_of(sae: SAE, site: str | None = None, layer: int | None = None) -> Key:
    """`site` and `layer`, by default those where an SAE was trained.

    Raises ValueError if one is not given and the SAE does not remember it.
    """
    site, layer = site or sae.origin.site, sae.origin.layer if layer is None else layer
    if site is None or layer is None:
        raise ValueError(
            "this SAE does not remember where it was trained: give site= and layer=, or make it "
            "with SAE(..., origin=Origin(site=..., layer=...))"
        )
    return site, layer


def known_before(site: str, layer: int) -> int:
    """The last block whose output is as without splicing at (site, layer), or is about to be
    replaced: a pass may resume after it (:func:`resume_after`). −1: none."""
    return layer if site == "resid_post" else layer - 1


class Batch:
    """Some rows of tokens, and what the model itself predicts there; made by :class:`Splicer`."""

    def __init__(self, lm: LM, ids: torch.Tensor, owner: torch.Tensor, rows: slice, start: int):
        self.lm, self.ids, self.rows = lm, ids, rows
        """rows: which rows of the tokens these are; ids: [n, positions], on the model's device."""
        ordinary = ~lm.is_special(ids)
        self.keep = ordinary.clone()
        """Positions whose activations are replaced, bool [n, positions]."""
        self.keep[:, :start] = False
        self.counted = self.keep[:, :-1] & ordinary[:, 1:]
        """Positions whose loss counts, bool [n, positions − 1]."""
        self.target = ids[:, 1:][self.counted]
        """The token to be predicted at each counted position, [counted]."""
        self.document = owner[:, None].expand_as(ids)
        """Number of the document of each position, [n, positions]."""
        self.counted_document = self.document[:, :-1][self.counted]
        """That of each counted position, [counted]."""
        self._blocks: dict[int, Any] = {}

    def predict(self, layers: Iterable[int]) -> torch.Tensor:
        """Log-probabilities of the model itself, float32 [counted, vocabulary]; keeps what the
        blocks of `layers` returned for :meth:`spliced`."""
        with record_blocks(self.lm, {layer for layer in layers if layer >= 0}) as blocks:
            found = self._log_probabilities()
        self._blocks = dict(blocks)
        return found

    def spliced(self, site: str, layer: int, replace: Replace) -> torch.Tensor:
        """The same with `replace(x)` in the place of the value at (site, layer); x: the value at
        the positions of `keep`, [kept, width]; what it returns is cast to the type of the value."""

        def fn(value: torch.Tensor) -> torch.Tensor:
            return value.index_put((self.keep,), replace(value[self.keep]).to(value))

        known = known_before(site, layer)
        known = known if known in self._blocks else -1
        resumed = resume_after(self.lm, known, self._blocks.get(known))
        with splice(self.lm, site, layer, fn), resumed:
            return self._log_probabilities()

    def losses(self, log_p: torch.Tensor) -> torch.Tensor:
        """Cross-entropy at each counted position, nats [counted]."""
        return torch.nn.functional.nll_loss(log_p, self.target, reduction="none")

    def _log_probabilities(self) -> torch.Tensor:
        logits = self.lm.model(self.ids, use_cache=False).logits
        return logits[:, :-1][self.counted].float().log_softmax(-1)


class Splicer:
    """The rows of `tokens` in batches, each with the model's own log-probabilities.

        for batch, log_p in Splicer(lm, tokens, [("resid_post", 3)]):
            log_q = batch.spliced("resid_post", 3, sae)

    places: (site, layer) at which will be spliced. start: positions before it are neither replaced
    nor counted. batch_rows: rows a forward pass, by default :meth:`LM.rows_at_once`. Raises
    ValueError for ids that the model cannot read.
    """

    def __init__(
        self,
        lm: LM,
        tokens: Tokens | torch.Tensor,
        places: Iterable[Key],
        start: int = 0,
        batch_rows: int | None = None,
    ):
        self.lm, self.tokens, self.start = lm, as_tokens(tokens), start
        lm.check_ids(self.tokens.ids)
        self.batch_rows = batch_rows or lm.rows_at_once(self.tokens.ids.shape[1])
        self.layers = {known_before(*place) for place in places}
        documents, self.document = self.tokens.document.unique(return_inverse=True)
        self.n_documents = len(documents)

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        first = range(0, len(self.tokens), self.batch_rows)
        for begin in tqdm(first, desc="splicing", unit="batch", mininterval=1):
            rows = slice(begin, begin + self.batch_rows)
            ids = self.tokens.ids[rows].to(self.lm.device)
            owner = self.document[rows].to(self.lm.device)
            batch = Batch(self.lm, ids, owner, rows, self.start)
            yield batch, batch.predict(self.layers)


# ---- hooks


@contextmanager
def splice(
    lm: LM, site: str, layer: int, fn: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Within it, every forward pass of `lm.model` has `fn(value)` in the place of the value at
    (site, layer).

    fn: takes [batch, positions, width], returns the same shape and dtype. `fn = lambda x: x`
    changes no logit (at mlp_in_before_gain, but for rounding).

    Raises ValueError for an unknown site, layer or layout, and, from the forward pass, if `fn`
    returns another shape or dtype.
    """

    def replace(value: torch.Tensor) -> torch.Tensor:
        new = fn(value)
        if described(new) != described(value):
            raise ValueError(
                f"the function spliced in at {site}, layer {layer}, returned {described(new)}, "
                f"expected the shape and dtype of its argument: {described(value)}"
            )
        return new

    with attach(locate(lm, site, layer), replace):
        yield


@contextmanager
def watch(lm: LM, site: str, layer: int) -> Iterator[list[torch.Tensor]]:
    """Within it, a list with the value at (site, layer) of the last forward pass, once that pass
    has come so far."""
    seen: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> None:
        seen[:] = [value]

    with attach(locate(lm, site, layer), keep):
        yield seen


@contextmanager
def record_blocks(lm: LM, layers: Iterable[int]) -> Iterator[dict[int, Any]]:
    """Within it, what each block of `layers` returned in the last forward pass, by layer, for
    :func:`resume_after`."""
    _, blocks = family_of(lm.model)
    found: dict[int, Any] = {}

    def keep(layer: int, module: torch.nn.Module, args: tuple, output: Any) -> None:
        found[layer] = output

    with ExitStack() as stack:
        for layer in set(layers):
            stack.enter_context(blocks[layer].register_forward_hook(partial(keep, layer)))
        yield found


@contextmanager
def resume_after(lm: LM, layer: int, output: Any) -> Iterator[None]:
    """Within it, a forward pass computes nothing up to block `layer`, which gives `output`: from
    :func:`record_blocks` and a pass over the same ids. Hooks on that block run as ever. A `layer`
    of −1 leaves the pass as it is.

    For passes that differ from a recorded one only from there on. They need use_cache=False.
    """
    _, blocks = family_of(lm.model)
    skipped = blocks[: layer + 1]
    try:
        for block in skipped:
            block.forward = lambda *args, **kwargs: output
        yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)
