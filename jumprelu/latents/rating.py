"""A blind manual study: do people find latents interpretable? (JumpReLU paper, arXiv 2407.14435,
the manual study.)

    python -m jumprelu rate make FOLDER SAE [SAE …]     a page for raters, and a key for nobody
    python -m jumprelu rate score KEY CSV [CSV …]       the key, opened, and what was said

- the page holds contexts, with activations as shares of the latent's maximum, and salted item ids.
  Thresholds, frequencies, histograms and scales stay out: they would tell the architecture. What
  the items are is in the key file alone.
- every row of a rater's CSV carries the study's id and a running checksum, which finds accidents.
"""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..corpus import Tokens
from ..files import digest, sha256, write_json, write_text
from ..lm import LM
from ..sae import SAE
from ..splicing import place_of
from .choosing import Choice
from .contexts import Contexts, collect_many, frequencies
from .verdicts import FORMAT, study_id
from .webpage import layout, narrow, pack, page, shades, token_texts, vocabulary

TARGETS = (20.0, 75.0, 150.0)
"""L0 of the paper's study. An SAE belongs to the target nearest to its own L0 in ratio."""
TITLE = "What is this feature about?"
SHOWN = Choice(top=8, quantiles=4, per_quantile=2, negatives=0, window=25)


class Item(NamedTuple):
    """One latent drawn, and the stratum that it stands for."""

    sae: int
    """Place among the SAEs given."""
    latent: int
    architecture: str
    site: str
    layer: int
    target: float
    """Of TARGETS, or whatever was given in its place."""
    l0: float


class Study(NamedTuple):
    """The two files of a study."""

    page: Path
    key: Path


def draw(
    saes: Sequence[SAE],
    frequency: Sequence[torch.Tensor],
    per_stratum: int,
    seed: int,
    targets: Sequence[float] = TARGETS,
) -> list[Item]:
    """`per_stratum` latents from each stratum of architecture, site, layer and L0 target that has
    an SAE, shuffled.

    frequency: share of tokens on which each latent fires, [d_sae] for each SAE; latents that never
    fire are not drawn. Where several SAEs share a stratum, they take turns. Raises ValueError for a
    stratum with too few latents, or an SAE that does not say where it was trained.
    """
    if per_stratum < 1 or not len(saes) or not targets or min(targets) <= 0:
        raise ValueError(
            "expected at least one SAE, a latent a stratum and targets above 0, got "
            f"{len(saes)}, {per_stratum} and {list(targets)}"
        )
    generator = torch.Generator().manual_seed(seed)
    waiting: dict[tuple[str, str, int, float], list[list[Item]]] = {}
    for number, (sae, own) in enumerate(zip(saes, frequency, strict=True)):
        l0 = float(own.sum())
        ratios = np.abs(np.log(max(l0, 1e-9) / np.asarray(targets)))
        target = float(targets[int(ratios.argmin())])
        stratum = (sae.origin.architecture, *place_of(sae), target)
        alive = (own > 0).nonzero().flatten()
        alive = alive[torch.randperm(len(alive), generator=generator)][:per_stratum]
        drawn = [Item(number, latent, *stratum, l0) for latent in alive.tolist()]
        waiting.setdefault(stratum, []).append(drawn)
    items = []
    for stratum, lists in waiting.items():
        turns = [own[place] for place in range(per_stratum) for own in lists if place < len(own)]
        if len(turns) < per_stratum:
            raise ValueError(
                f"stratum {stratum} has {len(turns)} latents that fire, {per_stratum} were asked "
                "for: lower --per-stratum, or read more --rows"
            )
        items += turns[:per_stratum]
    return [items[place] for place in torch.randperm(len(items), generator=generator)]


def make(
    out: str | Path,
    lm: LM,
    saes: Mapping[str, SAE],
    tokens: Tokens | torch.Tensor,
    per_stratum: int = 5,
    targets: Sequence[float] = TARGETS,
    seed: int | None = None,
    title: str = TITLE,
) -> Study:
    """Draw a study from named SAEs on one model, and write its page and its key to the folder
    `out`.

    seed: by default a new one that nobody knows; it goes into the key. Raises ValueError as
    :func:`draw` does.
    """
    seed = secrets.randbits(48) if seed is None else seed
    models = list(saes.values())
    items = draw(models, frequencies(lm, models, tokens), per_stratum, seed, targets)
    used = sorted({item.sae for item in items})
    drawn = [torch.tensor(sorted(i.latent for i in items if i.sae == number)) for number in used]
    found = collect_many(
        lm, [models[number] for number in used], tokens, latents=drawn, choice=SHOWN
    )
    return write_study(out, lm, saes, items, dict(zip(used, found, strict=True)), seed, title)


def write_study(
    out: str | Path,
    lm: LM,
    saes: Mapping[str, SAE],
    items: Sequence[Item],
    contexts: Mapping[int, Contexts],
    seed: int | None = None,
    title: str = TITLE,
    salt: str | None = None,
) -> Study:
    """Write the page and the key of `items`, in this order, to the folder `out`, as study-ID.html
    and key-ID.json.

    contexts: by place of the SAE, holding its items' latents. salt: by default a new secret.
    """
    salt = salt or secrets.token_hex(16)
    owned = [(contexts[item.sae], item.latent) for item in items]
    at = [(own, own.latents.tolist().index(latent)) for own, latent in owned]
    ids = torch.stack([own.tokens[place] for own, place in at])
    acts = torch.stack([own.acts[place] for own, place in at])
    quantile = torch.stack([own.quantile[place] for own, place in at])
    known, (tokens,) = vocabulary(ids)
    arrays = {
        "tokens": narrow(tokens),
        "acts": shades(acts, acts.clamp_min(0).flatten(1).amax(1)),
        "quantile": quantile.clamp(-2, 1).numpy().astype(np.int8),  # which bin is not told
    }
    words, packed = ["", *token_texts(lm.tokenizer, known)], pack(arrays)
    names, models = list(saes), list(saes.values())
    prints = {place: models[place].fingerprint for place in contexts}
    sources = []
    for item in items:
        source = {"item": digest(salt, prints[item.sae], item.latent)[:12]}
        source |= {"fingerprint": prints[item.sae], **item._asdict(), "sae": names[item.sae]}
        sources.append(source)
    shown = [source["item"] for source in sources]
    data = digest(shown, words, packed)
    key = {"format": FORMAT, "salt": salt, "seed": seed, "digest": data, "items": sources}
    study = study_id(key)
    about = {
        "title": title,
        "study": study,
        "digest": data,
        "items": shown,
        "layout": layout(arrays),
        "window": tokens.shape[2],
        "slots": tokens.shape[1],
    }
    paths = Study(Path(out) / f"study-{study}.html", Path(out) / f"key-{study}.json")
    first = {"about": about, "vocabulary": words}
    write_text(paths.page, page("rating", title, first, {"items": packed}))
    note = "Sealed until all ratings are in: `python -m jumprelu rate score` opens it."
    seal = {"note": note, "study": study, "page_sha256": sha256(paths.page)}
    write_json(paths.key, seal | key)
    return paths
