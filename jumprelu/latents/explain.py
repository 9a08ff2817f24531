"""Explanations of latents in words, and the activations that follow from them.

An explainer reads windows in which a latent is active and others in which it is silent, and gives a
text. From the text alone, not from the model, an activation of 0 to 10 is predicted at each token
of windows not seen before (Bills et al. 2023, "Language models can explain neurons in language
models"). `jumprelu.latents.interp` scores the prediction.

Notable here: :class:`RuleExplainer` needs no language model. It looks for a few rules such as
"'self' inside ( )" and gives each the mean activation where it holds. The rules are the explanation
that is shown, and nothing else predicts.
- all that it knows of a token are its string and the text of the window before it:
  :func:`features`.
- greedy: each rule is the one that most lowers the squared error of what the rules before it leave,
  less a price for each word of it. Sets of strings are found as in regression trees: sorted by
  mean, the best set is a prefix.
- a rule must hold at tokens of several windows: one window's oddities explain nothing.
"""

from __future__ import annotations

import builtins
import functools
import keyword
import re
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

LEVELS = 10
"""Predicted activations are 0 … 10, 10 the highest seen in training."""


class Windows(NamedTuple):
    """Windows of text around which one latent is active, or silent."""

    tokens: np.ndarray
    """int64 [n, w]: ids; −1 where there is no token."""
    acts: np.ndarray
    """float [n, w]: the latent's activations, any unit."""


class Rule(NamedTuple):
    """Where all of `literals` hold, the activation is `level`."""

    literals: tuple[tuple[str, tuple[str, ...]], ...]
    """Pairs of a feature (:func:`features`) and the values of which it must have one; no values for
    what just holds or not."""
    level: int


class Explanation(NamedTuple):
    """What a reader is shown, and what simulation needs."""

    text: str
    rules: tuple[Rule, ...] = ()
    cut: float = 1.0
    """A window is said to activate the latent if somewhere in it at least this is predicted."""


class Explainer(Protocol):
    def explain(self, training: Windows) -> Explanation:
        """From windows for training alone."""

    def simulate(self, explanation: Explanation, tokens: np.ndarray) -> np.ndarray:
        """Predicted activation, 0 … 10, at each token; tokens, result: [n, w]. NaN where there is
        no prediction."""


# ---- features of a token: its string, and the text before it

