"""Notebook 00's measurements: bytes and bits, intervals, copying, and where the sites sit."""

from __future__ import annotations

import bz2
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tokenizers
import torch
import transformers
from companion.rails.lm_loss import token_losses
from companion.subject import behaviour, compression, configuration, plots, sites, texts
from companion.subject.compression import row_bytes, token_bytes
from models import FAMILIES, LAYERS, VOCAB, random_ids, tiny_lm, tiny_tokenizer

from jumprelu.corpus import Tokens, tokenize
from jumprelu.lm import LM
from jumprelu.sites import SITES, capture


def lm_with_tokenizer(family: str = "gemma2", **overrides) -> LM:
    return dataclasses.replace(tiny_lm(family, **overrides), tokenizer=tiny_tokenizer())


def documents(n: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"text": f"# {i}\n" + f"value = {i} + value * {i % 3}\n" * 12}
        for i in range(start, start + n)
    ]


@pytest.fixture(scope="module")
def lm():
    return lm_with_tokenizer()


@pytest.fixture(scope="module")
def tokens(lm):
    return tokenize(documents(8), lm.tokenizer, context_size=33, rows_per_document=4)


# ---- bytes of tokens

TEXT = "def f(x):\n\treturn 'λ 🙂'  # naïve\r\n"


def sentencepiece_like() -> transformers.PreTrainedTokenizerFast:
    """Spaces as ▁ and unknown characters as bytes, as Gemma and Llama 2 have it."""
    words = [
        "<pad>",
        "<eos>",
        "<bos>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"def(x):retun'#",
        "▁r",
        "de",
    ]
    model = tokenizers.models.BPE(
        {w: i for i, w in enumerate(words)}, [("▁", "r"), ("d", "e")], byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_like])
