"""The estimators' checks fail on every estimator that is wrong in a way that someone could get it wrong."""

from __future__ import annotations

import inspect
import types

import pytest
from test_estimators import CHECKS

from jumprelu import estimators

SOURCE = inspect.getsource(estimators)
JUMP = "(threshold / bandwidth * kernel((z - threshold) / bandwidth, kernel_name))"
STEP = "(kernel((z - threshold) / bandwidth, kernel_name) / bandwidth)"

MUTATIONS = {
    "JumpReLU without the factor θ": (JUMP, JUMP.replace("threshold / bandwidth * kernel", "1 / bandwidth * kernel")),
    "JumpReLU with z in place of θ": (JUMP, JUMP.replace("threshold / bandwidth * kernel", "z / bandwidth * kernel")),
    "JumpReLU without 1/ε": (JUMP, JUMP.replace("threshold / bandwidth * kernel", "threshold * kernel")),
    "step without 1/ε": (STEP, STEP.replace(" / bandwidth)", ")")[:-1] + ")"),
    "step with a factor θ": (STEP, STEP.replace("/ bandwidth)", "/ bandwidth * threshold)")),
    "JumpReLU's window around 0": (JUMP, JUMP.replace("(z - threshold)", "z")),
    "step's window around 0": (STEP, STEP.replace("(z - threshold)", "z")),
    "JumpReLU's window above θ": (JUMP, JUMP.replace("(z - threshold) / bandwidth", "(z - threshold) / bandwidth - 0.5")),
    "step's window below θ": (STEP, STEP.replace("(z - threshold) / bandwidth", "(z - threshold) / bandwidth + 0.5")),
    "JumpReLU's window on the activation": (JUMP, JUMP.replace("(z - threshold)", "(z * (z > threshold) - threshold)")),
    "step's window on the activation": (STEP, STEP.replace("(z - threshold)", "(z * (z > threshold) - threshold)")),
    "JumpReLU's window not scaled by ε": (JUMP, JUMP.replace("(z - threshold) / bandwidth", "(z - threshold)")),
    "step's window not scaled by ε": (STEP, STEP.replace("(z - threshold) / bandwidth", "(z - threshold)")),
    "JumpReLU ignores the upstream gradient": (f"gradient * {JUMP}", f"gradient.sign().abs() * {JUMP}"),
    "step ignores the upstream gradient": (f"gradient * {STEP}", f"gradient.sign().abs() * {STEP}"),
    "JumpReLU's sign": ("to_z, _sum_to(-spike", "to_z, _sum_to(spike"),
    "step's sign": ("None, _sum_to(-spike", "None, _sum_to(spike"),
    "z receives the step's gradient": ("spike if ste_to_z else None", "spike"),
    "z receives the jump's gradient": ("to_z + spike if ste_to_z else to_z", "to_z + spike"),
    "z never receives the step's gradient": ("spike if ste_to_z else None", "None"),
    "z receives gradient where the latent is off": ("to_z = gradient * (z > threshold)", "to_z = gradient"),
    "JumpReLU with H(0) = 1": ("return z * (z > threshold)", "return z * (z >= threshold)"),
    "step with H(0) = 1": ("return (z > threshold).to(z.dtype)", "return (z >= threshold).to(z.dtype)"),
    "JumpReLU subtracts θ": ("return z * (z > threshold)", "return (z - threshold) * (z > threshold)"),
    "mean in place of sum over the batch": ("gradient.sum_to_size(shape)", "gradient.mean().expand(shape)"),
    "rectangle of width 2": ("(u > -0.5) & (u < 0.5)", "(u > -1) & (u < 1)"),
    "rectangle not centred": ("(u > -0.5) & (u < 0.5)", "(u > 0) & (u < 1)"),
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
    assert SOURCE.count(old) == 1, f"the source no longer has {old!r} once: write this mutation anew"
    assert old != new
    with pytest.raises(AssertionError):  # a crash is not a catch: any other error fails this test
        run_checks(SOURCE.replace(old, new))