_FUNCTION_WORDS = """a an the this that these those it its of to in for on with as by at from or and not is are was were be been
has have had can may will should must if when which while but than then there"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_SCAN = {
    False: re.compile(
        r"(?P<end>\0)|(?P<triple>\"{3}|'{3})|(?P<comment>\#[^\n\0]*)|(?P<line>\n[ \t]*)|(?P<word>[^\W\d]\w*)|(?P<open>[(\[{])"
        r"|(?P<string>(?<![\w)\]])(?:\"(?:[^\"\\\n\0]|\\.)*\"?|'(?:[^'\\\n\0]|\\.)*'?))|(?P<close>[)\]}])|(?P<mark>>>>|[@=,:*-])"
    ),
    True: re.compile(
        r"(?P<end>\0)|(?P<triple>\"{3}|'{3})|(?P<line>\n[ \t]*)|(?P<word>[^\W\d]\w*)|(?P<mark>>>>|[:@*-])"
    ),
}
"""What the scanner stops at: outside of a docstring, and within."""
_STATES = ("code", "a string", "a docstring", "a comment")
_BRACKETS = " ([{"


class Features(NamedTuple):
    """What is known of tokens, flat over windows; padding left out."""

    flags: dict[str, np.ndarray]
    """Name → bool [tokens]."""
    strings: dict[str, np.ndarray]
    """Name → code of the value, int [tokens]; 0 for none."""
    values: dict[str, list[str]]
    """Name → value of each code."""


class Pieces:
    """The text of each token id, as it stands within a text (a lone token may lose its space)."""

    def __init__(self, tokenizer: Any):
        if tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so its tokens have no text: explanations need one"
            )
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
        before = len(decode(anchor))
        special = set(tokenizer.all_special_ids)

        @functools.cache
        def text(token: int) -> str:
            return "" if token in special or token < 0 else decode([*anchor, token])[before:]

        self.text = text


@functools.cache
def _kinds(piece: str) -> list[bool]:
    """For each of KINDS, whether it is so."""
    word = piece.strip()
    letters = word.replace("_", "")
    return [
        piece[:1] == " ",
        "\n" in piece,
        not word,
        word.isdigit(),
        letters.isalpha() and letters.isupper() and len(word) > 1,
        letters.isalpha() and word[:1].isupper() and (len(word) == 1 or not word.isupper()),
        word.isalpha() and word.islower(),
        "_" in word,
        bool(word) and not any(c.isalnum() or c == "_" for c in word),
        word in keyword.kwlist,
        hasattr(builtins, word),
        word.lower() in FUNCTION_WORDS,
    ]


KINDS = (
    "starts with a space",
    "has a line break",
    "is blank",
    "is a number",
    "is in capitals",
    "is capitalised",
    "is a lower-case word",
    "has an underscore",
    "is punctuation",
    "is a keyword",
    "is a builtin's name",
    "is a function word",
)


def features(tokens: np.ndarray, pieces: Pieces) -> Features:
    """Features of all tokens of windows, [n, w], in order, without padding (ids below 0).

    What is said of a token depends on its own string and on what stands before it in the window, as
    in a causal model (but for tokens within triple quotes themselves).
    """
    here = tokens >= 0
    distinct, place = np.unique(tokens, return_inverse=True)
    place = place.reshape(tokens.shape)
    texts = [pieces.text(int(i)) for i in distinct]
    words = [text.strip() for text in texts]

    kinds = np.array([_kinds(text) for text in texts], bool).reshape(-1, len(KINDS)).T[:, place]
    flags = dict(zip(KINDS, kinds, strict=True))
    flags |= {f"after one that {name}": _later(kind) for name, kind in flags.items()}
    starts, ends = (
        np.array([text[at].isalnum() for text in texts], bool)[place]
        for at in (slice(1), slice(-1, None))
    )
    flags["continues a word"] = starts & _later(ends)
    same = (tokens[:, :, None] == tokens[:, None, :]) & np.tri(
        tokens.shape[1], k=-1, dtype=bool
    )  # the second earlier
    flags["seen before"] = same.any(2)
    flags["seen before after the same token"] = _later(
        (same[:, 1:, 1:] & same[:, :-1, :-1]).any(2), drop=0
    )
    said = np.array([bool(text) for text in texts], bool)[place]
    for most in (2, 8):  # the window begins before the row does, or with BOS
        flags[f"among the first {most} that the model sees"] = (
            ~said[:, :1] & said & (said.cumsum(1) <= most)
        )

    own = {
        "token": texts,
        "word": [word.lower() for word in words],
        "first character": [word[:1] for word in words],
        "last character": [word[-1:] for word in words],
        "ending": [word[-3:] if word.isalpha() and len(word) > 4 else "" for word in words],
    }
    values, strings = {}, {}
    for name, each in own.items():
        values[name], code = _coded(each)
        strings[name] = code[place]
    for name, of in (("previous token", "token"), ("token two before", "previous token")):
        values[name], strings[name] = values[of], _later(strings[of])

    at, held, said_words = _events(
        "\0".join("".join(texts[i].replace("\0", " ") for i in row) for row in place)
    )
    lengths = np.array([len(text) for text in texts], int)[place]
    lead = np.array([len(text) - len(text.lstrip()) if text.strip() else 0 for text in texts], int)[
        place
    ]
    start = lengths.cumsum().reshape(tokens.shape) - lengths + np.arange(len(tokens))[:, None]
    known = held[
        np.searchsorted(at, start + lead, side="right") - 1
    ]  # [n, w, 9]: what holds where the token's text begins
    state, bracket, depth, called, line_first, last, indent, equals, marks = np.moveaxis(
        known, 2, 0
    )
    flags |= {f"inside {name}": state == number for number, name in enumerate(_STATES) if number}
    flags |= {f"inside {_BRACKETS[i]} {')]}'[i - 1]}": bracket == i for i in (1, 2, 3)}
    flags |= {
        "inside two brackets or more": depth > 1,
        "right of =": equals > 0,
        "starts a line": line_first < 0,
        "in prose": (state == 0) & (marks == 0) & (bracket == 0),
    }
    flags |= {f"on a line indented by {n}": indent == n for n in (0, 4, 8)} | {
        "on a line indented by 12 or more": indent >= 12
    }
    for name, code in (
        ("last word", last),
        ("first word of the line", line_first.clip(min=0)),
        ("called", called),
    ):
        values[name], strings[name] = said_words, code
    flat = ({name: known[here] for name, known in kind.items()} for kind in (flags, strings))
    return Features(*flat, values)


def _later(values: np.ndarray, drop: int = 1) -> np.ndarray:
    """Each token's predecessor's value, 0 at the beginning of a window; [n, w]."""
    return np.pad(values[:, : values.shape[1] - drop], ((0, 0), (1, 0)))


def _coded(strings: list[str]) -> tuple[list[str], np.ndarray]:
    """The distinct strings, "" first, and the number of each."""
    known: dict[str, int] = {"": 0}
    code = np.array([known.setdefault(each, len(known)) for each in strings], dtype=np.int64)
    return list(known), code


def _opens(text: str, start: int, end: int) -> bool:
    """Whether the first triple quotes of a window open a docstring, or close one that began before
    the window.

    They open one if only blanks, a letter, = or a bracket stand before them on their line, and a
    text follows on it or the line before ended with a colon.
    """
    above, _, left = text[text.rfind("\0", 0, start) + 1 : start].rpartition("\n")
    left = left.strip().rstrip("rbfuRBFU")
    return (not left or left[-1] in "=(,") and (
        text[end : end + 1] not in ("\n", "\0", "") or above.rstrip().endswith(":")
    )


def _events(text: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Offsets at which something changes, what holds from there on ([events, 9], see `features`),
    and the words by code."""
    known: dict[str, int] = {"": 0}
    at: list[int] = []
    rows: list[tuple[int, ...]] = []
    state = line_first = last = equals = marks = 0
    indent, stack, position, paired = (
        -1,
        [(0, 0, 0)],
        0,
        False,
    )  # stack: brackets, what is called, whether right of =

    def hold(place: int, state: int) -> None:
        at.append(place)
        rows.append(
            (
                state,
                stack[-1][0],
                len(stack) - 1,
                stack[-1][1],
                line_first,
                last,
                indent,
                equals,
                marks,
            )
        )

    hold(0, state)
    while match := _SCAN[state == 2].search(text, position):
        kind, found, start, position = match.lastgroup, match[0], match.start(), match.end()
        if kind == "end":
            state = line_first = last = equals = marks = 0
            indent, stack, paired = -1, [(0, 0, 0)], False
        elif kind == "line":
            line_first, indent, equals, marks = -1, -1, 0, 0
            hold(start + 1, state)  # within the indentation nobody knows yet how deep it will be
            indent = len(found) - 1
        elif kind == "word":
            last = known.setdefault(found, len(known))
        elif kind == "triple":
            state = 2 if state != 2 and (paired or _opens(text, start, position)) else 0
            paired = True
        elif kind == "open":
            called = (
                last if text[start - 1 : start].isalnum() or text[start - 1 : start] == "_" else 0
            )
            stack.append((_BRACKETS.index(found), called, equals))
            equals, marks = 0, 1
        elif kind == "close":
            equals = stack[-1][2]
            stack = (
                stack[:-1] if len(stack) > 1 else stack
            )  # it may have been opened before the window
        elif kind == "mark":
            equals = int(found == "=" or (equals and found != ","))
            marks = int(marks or found in "=@")
        else:
            hold(start + 1, 3 if kind == "comment" else 1)
        if line_first < 0 and kind != "line":
            line_first = known.setdefault(
                found if kind in ("word", "mark") else found[:1], len(known)
            )
        hold(position, state)
    return np.array(at), np.array(rows), list(known)


