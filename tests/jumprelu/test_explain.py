"""Prompts and answers of a language model, played by functions; and the reading of answers."""

import json
import threading

import numpy as np
import pytest
import torch

from jumprelu.latents.contexts import Contexts
from jumprelu.latents.explain import Explanation, LLMExplainer, Windows, read_activations
from jumprelu.latents.interp import explain_all
from tests.models import tiny_tokenizer


def lines(prompt):
    """The texts at the end of a prompt."""
    return prompt.partition("one number for each token.\n\n")[2].split("\n\n")


def ids(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


WINDOWS = Windows(
    np.array([ids("ab(a"), ids("xyz)"), ids("aaa") + [-1]]),
    np.array([[0, 0, 2.0, 0.3], [0, 0, 0, 0], [0, 4.0, 0, 0]]),
)


def test_the_prompt_shows_tokens_and_levels():
    prompt = LLMExplainer(None, tiny_tokenizer()).explanation_prompt(WINDOWS)
    shown = '["a", "b", "(" 5, "a" 1]\n\n["a", "a" 10, "a"]\n\n["x", "y", "z", ")"]'
    assert prompt.endswith("alone.\n\n" + shown)


@pytest.mark.parametrize("parallel", [1, 3])
def test_simulation_asks_for_several_windows_at_once_and_puts_answers_in_place(parallel):
    asked = []

    def ask(prompt):
        asked.append(prompt)
        assert prompt.startswith("A latent") and "the {explanation}" in prompt
        texts = [json.loads(line) for line in lines(prompt)]
        levels = [[10 if token == "a" else 0 for token in text] for text in texts]
        return "Here you are:\n" + json.dumps(levels)

    explainer = LLMExplainer(ask, tiny_tokenizer(), together=2, parallel=parallel)
    explanation = Explanation("the {explanation}")
    predicted = explainer.simulate(explanation, WINDOWS.tokens)
    np.testing.assert_array_equal(predicted, [[10, 0, 0, 10], [0, 0, 0, 0], [10, 10, 10, 0]])
    assert sorted(asked) == sorted(explainer.simulation_prompts(explanation, WINDOWS.tokens))
    assert len(asked) == 2


def test_questions_are_asked_at_the_same_time_where_that_is_allowed():
    together = threading.Barrier(3, timeout=20)

    def ask(prompt):
        together.wait()  # fails unless three are under way
        return "[1, 1, 1, 1]"

    explainer = LLMExplainer(ask, tiny_tokenizer(), together=1, parallel=3)
    predicted = explainer.simulate(Explanation("e"), WINDOWS.tokens)
    np.testing.assert_array_equal(predicted[:2], np.ones((2, 4)))


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="without a tokenizer"):
        LLMExplainer(None, None)


def test_an_exception_ends_the_study():
    def ask(prompt):
        raise ConnectionError("no server")

    with pytest.raises(ConnectionError, match="no server"):
        LLMExplainer(ask, tiny_tokenizer()).simulate(Explanation("e"), WINDOWS.tokens)


def test_an_empty_answer_is_no_explanation_and_asks_for_no_prediction():
    asked = []
    explainer = LLMExplainer(lambda prompt: asked.append(prompt) or " ", tiny_tokenizer())
    explanation = explainer.explain(WINDOWS)
    predicted = explainer.simulate(explanation, WINDOWS.tokens)
    assert explanation.text == "no explanation" and len(asked) == 1
    assert np.isnan(predicted[WINDOWS.tokens >= 0]).all() and predicted[2, 3] == 0


@pytest.mark.parametrize(
    "answer, found",
    [
        ("[[1, 2], [3, 4, 5]]", [[1, 2], [3, 4, 5]]),
        ("Sure! ```json\n[[1, 2.5], [99, -4, 0]]\n```", [[1, 2.5], [10, 0, 0]]),
        ("[[1, 2], [3, 4]]", [[1, 2], None]),  # a number too few in the second
        ("[[1, 2], [3, null, 5]]", [[1, 2], None]),
        ("[[1, NaN], [3, true, 5]]", [None, None]),
        ("[[1, 2]]", [None, None]),  # which of the texts?
        ("[1, 2, 3]", [None, None]),
        ("no list", [None, None]),
        ("] [", [None, None]),
        ("[[1, 2], [3, 4", [None, None]),
        ("", [None, None]),
    ],
)
def test_an_answer_that_cannot_be_read_is_missing(answer, found):
    assert read_activations(answer, [2, 3]) == found


def test_the_numbers_of_a_single_text_need_no_list_around_them():
    assert read_activations("[1, 2]", [2]) == [[1, 2]] == read_activations("[[1, 2]]", [2])


def contexts():
    other = np.array([ids("ba(b"), ids("zyx)"), ids("bba") + [-1]])
    tokens = torch.from_numpy(np.tile(np.concatenate([WINDOWS.tokens, other]), (2, 1, 1)))
    acts = torch.from_numpy(np.tile(WINDOWS.acts, (2, 2, 1))).float()
    quantile = torch.tensor([0, -1, 0, 0, -1, 0]).expand(2, -1)
    document = torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, -1)
    place = torch.zeros(2, 6, dtype=torch.int64)
    return Contexts(
        torch.arange(2),
        tokens,
        acts,
        quantile,
        document,
        place,
        place,
        torch.ones(2),
        torch.zeros(2, 32),
        torch.full((2,), 4.0),
    )


def test_a_perfect_reader_gets_a_perfect_score():
    known = {
        ("b", "a", "(", "b"): [0, 0, 5, 1],
        ("z", "y", "x", ")"): [0, 0, 0, 0],
        ("b", "b", "a"): [0, 10, 0],
    }

    def ask(prompt):
        if not prompt.startswith("A latent"):
            return "Explanation: as in the texts."
        return json.dumps([known[tuple(json.loads(line))] for line in lines(prompt)])

    explainer = LLMExplainer(ask, tiny_tokenizer())
    table = explain_all(contexts(), explainer, np.array([0]), np.array([1]))
    assert table.correlation.min() > 0.99
    assert table.detection.eq(1).all() and table.missing.eq(0).all()
    assert table.explanation[0] == "as in the texts."


def test_answers_that_say_nothing_are_missing_values():
    explainer = LLMExplainer(lambda prompt: "letters", tiny_tokenizer())
    table = explain_all(contexts(), explainer, np.array([0]), np.array([1]))
    assert table.missing.tolist() == [1, 1] and table.correlation.isna().all()
    assert table.explanation.tolist() == ["letters", "letters"]
