"""What an SAE's error is compared with, against laws and maps that are known."""

from __future__ import annotations

import pytest
import torch
from companion.dark.errors import breakdown, linear_controls, predict_scalar, regress_errors
from decompositions import D_IN, direct, generator, sae_with_errors, store_of_documents, whole

from jumprelu.activations import activations_from_tensor
from jumprelu.dark.darkmatter import TokenNorms, decompose, nonlinear_error, split, stream
from jumprelu.intervals import bootstrap


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    return store_of_documents(tmp_path_factory.mktemp("acts"))


@pytest.fixture(scope="module")
def sae():
    return sae_with_errors()


def test_breakdown_of_a_known_law():
    widths = [64, 128, 256, 512, 1024]
    fvu = [0.12 + 3.0 * w**-0.5 for w in widths]
    found = breakdown(widths, fvu, [0.05, 0.06, 0.05, 0.04, 0.05])
    assert found.law.offset == pytest.approx(
        0.12, abs=1e-5
    ) and found.law.exponent == pytest.approx(0.5, abs=1e-4)
    assert found.absent + found.linear + found.nonlinear == pytest.approx(found.fvu)
    assert found.nonlinear == pytest.approx([0.05] * 5) and found.linear == pytest.approx(
        [0.07] * 5, abs=1e-5
    )


def tokens_of(n, documents=50):
    document = torch.arange(n) % documents
    empty = torch.empty(0)
    return TokenNorms(
        empty, empty, empty, document, torch.where(document < 30, document % 3, -1), document
    )


def r2(*args, **options):
    found = predict_scalar(*args, **options)
    return bootstrap(found.r2, len(found.tokens))


def test_a_number_by_token_from_features():
    g = generator(3)
    features = torch.randn(20_000, 2, generator=g).double()
    y = 3 + 2 * features[:, 0] + torch.randn(20_000, generator=g)  # 4 parts of 5 are explained
    tokens = tokens_of(20_000)
    found = r2(y, features[:, :1], tokens)
    assert found.mean == pytest.approx(0.8, abs=0.02) and found.low < 0.8 < found.high
    assert abs(r2(y, features[:, 1:], tokens).mean) < 0.01
    assert r2(3 + 2 * features[:, 0], features[:, :1], tokens).mean == pytest.approx(1)
    given = r2(
        y + features[:, 1], features[:, 1:], tokens, given=features[:, :1]
    )  # 1 part of what is left of 2
    assert given.mean == pytest.approx(0.5, abs=0.02)
    y[::7] = float("nan")
    assert r2(y, features[:, :1], tokens).mean == pytest.approx(0.8, abs=0.02)


def test_controls_are_what_their_names_say(acts):
    parts = split(acts)
    controls = linear_controls(acts, parts, [2, D_IN])
    x = torch.cat([rows.x for rows in stream(acts, parts, "fit")]).double()
    mean = x.mean(0)
    assert torch.allclose(controls["mean only"](x), mean.expand_as(x))
    assert torch.allclose(controls["shrunk by half"](x), (x + mean) / 2)
    assert torch.allclose(controls[f"{D_IN} principal components"](x), x)
    values = torch.linalg.svdvals(x - mean).square()
    assert (controls["2 principal components"](x) - x).square().sum() == pytest.approx(
        values[2:].sum().item()
    )
    found, _ = decompose(acts, controls, parts)
    for name in ("mean only", "shrunk by half", "2 principal components"):
        assert found[name].test.vector_r2(torch.ones(1, 16, dtype=torch.float64)) > 1 - 1e-9, name


def test_errors_from_another_place(acts, sae, tmp_path):
    """The source knows the nonlinear error and half of the coordinates of x, and nothing else."""
    parts = split(acts)
    linear = decompose(acts, {"sae": sae}, parts)[0]["sae"].linear
    x, document = whole(acts)
    nonlinear = nonlinear_error(x, sae, linear)
    known = torch.cat([nonlinear * 3 + 1, x[:, :3]], -1)
    source = activations_from_tensor(known, tmp_path / "source", document, shard_rows=333)
    found = regress_errors(acts, sae, linear, source, lambda v: v, parts, ridges=(0.0,))
    once = torch.ones(1, len(found["error"].tokens), dtype=torch.float64)
    assert found["nonlinear"].r2(once).item() == pytest.approx(1, abs=1e-6)
    fold = parts.fold[torch.searchsorted(parts.documents, document.long())]
    weight, offset = direct(known[fold >= 0].double(), linear(x[fold >= 0]))
    expected, test = linear(x[fold < 0]), known[fold < 0].double() @ weight + offset
    r2 = 1 - (expected - test).square().sum() / (expected - expected.mean(0)).square().sum()
    assert found["linear"].r2(once).item() == pytest.approx(r2.item(), rel=1e-4) and 0.1 < r2 < 0.95
    assert regress_errors(acts, sae, linear, acts, lambda v: v, parts)["linear"].r2(
        once
    ).item() == pytest.approx(1, abs=1e-6)
    shuffled = activations_from_tensor(known, tmp_path / "other", document.flip(0), shard_rows=333)
    with pytest.raises(ValueError, match="different tokens"):
        regress_errors(acts, sae, linear, shuffled, lambda v: v, parts)
