"""What is known of a token: its own string, and the text before it in its window.

Strings, comments, brackets and indentation are those of Python source; in other text they are
simply rare.
"""

from __future__ import annotations

import builtins
import functools
import keyword
import re
from typing import Any, NamedTuple

import numpy as np

_FUNCTION_WORDS = """a an the this that these those it its of to in for on with as by at from or and
not is are was were be been has have had can may will should must if when which while but than then
there"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_BASIC = r"(?P<end>\0)|(?P<triple>\"{3}|'{3})|(?P<line>\n[ \t]*)|(?P<word>[^\W\d]\w*)"
_STRING = r"(?<![\w)\]])(?:\"(?:[^\"\\\n\0]|\\.)*\"?|'(?:[^'\\\n\0]|\\.)*'?)"
_SCAN = {
    False: re.compile(
        rf"{_BASIC}|(?P<comment>\#[^\n\0]*)|(?P<open>[(\[{{])|(?P<string>{_STRING})"
        r"|(?P<close>[)\]}])|(?P<mark>>>>|[@=,:*-])"
    ),
    True: re.compile(rf"{_BASIC}|(?P<mark>>>>|[:@*-])"),
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
