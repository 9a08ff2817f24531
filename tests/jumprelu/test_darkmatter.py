"""Decompositions against errors in memory and against what they must be."""

from __future__ import annotations

import pytest
import torch
from decompositions import (
    D_IN,
    DOCUMENTS,
    OF_EACH,
    direct,
    sae_with_errors,
    store_of_documents,
    whole,
)

from jumprelu.activations import activations_from_tensor, open_activations
from jumprelu.dark import darkmatter
from jumprelu.dark.darkmatter import (
    NORMS,
    decompose,
    linear_error,
    nonlinear_error,
    split,
    stream,
)
from jumprelu.store import add_shard, start_store


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    return store_of_documents(tmp_path_factory.mktemp("acts"))


@pytest.fixture(scope="module")
def sae():
    return sae_with_errors()


def test_documents_are_split_whole(acts):
    parts = split(acts, test_share=0.25, folds=3)
    assert (parts.fold < 0).sum() == 10 and torch.bincount(
        parts.fold[parts.fold >= 0]
    ).tolist() == [10, 10, 10]
    x, document = whole(acts)
    streams = {which: list(stream(acts, parts, which)) for which in ("fit", "test", "all")}
    seen = {
        which: torch.cat([parts.documents[rows.document] for rows in blocks])
        for which, blocks in streams.items()
    }
    assert not set(seen["fit"].tolist()) & set(seen["test"].tolist())
    assert torch.equal(torch.cat([rows.x for rows in streams["all"]]), x) and torch.equal(
        seen["all"], document.long()
    )
    assert len(seen["fit"]) + len(seen["test"]) == len(x)
    assert torch.equal(split(acts, 0.25, 3).fold, parts.fold)
    assert not torch.equal(split(acts, 0.25, 3, seed=1).fold, parts.fold)


@pytest.mark.parametrize("share, folds", [(0.01, 2), (0.9, 5)])
def test_too_few_documents(acts, share, folds):
    with pytest.raises(
        ValueError, match="40 documents with tokens from position 0 on, .* are too few"
    ):
        split(acts, share, folds)


@pytest.mark.parametrize("bias", [True, False])
def test_decomposition_against_errors_in_memory(acts, sae, bias):
    parts = split(acts, folds=2)
    found, tokens = decompose(
        acts, {"other": torch.zeros_like, "sae": sae}, parts, bias, ridges=(0.0,)
    )
    x, document = whole(acts)
    fold = parts.fold[torch.searchsorted(parts.documents, document.long())]
    fitting, testing = fold >= 0, fold < 0
    x_hat = sae(x).detach().double()
    x = x.double()
    error = x - x_hat
    weight, offset = direct(x[fitting], error[fitting], bias)
    # x̂ is float32, and its last bits depend on how many rows are multiplied at once
    assert torch.allclose(found["sae"].linear.weight, weight, rtol=1e-6, atol=1e-7)
    assert torch.allclose(found["sae"].linear.bias, offset, rtol=1e-6, atol=1e-7)
    linear = x @ weight + offset
    nonlinear = error - linear
    assert torch.allclose(tokens.error[:, 1].double(), error.norm(dim=-1), rtol=1e-6)
    assert torch.allclose(tokens.nonlinear[:, 1].double(), nonlinear.norm(dim=-1), rtol=1e-5)
    assert torch.equal(tokens.fold, fold)

    test, once = found["sae"].test, torch.ones(1, (parts.fold < 0).sum(), dtype=torch.float64)
    left = nonlinear[testing].square()
    total = (error[testing] - error[testing].mean(0)).square()
    variance = (x[testing] - x[testing].mean(0)).square().sum()
    assert test.fvu(once).item() == pytest.approx(
        (error[testing].square().sum() / variance).item(), rel=1e-9
    )
    assert test.fvu_nonlinear(once).item() == pytest.approx(
        (left.sum() / variance).item(), rel=1e-7
    )
    assert test.vector_r2(once).item() == pytest.approx(
        1 - (left.sum() / total.sum()).item(), rel=1e-7
    )
    assert test.vector_r2(once, pooled=False).item() == pytest.approx(
        1 - (left.sum(0) / total.sum(0)).mean().item(), rel=1e-7
    )
    for name, vector in zip(NORMS, (x, x_hat, error, linear, nonlinear), strict=True):
        square = vector.square().sum(-1, keepdim=True)
        weight, offset = direct(x[fitting], square[fitting], bias)
        missed = (square - x @ weight - offset)[testing].square().sum()
        expected = 1 - missed / (square[testing] - square[testing].mean()).square().sum()
        assert test.norm_r2(once, name).item() == pytest.approx(
            expected.item(), rel=1e-6, abs=1e-9
        ), name