# ---- rules


def holds(rule: Rule, known: Features) -> np.ndarray:
    """Where all literals of a rule hold, bool [tokens]. Raises ValueError for a feature that does
    not exist."""
    found = True
    for name, wanted in rule.literals:
        if name not in (known.strings if wanted else known.flags):
            raise ValueError(
                f"rules know no feature {name!r}: expected one of {', '.join([*known.flags, *known.strings])}"
            )
        own = (
            known.flags[name]
            if not wanted
            else np.isin(
                known.strings[name],
                [i for i, value in enumerate(known.values[name]) if value and value in wanted],
            )
        )
        found = found & own
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

    @functools.cached_property
    def _recent(self) -> dict[tuple, Features]:
        return {}

    def _features(self, tokens: np.ndarray) -> Features:
        """:func:`features`, kept for the windows seen last, on which several explanations may be
        tried."""
        key = (tokens.shape, tokens.tobytes())
        if key not in self._recent:
            self._recent.clear()
            self._recent[key] = features(tokens, self.pieces)
        return self._recent[key]

    def explain(self, training: Windows) -> Explanation:
        known = self._features(training.tokens)
        here = training.tokens >= 0
        y = training.acts[here] / max(training.acts.max(initial=0), 1e-12) * LEVELS
        search = _Search(
            self, known, y, np.broadcast_to(np.arange(len(here))[:, None], here.shape)[here]
        )
        found: list[Rule] = []
        left = np.ones(len(y), bool)  # tokens at which no rule holds yet
        while len(found) < self.rules and (literals := search.best(left)):
            found.append(Rule(literals, 0))
            left &= ~holds(found[-1], known)
        rules = _levelled(found, known, y)
        return Explanation(
            in_words(rules),
            rules,
            _cut(_predict(rules, known, here), training.acts.max(1, initial=0) > 0),
        )

    def simulate(self, explanation: Explanation, tokens: np.ndarray) -> np.ndarray:
        return _predict(explanation.rules, self._features(tokens), tokens >= 0)


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
