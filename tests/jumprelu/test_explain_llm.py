"""The endpoint against a small server on this machine, the local model on a random one, and the
reading of answers."""

import json
import logging
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from jumprelu.latents.contexts import Contexts
from jumprelu.latents.explain import Explanation, Windows
from jumprelu.latents.explain_llm import (
    Endpoint,
    LLMExplainer,
    LocalChat,
    estimate,
    read_activations,
)
from jumprelu.latents.interp import explain_all
from jumprelu.lm import LM
from tests.models import tiny_model, tiny_tokenizer

KEY = "sk-very-secret-0123456789"
QUESTION = [{"role": "user", "content": "Why?"}]


def completion(text, used=(7, 3)):
    return json.dumps(
        {
            "choices": [{"message": {"content": text}}],
            "usage": {"prompt_tokens": used[0], "completion_tokens": used[1]},
        }
    )


class Server(ThreadingHTTPServer):
    """Answers each request with the next of `script`, and then for ever with the last: (status,
    headers, body), or seconds to sleep, or a function of the question."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock = [], [], threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.requests.append((time.monotonic(), self.path, dict(self.headers), body))
            answer = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        if isinstance(answer, float):
            time.sleep(answer)
            answer = (200, {}, completion("too late"))
        if callable(answer):
            answer = (200, {}, completion(answer(body["messages"])))
        status, headers, text = answer
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            pass  # the client gave up, as it should

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def endpoint(server, **options):
    return Endpoint(
        server.url,
        "tiny",
        **({"wait": 0.01, "per_minute": 60_000, "retries": 3, "timeout": 5} | options),
    )


def asked(chat, questions=(QUESTION,)):
    return [answer for _, answer in sorted(chat.ask(questions))]


def test_a_question_is_sent_as_the_protocol_asks_and_the_usage_is_counted(server):
    server.script = [(200, {}, completion("because"))]
    chat = endpoint(server, price_in=1e6, price_out=2e6)
    assert asked(chat) == ["because"]
    _, path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body == {"model": "tiny", "messages": QUESTION, "temperature": 0, "max_tokens": 2000}
    assert chat.cost == 7 * 1 + 3 * 2


@pytest.mark.parametrize(
    "problem",
    [
        (429, {}, "slow down"),
        (500, {}, "oops"),
        (503, {}, ""),
        (200, {}, "{half"),
        (200, {}, "[]"),
        (200, {}, '{"choices": []}'),
    ],
)
def test_what_may_pass_is_tried_again(server, problem):
    server.script = [problem, problem, (200, {}, completion("at last"))]
    assert asked(endpoint(server)) == ["at last"]
    assert len(server.requests) == 3


def test_waiting_doubles_and_is_never_less_than_the_server_asks_for(server):
    server.script = [
        (500, {}, ""),
        (500, {}, ""),
        (429, {"Retry-After": "0.4"}, ""),
        (200, {}, completion("yes")),
    ]
    assert asked(endpoint(server, wait=0.1)) == ["yes"]
    times = [at for at, *_ in server.requests]
    gaps = np.diff(times)
    assert gaps[0] >= 0.1 and gaps[1] >= 0.2 and gaps[2] >= 0.4
    server.script = [
        (429, {"Retry-After": "Wed, 21 Oct 2037 07:28:00 GMT"}, ""),
        (200, {}, completion("yes")),
    ]
    assert asked(endpoint(server)) == ["yes"]
    server.script = [(429, {"Retry-After": "3600"}, ""), (200, {}, completion("yes"))]
    start = time.monotonic()
    assert asked(endpoint(server, longest_wait=0.05)) == ["yes"] and time.monotonic() - start < 5


def test_a_slow_answer_is_tried_again_and_then_given_up(server):
    server.script = [0.6, (200, {}, completion("quick"))]
    assert asked(endpoint(server, timeout=0.15)) == ["quick"]
    server.script = [0.6]
    with pytest.raises(ConnectionError, match="2 times in a row.*answers so far are kept"):
        asked(endpoint(server, timeout=0.1, retries=1))


def test_an_absent_server_is_an_error_that_says_so(server):
    absent = Endpoint("http://127.0.0.1:9/v1", "tiny", wait=0.01, retries=1, per_minute=60_000)
    with pytest.raises(
        ConnectionError, match="127.0.0.1:9 answered ConnectionRefusedError, 2 times"
    ):
        asked(absent)


def test_the_rate_is_limited_over_all_threads(server):
    server.script = [(200, {}, completion("ok"))]
    start = time.monotonic()
    asked(endpoint(server, per_minute=1200, parallel=4), [QUESTION] * 8)
    assert time.monotonic() - start >= 7 * 0.05 and len(server.requests) == 8


def test_no_question_is_sent_beyond_the_budget(server):
    server.script = [(200, {}, completion("ok", (10, 0)))]
    chat = endpoint(server, price_in=1e6, budget=25, parallel=1)
    with pytest.raises(RuntimeError, match="budget of 25 is spent, on 3 answers"):
        asked(chat, [QUESTION] * 10)
    assert len(server.requests) == 3


def test_the_key_is_in_no_message_log_file_or_object(server, caplog, capfd, tmp_path):
    caplog.set_level(logging.DEBUG)
    chat, said = endpoint(server, retries=0), []
    for answer in [
        (401, {}, f"wrong key {KEY}"),
        (403, {}, KEY),
        (400, {}, f"bad: {KEY}"),
        (500, {}, KEY),
        (200, {}, KEY),
        (302, {"Location": "http://example.org/"}, KEY),
    ]:
        server.script = [answer]
        with pytest.raises((OSError, ValueError)) as caught:
            asked(chat)
        said.append(f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}")
    assert (
        "refused the key in OPENAI_API_KEY (HTTP 401)" in said[0]
        and "bad: …" in said[2]
        and "302" in said[5]
    )
    server.script = [(200, {}, completion("fine"))]
    explainer = LLMExplainer(chat, tiny_tokenizer(), tmp_path)
    explainer.explain(Windows(np.full((2, 3), 70), np.ones((2, 3))))
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    secret = KEY[6:]
    captured = capfd.readouterr()
    for text in (
        *said,
        *kept,
        repr(chat),
        repr(explainer),
        str(chat.identity),
        caplog.text,
        captured.out,
        captured.err,
    ):
        assert secret not in text
    assert all(
        secret in headers["Authorization"] for *_, headers, _ in server.requests
    )  # it was there to be leaked


def test_a_key_goes_to_no_stranger(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ValueError, match="unencrypted to example.org"):
        asked(Endpoint("http://example.org/v1", "tiny"))
    for url in (
        "ftp://example.org",
        "example.org",
        "https://user:pass@example.org/v1",
        "https://example.org/v1?key=1",
    ):
        with pytest.raises(ValueError, match="must look like"):
            asked(Endpoint(url, "tiny"))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(PermissionError, match="environment variable OPENAI_API_KEY"):
        asked(Endpoint("https://example.org/v1", "tiny"))


def ids(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


WINDOWS = Windows(
    np.array([ids("ab(a"), ids("xyz)"), ids("aaa") + [-1]]),
    np.array([[0, 0, 2.0, 0.3], [0, 0, 0, 0], [0, 4.0, 0, 0]]),
)


def test_the_question_shows_tokens_and_levels():
    question = LLMExplainer(None, tiny_tokenizer()).explanation_question(WINDOWS)
    assert (
        question[1]["content"]
        == '["a", "b", "(" 5, "a" 1]\n\n["a", "a" 10, "a"]\n\n["x", "y", "z", ")"]'
    )


def test_simulation_asks_for_several_windows_at_once_and_puts_answers_in_place(server):
    def answer(messages):
        texts = [json.loads(line) for line in messages[1]["content"].split("\n\n")]
        assert (
            messages[0]["content"].startswith("A latent")
            and "the {explanation}" in messages[0]["content"]
        )
        return "Here you are:\n" + json.dumps(
            [[10 if token == "a" else 0 for token in text] for text in texts]
        )

    server.script = [answer]
    explainer = LLMExplainer(endpoint(server), tiny_tokenizer(), together=2)
    predicted = explainer.simulate(Explanation("the {explanation}"), WINDOWS.tokens)
    np.testing.assert_array_equal(predicted, [[10, 0, 0, 10], [0, 0, 0, 0], [10, 10, 10, 0]])
    assert len(server.requests) == 2


def test_answers_are_kept_and_a_study_that_was_interrupted_goes_on(server, tmp_path):
    explainer = LLMExplainer(
        endpoint(server, retries=0, parallel=1), tiny_tokenizer(), tmp_path, together=1
    )
    good = (200, {}, completion("[1, 2, 3, 4]"))
    server.script = [good, good, (500, {}, "")]
    with pytest.raises(ConnectionError):
        explainer.simulate(Explanation("e"), WINDOWS.tokens)
    assert len(list(tmp_path.glob("*.json"))) == 2
    server.script = [(200, {}, completion("[7, 7, 7]"))]
    predicted = explainer.simulate(Explanation("e"), WINDOWS.tokens)
    assert len(server.requests) == 4  # two, the failure, and the one that was missing
    np.testing.assert_array_equal(predicted, [[1, 2, 3, 4], [1, 2, 3, 4], [7, 7, 7, 0]])
    np.testing.assert_array_equal(explainer.simulate(Explanation("e"), WINDOWS.tokens), predicted)
    assert len(server.requests) == 4
    explainer.simulate(Explanation("another"), WINDOWS.tokens[:1])
    assert len(server.requests) == 5
    damaged = next(iter(tmp_path.glob("*.json")))
    damaged.write_text("{")
    (
        explainer.simulate(Explanation("e"), WINDOWS.tokens),
        explainer.simulate(Explanation("another"), WINDOWS.tokens[:1]),
    )
    assert len(server.requests) == 6 and json.loads(damaged.read_text())["answer"] == "[7, 7, 7]"


def test_an_empty_answer_is_no_explanation_and_asks_for_no_prediction(server):
    server.script = [(200, {}, json.dumps({"choices": [{"message": {"content": None}}]}))]
    explainer = LLMExplainer(endpoint(server), tiny_tokenizer())
    explanation = explainer.explain(WINDOWS)
    assert explanation.text == "no explanation" and len(server.requests) == 1
    assert (
        np.isnan(explainer.simulate(explanation, WINDOWS.tokens)[WINDOWS.tokens >= 0]).all()
        and len(server.requests) == 1
    )


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


def test_the_estimate_counts_the_questions_that_are_asked(server):
    server.script = [(200, {}, completion("letters"))]
    explainer = LLMExplainer(
        endpoint(server, price_in=3.0, price_out=9.0), tiny_tokenizer(), together=2
    )
    cost = estimate(explainer, contexts(), np.array([0]), np.array([1]))
    assert not server.requests
    table = explain_all(contexts(), explainer, np.array([0]), np.array([1]))
    assert len(server.requests) == cost.questions == 2 * (1 + 2 * 2)
    assert (
        table.missing.tolist() == [1, 1] and table.correlation.isna().all()
    )  # "letters" is no prediction
    assert table.explanation.tolist() == ["letters", "letters"]
    read = (
        sum(len(message["content"]) for *_, body in server.requests for message in body["messages"])
        / 3
    )
    assert 0.5 * cost.tokens_in < read < 1.5 * cost.tokens_in
    assert (
        cost.price == pytest.approx((3 * cost.tokens_in + 9 * cost.tokens_out) / 1e6)
        and cost.tokens_out > 2 * 60
    )
    assert "10 questions" in str(cost)


def test_a_perfect_reader_gets_a_perfect_score(server):
    def answer(messages):
        if not messages[0]["content"].startswith("A latent"):
            return "Explanation: as in the texts."
        known = {
            ("b", "a", "(", "b"): [0, 0, 5, 1],
            ("z", "y", "x", ")"): [0, 0, 0, 0],
            ("b", "b", "a"): [0, 10, 0],
        }
        return json.dumps(
            [known[tuple(json.loads(line))] for line in messages[1]["content"].split("\n\n")]
        )

    server.script = [answer]
    table = explain_all(
        contexts(), LLMExplainer(endpoint(server), tiny_tokenizer()), np.array([0]), np.array([1])
    )
    assert (
        table.correlation.min() > 0.99 and table.detection.eq(1).all() and table.missing.eq(0).all()
    )
    assert table.explanation[0] == "as in the texts."


def local(**options):
    return LM(
        tiny_model("llama", max_position_embeddings=4096), tiny_tokenizer(), "tiny", **options
    )


def test_a_local_model_answers_alike_alone_and_in_a_batch():
    questions = [
        [{"role": "user", "content": text}] for text in ("a", "What is it, and why?", "b" * 30)
    ]
    together = dict(LocalChat(local(), most_tokens=5, batch=2).ask(questions))
    alone = [
        next(iter(LocalChat(local(), most_tokens=5).ask([question])))[1] for question in questions
    ]
    assert together == dict(enumerate(alone))


def test_nonsense_of_a_local_model_is_a_missing_value(tmp_path):
    explainer = LLMExplainer(LocalChat(local(), most_tokens=8), local().tokenizer, tmp_path)
    explanation = explainer.explain(WINDOWS)
    assert explanation.text
    predicted = explainer.simulate(explanation, WINDOWS.tokens)
    assert np.isnan(predicted[WINDOWS.tokens >= 0]).all() and predicted[2, 3] == 0
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_a_local_model_with_a_chat_template_reads_roles():
    lm = local()
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    lm.tokenizer.chat_template = turns + "{{ '!' * add_generation_prompt }}"
    assert LocalChat(lm)._prompt(QUESTION) == "<user>Why?!"
    assert len(list(LocalChat(lm, most_tokens=3).ask([QUESTION]))) == 1


def test_a_question_that_is_too_long_for_a_local_model_is_an_error():
    lm = LM(tiny_model("llama"), tiny_tokenizer(), "tiny")
    with pytest.raises(ValueError, match="do not fit into the 64 that tiny reads"):
        list(LocalChat(lm).ask([QUESTION]))
    with pytest.raises(ValueError, match="has no tokenizer"):
        list(LocalChat(LM(tiny_model("llama"))).ask([QUESTION]))
