"""How well latents can be explained: scores of explanations on documents that they were not made
from.

- correlation is that of the JumpReLU paper's automated study (after Bills et al. 2023): activations
  in bins 0 … 10, Pearson, over all tokens of held-out windows. Detection and fuzzing are delphi's
  (Paulo et al. 2024, arXiv 2410.13928), read off the predicted activations instead of asked of a
  language model anew.
- the split is by document and the same for all latents: no explanation has seen a document that it
  is scored on. Nor does it meet text that it has seen: licences and the like stand in many
  documents, so windows that repeat one are left out (:func:`fresh`).
- beside each score stand the same windows with another latent's explanation (`shuffled_…`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..corpus import Tokens, as_tokens
from ..lm import LM
from ..sae import SAE
from .choosing import Choice, uniform
from .contexts import Contexts, collect_many, frequencies
from .explain import LEVELS, Explainer, Explanation, Windows

if TYPE_CHECKING:
    import pandas as pd

EDGES = (0.01, 0.03, 0.1)
"""Frequencies between the bands."""
STUDY = Choice(top=20, quantiles=5, per_quantile=8, negatives=30)
"""Contexts of a latent, about half of them held out."""
REPEATED = 12
"""Tokens in a row that a held-out window must not share with any window for training."""
SCORES = ("correlation", "detection", "fuzzing")


# ---- scores


def binned(acts: np.ndarray, maximum: float) -> np.ndarray:
    """Activations as whole numbers 0 … 10, 10 the maximum."""
    return np.rint(acts * (LEVELS / maximum)) if maximum > 0 else np.zeros_like(acts)


def pearson(true: np.ndarray, predicted: np.ndarray) -> float:
    """Pearson correlation. 0 where the prediction is constant: it says nothing. NaN where the truth
    is: nothing to say."""
    true, predicted = np.asarray(true, float), np.asarray(predicted, float)
    if not len(true) or np.ptp(true) == 0:
        return float("nan")
    return 0.0 if np.ptp(predicted) == 0 else float(np.corrcoef(true, predicted)[0, 1])


def balanced_accuracy(true: np.ndarray, said: np.ndarray) -> float:
    """Mean of the shares of positives and of negatives that are called so, 0.5 by chance; NaN
    without examples of both kinds. bool [n]."""
    if true.all() or not true.any():
        return float("nan")
    return float(said[true].mean() + (~said[~true]).mean()) / 2


def detection(acts: np.ndarray, predicted: np.ndarray, cut: float) -> float:
    """Which windows activate the latent? Said of those with a prediction of at least `cut`. acts,
    predicted: [n, w]."""
    return balanced_accuracy((acts > 0).any(1), (predicted >= cut).any(1))


def fuzzing(acts: np.ndarray, predicted: np.ndarray, real: np.ndarray, seed: int = 0) -> float:
    """Are the right tokens marked? Right: the active tokens of an active window. Wrong, as in
    delphi: in silent windows, as many random tokens as are active in an active window on average.
    The marks are called right where the mean prediction at them is above that at the window's other
    tokens. acts, predicted, real (no padding): [n, w].
    """
    rng = np.random.default_rng(seed)
    active = (acts > 0).any(1)
    marked = [(row, acts[row] > 0, True) for row in active.nonzero()[0]]
    typical = max(1, round(float((acts[active] > 0).sum(1).mean()))) if active.any() else 1
    for row in (~active).nonzero()[0]:
        free = real[row].nonzero()[0]
        marks = np.zeros(acts.shape[1], bool)
        marks[rng.choice(free, min(typical, len(free)), replace=False)] = True
        if len(free):
            marked.append((row, marks, False))
    said = [
        _mean(predicted[row], marks) > _mean(predicted[row], real[row] & ~marks)
        for row, marks, _ in marked
    ]
    return balanced_accuracy(np.array([right for *_, right in marked], bool), np.array(said, bool))


def _mean(values: np.ndarray, where: np.ndarray) -> float:
    return float(values[where].mean()) if where.any() else 0.0


class Score(NamedTuple):
    correlation: float
    detection: float
    """Balanced accuracy, as is fuzzing."""
    fuzzing: float
    missing: float
    """Share of tokens without a prediction; windows that have one are left out of the scores."""


def score(
    held_out: Windows, predicted: np.ndarray, maximum: float, cut: float = 1.0, seed: int = 0
) -> Score:
    """Scores of predicted activations on held-out windows. predicted: [n, w], NaN where missing;
    maximum: of the latent."""
    real = held_out.tokens >= 0
    lost = real & np.isnan(predicted)
    whole = ~lost.any(1)
    acts, predicted, real = held_out.acts[whole], np.where(real, predicted, 0)[whole], real[whole]
    return Score(
        pearson(binned(acts[real], maximum), predicted[real]),
        detection(acts, predicted, cut),
        fuzzing(acts, predicted, real, seed),
        float(lost.sum() / max(1, (held_out.tokens >= 0).sum())),
    )


# ---- the study


def windows(
    contexts: Contexts, place: int, among: np.ndarray, special: Sequence[int] = ()
) -> Windows:
    """The windows of the latent at `place` whose documents are in `among`; special tokens count as
    padding."""
    chosen = np.isin(contexts.document[place].numpy(), among)  # -1 in empty slots
    tokens = contexts.tokens[place].numpy()[chosen]
    tokens = np.where(np.isin(tokens, special), -1, tokens)
    return Windows(tokens, contexts.acts[place].numpy()[chosen])


def fresh(held_out: Windows, training: Windows, run: int = REPEATED) -> Windows:
    """The windows that have no `run` tokens in a row in common with any window for training; of
    shorter windows, all tokens."""
    run = min(run, held_out.tokens.shape[1])
    factors = np.random.default_rng(0).integers(2**63, size=run, dtype=np.uint64)

    def runs(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        every = np.lib.stride_tricks.sliding_window_view(tokens, run, axis=1)
        number = (every.astype(np.uint64) * factors).sum(-1)  # modulo 2**64
        return number, (every >= 0).all(-1)

    (known, whole), (own, own_whole) = runs(training.tokens), runs(held_out.tokens)
    new = ~(np.isin(own, known[whole]) & own_whole).any(1)
    return Windows(held_out.tokens[new], held_out.acts[new])


def split_documents(document: torch.Tensor, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents for training, half of them, and of those held out. Raises ValueError
    for fewer than two."""
    numbers = document.unique().numpy()
    if len(numbers) < 2:
        raise ValueError("explanations are made from some documents and scored on others: give two")
    mixed = numbers[np.argsort(uniform(seed, 8, numbers), kind="stable")]
    return np.sort(mixed[: len(mixed) // 2]), np.sort(mixed[len(mixed) // 2 :])


def sample_latents(frequency: torch.Tensor, count: int, seed: int = 0) -> pd.DataFrame:
    """At most `count` latents that fire, as many as there are from each band of frequency in turn.

    Returns columns latent (ascending), band (0 the rarest) and weight: how many latents of its band
    each stands for.
    """
    import pandas as pd

    frequency, latent = frequency.numpy(), np.arange(len(frequency))
    alive = pd.DataFrame({"latent": latent, "band": np.searchsorted(EDGES, frequency)})
    order = np.argsort(uniform(seed, 9, latent), kind="stable")
    alive = alive.iloc[order[frequency[order] > 0]]
    turn = alive.groupby("band").cumcount()
    chosen = alive.assign(turn=turn).sort_values(["turn", "band"], kind="stable").head(count)
    chosen["weight"] = chosen.band.map(alive.band.value_counts() / chosen.band.value_counts())
    return chosen.sort_values("latent", ignore_index=True)[["latent", "band", "weight"]]


def study(
    saes: dict[str, SAE],
    lm: LM,
    tokens: Tokens | torch.Tensor,
    explainer: Explainer,
    lms: dict[str, LM] | None = None,
    count: int = 100,
    choice: Choice = STUDY,
    seed: int = 0,
) -> pd.DataFrame:
    """Explain latents of several SAEs and score the explanations on held-out documents.

    saes: by name; each remembers its site and layer. lms: by name of an SAE, another model that it
    belongs to, with the same tokenizer. count: latents of each SAE, drawn from bands of frequency
    (:func:`sample_latents`). tokens: text that no SAE was trained on; half of its documents are for
    explaining, half for scoring (:func:`split_documents`).

    Returns a row a latent: sae, latent, frequency, band, weight, l0 (of the SAE), the fields of
    :class:`Score`, the scores of another latent's explanation on the same windows
    (shuffled_correlation, shuffled_detection, shuffled_fuzzing), active and silent (numbers of
    held-out windows), repeated (those left out by :func:`fresh`), explanation. A score is NaN where
    the held-out windows do not allow it. Frequencies for the bands, and l0, are measured on every
    fourth row; the column frequency on all. Raises ValueError as
    :func:`jumprelu.latents.contexts.collect` does, for fewer than two documents, and for an SAE of
    which no latent fires.
    """
    import pandas as pd

    tokens = as_tokens(tokens)
    training, held_out = split_documents(tokens.document, seed)
    tables: dict[str, pd.DataFrame] = {}
    groups: dict[int, list[str]] = {}
    owners = {name: (lms or {}).get(name, lm) for name in saes}
    for name, owner in owners.items():
        groups.setdefault(id(owner), []).append(name)
    for names in groups.values():
        owner, some = owners[names[0]], [saes[name] for name in names]
        found = frequencies(owner, some, tokens[torch.arange(0, len(tokens), 4)])
        samples = [sample_latents(frequency, count, seed) for frequency in found]
        chosen = [torch.tensor(sample.latent.to_numpy(copy=True)) for sample in samples]
        for name, latents in zip(names, chosen, strict=True):
            if not len(latents):
                raise ValueError(f"no latent of {name} ever fires on these tokens")
        contexts = collect_many(owner, some, tokens, latents=chosen, choice=choice)
        for name, frequency, sample, own in zip(names, found, samples, contexts, strict=True):
            scored = explain_all(own, explainer, training, held_out, owner.special_ids, seed)
            sample.insert(1, "frequency", own.frequency.numpy())
            sample = sample.assign(l0=float(frequency.sum()))
            sample.insert(0, "sae", name)
            tables[name] = pd.concat([sample, scored], axis=1)
    return pd.concat([tables[name] for name in saes], ignore_index=True)


def explain_all(
    contexts: Contexts,
    explainer: Explainer,
    training: np.ndarray,
    held_out: np.ndarray,
    special: Sequence[int] = (),
    seed: int = 0,
) -> pd.DataFrame:
    """The part of :func:`study` that follows the contexts: one row a latent, in their order."""
    import pandas as pd

    count = len(contexts.latents)
    made: list[Explanation] = []
    tested: list[tuple[Windows, int]] = []  # and how many were left out
    for place in tqdm(range(count), desc="explaining", unit="latent", mininterval=1):
        shown = windows(contexts, place, training, special)
        held = windows(contexts, place, held_out, special)
        new = fresh(held, shown)
        tested.append((new, len(held.acts) - len(new.acts)))
        made.append(explainer.explain(shown))
    order = np.argsort(uniform(seed, 10, np.arange(count)), kind="stable")
    other = np.empty(count, int)
    other[order] = np.roll(order, 1)  # nobody keeps his own
    rows = []
    for place in tqdm(range(count), desc="scoring", unit="latent", mininterval=1):
        (held, repeated), maximum = tested[place], float(contexts.maximum[place])
        own, wrong = (
            score(held, explainer.simulate(each, held.tokens), maximum, each.cut, seed)
            for each in (made[place], made[other[place]])
        )
        if count == 1:
            wrong = Score(*[float("nan")] * len(Score._fields))
        active = int((held.acts > 0).any(1).sum())
        counts = {"active": active, "silent": len(held.acts) - active, "repeated": repeated}
        shuffled = {f"shuffled_{name}": getattr(wrong, name) for name in SCORES}
        rows.append(own._asdict() | shuffled | counts | {"explanation": made[place].text})
    return pd.DataFrame(rows)
