"""Gradient pursuit: the formulas token by token, by hand, and what holds of it and what does
not."""

from __future__ import annotations

import math

import pytest
import torch

from jumprelu.dark.pursuit import pursue
from jumprelu.sae import SAE

CROWDED = torch.tensor(
    [[-3.0, 3, 1], [-1, 3, 3], [0, -3, 2], [-3, 1, -3], [-1, 2, -1]], dtype=torch.float64
)
"""Near the sum of these, not normalised, latents are clipped, and come back: in random dictionaries
they hardly ever are."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sae_of(atoms, b_dec=None, threshold=0.5):
    """An SAE with these atoms, [d_sae, d_in], and its encoder tied to them."""
    atoms = torch.as_tensor(atoms)
    b_dec = atoms.new_zeros(atoms.shape[1]) if b_dec is None else b_dec
    return SAE(atoms.T, -atoms @ b_dec, atoms, b_dec, atoms.new_full((len(atoms),), threshold))


def unit(atoms):
    return atoms / atoms.norm(dim=1, keepdim=True)


def random_sae(d_in=8, d_sae=24, seed=0):
    """Its atoms do not lie in all directions alike: they get in each other's way."""
    return sae_of(
        unit(random(d_sae, d_in, seed=seed) + torch.eye(d_in)[0]), random(d_in, seed=seed + 100)
    )


def inputs(sae, tokens=40, seed=7):
    return random(tokens, sae.d_in, seed=seed) + 2 * torch.eye(sae.d_in)[0] + sae.b_dec.detach()


def problems():
    """(SAE, x) of random dictionaries and of a crowded one."""
    for seed in range(3):
        sae = random_sae(seed=seed)
        yield sae, inputs(sae)
    sae = sae_of(unit(CROWDED), random(3))
    yield sae, random(160, 3, seed=7) * 0.4 + unit(CROWDED).sum(0) + sae.b_dec.detach()


def reference(signal, atoms, steps):
    """One token, [d_in]: for each step the dense w before and after it, the latent found, and the
    drop of ‖r‖² promised."""
    w, path = torch.zeros(len(atoms), dtype=torch.float64), []
    for _ in range(steps):
        r = signal - w @ atoms
        q = atoms @ r
        found = int(q.argmax())
        support = w != 0
        support[found] = True
        g = torch.where(support, q, 0.0)
        c = g @ atoms
        eta = (c @ r) / (c @ c) if c @ c != 0 else 0.0
        before, w = w, (w + eta * g).clamp(min=0)
        path.append((before, w, found, (eta * (c @ r)) if (before + eta * g >= 0).all() else None))
    return path


def expected(sae, x, steps):
    rows = [
        reference(signal, sae.W_dec.detach(), k)
        for signal, k in zip(x - sae.b_dec.detach(), steps.tolist(), strict=True)
    ]
    return torch.stack([path[-1][1] if path else torch.zeros(sae.d_sae).double() for path in rows])


def of_many_lengths(n, most, seed=3):
    """Steps in no order, [n], 0 and `most` among them."""
    steps = torch.randint(0, most + 1, (n,), generator=torch.Generator().manual_seed(seed))
    steps[5], steps[11] = 0, most
    return steps


@pytest.mark.parametrize("batch", [1, 7, 512])
def test_it_is_the_formulas(batch):
    for sae, x in problems():
        steps = of_many_lengths(len(x), 12)
        torch.testing.assert_close(
            pursue(sae, x, steps, batch).to_dense(), expected(sae, x, steps), rtol=1e-9, atol=1e-9
        )


def test_these_problems_meet_every_case():
    again, clipped, back = 0, 0, 0
    for sae, x in problems():
        steps = of_many_lengths(len(x), 12)
        for signal, k in zip(x - sae.b_dec.detach(), steps.tolist(), strict=True):
            left = torch.zeros(sae.d_sae, dtype=torch.bool)
            for before, after, found, _ in reference(signal, sae.W_dec.detach(), k):
                again += int(before[found] != 0)
                back += int(left[found] and before[found] == 0 and after[found] > 0.01)
                left |= (before > 0.01) & (after == 0)
            clipped += int(left.any())
    assert again > 100 and clipped > 5 and back > 0


def test_in_float32_as_in_float64():
    exact = random_sae()
    x, steps = inputs(exact), of_many_lengths(40, 5)
    found = pursue(random_sae().float(), x.float(), steps)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.to_dense().double(), expected(exact, x, steps), rtol=1e-4, atol=1e-5
    )


def test_a_narrow_sae_is_pursued_in_float32():
    narrow = random_sae().bfloat16()
    x = inputs(random_sae()).bfloat16()
    found = pursue(narrow, x, 4)
    wide = SAE(*(p.float() for p in narrow.parameters()))
    assert found.dtype == torch.float32 and torch.equal(
        found.to_dense(), pursue(wide, x.float(), 4).to_dense()
    )
    assert narrow.decode(found).dtype == torch.bfloat16


