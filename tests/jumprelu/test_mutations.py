"""The estimators' checks fail on every estimator that is wrong in a way that someone could get it
wrong."""

from __future__ import annotations

import inspect
import types

import pytest
from test_estimators import CHECKS

from jumprelu import estimators

SOURCE = inspect.getsource(estimators)
WINDOW = "kernel((z - threshold).div_(bandwidth), kernel_name)\n        spike"
JUMP = f"{WINDOW}.mul_(threshold / bandwidth).mul_(gradient)"
STEP = f"{WINDOW}.div_(bandwidth).mul_(gradient)"
BACKWARD = "\n\n    @staticmethod\n    def backward(ctx, gradient):\n"
REFUSES = BACKWARD.replace("    def", "    @once_differentiable\n    def")
OFFSET = "(z - threshold)"
SCALED = "(z - threshold).div_(bandwidth)"
ACTIVATION = "(z * (z > threshold) - threshold)"

MUTATIONS = {
    "JumpReLU without the factor θ": (
        JUMP,
        JUMP.replace("threshold / bandwidth)", "1 / bandwidth)"),
    ),
    "JumpReLU with z in place of θ": (
        JUMP,
        JUMP.replace("threshold / bandwidth)", "z / bandwidth)"),
    ),
    "JumpReLU without 1/ε": (JUMP, JUMP.replace("threshold / bandwidth)", "threshold)")),
    "step without 1/ε": (STEP, STEP.replace(".div_(bandwidth).mul_", ".mul_")),
    "step with a factor θ": (
        STEP,
        STEP.replace(".mul_(gradient)", ".mul_(threshold).mul_(gradient)"),
    ),
    "JumpReLU's window around 0": (JUMP, JUMP.replace(OFFSET, "z.clone()")),
    "step's window around 0": (STEP, STEP.replace(OFFSET, "z.clone()")),
    "JumpReLU's window above θ": (JUMP, JUMP.replace(SCALED, f"{SCALED} - 0.5")),
    "step's window below θ": (STEP, STEP.replace(SCALED, f"{SCALED} + 0.5")),
    "JumpReLU's window on the activation": (JUMP, JUMP.replace(OFFSET, ACTIVATION)),
    "step's window on the activation": (STEP, STEP.replace(OFFSET, ACTIVATION)),
    "JumpReLU's window not scaled by ε": (JUMP, JUMP.replace(SCALED, OFFSET)),
    "step's window not scaled by ε": (STEP, STEP.replace(SCALED, OFFSET)),
    "JumpReLU ignores the upstream gradient": (
        JUMP,
        JUMP.replace("mul_(gradient)", "mul_(gradient.sign().abs())"),
    ),
    "step ignores the upstream gradient": (
        STEP,
        STEP.replace("mul_(gradient)", "mul_(gradient.sign().abs())"),
    ),
    "JumpReLU's sign": ("return to_z, -_sum_to(spike", "return to_z, _sum_to(spike"),
    "step's sign": ("None, -_sum_to(spike", "None, _sum_to(spike"),
    "z receives the step's gradient": ("spike if ste_to_z else None", "spike"),
    "z receives the jump's gradient": (
        "to_z.add_(spike) if ste_to_z else to_z",
        "to_z.add_(spike)",
    ),
    "JumpReLU can be differentiated twice": (f".mul_(z){REFUSES}", f".mul_(z){BACKWARD}"),
    "step can be differentiated twice": (
        f"return heaviside(z, threshold){REFUSES}",
        f"return heaviside(z, threshold){BACKWARD}",
    ),
    "z never receives the step's gradient": ("spike if ste_to_z else None", "None"),
    "z receives gradient where the latent is off": (
        "to_z = heaviside(z, threshold).mul_(gradient)",
        "to_z = gradient.clone()",
    ),
    "H(0) = 1": ("torch.gt(z, threshold", "torch.ge(z, threshold"),
    "JumpReLU subtracts θ": (
        "return heaviside(z, threshold).mul_(z)",
        "return heaviside(z, threshold).mul_(z - threshold)",
    ),
    "JumpReLU does not jump": ("return heaviside(z, threshold).mul_(z)", "return z.clamp_min(0)"),
    "step returns z": (
        "return heaviside(z, threshold)\n",
        "return heaviside(z, threshold).mul_(z)\n",
    ),
    "mean in place of sum over the batch": (
        "gradient.sum_to_size(shape)",
        "gradient.mean().expand(shape)",
    ),
    "rectangle of width 2": ("u.abs().lt_(0.5)", "u.abs().lt_(1)"),
    "rectangle not centred": ("u.abs().lt_(0.5)", "(u - 0.5).abs().lt_(0.5)"),
    "triangle of half the width": ("(1 - u.abs())", "(1 - 2 * u.abs())"),
    "parabola without ¾": ("0.75 * (1 - u * u)", "(1 - u * u)"),
    "bell without its normaliser": (" / math.sqrt(2 * math.pi)", ""),
}


def run_checks(source: str) -> None:
    """All checks on a module with this source."""
    module = types.ModuleType("mutated_estimators")
    exec(compile(source, "mutated_estimators.py", "exec"), module.__dict__)
    for check in CHECKS:
        check(module)


def test_the_source_itself_passes():
    run_checks(SOURCE)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name):
    old, new = MUTATIONS[name]
    assert SOURCE.count(old) == 1, (
        f"the source no longer has {old!r} once: write this mutation anew"
    )
    assert old != new
    with pytest.raises(AssertionError):  # a crash is not a catch: any other error fails this test
        run_checks(SOURCE.replace(old, new))