def test_nonlinear_error_is_what_is_not_linear_in_the_sae_itself(acts, sae):
    """x is among the regressors: the residuals of x − Sae(x) and of −Sae(x) are the same."""
    found, _ = decompose(acts, {"sae": sae}, split(acts), ridges=(0.0,))
    x, document = whole(acts)
    parts = split(acts)
    fitting = parts.fold[torch.searchsorted(parts.documents, document.long())] >= 0
    weight, offset = direct(x[fitting].double(), sae(x[fitting]).detach().double())
    expected = -(sae(x).detach().double() - x.double() @ weight - offset)
    left = nonlinear_error(x.double(), lambda v: sae(v.float()).double(), found["sae"].linear)
    assert torch.allclose(left, expected, atol=1e-5) and left.norm() > 1


def test_what_is_linear_has_no_nonlinear_error(acts):
    saes = {"dead": lambda x: torch.full_like(x, 0.7), "shrunk": lambda x: 0.6 * x + 0.1}
    found, _ = decompose(acts, saes, split(acts))
    once = torch.ones(1, len(found["dead"].test.tokens), dtype=torch.float64)
    for name in saes:
        test = found[name].test
        assert (
            test.fvu(once) > 0.1
            and test.fvu_nonlinear(once).abs() < 1e-12
            and test.vector_r2(once) > 1 - 1e-12
        ), name


def test_what_has_nothing_to_do_with_x_is_not_predicted(acts):
    def noise(x):
        return x - torch.sin(1e4 * x)  # depends on x, and not to be seen as a linear function of it

    found, _ = decompose(acts, {"noise": noise}, split(acts))
    test = found["noise"].test
    once = torch.ones(1, len(test.tokens), dtype=torch.float64)
    assert abs(test.vector_r2(once).item()) < 0.05 and abs(test.norm_r2(once).item()) < 0.05
    assert test.norm_r2(once, "x") > 0.2


def test_parts_add_up(acts, sae):
    found, _ = decompose(acts, {"sae": sae}, split(acts))
    x, linear = whole(acts)[0], found["sae"].linear
    assert torch.allclose(
        sae(x) + linear_error(x, linear) + nonlinear_error(x, sae, linear), x, atol=1e-5
    )
    assert linear_error(x, linear).dtype == x.dtype


def test_sums_that_do_not_fit_are_taken_in_turns(acts, sae, monkeypatch):
    """Results do not depend on how many SAEs are decomposed at a time."""
    saes = {"sae": sae, "half": lambda x: 0.5 * sae(x), "dead": torch.zeros_like}
    together, norms = decompose(acts, saes, split(acts))
    monkeypatch.setattr(darkmatter, "MEMORY", 1)
    apart, norms_apart = decompose(acts, saes, split(acts))
    assert list(apart) == list(saes) and next(sae.parameters()).device.type == "cpu"
    for name in saes:
        assert torch.allclose(
            together[name].linear.weight, apart[name].linear.weight, rtol=1e-9, atol=1e-12
        )
        assert together[name].ridge == apart[name].ridge
        for one, other in zip(together[name].test, apart[name].test, strict=True):
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)
    assert torch.allclose(norms.error, norms_apart.error) and torch.allclose(
        norms.nonlinear, norms_apart.nonlinear, atol=1e-6
    )


def test_positions_before_the_start_do_not_count(acts, sae, tmp_path):
    index = start_store(
        tmp_path, dict(acts.index["request"]), None, D_IN, len(acts.index["shards"])
    )
    at = 0
    for number, shard in enumerate(acts.shards()):
        position = (torch.arange(at, at + len(shard.ids)) % OF_EACH).int()
        position[shard.document == 11] = 3  # this document has no later ones
        add_shard(tmp_path, index, number, shard._replace(position=position))
        at += len(shard.ids)
    store = open_activations(tmp_path)
    parts = split(store, start=20)
    assert len(parts.documents) == DOCUMENTS - 1 and 11 not in parts.documents.tolist()
    seen = torch.cat([rows.x for rows in stream(store, parts)])
    x, document = whole(acts)
    kept = (torch.arange(len(x)) % OF_EACH >= 20) & (document != 11)
    assert torch.equal(seen, x[kept])
    found = decompose(store, {"sae": sae}, parts)[0]["sae"].test
    assert found.tokens.tolist() == [OF_EACH - 20] * int((parts.fold < 0).sum())


def test_documents_that_the_split_does_not_know(acts, tmp_path):
    other = activations_from_tensor(whole(acts)[0], tmp_path / "other", whole(acts)[1] + 1)
    with pytest.raises(ValueError, match="has documents that the split does not know"):
        list(stream(other, split(acts)))