def test_three_steps_by_hand():
    sae, x = sae_of([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[4.0, 1.0]])
    # q = (4, 3.2): e₁, to its full 4; then r = (0, 1), q = (0, 0.8): the other, η = 1; then r =
    # (−0.48, 0.36), q = (−0.48, 0)
    for steps, code in enumerate(([0.0, 0.0], [4.0, 0.0], [4.0, 0.8], [3.52, 0.8])):
        torch.testing.assert_close(pursue(sae, x, steps).to_dense(), torch.tensor([code]))
    torch.testing.assert_close(sae.decode(pursue(sae, x, 3)), torch.tensor([[4.0, 0.64]]))


def test_the_signal_is_what_lies_beyond_the_decoders_bias_and_the_units_are_those_of_x():
    sae = random_sae()
    x, shift = inputs(sae), random(8, seed=5)
    moved = sae_of(sae.W_dec.detach(), sae.b_dec.detach() + shift)
    torch.testing.assert_close(pursue(moved, x + shift, 5).to_dense(), pursue(sae, x, 5).to_dense())
    centred = sae_of(sae.W_dec.detach())
    assert torch.equal(
        pursue(centred, 8 * x, 5).to_dense(), 8 * pursue(centred, x, 5).to_dense()
    )  # a power of 2 rounds nothing


def test_what_comes_back():
    sae = random_sae()
    x, steps = inputs(sae).requires_grad_(), of_many_lengths(40, 12)
    found = pursue(sae, x, steps)
    assert (
        found.is_sparse
        and found.is_coalesced()
        and found.shape == (40, 24)
        and found.dtype == torch.float64
    )
    assert not found.requires_grad and (found.values() > 0).all()
    counts = (found.to_dense() > 0).sum(-1)
    assert found._nnz() == counts.sum() and (counts <= steps).all() and counts[5] == 0 < counts[11]
    torch.testing.assert_close(sae.decode(found), sae.decode(found.to_dense()))


def test_the_order_of_tokens_does_not_matter():
    sae = random_sae()
    x, steps = inputs(sae), of_many_lengths(40, 12)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        pursue(sae, x[order], steps[order], 7).to_dense(),
        pursue(sae, x, steps, 7).to_dense()[order],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the two ways to encode
def test_left_to_itself_a_token_takes_its_own_l0(dtype):
    sae = random_sae().to(dtype)
    x = inputs(sae).to(dtype)
    x[[3, -1]] = sae.b_dec.detach()
    l0 = (sae.encode(x) > 0).sum(-1)
    assert l0[3] == l0[-1] == 0 and l0.unique().numel() > 4
    for batch in (9, 512):
        torch.testing.assert_close(
            pursue(sae, x, batch=batch).to_dense(), pursue(sae, x, l0).to_dense()
        )


def test_one_number_of_steps_is_that_of_all():
    sae = random_sae()
    x = inputs(sae)
    assert torch.equal(
        pursue(sae, x, 6).to_dense(),
        pursue(sae, x, torch.full((40,), 6, dtype=torch.int32)).to_dense(),
    )


def test_no_tokens_and_no_steps():
    sae = random_sae()
    for x, steps in ((inputs(sae)[:0], None), (inputs(sae)[:0], 3), (inputs(sae), 0)):
        found = pursue(sae, x, steps)
        assert found.shape == (len(x), 24) and found._nnz() == 0 and found.is_coalesced()
        assert torch.equal(sae.decode(found), sae.b_dec.detach().expand(len(x), 8))


def test_where_nothing_is_clipped_the_error_falls_by_as_much_as_the_step_promises():
    sae = random_sae()
    x = inputs(sae)
    errors = torch.stack(
        [(x - sae.decode(pursue(sae, x, k))).square().sum(-1) for k in range(13)]
    ).detach()
    held = 0
    for token, signal in enumerate(x - sae.b_dec.detach()):
        for k, (*_, drop) in enumerate(reference(signal, sae.W_dec.detach(), 12)):
            if drop is not None:
                held += 1
                assert drop >= 0 and errors[k + 1, token] == pytest.approx(
                    float(errors[k, token] - drop), abs=1e-9
                )
    assert held > 300


def test_clipping_can_raise_the_error():
    atoms = torch.tensor([[2.0, 2, 1], [0, -3, 2], [2, -2, -1], [3, -1, -2]], dtype=torch.float64)
    sae, x = sae_of(unit(atoms)), torch.tensor([[2.0, 1, 0]], dtype=torch.float64)
    codes = [pursue(sae, x, k).to_dense() for k in range(6)]
    errors = [(x - sae.decode(code)).norm().item() for code in codes]
    assert codes[3][0, 2] > 0 and codes[4][0, 2] == 0
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[4] == pytest.approx(
        1.768674 * errors[3], rel=1e-5
    )
    assert errors[5] < errors[4]