def test_bytes_of_tokens_join_to_the_text(make):
    tokenizer = make()
    table = token_bytes(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(table[i] for i in ids) == TEXT.encode()
    assert len(table) == 1 + max(tokenizer.get_vocab().values()) and all(
        table[i] == b"" for i in tokenizer.all_special_ids
    )


def test_bytes_of_any_other_tokenizer_come_from_decoding():
    model = tokenizers.models.WordLevel({"<unk>": 0, "été": 1, "x": 2}, unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>"
    )
    assert token_bytes(tokenizer) == [b"", "été".encode(), b"x"]


def test_rows_give_back_their_document(lm, tokens):
    rows = row_bytes(tokens, lm.tokenizer)
    data = b"".join(row for row, d in zip(rows, tokens.document.tolist(), strict=True) if d == 3)
    assert len(data) == 4 * 32 and documents(8)[3]["text"].encode()[:32] == data[:32]


def test_splits_are_of_other_documents_and_the_test_rows_have_no_gap(lm, tmp_path):
    for i in range(300):
        (tmp_path / f"{i}.txt").write_text(documents(1, start=i)[0]["text"])
    test, train = texts.splits(lm, str(tmp_path), 17, test_rows=12, train_rows=100, characters=100)
    held = {row["text"].encode()[:96] for row in texts.load_texts(str(tmp_path), "test")}
    rows = row_bytes(test, lm.tokenizer)
    assert {
        b"".join(rows[i : i + 6]) for i in (0, 6)
    } <= held  # six rows of 16 bytes fit into 100 characters
    trained = {row["text"].encode() for row in texts.load_texts(str(tmp_path), "train")}
    assert len(train) == 100 and all(
        any(row in text for text in trained) for row in row_bytes(train, lm.tokenizer)
    )


# ---- bits


def test_token_losses_are_the_models_own(lm):
    ids = random_ids(5, 20)
    losses = token_losses(lm, ids, batch_rows=2)
    assert losses.shape == (5, 19)
    assert losses.mean().item() == pytest.approx(lm.model(ids, labels=ids).loss.item(), rel=1e-5)


def test_a_model_that_knows_nothing_pays_log_vocabulary(tokens):
    lm = lm_with_tokenizer()
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.zero_()  # tied: all logits are 0
    table = compression.bits_per_byte(lm, tokens, tokens, groups=4).set_index("method")
    assert table.bits_per_byte[lm.name] == pytest.approx(
        math.log2(VOCAB), rel=1e-6
    )  # a token is a byte here
    assert table.low[lm.name] == pytest.approx(table.high[lm.name], abs=1e-5)
    assert table.bits_per_byte.is_monotonic_decreasing and table.index[0] == lm.name
    assert (table.drop(lm.name).difference_high < 0).all()


def test_every_method_is_charged_for_the_same_bytes(lm, tokens):
    train = tokenize(documents(20, start=100), lm.tokenizer, context_size=33)
    table = compression.bits_per_byte(lm, tokens, train, groups=4, prime_bytes=500).set_index(
        "method"
    )
    data = b"".join(row_bytes(tokens, lm.tokenizer))
    assert table.bits_per_byte["bz2 -9"] == pytest.approx(
        8 * len(bz2.compress(data, 9)) / len(data)
    )
    assert (
        table.bits_per_byte["xz -9e, primed"] < table.bits_per_byte["xz -9e"]
    )  # the texts resemble each other
    nats = token_losses(lm, tokens.ids).sum().item()
    assert table.bits_per_byte[lm.name] == pytest.approx(nats / math.log(2) / len(data), rel=1e-5)
    assert table.difference[lm.name] == table.difference_low[lm.name] == 0
    others = table.drop(lm.name)
    assert np.allclose(others.difference, others.bits_per_byte - table.bits_per_byte[lm.name])
    assert set(table.kind) == {"language model", "n-gram", "compressor"}


def test_groups_hold_whole_documents():
    document = torch.tensor([4, 4, 9, 9, 9, 10, 11, 30, 30, 31])
    group = compression.document_groups(document, 3)
    assert group.tolist() == [0, 0, 0, 0, 0, 1, 1, 2, 2, 2]
    assert compression.document_groups(document, 99).max() == 5
    with pytest.raises(ValueError, match="at least 3 documents, got 2"):
        compression.document_groups(torch.tensor([0, 0, 1]))


# ---- the model


@pytest.mark.parametrize("family", FAMILIES)
def test_checks_hold_for_a_model_as_configured(family):
    checks = configuration.configuration_checks(tiny_lm(family), length=20)
    assert checks.holds.all(), checks
    reach = checks[checks.property.str.contains("reach")].found.tolist()
    assert reach == (
        ["4", "19"] if family == "gemma2" else ["19", "19"]
    )  # the sliding window of the test model is 4


def test_checks_fail_for_a_model_that_does_otherwise():
    def failing(lm: LM) -> list[str]:
        checks = configuration.configuration_checks(lm, length=20)
        return checks[~checks.holds].property.tolist()

    lm = tiny_lm()
    lm.model.lm_head.weight = torch.nn.Parameter(lm.model.lm_head.weight.clone())
    assert failing(lm) == ["embeddings tied"]
    lm = tiny_lm()
    lm.model.lm_head.register_forward_hook(lambda module, args, output: output * 100)
    lm.model.register_forward_hook(
        lambda module, args, output: setattr(output, "logits", output.logits * 2)
    )
    assert failing(lm) == ["soft cap of the logits"]
    lm = tiny_lm()
    lm.config.num_key_value_heads = 4
    assert failing(lm) == ["key-value heads"]
    lm = tiny_lm()
    lm.model.model.layers[0].register_forward_hook(
        lambda module, args, output: output + output.cumsum(1)
    )
    assert "reach after layer 0 [positions]" in failing(lm)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_once_and_all_have_a_place(family):
    lm = tiny_lm(family)
    table = configuration.parameter_table(lm)
    assert (
        table.parameters.sum() == lm.model.num_parameters()
        and table.share.sum() == pytest.approx(1)
    )
    assert "other" not in set(table.component) and {
        "MLP",
        "attention",
        "norms",
        "embedding",
    } <= set(table.component)
    assert configuration.weights_megabytes(lm) == pytest.approx(4 * table.parameters.sum() / 1e6)


def test_config_table_leaves_out_what_a_model_lacks():
    gemma, gpt2 = (
        configuration.config_table(tiny_lm(family)).set_index("property").value
        for family in ("gemma2", "gpt2")
    )
    assert gemma["sliding_window"] == "4" and gemma["class"] == "Gemma2ForCausalLM"
    assert "sliding_window" not in gpt2.index and gpt2["hidden_size"] == "16"


def test_training_log(tmp_path):
    lm = tiny_lm()
    assert configuration.training_log(lm).empty
    written = pd.DataFrame([[1, 10, 2.5, 1.0, 3.0]], columns=list(configuration.LOG_COLUMNS))
    written.to_csv(tmp_path / "training.csv", index=False)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2000)
    loaded = dataclasses.replace(lm, folder=tmp_path)
    assert configuration.training_log(loaded).to_dict("list") == written.to_dict("list")
    assert configuration.weights_megabytes(loaded) == 0.002


