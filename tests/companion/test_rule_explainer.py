"""Features of tokens by hand, the search for rules against planted ones and brute force."""

import itertools

import numpy as np
import pytest
import tokenizers
import transformers
from companion.rails.rule_explainer import (
    Rule,
    RuleExplainer,
    _Candidate,
    _cut,
    _levelled,
    _Search,
    holds,
)
from companion.rails.token_features import Features, Pieces, features
from models import tiny_tokenizer

from jumprelu.latents.explain import Explanation, Windows


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def ids(tokenizer, *texts):
    """Windows of these texts, a token a character, padded at the end; [n, w]."""
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows])


def known_at(tokenizer, text):
    """What is known at each character of a text: a function of a feature's name and the character's
    place."""
    found = features(ids(tokenizer, text), Pieces(tokenizer))

    def at(name, place):
        return (
            found.flags[name][place]
            if name in found.flags
            else found.values[name][found.strings[name][place]]
        )

    return at


CODE = """x = 1
def f(a, b='d"e'):
    \"\"\"Doc: it's [here.\"\"\"
    return g(h[1], k=2)  # note (a
y
"""


def test_where_a_token_stands_in_the_syntax(tokenizer):
    at = known_at(tokenizer, CODE)
    place = CODE.index
    inside = {
        name: f"inside {name}"
        for name in ("a string", "a docstring", "a comment", "( )", "[ ]", "{ }")
    }
    assert not any(at(flag, place("x")) for flag in inside.values())
    assert (
        at(inside["a string"], place('d"e'))
        and at(inside["a string"], place("e'):"))
        and at(inside["( )"], place("e'):"))
    )
    assert not at(inside["a string"], place("):"))
    for word in ("Doc", "it's", "s [here", "here"):
        assert at(inside["a docstring"], place(word)) and not at(inside["[ ]"], place(word)), word
    assert not at(inside["a docstring"], place("return"))
    deep = "inside two brackets or more"
    assert (
        at(inside["[ ]"], place("1]"))
        and at(deep, place("1]"))
        and not at(inside["( )"], place("1]"))
    )
    assert at(inside["( )"], place(", k")) and not at(deep, place(", k"))
    assert at(inside["a comment"], place("note")) and not at(inside["( )"], place("a\ny"))
    assert not at(inside["a comment"], place("y\n"))


def test_lines_words_and_calls(tokenizer):
    at, place = known_at(tokenizer, CODE), CODE.index
    assert (
        at("starts a line", place("def"))
        and not at("starts a line", place("f("))
        and at("starts a line", place("return"))
    )
    assert at("on a line indented by 4", place("return")) and at(
        "on a line indented by 0", place("def")
    )
    assert at("on a line indented by 0", place("y\n"))
    assert (
        at("last word", place("f(")) == "def"
        and at("first word of the line", place("a, b")) == "def"
    )
    assert (
        at("called", place("1]")) == "h"
        and at("called", place("k=")) == "g"
        and at("called", place("a, b")) == "f"
    )
    assert at("called", place("return")) == ""
    assert (
        at("right of =", place("2)"))
        and not at("right of =", place("k=2"))
        and not at("right of =", place("  #"))
    )
    again = known_at(tokenizer, "x = f(a=1) + b")
    assert again("right of =", 13) and not known_at(tokenizer, "f(a=1) + b")("right of =", 9)
    assert at("last word", place("eturn")) == "here"  # not the word that has begun
    assert at("continues a word", place("eturn")) and not at("continues a word", place("return"))


def test_the_strings_of_a_token_and_before_it(tokenizer):
    at = known_at(tokenizer, "Ab 7b_")
    assert [at("token", i) for i in range(6)] == list("Ab 7b_")
    assert at("word", 0) == "a" and at("previous token", 0) == "" and at("previous token", 1) == "A"
    assert at("token two before", 2) == "A" and at("is capitalised", 0) and at("is a number", 3)
    assert at("after one that is a number", 4) and not at("after one that is a number", 3)
    assert at("is blank", 2) and at("has an underscore", 5) and not at("is punctuation", 5)
    assert (
        at("seen before", 4)
        and not at("seen before", 1)
        and not at("seen before after the same token", 4)
    )
    first = [f"among the first {most} that the model sees" for most in (2, 8)]
    tokens = np.concatenate([[[-1, -1]], ids(tokenizer, "abc")], 1)
    found = features(np.concatenate([tokens, ids(tokenizer, "abcde")]), Pieces(tokenizer))
    assert [found.flags[name].tolist() for name in first] == [
        [1, 1, 0] + [0] * 5,
        [1, 1, 1] + [0] * 5,
    ]
    again = known_at(tokenizer, "abcab")
    assert again("seen before after the same token", 4) and not again(
        "seen before after the same token", 3
    )


