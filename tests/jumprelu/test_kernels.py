"""The GPU's kernels against dense arithmetic in float64: on a GPU if there is one, else in Triton's
interpreter."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip(
    "triton", minversion="3.8" if DEVICE.type == "cpu" else None
)  # older interpreters fail on NumPy 2.4

from jumprelu import kernels  # noqa: E402
from jumprelu.activations import activations_from_tensor  # noqa: E402
from jumprelu.optim import Adam  # noqa: E402
from jumprelu.recipe import TrainConfig  # noqa: E402
from jumprelu.sae import SAE  # noqa: E402
from jumprelu.sparse import SparsePolicy, screen  # noqa: E402
from jumprelu.state import TrainState, train_step  # noqa: E402
from jumprelu.support import DENSE, transposed  # noqa: E402

SHAPES = [(9, 13), (1, 1), (2, 40), (0, 5), (5, 0)]
WIDTHS = [
    (1, torch.float32),
    (24, torch.bfloat16),
    (600, torch.float32),
]  # the last takes two blocks


WITH_KERNELS = SparsePolicy(dense_above=1.0, bf16_below=1.0, gpu_bf16_below=1.0, triton=True)
WITHOUT = SparsePolicy(dense_above=0.0, triton=False)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def entries(rows, columns, density=0.3):
    """(mask, start, column): some entries of a matrix; a row and a column in the middle have none,
    if there are others."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < density
    if rows > 1 and columns > 1 and density < 1:
        mask[rows // 2], mask[:, columns // 2] = False, False
    start = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return mask, start.to(DEVICE), mask.nonzero()[:, 1].int().to(DEVICE)


def dense(mask, weight):
    matrix = torch.zeros(mask.shape, dtype=torch.float64)
    matrix[mask] = weight.cpu().double()
    return matrix


# ---- finding entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [-torch.inf, -0.5, 1.0, torch.inf])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2500)])  # the last takes several blocks
def test_compact_finds_what_is_above_its_rows_bar(shape, level, dtype):
    products, bar = normal(*shape, dtype=dtype), level + normal(shape[0], seed=1)
    if products.numel():
        bar[0] = products[0, 0].float()  # an entry at the bar is not above it
    over = products > bar.unsqueeze(-1)
    start, column, value = kernels.compact(products, bar)
    assert start.dtype == column.dtype == torch.int32 and value.dtype == torch.float32
    assert start[0] == 0 and torch.equal(start.diff(), over.sum(1).int())
    assert torch.equal(column, over.nonzero()[:, 1].int()) and torch.equal(
        value, products[over].float()
    )


def test_compact_without_a_bar_finds_what_is_positive():
    products = torch.tensor(
        [[0.0, -0.0, 1e-30], [torch.nan, torch.inf, -torch.inf], [-1.0, -2.0, -3.0]], device=DEVICE
    )
    start, column, value = kernels.compact(products)
    assert start.tolist() == [0, 1, 2, 2] and column.tolist() == [2, 1]
    assert torch.equal(value, products[[0, 1], [2, 1]])


def test_compact_stops_at_its_limit():
    products = torch.ones(3, 4, device=DEVICE)
    assert (
        kernels.compact(products, limit=11) is None
        and len(kernels.compact(products, limit=12)[1]) == 12
    )


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_is_what_the_cpu_computes(shape, density):
    mask, start, column = entries(*shape, density)
    found = kernels.transposed(start, column, shape)
    assert all(tensor.dtype == torch.int32 for tensor in found)
    for ours, theirs in zip(found, transposed(start.cpu(), column.cpu(), shape), strict=True):
        assert torch.equal(ours.cpu(), theirs)
    assert torch.equal(found[2].cpu(), mask.T.nonzero()[:, 1].int())


# ---- sums over entries


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width, dtype", WIDTHS)
def test_bag_is_a_matmul(width, shape, density, dtype):
    mask, start, column = entries(*shape, density)
    weight, rows = normal(len(column), seed=1), normal(shape[1], width, seed=2, dtype=dtype)
    found = kernels.bag(start, column, weight, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.cpu().double(), dense(mask, weight) @ rows.cpu().double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("width, dtype", WIDTHS)
def test_dots_are_a_matmul_where_entries_are(width, shape, density, dtype):
    mask, start, token = entries(*shape, density)
    latent = torch.arange(shape[0], device=DEVICE).repeat_interleave(start.diff()).int()
    atoms, rows = normal(shape[0], width, seed=1), normal(shape[1], width, seed=2, dtype=dtype)
    found = kernels.dots(latent, token, rows, atoms)
    assert found.dtype == torch.float32
    expected = (atoms.cpu().double() @ rows.cpu().double().T)[mask]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_beyond_the_reach_of_32_bits():
    """The matrix is never written but for its last row: most of its 4 GiB are never in memory."""
    last = 2**31 // 512
    rows = torch.empty(last + 1, 512, dtype=torch.bfloat16, device=DEVICE)
    rows[last] = normal(512)
    index, zero = (
        torch.tensor([last], dtype=torch.int32, device=DEVICE),
        torch.zeros(1, dtype=torch.int32, device=DEVICE),
    )
    start = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    assert torch.equal(
        kernels.bag(start, index, torch.ones(1, device=DEVICE), rows)[0], rows[last].float()
    )
    atoms = torch.eye(512, device=DEVICE)[7:8]
    assert (
        kernels.dots(zero, index, rows, atoms)
        == rows[last, 7]
        == kernels.dots(index, zero, atoms, rows)
    )


# ---- the optimiser


@pytest.mark.parametrize(
    "betas, eps", [((0.0, 0.999), 1e-8), ((0.9, 0.99), 1e-8), ((0.5, 0.9), 0.1)]
)
@pytest.mark.parametrize(
    "shape, unit_norm",
    [
        ((1,), False),
        ((2500,), False),
        ((3, 700), False),
        ((5, 24), False),
        ((5, 24), True),
        ((3, 1), True),
        ((2, 1030), True),
    ],
)
def test_adam_is_the_one_of_the_cpu(shape, unit_norm, betas, eps):
    initial = normal(*shape)
    if unit_norm:
        initial /= initial.norm(dim=-1, keepdim=True)
    theirs = torch.nn.Parameter(initial.cpu().clone())
    reference = Adam({"p": theirs}, betas, eps, unit_norm=("p",) if unit_norm else ())
    ours, second = initial.clone(), torch.zeros_like(initial)
    first = torch.zeros_like(initial) if betas[0] else None
    for step in range(1, 6):
        gradient = normal(*shape, seed=step) * 10.0 ** (step - 3)
        theirs.grad = gradient.cpu().clone()
        reference.step({"p": 0.01 * step})
        kept = gradient.clone()
        kernels.adam(ours, gradient, second, first, 0.01 * step, betas, eps, step, unit_norm)
        assert torch.equal(gradient, kept)
        torch.testing.assert_close(ours.cpu(), theirs.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        second.cpu(), reference.moments["p"]["exp_avg_sq"], rtol=1e-5, atol=1e-9
    )
    if first is not None:
        torch.testing.assert_close(
            first.cpu(), reference.moments["p"]["exp_avg"], rtol=1e-5, atol=1e-6
        )
    if unit_norm:
        torch.testing.assert_close(ours.norm(dim=-1), torch.ones(shape[0], device=DEVICE))


def test_adam_without_eps_keeps_rows_finite():
    """A block is wider than the row: what lies beyond is 0/0, and must not reach the norm."""
    parameter, gradient = (
        torch.tensor([[0.6, 0.8, 0.0]], device=DEVICE),
        torch.ones(1, 3, device=DEVICE),
    )
    kernels.adam(
        parameter,
        gradient,
        torch.zeros_like(gradient),
        None,
        0.1,
        (0.0, 0.9),
        0.0,
        1,
        unit_norm=True,
    )
    moved = torch.tensor([0.6, 0.8, 0.0]) - 0.1 * torch.tensor(
        [1.0, -1.0, 1.0]
    )  # the sign of 1 − 1.4·p
    torch.testing.assert_close(parameter[0].cpu(), moved / moved.norm())


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_adam_of_nothing(shape):
    kernels.adam(
        *(torch.zeros(shape, device=DEVICE) for _ in range(3)),
        None,
        0.1,
        (0.0, 0.9),
        1e-8,
        1,
        unit_norm=True,
    )


def test_atoms_too_wide_for_a_program_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "WIDEST", 16)
    tensors = [torch.ones(2, 17, device=DEVICE) for _ in range(3)]
    kernels.adam(*tensors, None, 0.1, (0.0, 0.9), 1e-8, 1)
    with pytest.raises(ValueError, match="at most 16 columns"):
        kernels.adam(*tensors, None, 0.1, (0.0, 0.9), 1e-8, 1, unit_norm=True)


# ---- when they serve, and on what


def test_a_transpose_is_refused():
    with pytest.raises(ValueError, match="products: .* not contiguous"):
        kernels.compact(torch.ones(3, 4, device=DEVICE).T)


def test_serves():
    here, cpu = torch.zeros(1, device=DEVICE), torch.zeros(1)
    assert kernels.serves(here, True) and kernels.serves(cpu, True)
    assert not kernels.serves(here, False) and not kernels.serves(cpu)
    assert kernels.serves(here) == (DEVICE.type == "cuda")


def test_without_triton_the_module_loads_and_serves_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("without_triton", kernels.__file__)
    without = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(without)
    assert not without.serves(torch.zeros(1, device=DEVICE), True)


COMPILE = """
import importlib.util, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("kernels", sys.argv[1])
sys.modules["kernels"] = kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
positions = dict.fromkeys(("start", "index", "latent", "token", "counts", "column_out"), "*i32")
numbers = dict.fromkeys(("rate", "beta1", "rest1", "beta2", "rest2", "root2", "eps"), "fp32")
sizes = {"n": "i32", "width": "i32", "columns": "i32", "size": "i64"}
for dtype in ("*fp32", "*bf16"):
    types = positions | numbers | sizes | {"products": dtype, "rows": dtype}
    few = {"BLOCK": 512, "ENTRIES": 8}
    versions = [(kernels._count, {"BLOCK": 1024}, 4), (kernels._list, {"BLOCK": 1024}, 4),
                (kernels._bag, few, 4), (kernels._dots, few, 4),
                (kernels._totals, {"BLOCK": 512}, 4)]
    for yes in (False, True) if dtype == "*fp32" else ():
        versions.append((kernels._adam, {"FIRST_MOMENT": yes, "UNIT_NORM": yes, "BLOCK": 4096}, 8))
    for kernel, constants, warps in versions:
        signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constexprs=constants)
        options = {"num_warps": warps}
        assert compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
"""


@pytest.mark.slow
@pytest.mark.skipif(
    torch.version.hip is not None, reason="Triton for AMD cannot compile for NVIDIA"
)
def test_every_kernel_compiles_for_an_h200_without_one(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, kernels.__file__],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_totals_are_sums_of_entries(shape):
    mask, start, _ = entries(*shape)
    weight = normal(int(mask.sum()), seed=3)
    torch.testing.assert_close(
        kernels.totals(start, weight).cpu().double(), dense(mask, weight).sum(1)
    )


# ---- what is built on them


def random_sae(d_in=24, d_sae=60):
    return SAE(
        normal(d_in, d_sae),
        normal(d_sae, seed=1),
        normal(d_sae, d_in, seed=2),
        normal(d_in, seed=3),
        4 + normal(d_sae, seed=4).abs(),
    )


@pytest.mark.parametrize("search", [torch.float32, torch.bfloat16])
def test_screening_finds_what_is_active(search):
    policy = SparsePolicy(chunk=300, gpu_chunk=300, triton=True)  # several blocks
    sae, x = random_sae().to(DEVICE), normal(50, 24, seed=5)
    with torch.no_grad():
        pre = sae.preactivations(x)
        arguments = x, sae.W_enc, sae.b_enc, sae.threshold, search
        found = screen(*arguments, policy=policy)
        assert screen(*arguments, 0.001, policy) is None
    assert found.triton
    latent, token = (pre > sae.threshold).T.nonzero().unbind(-1)
    assert (
        len(found)
        and torch.equal(found.token.long(), token)
        and torch.equal(found.latent.long(), latent)
    )
    torch.testing.assert_close(found.pre, pre.T[latent, token])


@pytest.mark.parametrize("k", [None, 5])
def test_an_sae_gives_what_it_gives_without_kernels(k):
    sae, x = random_sae().to(DEVICE), normal(50, 24, seed=5)
    if k:
        sae.k, sae.threshold.data = k, torch.zeros_like(sae.threshold)
    with torch.no_grad():
        sae.policy = WITH_KERNELS
        acts, x_hat = sae.encode(x, sparse=True), sae(x)
        sae.policy = WITHOUT
        torch.testing.assert_close(acts.to_dense(), sae.encode(x))
        torch.testing.assert_close(x_hat, sae(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"encoder_dtype": "bfloat16"},
        {"ste_to_z": True, "kernel": "triangular"},
        {"sparsity_loss": "frequency"},
        {"architecture": "relu", "sparsity": 0.1},
        {"architecture": "gated", "sparsity": 0.1},
        {"betas": (0.9, 0.999)},
        {"architecture": "topk", "k": 4},
        {"architecture": "batchtopk", "k": 4},
    ],
)
def test_gradients_are_those_of_the_dense_reference(change, tmp_path):
    acts = activations_from_tensor(normal(300, 24).cpu() + 1, tmp_path)
    config = TrainConfig(
        **{"d_sae": 40, "steps": 20, "batch_size": 64, "threshold_init": 0.3, "sparsity": 0.01}
        | change
    )
    trainee = TrainState(acts, config, DEVICE).trainee
    x = acts.rows(64).to(DEVICE)
    x /= x.square().sum(-1).mean().sqrt()

    def gradients(policy):
        out = trainee(x, config.bandwidth, trainee.layout(x, config.bandwidth, policy))
        dead = torch.arange(40, device=DEVICE) % 3 == 0
        sum(trainee.loss(x, out, config.sparsity, config.bandwidth, dead).values()).backward()
        found = {name: parameter.grad.clone() for name, parameter in trainee.named_parameters()}
        trainee.zero_grad()
        return found, out

    expected, reference = gradients(WITHOUT)
    found, out = gradients(WITH_KERNELS)
    assert reference.layout is DENSE and out.layout is not DENSE and out.acts.any()
    torch.testing.assert_close(out.x_hat, reference.x_hat, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item(), msg=name
        )


@pytest.mark.slow
def test_a_run_learns_what_it_learns_without_kernels(tmp_path):
    acts = activations_from_tensor(normal(300, 24).cpu() + 1, tmp_path)
    config = TrainConfig(
        d_sae=40, steps=20, batch_size=64, threshold_init=0.3, sparsity=0.01, lr=1e-3
    )
    rows = []
    for policy in (WITH_KERNELS, WITHOUT):
        state, x = TrainState(acts, config, DEVICE, policy=policy), acts.rows(64).to(DEVICE)
        for _ in range(5):
            row = train_step(state, x / state.input_scale, log=True)
        rows.append(row)
    assert rows[1].pop("computed") == 1 > rows[0].pop("computed")
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-4)
