"""Absorption that was put into an SAE by hand is found; probes against scipy; main latents and the
criterion by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from companion.reading import absorption
from models import random_ids, tiny_lm, tiny_tokenizer
from scipy.optimize import minimize

from jumprelu.corpus import Tokens
from jumprelu.lm import LM
from jumprelu.sae import SAE, Origin


def test_probes_are_those_of_a_general_solver():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(80, 3, generator=g, dtype=torch.float64) * 5 + 2
    y = torch.stack([x[:, 0] + 4 * torch.randn(80, generator=g) > 2, x[:, 1] - x[:, 2] > 1], 1)
    w, b = absorption.fit_probes(x, y, decay=0.01)
    scale = (x - x.mean(0)).square().sum(-1).mean().sqrt().item() / math.sqrt(3)
    for k in range(2):
        sign = np.where(y[:, k].numpy(), 1, -1)

        def loss(p, sign=sign):
            return (
                np.logaddexp(0, -sign * (x.numpy() @ p[:3] + p[3])).mean()
                + 0.005 * np.square(p[:3] * scale).sum()
            )

        best = minimize(loss, np.zeros(4), tol=1e-12)
        assert loss(np.array([*w[:, k].tolist(), b[k].item()])) == pytest.approx(best.fun, rel=1e-6)
        assert [*w[:, k].tolist(), b[k].item()] == pytest.approx(
            best.x.tolist(), rel=0.02, abs=0.02
        )


def test_main_latents_by_hand():
    y = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    fires = torch.tensor(
        [[1, 1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1], [0] * 8]
    ).T
    # alone: 2/3, 4/7, 6/11, 0; the first with the second: 8/9; then nothing adds
    assert absorption.main_latents(fires.double(), y) == [0, 1]
    assert absorption.main_latents(fires.double(), y, most=1) == [0]
    assert absorption.main_latents(fires.double(), y, step=0.3) == [0]  # 8/9 − 2/3 is less


def test_the_criterion_by_hand():
    w = torch.tensor([2.0, 0.0])
    W_dec = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.6, -0.8]])
    f = torch.tensor(
        [
            [0.0, 1.0, 5.0, 0.0],  # the second carries it all
            [0.1, 1.0, 0.0, 0.0],  # the main latent fires
            [0.0, 0.0, 1.0, 0.0],  # nobody carries it
            [0.0, 1.0, 0.0, 1.0],  # a half each
            [0.0, 0.0, 0.0, 0.0],
        ]
    )
    assert absorption.absorbed(f, W_dec, w, [0]).tolist() == [True, False, False, True, False]
    assert absorption.absorbed(f, W_dec, w, [0], share=0.6).tolist() == [
        True,
        False,
        False,
        False,
        False,
    ]
    assert absorption.absorbed(f, W_dec, w, [0], cosine=0.7).tolist() == [False] * 5
    assert absorption.absorbed(f, W_dec, w, [0, 1]).tolist() == [False] * 5
    assert absorption.absorbed(f, W_dec, w, [0, 2]).tolist() == [False, False, False, True, False]


WIDTH, SPECIAL, OTHER = 13, slice(1, 11), 11


def absorbing_sae() -> SAE:
    """Latent 0 stands for direction 0, but is silent where one of ten special directions is there
    too: its latent writes both."""
    W_enc, W_dec = torch.eye(WIDTH), torch.eye(WIDTH)
    W_enc[SPECIAL, 0] = -2.0
    W_dec[SPECIAL, 0] = 1.0
    W_dec = torch.nn.functional.normalize(W_dec, dim=-1)
    return SAE(W_enc, torch.zeros(WIDTH), W_dec, torch.zeros(WIDTH), torch.full((WIDTH,), 0.5))


def made_tokens(share: float, n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the tokens have the feature, x_0 = 2; in each block of twenty, `share` of those have
    a special direction too.

    Blocks 0 and 1 have the first special direction, 2 and 3 the second …, so that each is rare: 3 %
    of the tokens for 0.3.
    """
    x = 0.1 * torch.rand(n, WIDTH, generator=torch.Generator().manual_seed(0))
    place = torch.arange(n)
    has = place % 2 == 0
    x[has, 0] = 2
    special = has & (place % 20 < 20 * share)
    x[special, 1 + place[special] // 40 % 10] = 1.5
    x[~has, OTHER] = 1
    return x, has[:, None]


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_absorption_that_was_put_in_is_found(share):
    x, y = made_tokens(share)
    place = torch.arange(400)
    train, document = (place // 20) % 2 == 0, place // 40
    found = absorption.count(
        absorbing_sae(), x, y, document, train, absorption.fit_probes(x[train], y[train])
    )
    probe, main, latents, silent, absorbed = found.statistic(torch.ones(1, 10))[0, 0].tolist()
    assert (probe, latents) == (1, 1)
    assert silent == pytest.approx(share) and absorbed == pytest.approx(share)
    assert main == pytest.approx(2 * (1 - share) / (2 - share))  # recall 1 − share, precision 1
    assert found.absorbed.flatten().tolist() == pytest.approx([10 * share] * 10)


def test_a_silent_main_latent_without_another_in_its_place_is_not_absorption():
    x, y = made_tokens(0.3)
    sae = absorbing_sae()
    sae.W_dec.data = torch.eye(
        WIDTH
    )  # the special latents fire there, but write nothing along the feature
    train = (torch.arange(400) // 20) % 2 == 0
    w = torch.zeros(WIDTH, 1)
    w[0], w[OTHER] = 1, -1
    probes = w, torch.tensor([-0.5])
    found = absorption.count(sae, x, y, torch.arange(400) // 40, train, probes)
    *_, silent, absorbed = found.statistic(torch.ones(1, 10))[0, 0].tolist()
    assert silent == pytest.approx(0.3) and absorbed == 0


def test_statistics_are_ratios_of_the_documents_drawn():
    x, y = made_tokens(0.3)
    y[::7] = False
    train = (torch.arange(400) // 20) % 2 == 0
    found = absorption.count(
        absorbing_sae(),
        x,
        y,
        torch.arange(400) // 40,
        train,
        absorption.fit_probes(x[train], y[train]),
    )
    weights = torch.tensor([[1.0] * 10, [3.0] + [0.0] * 8 + [1.0]])
    has, says, both = (3 * part[0] + part[9] for part in found.probe)
    drawn = found.statistic(weights)[1, 0]
    assert drawn[0].item() == pytest.approx((2 * both / (has + says)).item())
    assert drawn[4].item() == pytest.approx(
        ((3 * found.absorbed[0] + found.absorbed[9]) / both).item()
    )


def test_features_are_of_the_whole_token():
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a 1B", add_special_tokens=False)["input_ids"]
    found = absorption.truth(
        torch.tensor(ids), tokenizer, {"a": " ?a[a-z]*", "digit": r" ?\d+", "space": r"\s+"}
    )
    assert found.tolist() == [
        [True, False, False],
        [False, False, True],
        [False, True, False],
        [False, False, False],
    ]


def test_the_table_is_of_every_name_and_feature():
    lm = LM(tiny_lm().model, tiny_tokenizer(), "tiny")
    tokens = Tokens(random_ids(12, 30) % 256 + 3, torch.arange(12) // 2)
    tokens.ids[:, 0] = 2
    g = torch.Generator().manual_seed(1)

    def sae(site, width):
        W = torch.nn.functional.normalize(torch.randn(20, width, generator=g), dim=-1)
        return SAE(
            W.T,
            torch.zeros(20),
            W,
            torch.zeros(width),
            torch.full((20,), 0.1),
            origin=Origin("tiny", site, 1),
        )

    features = {"letter": "[a-z]", "capital": "[A-Z]"}
    saes = {"one": [sae("resid_post", 16), sae("resid_post", 16)], "two": [sae("attn_out", 32)]}
    table = absorption.absorption_table(lm, saes, tokens, features, draws=50)
    assert len(table) == 2 * 3 * 5 and set(table.feature) == {"letter", "capital", "all"}
    wide = table.pivot_table(index=["name", "feature"], columns="quantity", values="mean")
    known = wide.dropna()  # the rest: features that the probe never finds
    assert (
        len(known) >= 2
        and (known.absorbed <= known.silent + 1e-9).all()
        and known.silent.between(0, 1).all()
    )
    f1 = wide["probe F1"]["one"]
    assert f1["all"] == pytest.approx((f1["letter"] + f1["capital"]) / 2)
    with pytest.raises(ValueError, match="word: no token or every token"):
        absorption.absorption_table(lm, saes, tokens, {**features, "word": "[a-z]{4}"})
    with pytest.raises(ValueError, match="cannot be split"):
        absorption.absorption_table(lm, saes, tokens[:2], features)
    saes["two"][0].origin = Origin()
    with pytest.raises(ValueError, match="does not remember"):
        absorption.absorption_table(lm, saes, tokens, features)
