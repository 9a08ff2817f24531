"""Hooks: the sites are what they are said to be, in every layout; splicing the identity changes
nothing."""

from __future__ import annotations

import pytest
import torch
import transformers

from jumprelu.lm import LM
from jumprelu.sites import INPUTS, SITES, capture
from jumprelu.splicing import record_blocks, resume_after, splice, watch
from tests.models import D_MODEL, FAMILIES, HEADS, LAYERS, VOCAB, random_ids, tiny_lm

ALL = [(site, layer) for site in SITES for layer in range(LAYERS)]
IDS = random_ids(2, 9)


def logits(lm: LM, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(ids, use_cache=False).logits


def attention_added(lm: LM, layer: int, heads: torch.Tensor) -> torch.Tensor:
    """What the attention adds to the residual stream, from the concatenated heads."""
    if "gemma2" in lm.name:
        block = lm.model.model.layers[layer]
        return block.post_attention_layernorm(block.self_attn.o_proj(heads))
    if "llama" in lm.name:
        return lm.model.model.layers[layer].self_attn.o_proj(heads)
    if "gpt2" in lm.name:
        return lm.model.transformer.h[layer].attn.c_proj(heads)
    return lm.model.gpt_neox.layers[layer].attention.dense(heads)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sites_add_up_to_the_residual_stream(family):
    """resid_post(l) = resid_post(l − 1) + attention(attn_out(l)) + mlp_out(l), parallel or
    serial."""
    lm = tiny_lm(family)
    got = capture(lm, ALL, IDS)
    assert got["attn_out", 0].shape == (2, 9, HEADS * 8 if family == "gemma2" else D_MODEL)
    for layer in range(1, LAYERS):
        added = attention_added(lm, layer, got["attn_out", layer]) + got["mlp_out", layer]
        torch.testing.assert_close(
            got["resid_post", layer - 1] + added, got["resid_post", layer], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_resid_post_is_the_models_own_hidden_state(family):
    lm = tiny_lm(family)
    with torch.no_grad():
        hidden = lm.model(
            IDS, output_hidden_states=True
        ).hidden_states  # embeddings, then blocks; the last one is normed
    got = capture(lm, ALL, IDS)
    for layer in range(LAYERS - 1):
        assert torch.equal(got["resid_post", layer], hidden[layer + 1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_splicing_the_identity_changes_no_bit_and_leaves_no_trace(family, site):
    lm = tiny_lm(family)
    before = logits(lm)
    for layer in range(LAYERS):
        with splice(lm, site, layer, lambda value: value):
            assert torch.equal(logits(lm), before)
        with splice(lm, site, layer, torch.zeros_like):
            assert not torch.allclose(logits(lm), before)
        with splice(lm, site, layer, lambda value: value.clone()):
            assert torch.equal(logits(lm), before)
    assert torch.equal(logits(lm), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_a_value_moves_between_two_inputs(family, site):
    """With another input's value at the last layer's site, capture sees it and later values follow
    it."""
    lm = tiny_lm(family)
    other = capture(lm, [(site, 1)], random_ids(2, 9, seed=5))[site, 1]
    with splice(lm, site, 1, lambda value: other):
        assert torch.equal(capture(lm, [(site, 1)], IDS)[site, 1], other)
    if site == "resid_post":  # it is everything that later blocks see
        with splice(lm, site, 1, lambda value: other):
            assert torch.equal(logits(lm), logits_of_other(lm))


def logits_of_other(lm: LM) -> torch.Tensor:
    return logits(lm, random_ids(2, 9, seed=5))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_a_pass_resumed_behind_what_is_known_is_the_whole_pass(family, site):
    lm = tiny_lm(family)
    before = logits(lm)
    for layer in range(LAYERS):
        known = layer if site == "resid_post" else layer - 1
        with record_blocks(lm, [known] if known >= 0 else []) as blocks:
            logits(lm)
        with splice(lm, site, layer, lambda x: 0.5 * x.roll(1, 0)):
            whole = logits(lm)
            with resume_after(lm, known, blocks.get(known)):
                assert torch.equal(logits(lm), whole)
        assert not torch.equal(whole, before)
    assert torch.equal(logits(lm), before)


def test_gradients_pass_through_a_splice():
    lm = tiny_lm()
    delta = torch.zeros(D_MODEL, requires_grad=True)
    with splice(lm, "mlp_out", 1, lambda value: value + delta):
        lm.model(IDS).logits.square().sum().backward()
    assert delta.grad.abs().sum() > 0


def test_the_forward_stops_after_the_last_module_needed_and_the_model_still_works():
    lm = tiny_lm()
    before, ran = logits(lm), []
    for layer, block in enumerate(lm.model.model.layers):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    capture(lm, [("attn_out", 1)], IDS)
    assert ran == [0]
    capture(lm, [("resid_post", 0), ("mlp_out", 1)], IDS)
    assert ran == [0, 0]
    assert torch.equal(logits(lm), before)
    assert ran == [0, 0, 0, 1, 2]


def test_capture_gives_no_gradient_and_tensors_that_can_be_trained_on():
    value = capture(tiny_lm(), [("resid_post", 0)], IDS)["resid_post", 0]
    assert not value.requires_grad
    weight = torch.ones(D_MODEL, requires_grad=True)
    (value * weight).sum().backward()
    assert weight.grad.shape == (D_MODEL,)


def test_blocks_that_return_a_tuple():
    """As in other versions of transformers: the value comes first, the rest is passed on."""
    lm = tiny_lm()
    block, expected = (
        lm.model.model.layers[1],
        capture(lm, [("resid_post", 1)], IDS)["resid_post", 1],
    )
    with splice(lm, "resid_post", 1, torch.zeros_like):
        zeroed = logits(lm)
    block.register_forward_hook(lambda module, args, output: (output, "rest"))
    assert torch.equal(capture(lm, [("resid_post", 1)], IDS)["resid_post", 1], expected)
    with splice(lm, "resid_post", 1, torch.zeros_like):
        rest = []
        block.register_forward_hook(
            lambda module, args, output: rest.append(output[1]) or output[0]
        )
        assert torch.equal(logits(lm), zeroed) and rest == ["rest"]


def test_hooks_are_removed_after_an_error():
    lm = tiny_lm()
    before = logits(lm)
    with pytest.raises(ZeroDivisionError), splice(lm, "resid_post", 0, lambda value: 1 / 0):
        logits(lm)
    assert torch.equal(logits(lm), before)


@pytest.mark.parametrize(
    "wrong, given",
    [
        (lambda x: x[:, :3], r"\(2, 3, 16\) of torch.float32"),
        (lambda x: x.double(), r"\(2, 9, 16\) of torch.float64"),
        (lambda x: None, "NoneType"),
    ],
)
def test_a_splice_of_another_shape_or_type_is_refused(wrong, given):
    lm = tiny_lm()
    message = rf"resid_post, layer 1, returned {given}, expected .*\(2, 9, 16\) of torch.float32"
    with splice(lm, "resid_post", 1, wrong), pytest.raises(ValueError, match=message):
        logits(lm)


def test_unknown_site_and_layer_name_what_there_is():
    lm = tiny_lm()
    with pytest.raises(
        ValueError, match="unknown site 'resid_pre': expected one of resid_post, mlp_out, attn_out"
    ):
        capture(lm, [("resid_pre", 0)], IDS)
    for layer in (3, -1, 1.5):
        with pytest.raises(
            ValueError, match=f"unknown layer {layer}: tiny-gemma2 has layers 0 to 2"
        ):
            capture(lm, [("resid_post", layer)], IDS)
    with pytest.raises(ValueError, match="nothing to capture"):
        capture(lm, [], IDS)


def test_unknown_layout_lists_what_was_found():
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    lm = LM(transformers.OPTForCausalLM(config), name="opt")
    with pytest.raises(ValueError, match="unknown layout of OPTForCausalLM") as error:
        capture(lm, [("resid_post", 0)], IDS)
    text = str(error.value)
    assert "model.decoder.layers: 2 × OPTDecoderLayer with self_attn" in text and "fc2" in text
    assert "GPT-2: transformer.h with ln_1, attn, ln_2, mlp, and attn.c_proj" in text


def test_a_known_name_with_other_children_is_refused():
    """A block with a module that the layout does not know could add something to the residual
    stream."""
    lm = tiny_lm("llama")
    lm.model.model.layers[1].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="unknown layout of LlamaForCausalLM"):
        capture(lm, [("resid_post", 0)], IDS)


def test_ids_are_checked():
    lm = tiny_lm("gpt2")
    cases = [
        (torch.zeros(2, 3), r"\(2, 3\) of torch.float32"),
        (torch.zeros(3, dtype=torch.long), r"\(3,\) of torch.int64"),
        ([[1, 2]], "got list"),
        (
            torch.full((1, 2), VOCAB),
            f"span {VOCAB} to {VOCAB}, the vocabulary of tiny-gpt2 is 0 to {VOCAB - 1}",
        ),
        (torch.full((1, 2), -1), "span -1 to -1"),
        (random_ids(1, 65), "rows of 65 tokens, tiny-gpt2 reads at most 64"),
    ]
    for ids, message in cases:
        with pytest.raises(ValueError, match=message):
            capture(lm, [("resid_post", 0)], ids)


def test_what_an_mlp_gets_gives_what_it_adds():
    lm = tiny_lm("gemma2")
    block = lm.model.model.layers[1]
    with torch.no_grad():
        block.pre_feedforward_layernorm.weight.uniform_(-0.5, 0.5)
    found = capture(lm, [(site, 1) for site in (*INPUTS, "mlp_out")], random_ids(2, 6))
    with torch.no_grad():
        out = block.post_feedforward_layernorm(block.mlp(found["mlp_in", 1]))
    torch.testing.assert_close(out, found["mlp_out", 1])
    gain = 1 + block.pre_feedforward_layernorm.weight
    torch.testing.assert_close(found["mlp_in_before_gain", 1] * gain, found["mlp_in", 1])


@pytest.mark.parametrize("site", INPUTS)
def test_an_input_of_the_mlp_can_be_replaced(site):
    lm, ids = tiny_lm("gemma2"), random_ids(2, 6)
    with torch.no_grad(), splice(lm, site, 1, torch.zeros_like), watch(lm, "mlp_out", 1) as seen:
        lm.model(ids)
    assert not seen[0].any()  # a gated MLP without biases


def test_only_a_norm_whose_gain_is_known_can_be_undone():
    with pytest.raises(ValueError, match="tiny-llama is neither: take mlp_in"):
        capture(tiny_lm("llama"), [("mlp_in_before_gain", 0)], random_ids(2, 6))


def test_watching_keeps_the_last_pass_and_leaves_no_trace():
    lm, ids = tiny_lm("gpt2"), random_ids(2, 6)
    with torch.no_grad(), watch(lm, "resid_post", 1) as seen:
        for some in (ids[:1], ids):
            lm.model(some)
            assert len(seen) == 1 and torch.equal(
                seen[0], capture(lm, [("resid_post", 1)], some)["resid_post", 1]
            )
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules()
    )
