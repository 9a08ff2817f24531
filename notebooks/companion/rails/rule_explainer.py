"""An explainer that needs no language model: it looks for a few rules such as "'self' inside ( )"
and gives each the mean activation where it holds. The rules are the explanation that is shown, and
nothing else predicts.

- all that it knows of a token are its string and the text of the window before it
  (:mod:`companion.rails.token_features`).
- greedy: each rule is the one that most lowers the squared error of what the rules before it leave,
  less a price for each word of it. Sets of strings are found as in regression trees: sorted by
  mean, the best set is a prefix.
- a rule must hold at tokens of several windows: one window's oddities explain nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jumprelu.latents import interp
from jumprelu.latents.explain import LEVELS, Explanation, Windows

from .token_features import Features, Pieces, features

if TYPE_CHECKING:
    import pandas as pd

    from jumprelu.corpus import Tokens
    from jumprelu.lm import LM
    from jumprelu.sae import SAE


def study(saes: dict[str, SAE], lm: LM, tokens: Tokens, **options: Any) -> pd.DataFrame:
    """:func:`jumprelu.latents.interp.study` with the rules of :class:`RuleExplainer`."""
    return interp.study(saes, lm, tokens, RuleExplainer(lm.tokenizer), **options)


class Rule(NamedTuple):
    """Where all of `literals` hold, the activation is `level`."""

    literals: tuple[tuple[str, tuple[str, ...]], ...]
    """Pairs of a feature (:func:`features`) and the values of which it must have one; no values for
    what just holds or not."""
    level: int


def holds(rule: Rule, known: Features) -> np.ndarray:
    """Where all literals of a rule hold, bool [tokens]. Raises ValueError for a feature that does
    not exist."""
    found = True
    for name, wanted in rule.literals:
        if name not in (known.strings if wanted else known.flags):
            names = ", ".join([*known.flags, *known.strings])
            raise ValueError(f"rules know no feature {name!r}: expected one of {names}")
        if wanted:
            codes = [i for i, value in enumerate(known.values[name]) if value and value in wanted]
            found = found & np.isin(known.strings[name], codes)
        else:
            found = found & known.flags[name]
    return found


def in_words(rules: tuple[Rule, ...]) -> str:
    """Rules as a reader sees them: "'self', 'cls' and inside ( ) (9); the last word is 'def'
    (4)"."""
    said = {
        "token": "",
        "word": "the word ",
        "first character": "begins with ",
        "last character": "ends in ",
        "ending": "a word in -",
        "previous token": "after ",
        "token two before": "two after ",
        "last word": "the last word is ",
        "first word of the line": "on a line of ",
        "called": "in a call of ",
    }
    texts = []
    for rule in rules:
        literals = [
            said[name] + ", ".join(map(repr, values)) if values else name
            for name, values in rule.literals
        ]
        texts.append(" and ".join(literals) + f" ({rule.level})")
    return "; ".join(texts) or "no rule found"


@dataclass(frozen=True)
class RuleExplainer:
    """Looks for rules (see the module's text). tokenizer: of the language model that the tokens are
    of."""

    tokenizer: Any
    rules: int = 4
    literals: int = 3
    """Conditions of a rule, at most."""
    strings: int = 8
    """Values that one condition lists, at most."""
    windows: int = 2
    """In how many windows, at least, a rule must hold, and each string that it lists."""
    price: float = 0.01
    """What each condition must take off the squared error, as a share of all; and each string of a
    set half as much."""
    shrink: float = 2.0
    """As many tokens of the mean are added to those where a rule holds, so that a rule of few
    tokens promises less."""
    beam: int = 6
    """Conditions that are tried as the first of a rule."""

    @functools.cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.tokenizer)

    def explain(self, training: Windows) -> Explanation:
        known = self._features(training.tokens)
        here = training.tokens >= 0
        y = training.acts[here] / max(training.acts.max(initial=0), 1e-12) * LEVELS
        search = _Search(self, known, y, here.nonzero()[0])
        found: list[Rule] = []
        left = np.ones(len(y), bool)  # tokens at which no rule holds yet
        while len(found) < self.rules and (literals := search.best(left)):
            found.append(Rule(literals, 0))
            left &= ~holds(found[-1], known)
        rules = _levelled(found, known, y)
        cut = _cut(_predict(rules, known, here), training.acts.max(1, initial=0) > 0)
        return Explanation(in_words(rules), rules, cut)

    def simulate(self, explanation: Explanation, tokens: np.ndarray) -> np.ndarray:
        return _predict(explanation.rules, self._features(tokens), tokens >= 0)

    def _features(self, tokens: np.ndarray) -> Features:
        """:func:`features`, kept for the windows seen last, on which several explanations may be
        tried."""
        key = (tokens.shape, tokens.tobytes())
        if key not in self._recent:
            self._recent.clear()
            self._recent[key] = features(tokens, self.pieces)
        return self._recent[key]

    @functools.cached_property
    def _recent(self) -> dict[tuple, Features]:
        return {}


def _predict(rules: tuple[Rule, ...], known: Features, here: np.ndarray) -> np.ndarray:
    """The highest level of the rules that hold; 0 where none does."""
    predicted = np.zeros(here.shape)
    predicted[here] = np.max([rule.level * holds(rule, known) for rule in rules], axis=0, initial=0)
    return predicted


def _levelled(rules: list[Rule], known: Features, y: np.ndarray) -> tuple[Rule, ...]:
    """The rules by falling level, each level the mean of y where no rule above holds; those that
    come to 0 are left out."""
    where = sorted(
        ((holds(rule, known), rule) for rule in rules), key=lambda pair: -y[pair[0]].mean()
    )
    left, found = np.ones(len(y), bool), []
    for mine, rule in where:
        if (mine & left).any() and (level := round(float(y[mine & left].mean()))):
            found.append(rule._replace(level=level))
            left &= ~mine
    return tuple(sorted(found, key=lambda rule: -rule.level))