def test_a_latent_found_below_zero_counts_in_the_step_and_is_clipped():
    atoms = unit(
        torch.tensor([[0.0, 3, 2], [-4, -1, -3], [4, 2, 1], [3, -1, -2], [0, 1, 1]]).double()
    )
    x = torch.tensor([[3.0, 1, 5]], dtype=torch.float64)
    before, after, found, _ = reference(x[0], atoms, 6)[-1]
    q = (x[0] - before @ atoms) @ atoms.T
    assert (
        q.max() == q[found] < -0.3
        and before[found] == after[found] == 0
        and (before > 0).sum() == 2
    )
    torch.testing.assert_close(pursue(sae_of(atoms), x, 6).to_dense()[0], after)
    alone = torch.where(before != 0, q, 0)  # without it the step would be another
    assert (
        (before + alone.square().sum() / (alone @ atoms).square().sum() * alone).clamp(min=0)
        - after
    ).norm() > 1e-3


def test_orthonormal_atoms_give_the_code_in_as_many_steps_as_it_has_latents():
    atoms = torch.linalg.qr(random(8, 8)).Q
    sae = sae_of(atoms, random(8, seed=1))
    code = torch.tensor(
        [
            [0, 3.0, 0, 0.5, 2.0, 0, 0, 1.0],
            [0, 0, 0, 0, 0, 4.0, 1.5, 0],
            [1.0, -2, 0, 0, 0, 0, 0, 3],
        ]
    ).double()
    x, size = sae.decode(code).detach(), torch.tensor([4, 2, 2])
    torch.testing.assert_close(pursue(sae, x, size).to_dense(), code.clamp(min=0))
    # with fewer steps, the largest of them, and each at its full weight at once
    for k in range(4):
        largest = code[:1].topk(k)
        kept = torch.zeros(1, 8).double().scatter(-1, largest.indices, largest.values)
        torch.testing.assert_close(pursue(sae, x[:1], k).to_dense(), kept)
    # with more, nothing but rounding is added
    torch.testing.assert_close(pursue(sae, x, size + 4).to_dense(), code.clamp(min=0))


def test_a_latent_found_again_is_not_added_twice_and_its_weight_goes_on_to_the_best():
    slanted = sae_of([[1.0, 0.0], [0.5, math.sqrt(0.75)]])
    x = torch.tensor([[2.0, 1.0]]) @ slanted.W_dec.detach()
    found = pursue(slanted, x, 40)
    assert found._nnz() == 2
    torch.testing.assert_close(found.to_dense(), torch.tensor([[2.0, 1.0]]), rtol=1e-5, atol=1e-5)


def test_steps_that_lead_nowhere_leave_w_as_it_is():
    sae = sae_of([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], torch.tensor([0.25, 0.5, 1.0]))
    # nothing, orthogonal to the atoms, opposed to them; then two of which one atom gives all that
    # can be had
    signals = torch.tensor([[0.0, 0, 0], [0, 0, 7], [-1, -2, 0], [3, 0, 0], [3, -2, 1]])
    found = pursue(sae, signals + sae.b_dec.detach(), 5).to_dense()
    assert torch.equal(found, torch.tensor([[0.0, 0], [0, 0], [0, 0], [3, 0], [3, 0]]))


def test_a_token_that_is_not_finite_is_not_hidden_and_harms_no_other():
    sae = random_sae()
    x = inputs(sae)
    bad = x.clone()
    bad[4, 2], bad[6] = math.nan, math.inf
    found, fine = pursue(sae, bad, 5).to_dense(), torch.arange(40).ne(4) & torch.arange(40).ne(6)
    assert found[[4, 6]].isnan().any(-1).all()
    torch.testing.assert_close(found[fine], pursue(sae, x, 5).to_dense()[fine])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=torch.zeros(40, 7)), r"\[tokens, d_in\] with this SAE's d_in = 8, got \[40, 7\]"),
        (dict(x=torch.zeros(8)), r"got \[8\]"),
        (dict(x=torch.zeros(2, 20, 8)), r"got \[2, 20, 8\]: x.flatten\(0, -2\)"),
        (dict(steps=-1), r"at least 0, got torch.int64 such as \[-1, -1, -1\]"),
        (dict(steps=torch.arange(40) - 3), r"at least 0, got torch.int64 such as \[-3, -2, -1\]"),
        (dict(steps=torch.ones(39, dtype=torch.int64)), r"each of the 40 tokens, got shape \[39\]"),
        (dict(steps=torch.ones(40, 1, dtype=torch.int64)), r"got shape \[40, 1\]"),
        (dict(steps=torch.tensor(3)), r"got shape \[\]"),
        (dict(steps=2.0), "integers .* got torch.float32"),
        (dict(steps=torch.ones(40)), "integers .* got torch.float32"),
        (dict(steps=torch.ones(40, dtype=torch.bool)), "integers .* got torch.bool"),
    ],
)
def test_what_cannot_be_pursued_is_refused(arguments, message):
    sae = random_sae()
    with pytest.raises(ValueError, match=message):
        pursue(sae, **(dict(x=inputs(sae), steps=3) | arguments))
