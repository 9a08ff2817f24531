"""The estimators against closed forms and formulae written again from the paper.

Every check takes the module it checks, so that `test_mutations.py` can run the same checks on
broken copies.
"""

from __future__ import annotations

import math

import pytest
import torch

from jumprelu import estimators as real

BANDWIDTHS = (0.03, 0.4, 2.5)
SD = {
    "rectangle": math.sqrt(1 / 12),
    "triangular": math.sqrt(1 / 6),
    "gaussian": 1.0,
    "epanechnikov": math.sqrt(1 / 5),
}


def reference_kernel(u: float, name: str) -> float:
    if name == "gaussian":
        return math.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    inside = abs(u) < (0.5 if name == "rectangle" else 1)
    return {"rectangle": 1.0, "triangular": 1 - abs(u), "epanechnikov": 0.75 * (1 - u * u)}[
        name
    ] * inside


def threshold_gradients(function, z: torch.Tensor, theta: float, *args, **kwargs) -> torch.Tensor:
    """The pseudo-derivative at every z, each with a threshold of its own."""
    threshold = torch.full_like(z, theta, requires_grad=True)
    return torch.autograd.grad(function(z, threshold, *args, **kwargs).sum(), threshold)[0]


def grid(
    theta: float, bandwidth: float, name: str, points: int = 8_001
) -> tuple[torch.Tensor, float]:
    reach = (9 if name == "gaussian" else 1.2) * bandwidth
    return torch.linspace(theta - reach, theta + reach, points, dtype=torch.float64), 2 * reach / (
        points - 1
    )


def check_forward(e):
    z = torch.tensor([-1.0, 0.0, 0.49, 0.5, 0.51, 2.0], dtype=torch.float64)
    assert e.jump_relu(z, 0.5, 0.1).tolist() == [
        0,
        0,
        0,
        0,
        0.51,
        2.0,
    ]  # at z = θ the latent is off
    assert e.step(z, 0.5, 0.1).tolist() == [0, 0, 0, 0, 1, 1]


def check_kernels(e):
    for name in e.KERNELS:
        u = torch.linspace(-9, 9, 36_001, dtype=torch.float64)
        k, du = e.kernel(u, name), 18 / 36_000
        assert (k >= 0).all() and torch.equal(k, k.flip(0)), name
        assert math.isclose(k.sum().item() * du, 1, rel_tol=1e-3), name
        assert math.isclose((u * u * k).sum().item() * du, SD[name] ** 2, rel_tol=3e-3), name
        points = torch.tensor([-1.2, -0.7, -0.2, 0.0, 0.4, 0.8, 2.0], dtype=torch.float64)
        expected = [reference_kernel(v, name) for v in points.tolist()]
        assert torch.allclose(
            e.kernel(points, name), torch.tensor(expected, dtype=torch.float64)
        ), name


def check_pseudo_derivative_moments(e):
    """Over z, −ð/ðθ is a density around θ: mass 1 (times θ for JumpReLU), mean θ, standard
    deviation ε·sd(K)."""
    for name in e.KERNELS:
        for bandwidth in BANDWIDTHS:
            for theta in (0.3, 1.7):
                z, dz = grid(theta, bandwidth, name)
                for function, mass in ((e.jump_relu, theta), (e.step, 1.0)):
                    density = -threshold_gradients(function, z, theta, bandwidth, name)
                    case = f"{function.__name__}, {name}, bandwidth {bandwidth}, threshold {theta}"
                    assert math.isclose(density.sum().item() * dz, mass, rel_tol=2e-3), case
                    assert (
                        abs((density * (z - theta)).sum().item() * dz) < 1e-3 * mass * bandwidth
                    ), case
                    variance = (density * (z - theta) ** 2).sum().item() * dz / mass
                    assert math.isclose(variance, (bandwidth * SD[name]) ** 2, rel_tol=2e-3), case


def check_against_formula(e):
    """Batch gradients with upstream gradients, against the paper's formula in plain Python."""
    generator = torch.Generator().manual_seed(0)
    z, upstream = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    theta = [0.2, 0.5, 0.9]
    for name in e.KERNELS:
        for bandwidth in (0.4, 2.5):
            for function, power in ((e.jump_relu, 1), (e.step, 0)):
                threshold = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
                (function(z, threshold, bandwidth, name) * upstream).sum().backward()
                expected = [
                    -sum(
                        g * t**power / bandwidth * reference_kernel((v - t) / bandwidth, name)
                        for v, g in zip(z[:, i].tolist(), upstream[:, i].tolist(), strict=True)
                    )
                    for i, t in enumerate(theta)
                ]
                assert threshold.grad.shape == (3,)
                assert torch.allclose(
                    threshold.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-12
                ), (name, bandwidth)


def check_expected_loss(e):
    """The mean pseudo-gradient of ‖x − x̂‖² + λ·L0 is the derivative of the mean loss, as the
    window narrows.

    One latent, normal pre-activations on a fine grid instead of samples, x̂ = d·f: the mean loss is
    differentiated numerically, with a step that is wide against the grid and narrow against the
    density.
    """
    z, dz = torch.linspace(-5, 5, 100_001, dtype=torch.float64), 10 / 100_000
    weight = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * dz
    x, d, lam, theta, h = 1.3 * z + 0.2, 0.8, 0.4, 0.7, 0.02

    def mean_loss(threshold, bandwidth=1.0, name="rectangle"):
        f = e.jump_relu(z, threshold, bandwidth, name)
        return (((x - d * f) ** 2 + lam * e.step(z, threshold, bandwidth, name)) * weight).sum()

    derivative = (mean_loss(theta + h) - mean_loss(theta - h)).item() / (2 * h)
    exact = (
        (2 * theta * d * (1.3 * theta + 0.2) - theta**2 * d**2 - lam)
        * math.exp(-(theta**2) / 2)
        / math.sqrt(2 * math.pi)
    )
    assert math.isclose(derivative, exact, rel_tol=0.01)
    for name in e.KERNELS:
        threshold = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        mean_loss(threshold, 0.005 / SD[name], name).backward()
        assert math.isclose(threshold.grad.item(), derivative, rel_tol=0.02), name


