"""The sparse step is the dense one: same losses, same gradients, for every architecture and loss,
at every density."""

import dataclasses
import gc
import weakref

import pytest
import torch

import jumprelu as jr
from jumprelu import sparse
from jumprelu.activations import activations_from_tensor
from jumprelu.architectures import Trainee
from jumprelu.recipe import SPARSITY_LOSSES, TrainConfig
from jumprelu.sparse import POLICY, SparsePolicy, screen
from jumprelu.support import DENSE, Support, dots, latent_sums, token_sums

D_IN, D_SAE, BATCH = 24, 96, 120
ALWAYS_DENSE = SparsePolicy(dense_above=0.0)
ALWAYS_SPARSE = SparsePolicy(dense_above=1.0, bf16_below=1.0)
LOSSES = [(a, loss) for a, known in SPARSITY_LOSSES.items() for loss in known]


def trainee(config, d_in=D_IN, seed=0):
    generator = torch.Generator().manual_seed(seed)
    trainee = Trainee(d_in, config, generator)
    with torch.no_grad():
        for parameter in trainee.parameters():  # away from the initial symmetry
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trainee


def inputs(n=BATCH, d_in=D_IN, seed=1):
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed)) / d_in**0.5


def step(trainee, x, policy, bandwidth=0.1):
    """(pass, losses, gradients) under a policy."""
    trainee.zero_grad()
    before = {name: buffer.clone() for name, buffer in trainee.named_buffers()}
    out = trainee(x, bandwidth, trainee.layout(x, bandwidth, policy))
    dead = torch.arange(trainee.config.d_sae) % 5 == 0
    terms = trainee.loss(x, out, 1e-2, bandwidth, dead)
    sum(terms.values()).backward()
    for name, buffer in trainee.named_buffers():
        buffer.copy_(before[name])
    gradients = {
        name: p.grad.clone() for name, p in trainee.named_parameters() if p.grad is not None
    }
    return out, {name: term.item() for name, term in terms.items()}, gradients


def assert_same_step(trainee, x, bandwidth=0.1):
    reference, terms, gradients = step(trainee, x, ALWAYS_DENSE, bandwidth)
    out, sparse_terms, sparse_gradients = step(trainee, x, ALWAYS_SPARSE, bandwidth)
    assert reference.layout is DENSE and isinstance(out.layout, Support)
    assert sparse_terms == pytest.approx(terms, rel=1e-5, abs=1e-7)
    assert (out.x_hat - reference.x_hat).norm() <= 1e-5 * reference.x_hat.norm()
    assert (out.acts > 0).sum() == (reference.acts > 0).sum()
    assert sparse_gradients.keys() == gradients.keys() >= {"W_enc", "W_dec", "b_enc", "b_dec"}
    for name, gradient in gradients.items():
        error = (sparse_gradients[name] - gradient).norm()
        assert error <= 1e-5 * gradient.norm() + 1e-12, f"{name}: {error / gradient.norm()}"
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture, loss", LOSSES)
def test_gradients_of_every_architecture_and_loss(architecture, loss, dtype):
    config = TrainConfig(
        architecture=architecture,
        sparsity_loss=loss,
        d_sae=D_SAE,
        k=4,
        k_aux=8,
        l0_target=4.0,
        encoder_dtype=dtype,
    )
    assert_same_step(trainee(config), inputs())


@pytest.mark.parametrize("ste_to_z", [False, True])
@pytest.mark.parametrize("log_threshold", [False, True])
@pytest.mark.parametrize("kernel", jr.estimators.KERNELS)
def test_gradients_of_every_estimator(kernel, ste_to_z, log_threshold):
    config = TrainConfig(d_sae=D_SAE, kernel=kernel, ste_to_z=ste_to_z, log_threshold=log_threshold)
    out = assert_same_step(trainee(config), inputs())
    assert (
        len(out.layout) > (out.acts > 0).sum()
    )  # the window holds inactive entries too: they train θ