@pytest.mark.parametrize(
    "text, place, expected",
    [
        ('ends here.\n    """\n    x = 1', "x", False),  # the window begins within a docstring
        ('def f():\n    """\n    Text', "Text", True),
        ('    """Text of it', "Text", True),
        ('it ends."""\n    x', "x", False),
        ('ends.\n"""\n\nx = """text', "text", True),
        ("s = '''text", "text", True),
    ],
)
def test_the_first_quotes_of_a_window_may_end_a_docstring_that_began_before_it(
    tokenizer, text, place, expected
):
    assert known_at(tokenizer, text)("inside a docstring", text.index(place)) == expected


def test_a_window_does_not_leak_into_the_next(tokenizer):
    together = features(ids(tokenizer, 'f("""abc (', "x + 1"), Pieces(tokenizer))
    alone = features(ids(tokenizer, "x + 1"), Pieces(tokenizer))
    for name, flag in alone.flags.items():
        np.testing.assert_array_equal(together.flags[name][-5:], flag, err_msg=name)
    for name, code in alone.strings.items():
        assert [together.values[name][i] for i in together.strings[name][-5:]] == [
            alone.values[name][i] for i in code
        ], name


def test_what_is_known_of_a_token_does_not_depend_on_what_follows(tokenizer):
    text = CODE.replace('"""', "") + "class A(b):  # c\n  x = ['d e', f({1: -2})]\n"
    whole = known_at(tokenizer, text)
    names = features(ids(tokenizer, "a"), Pieces(tokenizer))
    for length in range(1, len(text)):
        part = known_at(tokenizer, text[:length])
        for name in (*names.flags, *names.strings):
            assert part(name, length - 1) == whole(name, length - 1), (name, text[:length])


def test_a_piece_of_text_keeps_its_space():
    tokens = {"<unk>": 0, "a": 1, "▁": 2, "▁b": 3, "c": 4, "<bos>": 5}
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(tokens, [("▁", "b")] if "b" in tokens else [], unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>"
    )
    assert tokenizer.decode([3]) == "b"  # alone, it loses its space
    assert [Pieces(tokenizer).text(i) for i in (3, 4, 5, -1)] == [" b", "c", "", ""]
    with pytest.raises(ValueError, match="no tokenizer"):
        Pieces(None)


def random_windows(tokenizer, n=120, w=24, seed=0, alphabet="abcdefgh(,) "):
    rng = np.random.default_rng(seed)
    return ids(tokenizer, *("".join(rng.choice(list(alphabet), w)) for _ in range(n)))


def planted(tokenizer, tokens):
    """10 at any 'd' or 'b' right after '(', 4 at any 'c', else 0."""
    code = {character: ids(tokenizer, character)[0, 0] for character in "bcd("}
    previous = np.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    first = np.isin(tokens, [code["b"], code["d"]]) & (previous == code["("])
    return 10.0 * first + 4.0 * (tokens == code["c"])


def test_planted_rules_are_found_and_predict_new_windows_exactly(tokenizer):
    tokens = random_windows(tokenizer)
    explainer = RuleExplainer(tokenizer)
    explanation = explainer.explain(Windows(tokens, planted(tokenizer, tokens) / 3))  # any unit
    assert [rule.level for rule in explanation.rules] == [10, 4]
    assert {"".join(sorted(values)) for _, values in explanation.rules[0].literals} == {"bd", "("}
    assert "'('" in explanation.text and "'c' (4)" in explanation.text
    new = random_windows(tokenizer, seed=1)
    np.testing.assert_array_equal(explainer.simulate(explanation, new), planted(tokenizer, new))


def test_noise_has_no_rule_that_helps_on_new_windows(tokenizer):
    rng = np.random.default_rng(3)
    correlations = []
    for seed in range(20):
        tokens, new = (
            random_windows(tokenizer, seed=seed),
            random_windows(tokenizer, seed=seed + 100),
        )
        explainer = RuleExplainer(tokenizer)
        explanation = explainer.explain(
            Windows(tokens, rng.exponential(size=tokens.shape) * (rng.random(tokens.shape) < 0.1))
        )
        predicted = explainer.simulate(explanation, new)
        truth = rng.exponential(size=new.shape) * (rng.random(new.shape) < 0.1)
        correlations.append(
            np.corrcoef(predicted.ravel(), truth.ravel())[0, 1] if np.ptp(predicted) else 0.0
        )
    assert abs(np.mean(correlations)) < 0.02


def test_a_string_must_be_seen_in_several_windows(tokenizer):
    tokens = ids(tokenizer, "abqba", "abcde", "edcba", "cdbae")
    acts = 5.0 * (tokens == ids(tokenizer, "q"))
    assert "'q'" not in RuleExplainer(tokenizer).explain(Windows(tokens, acts)).text
    twice = Windows(np.tile(tokens, (2, 1)), np.tile(acts, (2, 1)))
    assert RuleExplainer(tokenizer).explain(twice).text == "'q' (10)"