# ---- the corpus


def test_corpus_tables(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.txt").write_text(f"é {i} " * 10)
    table = texts.corpus_table(str(tmp_path))
    assert table.documents.sum() == 200 and set(table.split) == {"train", "validation", "test"}
    assert table.megabytes.sum() == pytest.approx(
        sum(len(f"é {i} ".encode()) * 10 for i in range(200)) / 1e6
    )
    assert texts.corpus_table(str(tmp_path), documents=2).documents.max() == 2
    summary = texts.corpus_summary(table)
    assert summary.loc["total", [c for c in summary if c.endswith("documents")]].sum() == 200


def test_fingerprint_follows_content_path_and_order():
    rows = [{"path": f"{i}", "text": f"value_{i} = {i}"} for i in range(3)]
    changed = [dict(rows[0], text=rows[0]["text"] + " "), *rows[1:]]
    moved = [dict(rows[0], path="other"), *rows[1:]]
    every = [texts.fingerprint(some) for some in (rows, changed, moved, rows[::-1])]
    assert len(set(every)) == 4 and every[0] == texts.fingerprint(iter(rows))


def test_fingerprint_note(monkeypatch):
    assert "no fingerprint is recorded" in texts.fingerprint_note("some/dataset")
    monkeypatch.setattr(texts, "load_texts", lambda source, split: [{"path": "a", "text": "b"}])
    assert texts.fingerprint_note("installed").startswith("warning: test split ")
    monkeypatch.setattr(
        texts, "recorded_fingerprint", lambda: texts.fingerprint([{"path": "a", "text": "b"}])
    )
    assert texts.fingerprint_note("installed").endswith(": the recorded one")


# ---- behaviour


def test_samples_follow_the_seed_and_leave_the_random_state(lm):
    prompts = ("def ", "x")
    before = torch.random.get_rng_state()
    first, again, other = (
        behaviour.samples(lm, prompts, new_tokens=12, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == again != other
    assert all(text.startswith(prompt) for text, prompt in zip(first, prompts, strict=True))
    assert behaviour.samples(lm, prompts, 12, temperature=0, seed=0) == behaviour.samples(
        lm, prompts, 12, temperature=0, seed=1
    )


class Copier(torch.nn.Module):
    """What an ideal induction head does: expects what followed the last occurrence of the present
    token."""

    device = torch.device("cpu")
    config = transformers.GPT2Config(vocab_size=VOCAB)

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        logits = torch.zeros(*ids.shape, VOCAB)
        for row, t in np.ndindex(*ids.shape):
            earlier = (ids[row, :t] == ids[row, t]).nonzero()
            if len(earlier):
                logits[row, t, ids[row, earlier[-1] + 1]] = 10.0
        return SimpleNamespace(logits=logits)


def test_induction_tells_a_copier_from_a_random_model(lm):
    copier = LM(Copier(), tiny_tokenizer(), "copier")
    losses = behaviour.repeated_losses(copier, n_rows=6, length=12)
    first, second, fall = behaviour.induction_fall(losses)
    assert second.mean < 3 < first.mean and fall.low > 1
    curve = behaviour.induction(losses)
    assert curve["copy"].tolist() == [1] * 12 + [2] * 12
    assert curve.loss.mean() == pytest.approx(losses.loss.mean())
    assert ((curve.low <= curve.loss) & (curve.loss <= curve.high)).all()

    _, _, fall = behaviour.induction_fall(behaviour.repeated_losses(lm, n_rows=24, length=12))
    assert abs(fall.mean) < 3 * fall.half < 3


def test_repeated_rows_are_bos_and_a_sequence_twice(lm):
    rows = behaviour.repeated_rows(lm, 5, 10)
    assert rows.shape == (5, 21) and (rows[:, 0] == lm.tokenizer.bos_token_id).all()
    assert torch.equal(rows[:, 1:11], rows[:, 11:]) and not set(
        rows[:, 1:].unique().tolist()
    ) & set(lm.special_ids)


# ---- sites


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_add_up_to_the_residual_stream(family):
    table = sites.residual_identity(tiny_lm(family), random_ids(2, 12))
    assert (
        table.layer.tolist() == list(range(1, LAYERS))
        and (table.error < 3 * table["rounding"]).all()
    )
    assert table["rounding"].max() < 1e-5


def test_sites_do_not_add_up_where_a_part_is_missing():
    lm = tiny_lm()
    # the block adds a little of its own, as a site in the wrong place would seem to
    lm.model.model.layers[2].register_forward_hook(lambda module, args, output: output * 1.01)
    table = sites.residual_identity(lm, random_ids(2, 12)).set_index("layer")
    assert table.error[1] < 3 * table["rounding"][1] and table.error[2] > 100 * table["rounding"][2]


def test_site_statistics_are_those_of_ordinary_positions():
    lm = tiny_lm()
    ids = random_ids(5, 12)
    ids[2, 7] = 1  # an EOS inside a row
    table = sites.site_statistics(lm, Tokens(ids, torch.arange(5)), batch_rows=2)
    assert len(table) == 3 * LAYERS and set(table.site) == set(SITES)
    row = table[(table.site == "mlp_out") & (table.layer == 1)].iloc[0]
    value = capture(lm, [("mlp_out", 1)], ids)["mlp_out", 1].double()
    x = value[ids > 2]
    mean_square = x.square().sum(1).mean().item()
    assert row.mean_square == pytest.approx(mean_square)
    assert row.mean_share == pytest.approx(x.mean(0).square().sum().item() / mean_square)
    assert row.first_ratio == pytest.approx(
        math.sqrt(value[:, 0].square().sum(1).mean().item() / mean_square)
    )


# ---- figures


def test_a_model_without_a_log_gets_a_figure_that_says_so():
    fig = plots.lm_training(configuration.training_log(tiny_lm()))
    assert "without a training log" in fig.axes[0].texts[0].get_text()


def test_figures_label_their_axes(lm, tokens):
    log = pd.DataFrame(
        {
            "step": [1, 2],
            "tokens": [1e6, 2e6],
            "train_loss": [3.0, 2.0],
            "lr_factor": [1.0, 0.1],
            "heldout_loss": [np.nan, 2.5],
        }
    )
    drawn = [
        plots.lm_training(log),
        plots.bits_per_byte(compression.bits_per_byte(lm, tokens, tokens, groups=4)),
        plots.induction(behaviour.induction(behaviour.repeated_losses(lm, 4, 10))),
        plots.sites(sites.site_statistics(lm, tokens)),
    ]
    for fig in drawn:
        assert all(ax.get_xlabel() for ax in fig.axes)
    assert [label.get_text() for label in drawn[1].axes[0].get_yticklabels()].count(lm.name) == 1