def check_gradient_to_z(e):
    """JumpReLU passes the mask to z; the step passes nothing, so L0 trains thresholds only."""
    z = torch.linspace(-1, 2, 301, dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(1, 3, 301, dtype=torch.float64)
    to_z = torch.autograd.grad((e.jump_relu(z, threshold, 0.7) * upstream).sum(), z)[0]
    assert torch.equal(to_z, upstream * (z > 0.5))
    steps = e.step(z, threshold, 0.7).sum()
    to_z = torch.autograd.grad(steps, z, allow_unused=True, materialize_grads=True)[0]
    assert torch.equal(to_z, torch.zeros_like(z))


def check_ste_to_z(e):
    """The ablation: z receives minus the threshold's pseudo-gradient, on top of the mask."""
    z = torch.linspace(-1, 2, 301, dtype=torch.float64, requires_grad=True)
    for function, mask in ((e.jump_relu, (z > 0.5).double()), (e.step, torch.zeros_like(z))):
        threshold = torch.full_like(z, 0.5, requires_grad=True)
        out = function(z, threshold, 0.7, "triangular", ste_to_z=True).sum()
        to_z, to_threshold = torch.autograd.grad(
            out, [z, threshold], allow_unused=True, materialize_grads=True
        )
        assert torch.allclose(to_z, mask - to_threshold, rtol=1e-12)


def check_shapes(e):
    z = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    for shape in ((), (3,), (1, 3), (5, 1), (4, 5, 3)):
        threshold = torch.full(shape, 0.2, requires_grad=True)
        for function in (e.jump_relu, e.step):
            out = function(z, threshold, 0.5)
            assert out.shape == z.shape and out.dtype == z.dtype
            full = torch.full((4, 5, 3), 0.2, requires_grad=True)
            got, whole = (
                torch.autograd.grad(out.sum(), threshold)[0],
                torch.autograd.grad(function(z, full, 0.5).sum(), full)[0],
            )
            assert got.shape == shape
            assert torch.allclose(got, whole.sum_to_size(shape), rtol=1e-5)


def check_no_second_derivative(e):
    """A pseudo-derivative is not the derivative of anything: to differentiate it is an error."""
    for function in (e.jump_relu, e.step):
        z = torch.linspace(0, 1, 50, dtype=torch.float64, requires_grad=True)
        threshold = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        out = (function(z, threshold, 0.7, "triangular") * z).sum()
        try:
            once = torch.autograd.grad(out, threshold, create_graph=True)[0]
            once.backward()
        except RuntimeError as error:
            assert "differentiate twice" in str(error), error
        else:
            raise AssertionError(f"{function.__name__} was differentiated twice")


CHECKS = (
    check_forward,
    check_gradient_to_z,
    check_ste_to_z,
    check_shapes,
    check_kernels,
    check_against_formula,
    check_pseudo_derivative_moments,
    check_expected_loss,
    check_no_second_derivative,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_estimators(check):
    check(real)


def test_z_gradient_is_the_true_derivative_away_from_the_threshold():
    z = torch.tensor([-1.0, -0.2, 0.4, 0.6, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: real.jump_relu(v, 0.5, 0.1), z, eps=1e-6)


def test_plain_number_as_threshold_takes_no_gradient():
    z = torch.randn(7, generator=torch.Generator().manual_seed(2), requires_grad=True)
    (real.jump_relu(z, 0.1, 0.5) + real.step(z, 0.1, 0.5)).sum().backward()
    assert torch.equal(z.grad, (z > 0.1).float())


def test_heaviside_is_ones_and_zeros_of_the_type_of_z():
    z = torch.tensor([[-1.0, 0.5, 2.0], [0.4, -0.0, 0.5]], requires_grad=True)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        out = real.heaviside(z.to(dtype), torch.tensor([0.0, 0.0, 0.5]))
        assert (
            torch.equal(out, torch.tensor([[0.0, 1, 1], [1, 0, 0]], dtype=dtype))
            and not out.requires_grad
        )


@pytest.mark.parametrize("function", [real.jump_relu, real.step])
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(3), 0.0), "bandwidth must be above 0, got 0.0"),
        ((torch.zeros(3), -1.0), "bandwidth must be above 0"),
        ((torch.zeros(3), float("nan")), "bandwidth must be above 0"),
        ((torch.zeros(3), 0.1, "square"), "unknown kernel 'square': expected one of rectangle"),
        ((torch.zeros(4), 0.1), "threshold of shape \\(4,\\) does not fit"),
        ((torch.zeros(2, 5, 3), 0.1), "expected \\[d_sae\\]"),
    ],
)
def test_bad_arguments_say_what_was_expected(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(5, 3), *arguments)


def test_unknown_kernel():
    with pytest.raises(ValueError, match="unknown kernel 'box'"):
        real.kernel(torch.zeros(1), "box")