def _cut(predicted: np.ndarray, active: np.ndarray) -> float:
    """The level from which a window's highest prediction tells active windows best from silent
    ones, by balanced accuracy."""
    highest = predicted.max(1, initial=0)
    if active.all() or not active.any():
        return 1.0
    scores = [
        (highest[active] >= cut).mean() + (highest[~active] < cut).mean()
        for cut in range(1, LEVELS + 1)
    ]
    return 1.0 + int(np.argmax(scores))


class _Candidate(NamedTuple):
    gain: float
    literals: tuple[tuple[str, tuple[str, ...]], ...]
    where: np.ndarray


class _Search:
    """The search for one rule. y: [tokens]; window: of each token, its number, ascending."""

    def __init__(self, options: RuleExplainer, known: Features, y: np.ndarray, window: np.ndarray):
        self.options, self.known, self.y, self.window = options, known, y, window
        flags = np.array(list(known.flags.values()), bool).reshape(len(known.flags), len(y))
        common = np.array([self._windows(flag) >= options.windows for flag in flags], bool)
        self.flags = [name for name, kept in zip(known.flags, common, strict=True) if kept]
        self.flag_matrix = flags[common].astype(np.float32)
        self.codes = {
            name: self._common(code, len(known.values[name]))
            for name, code in known.strings.items()
        }
        self.price = options.price * float(np.square(y - y.mean()).sum()) if len(y) else 0.0

    def _windows(self, where: np.ndarray) -> int:
        """In how many windows something holds."""
        numbers = self.window[where]
        return int((numbers[1:] != numbers[:-1]).sum()) + 1 if len(numbers) else 0

    def _common(self, code: np.ndarray, values: int) -> np.ndarray:
        """`code`, 0 for the values that occur in too few windows."""
        seen = (
            np.unique(code * (self.window[-1] + 1) + self.window) // (self.window[-1] + 1)
            if len(code)
            else code
        )
        return np.where(np.bincount(seen, minlength=values)[code] >= self.options.windows, code, 0)

    def best(self, left: np.ndarray) -> tuple:
        """Literals of the best rule for the tokens in `left`; () if none is worth its price."""
        if not left.any() or not self.price:
            return ()
        rest = np.where(left, self.y - self.y[left].mean(), 0).astype(np.float32)
        found = self._longer(rest, [_Candidate(0.0, (), left)])
        flags, sets = (
            [c for c in found if bool(c.literals[0][1]) == kind] for kind in (False, True)
        )
        half = self.options.beam // 2
        longest = (
            sorted(flags, key=lambda c: -c.gain)[:half] + sorted(sets, key=lambda c: -c.gain)[:half]
        )
        for _ in range(self.options.literals - 1):
            more = sorted(self._longer(rest, longest), key=lambda c: -c.gain)
            found, longest = found + more[: self.options.beam], more[:1]
        for candidate in sorted(found, key=lambda c: -c.gain):
            if candidate.gain <= 0:
                break
            if self._windows(candidate.where) >= self.options.windows:
                return candidate.literals
        return ()

    def _longer(self, rest: np.ndarray, shorter: list[_Candidate]) -> list[_Candidate]:
        """Each of `shorter` with one condition more: every flag, and the best set of values of
        every string."""
        if not shorter:
            return []
        masks = np.array([c.where for c in shorter], dtype=np.float32)
        sums, counts = (
            self.flag_matrix @ (masks * rest).T,
            self.flag_matrix @ masks.T,
        )  # [flags, shorter]
        prices = self.price * np.array([1 + _length(c.literals) for c in shorter])
        gains = (
            np.where(sums > 0, np.square(sums) / (counts + self.options.shrink).clip(1e-9), 0)
            - prices
        )
        found = []
        for at, candidate in enumerate(shorter):
            used = {name for name, _ in candidate.literals}
            for i in np.argsort(-gains[:, at])[: self.options.beam]:
                if self.flags[i] not in used:
                    where = candidate.where & (self.flag_matrix[i] > 0)
                    found.append(
                        _Candidate(gains[i, at], (*candidate.literals, (self.flags[i], ())), where)
                    )
            inside = candidate.where.nonzero()[0]
            for name, code in self.codes.items():
                if name not in used and (
                    new := self._set(candidate, name, code[inside], rest[inside], prices[at])
                ):
                    found.append(new)
        return found

    def _set(
        self, candidate: _Candidate, name: str, code: np.ndarray, rest: np.ndarray, price: float
    ) -> _Candidate | None:
        counts, sums = np.bincount(code, minlength=1), np.bincount(code, rest, minlength=1)
        sums[0] = 0  # rare values, and none
        best = np.argsort(-sums / (counts + self.options.shrink).clip(1e-9))[: self.options.strings]
        best = best[sums[best] > 0]
        if not len(best):
            return None
        total, count = sums[best].cumsum(), counts[best].cumsum()
        gains = (
            np.square(total) / (count + self.options.shrink)
            - price
            - self.price * np.arange(len(best)) / 2
        )
        size = int(gains.argmax()) + 1
        chosen = best[:size]
        values = tuple(self.known.values[name][i] for i in chosen)
        return _Candidate(
            float(gains[size - 1]),
            (*candidate.literals, (name, values)),
            candidate.where & np.isin(self.codes[name], chosen),
        )


def _length(literals: tuple) -> float:
    """What the conditions of a rule cost, in prices: 1 each, and 1/2 for each string beyond the
    first."""
    return sum(1 + max(len(values) - 1, 0) / 2 for _, values in literals)