@pytest.mark.parametrize("policy", [ALWAYS_DENSE, ALWAYS_SPARSE])
@pytest.mark.parametrize("kernel", jr.estimators.KERNELS)
def test_diagnostics_are_those_of_dense_arithmetic(kernel, policy):
    subject, x, width = trainee(TrainConfig(d_sae=D_SAE, kernel=kernel)), inputs(), 0.05
    with torch.no_grad():
        u = ((x - subject.b_dec) @ subject.W_enc + subject.b_enc - subject.threshold) / width
    out = subject(x, width, subject.layout(x, width, policy))
    terms = subject.loss(x, out, 1e-2, width, torch.zeros(D_SAE, dtype=torch.bool))
    found = subject.diagnose(out, terms, width)
    expected = (u.abs() < jr.estimators.REACH[kernel]).float().mean(0)
    assert expected.max() > 0
    torch.testing.assert_close(found["window_share"], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("buckets", [4, 7, 50, 64, 80, 96])
def test_gradients_of_approximate_topk(buckets):
    config = TrainConfig(architecture="topk", d_sae=D_SAE, k=4, k_aux=8, topk_buckets=buckets)
    subject, exact = trainee(config), trainee(dataclasses.replace(config, topk_buckets=None))
    out = assert_same_step(subject, inputs())
    assert ((out.layout.per_token((out.acts > 0).float())) <= 4).all()
    same = torch.allclose(out.x_hat, exact(inputs(), 0.1, DENSE).x_hat, atol=1e-6)
    assert same == (buckets == D_SAE)


@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize("architecture", ["relu", "gated"])
def test_gradients_with_free_and_fixed_norms(architecture, unit_norm):
    assert_same_step(
        trainee(TrainConfig(architecture=architecture, d_sae=D_SAE, unit_norm=unit_norm)),
        inputs(),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shift", [5.0, 0.5, 0.2, 0.0, -0.2, -5.0])
def test_every_density(shift, dtype):
    """From no active latent at all to all of them on every token, by moving the biases."""
    config = TrainConfig(d_sae=D_SAE, encoder_dtype=dtype)
    subject = trainee(config)
    subject.b_enc.data -= shift
    out = assert_same_step(subject, inputs())
    density = (out.acts > 0).sum().item() / BATCH / D_SAE
    assert density == 0 if shift == 5.0 else density == 1 if shift == -5.0 else 0 < density < 1


@pytest.mark.parametrize("batch, d_in, d_sae", [(1, 24, 96), (3, 5, 7), (120, 1, 1), (17, 24, 13)])
def test_odd_shapes_and_tokens_without_an_active_latent(batch, d_in, d_sae):
    x = inputs(batch, d_in)
    x[0] = -10  # below every threshold, or above: either way unlike the others
    assert_same_step(trainee(TrainConfig(d_sae=d_sae, threshold_init=0.05), d_in), x)


def test_a_bandwidth_as_narrow_as_the_papers():
    assert_same_step(
        trainee(TrainConfig(d_sae=D_SAE, threshold_init=0.3)),
        inputs(600),
        bandwidth=1e-3,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_activations(dtype, tmp_path):
    lm = jr.load_lm()
    tokens = jr.tokenize(
        jr.load_texts("installed", "test").select(range(20)), lm.tokenizer, 64, max_rows=8
    )
    acts = jr.harvest(lm, tokens, site="resid_post", layer=3, out=tmp_path / "acts")
    x = acts.rows(400)
    subject = trainee(TrainConfig(d_sae=512, encoder_dtype=dtype), acts.d_in)
    scale = x.square().sum(-1).mean().sqrt()
    subject.b_dec.data = x.mean(0) / scale
    out = assert_same_step(subject, x / scale)
    assert 0 < (out.acts > 0).float().sum() / 400 < 256


@pytest.mark.parametrize("architecture", list(SPARSITY_LOSSES))
def test_diagnostics_and_whole_runs_agree(architecture, tmp_path):
    acts = activations_from_tensor(inputs(2000), tmp_path / "acts")
    config = TrainConfig(
        architecture=architecture,
        d_sae=D_SAE,
        steps=40,
        batch_size=64,
        k=4,
        sparsity=1e-2,
        dead_after=500,
    )
    logs, saes = [], []
    for policy in (ALWAYS_DENSE, SparsePolicy(dense_above=1.0)):
        sae, log = jr.train(acts, config, device="cpu", policy=policy)
        assert (log.pop("computed") < 1).any() == (policy is not ALWAYS_DENSE)
        logs.append(log), saes.append(sae)
    assert list(logs[0].columns) == list(logs[1].columns)
    torch.testing.assert_close(
        torch.tensor(logs[1].to_numpy()), torch.tensor(logs[0].to_numpy()), rtol=0.02, atol=0.02
    )
    torch.testing.assert_close(saes[1].W_dec, saes[0].W_dec, atol=0.02, rtol=0)


def test_the_denser_batch_is_computed_densely():
    subject, x = trainee(TrainConfig(d_sae=D_SAE)), inputs()
    assert subject(x, 0.1).layout is DENSE  # many pre-activations within ε = 0.1
    subject.b_enc.data -= 0.6
    out = subject(x, 0.1)
    assert isinstance(out.layout, Support) and len(out.layout) <= POLICY.dense_above * BATCH * D_SAE


def test_a_step_leaves_nothing_behind():
    """The graph and the support do not hold each other: memory is free at once, not when the
    collector comes."""
    subject = trainee(TrainConfig(d_sae=D_SAE))
    subject.b_enc.data -= 0.6
    gc.disable()
    try:
        out = subject(inputs(), 0.1)
        assert isinstance(out.layout, Support)
        gone = weakref.ref(out.layout)
        sum(
            subject.loss(inputs(), out, 1e-3, 0.1, torch.zeros(D_SAE, dtype=torch.bool)).values()
        ).backward()
        del out
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("shift", [0.3, 20.0])
def test_batchtopk_with_fewer_active_entries_than_it_may_keep(shift):
    """Then all that are positive are kept, its threshold goes to zero, and none at all is no
    error."""
    config = TrainConfig(architecture="batchtopk", d_sae=D_SAE, k=30)
    thresholds = []
    for policy in (ALWAYS_DENSE, SparsePolicy(dense_above=1.0)):
        subject = trainee(config)
        subject.b_enc.data -= shift
        subject.batch_threshold += 0.5
        out = subject(inputs(), 0.1, subject.layout(inputs(), 0.1, policy))
        assert (out.acts > 0).sum() < 30 * BATCH and (out.acts > 0).any() == (shift == 0.3)
        thresholds.append(subject.batch_threshold.item())
    assert thresholds[0] == thresholds[1] == pytest.approx(0.495)


# ---- finding S


@pytest.mark.parametrize("seed", range(8))
def test_bfloat16_loses_no_entry(seed):
    """Tokens and latents of very different lengths, and a bar that many entries touch: rounding
    must not hide one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 40, generator=generator) * torch.logspace(-2, 2, 200).unsqueeze(-1)
    W_enc = (torch.randn(64, 40, generator=generator) * torch.logspace(-1, 1, 64).unsqueeze(-1)).T
    b_enc = torch.randn(64, generator=generator)
    low = (x @ W_enc + b_enc).sort(dim=0).values[180]
    low -= 1e-5 * low.abs()  # of each latent, one entry is just above, by more than float32 rounds
    exact, found = screen(x, W_enc, b_enc, low), screen(x, W_enc, b_enc, low, torch.bfloat16)
    missing = set(zip(exact.latent.tolist(), exact.token.tolist(), strict=True)) - set(
        zip(found.latent.tolist(), found.token.tolist(), strict=True)
    )
    assert not missing and len(found) == len(exact) == 64 * 20
    dense = (x @ W_enc + b_enc)[found.token.long(), found.latent.long()]
    torch.testing.assert_close(found.pre, dense, rtol=1e-4, atol=1e-4)


def test_screen_stops_when_there_is_too_much():
    x, W_enc = inputs(), torch.eye(D_IN)
    assert screen(x, W_enc, torch.zeros(D_IN), torch.full((D_IN,), -9.0), limit=0.5) is None
    assert len(screen(x, W_enc, torch.zeros(D_IN), torch.full((D_IN,), -9.0))) == BATCH * D_IN
    assert len(screen(x, W_enc, torch.zeros(D_IN), torch.full((D_IN,), 9.0))) == 0


@pytest.mark.parametrize("chunk", [1, 64, 10_000])
@pytest.mark.parametrize("limit", [1.0, 0.99])  # below 1 a small block comes first
def test_chunks_do_not_matter(chunk, limit):
    x, W_enc = inputs(), trainee(TrainConfig(d_sae=D_SAE)).W_enc.detach()
    whole = screen(x, W_enc, torch.zeros(D_SAE), torch.full((D_SAE,), 0.2))
    low, policy = torch.full((D_SAE,), 0.2), SparsePolicy(chunk=chunk)
    parts = screen(x, W_enc, torch.zeros(D_SAE), low, limit=limit, policy=policy)
    assert (
        torch.equal(whole.token, parts.token)
        and torch.equal(whole.start, parts.start)
        and len(whole) > 100
    )


def test_the_workspace_survives_inference_mode():
    x, W_enc, low = inputs(50), torch.randn(D_IN, 64), torch.full((64,), 0.2)
    with torch.inference_mode():
        inside = screen(x, W_enc, torch.zeros(64), low)
    assert torch.equal(inside.token, screen(x, W_enc, torch.zeros(64), low).token)


def largest_of_buckets(row, k, buckets):
    """Which columns approximate top-k keeps, as its definition reads."""
    winners = [max(range(b, len(row), buckets), key=lambda i: row[i]) for b in range(buckets)]
    return set(sorted(winners, key=lambda i: -row[i])[:k])


@pytest.mark.parametrize(
    "d_sae, k, buckets",
    [(12, 3, 4), (13, 3, 4), (15, 4, 4), (10, 2, 7), (9, 1, 1), (9, 5, 9), (9, 9, 9)],
)
def test_buckets_against_their_definition(d_sae, k, buckets):
    rows = torch.randn(50, d_sae, generator=torch.Generator().manual_seed(0))
    values, index = sparse.top(rows, k, buckets)
    assert torch.equal(values, rows.gather(-1, index))
    assert [set(found) for found in index.tolist()] == [
        largest_of_buckets(row, k, buckets) for row in rows.tolist()
    ]
    support = sparse.largest(rows, torch.eye(d_sae), torch.zeros(d_sae), k, buckets)
    kept = torch.zeros(50, d_sae, dtype=torch.bool).scatter(-1, index, True)
    assert torch.equal(kept.T.nonzero().int(), torch.stack([support.latent, support.token], -1))
    torch.testing.assert_close(support.pre, rows.T[kept.T])
    if buckets == d_sae:
        assert torch.equal(index.sort().values, rows.topk(k).indices.sort().values)


def test_buckets_with_equal_values_keep_k_different_columns():
    rows = torch.ones(2, 13)
    assert all(len(set(found)) == 5 for found in sparse.top(rows, 5, 6)[1].tolist())


@pytest.mark.parametrize("k, buckets", [(16, 32), (16, 128), (32, 512)])
def test_recall_of_buckets_is_its_closed_form(k, buckets):
    """The j-th largest is found if none of the j − 1 larger ones, drawn without replacement, shares
    its bucket."""
    d_sae, rows = 1024, 4000
    others = d_sae // buckets - 1
    free, expected = 1.0, []
    for larger in range(k):  # P(none of `larger` columns is one of the `others`)
        expected.append(free)
        free *= (d_sae - 1 - others - larger) / (d_sae - 1 - larger)
    x = torch.randn(rows, d_sae, generator=torch.Generator().manual_seed(1))
    found = torch.zeros(rows, d_sae).scatter(-1, sparse.top(x, k, buckets)[1], 1.0)
    recall = found.gather(-1, x.topk(k).indices).mean(0)  # of the largest, the second largest, ...
    error = (torch.tensor(expected) * (1 - torch.tensor(expected)) / rows).sqrt()
    assert recall[0] == 1 and ((recall - torch.tensor(expected)).abs() <= 5 * error + 1e-6).all()
    assert recall.mean().item() == pytest.approx(sum(expected) / k, abs=0.005)


@pytest.mark.parametrize("shape", [(8, 8), (3, 5), (1, 1), (16, 40)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_positions(shape, density):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    assert torch.equal(sparse._positions(mask), mask.view(-1).nonzero().squeeze(-1))


# ---- the kernels against dense arithmetic


def test_kernels_against_dense_arithmetic():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(9, 13, generator=generator) < 0.3
    mask[4], mask[:, 5] = False, False  # a token without entries, a latent without entries
    token, latent = mask.T.nonzero().int().unbind(-1)[::-1]
    start = torch.cat([torch.zeros(1), mask.sum(0).cumsum(0)]).int()
    support = Support(start, token, (9, 13))
    assert torch.equal(support.latent, latent)
    values = torch.randn(len(support), generator=generator)
    dense = torch.zeros(9, 13)
    dense[token.long(), latent.long()] = values
    rows, atoms = torch.randn(9, 6, generator=generator), torch.randn(13, 6, generator=generator)
    torch.testing.assert_close(
        dots(support, rows, atoms), (rows @ atoms.T)[token.long(), latent.long()]
    )
    torch.testing.assert_close(token_sums(support, values, atoms), dense @ atoms)
    torch.testing.assert_close(latent_sums(support, values, rows), dense.T @ rows)
    torch.testing.assert_close(support.per_token(values), dense.sum(1))
    torch.testing.assert_close(support.per_latent(values), dense.mean(0))
    torch.testing.assert_close(support.at(atoms[:, 0]), atoms[latent.long(), 0])
    part, kept = support.nonzero(values * (values > 0))
    assert torch.equal(kept, values[values > 0]) and torch.equal(part.token, token[values > 0])
    torch.testing.assert_close(token_sums(part, kept, atoms), dense.clamp_min(0) @ atoms)
