"""Concepts of Python source: a rule on the text so far and the tokens that answer it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch


class Concept(NamedTuple):
    name: str
    rule: Callable[[str], bool]
    """Of the text of the row up to and with the position that predicts."""
    answers: torch.Tensor
    """Token ids, int64 [n]."""


def open_bracket(text: str) -> str:
    """The innermost bracket that is open at the end of the text, or "". Strings and comments are
    read like code."""
    stack: list[str] = []
    for char in text:
        if char in "([{":
            stack.append(char)
        elif char in ")]}" and stack and stack[-1] + char in ("()", "[]", "{}"):
            stack.pop()
    return stack[-1] if stack else ""


def in_header(text: str) -> bool:
    """Whether the last line begins like a compound statement of Python and has no bracket open."""
    line = text.rsplit("\n", 1)[-1]
    header = re.match(r"\s*(def|class|if|elif|else|for|while|try|except|finally|with)\b", line)
    return bool(header) and not open_bracket(line)


def in_string(text: str, quote: str) -> bool:
    """Whether the last line holds an odd number of this quotation mark, and no three in a row."""
    line = text.rsplit("\n", 1)[-1]
    return line.count(quote) % 2 == 1 and quote * 3 not in line


RULES: dict[str, tuple[Callable[[str], bool], str]] = {
    "closing )": (lambda text: open_bracket(text) == "(", r" *\).*"),
    "closing ]": (lambda text: open_bracket(text) == "[", r" *\].*"),
    'closing "': (lambda text: in_string(text, '"'), r'".*'),
    "colon of a header": (in_header, r" *:(?!:).*"),
    "self": (lambda text: re.search(r"\n +def \w+\(?$", text) is not None, r"\(?self"),
    "import": (lambda text: re.search(r"(^|\n) *from [\w. ]*\w$", text) is not None, r" import"),
}
"""Name → (rule, what the whole text of an answer token matches), for Python source."""


def python_concepts(
    tokenizer: Any, rules: Mapping[str, tuple[Callable[[str], bool], str]] = RULES
) -> list[Concept]:
    """The concepts of `rules` with the answers that a tokenizer has. Raises ValueError for one
    without any."""
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    found = []
    for name, (rule, pattern) in rules.items():
        answers = [
            token for token, text in enumerate(texts) if re.fullmatch(pattern, text, re.DOTALL)
        ]
        if not answers:
            raise ValueError(
                f"no token of this tokenizer matches {pattern!r}, the answers of the concept "
                f"{name!r}: leave it out"
            )
        found.append(Concept(name, rule, torch.tensor(answers)))
    return found
