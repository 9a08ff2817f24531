"""Contexts made by hand, and a model whose tokens are hostile to a web page."""

from __future__ import annotations

import tokenizers
import torch
import transformers
from models import VOCAB, tiny_model

from jumprelu.latents.contexts import Contexts
from jumprelu.lm import LM
from jumprelu.sae import SAE, Origin

HOSTILE = [
    "<script>window.hacked=1</script>",
    "</script><script>window.hacked=2</script>",
    "<img src=x onerror=window.hacked=3>",
    "<!--",
    "-->",
    "</style>",
    '"',
    "'",
    "&lt;b&gt;",
    "\u202eright to left",
    "\u2066isolate",
    "\u200bnothing",
    "\u2028line",
    "\x00",
    "${window.hacked=4}",
    "javascript:window.hacked=5",
    "<svg onload=window.hacked=6>",
    "\n",
    "\t",
    "]]>",
    "<base href=//x.org>",
    "עברית",
    "\N{GRINNING FACE}",
    "x" * 300,
    " <b> ",
    "=1+1",
    '" onmouseover="window.hacked=7',
    "%%script%%",
]
FIRST = 10
"""Id of the first hostile token; all others are w0, w1, …, with a space before the even ones."""


def hostile_lm(seed: int = 0) -> LM:
    """A tiny Gemma 2 with a word for each id: HOSTILE from FIRST on."""
    words = [f"{' ' * (i % 2 == 0)}w{i}" for i in range(VOCAB)]
    words[:3], words[FIRST : FIRST + len(HOSTILE)] = ["<pad>", "<eos>", "<bos>"], HOSTILE
    assert len(set(words)) == VOCAB
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>")
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    return LM(tiny_model("gemma2", seed), wrapped, name="tiny <b>model</b>")


def random_sae(
    d_in: int,
    d_sae: int,
    seed: int = 0,
    site: str | None = "resid_post",
    layer: int = 1,
    architecture: str = "jumprelu",
) -> SAE:
    """Unit atoms, encoders of different length, thresholds that rise with the number."""
    g = torch.Generator().manual_seed(seed)
    atoms = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
    encoder = atoms.T * torch.linspace(2, 1, d_sae)
    threshold = torch.linspace(0.1, 1, d_sae)
    return SAE(
        encoder,
        torch.zeros(d_sae),
        atoms,
        torch.zeros(d_in),
        threshold,
        origin=Origin("tiny", site, layer, architecture),
    )


def made_contexts(
    latents: list[int], tokens: torch.Tensor, seed: int = 0, positive: float = 1 / 3
) -> Contexts:
    """Contexts of `latents` [m] with these tokens [m, n, w]: half are top ones, the others of
    quantiles 1 and 2, the last silent.

    Activations: latent i's maximum is i + 1, at the middle of its first context; a share of the
    others is positive. The last latent never fires and all its slots but one are empty.
    """
    m, n, w = tokens.shape
    g = torch.Generator().manual_seed(seed)
    maximum = torch.arange(m) + 1.0
    acts = (
        torch.rand(m, n, w, generator=g)
        * (torch.rand(m, n, w, generator=g) < positive)
        * maximum[:, None, None]
        * 0.9
    )
    acts[:, 0, w // 2] = maximum
    quantile = torch.tensor(
        [0] * (n // 2) + [1 + 2 * i // (n - n // 2 - 1) for i in range(n - n // 2 - 1)] + [-1]
    ).repeat(m, 1)
    acts[:, -1] = 0
    tokens, acts[-1], maximum[-1], quantile[-1, :-1] = tokens.clone(), 0, 0, -2
    tokens[-1, :-1] = -1
    acts[tokens < 0] = 0
    place = torch.where(quantile == -2, -1, torch.arange(n).repeat(m, 1))
    histogram = torch.randint(0, 50, (m, 32), generator=g)
    histogram[-1] = 0
    frequency = torch.linspace(0.5, 0, m, dtype=torch.float64)
    return Contexts(
        torch.tensor(latents),
        tokens,
        acts,
        quantile,
        place,
        place,
        place,
        frequency,
        histogram,
        maximum,
    )


def hostile_contexts(m: int = 40, n: int = 6, w: int = 9, seed: int = 0) -> Contexts:
    """Latents 0 … m − 1; every context of the first latents is full of hostile tokens, each of
    which is met."""
    ids = torch.randint(3, VOCAB, (m, n, w), generator=torch.Generator().manual_seed(seed))
    places = torch.arange(n * w).view(n, w)
    ids[:3] = FIRST + places % len(HOSTILE)
    ids[3, 0, :3] = -1  # the window leaves the row
    return made_contexts(list(range(m)), ids, seed)