@pytest.mark.parametrize("acts", [0.0, 1.0])
def test_where_activations_do_not_vary_there_is_no_rule(tokenizer, acts):
    tokens = ids(tokenizer, "abc", "cde")
    explanation = RuleExplainer(tokenizer).explain(Windows(tokens, np.full(tokens.shape, acts)))
    assert explanation == Explanation("no rule found", (), 1.0)
    assert (RuleExplainer(tokenizer).simulate(explanation, tokens) == 0).all()


def test_no_windows_give_no_rule(tokenizer):
    empty = Windows(np.zeros((0, 5), np.int64), np.zeros((0, 5)))
    assert RuleExplainer(tokenizer).explain(empty).rules == ()
    assert RuleExplainer(tokenizer).simulate(Explanation("", ()), empty.tokens).shape == (0, 5)


def test_the_highest_rule_counts_and_the_rest_is_zero(tokenizer):
    tokens = ids(tokenizer, "abc ", "ca")
    rules = (
        Rule((("token", ("a", "b")),), 3),
        Rule((("token", ("a",)), ("previous token", ("c",))), 8),
    )
    predicted = RuleExplainer(tokenizer).simulate(Explanation("", rules), tokens)
    np.testing.assert_array_equal(predicted, [[3, 3, 0, 0], [0, 8, 0, 0]])


def test_a_feature_that_does_not_exist_is_an_error(tokenizer):
    known = features(ids(tokenizer, "abc"), Pieces(tokenizer))
    with pytest.raises(ValueError, match="no feature 'colour'"):
        holds(Rule((("colour", ("red",)),), 3), known)
    with pytest.raises(ValueError, match="no feature 'token'"):
        holds(Rule((("token", ()),), 3), known)  # a string without values


def test_the_best_set_of_strings_equals_brute_force():
    rng = np.random.default_rng(0)
    code = rng.choice(
        7, 200, p=[0, 0.05, 0.4, 0.05, 0.2, 0.2, 0.1]
    )  # the common value has the greatest sum, not mean
    y = np.array([0, 6, 2.5, 5, 0, 0.1, 0])[code] + rng.normal(size=200) * 0.3
    known = Features({"never": np.zeros(200, bool)}, {"word": code}, {"word": ["", *"abcdef"]})
    search = _Search(
        RuleExplainer(None, shrink=0.0, price=0.0, strings=6), known, y, np.arange(200) // 10
    )
    rest = (y - y.mean()).astype(np.float32)
    everywhere = _Candidate(0.0, (), np.ones(200, bool))
    found = search._set(everywhere, "word", code, rest, 0.0)
    sums = {}
    for size in range(1, 6):
        for chosen in itertools.combinations(range(1, 7), size):
            where = np.isin(code, chosen)
            if rest[where].sum() > 0:
                sums[chosen] = rest[where].sum() ** 2 / where.sum()
    best = max(sums, key=sums.get)
    assert {"abcdef"[i - 1] for i in best} == set(found.literals[0][1])
    assert len(best) > 1 and found.gain == pytest.approx(sums[best], rel=1e-4)
    np.testing.assert_array_equal(found.where, np.isin(code, best))


def test_levels_are_means_where_no_higher_rule_holds(tokenizer):
    tokens = ids(tokenizer, "aabbbbcc")
    known, y = features(tokens, Pieces(tokenizer)), np.array([10, 8, 4, 4, 4, 4, 0.3, 0.1])
    wide, narrow, idle = (Rule((("word", values),), 0) for values in (("a", "b"), ("a",), ("c",)))
    assert _levelled([wide, narrow, idle], known, y) == (
        narrow._replace(level=9),
        wide._replace(level=4),
    )


def test_the_cut_by_hand():
    active = np.array([True, True, False, False])
    assert (
        _cut(np.array([[0, 5], [5, 0], [2, 2], [0, 0]]), active) == 3
    )  # the lowest of the best, 3 to 5
    assert _cut(np.array([[9], [1], [0], [0]]), active) == 1
    assert _cut(np.array([[9], [7], [8], [6]]), active) == 7
    assert _cut(np.array([[9], [9]]), np.array([True, True])) == 1


def test_the_cut_tells_active_windows_from_silent_ones_in_training(tokenizer):
    tokens = ids(
        tokenizer, *["ab  c"] * 6, *["bbbbc"] * 6
    )  # c is active after a blank; b everywhere is noise
    acts = np.zeros(tokens.shape)
    acts[:6, 4], acts[:6, 1] = 9.0, 2.0
    explanation = RuleExplainer(tokenizer).explain(Windows(tokens, acts))
    predicted = RuleExplainer(tokenizer).simulate(explanation, tokens)
    assert ((predicted >= explanation.cut).any(1) == (acts > 0).any(1)).all()
