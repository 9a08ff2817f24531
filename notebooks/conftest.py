"""Rules for `pytest --nbval notebooks`: kernels as in `make reproduce`, so that the same cells give
the same output."""

from __future__ import annotations

import tempfile

from companion.rails.environment import kernel_environment, set_variables


def pytest_configure(config):
    """Caches are shared with `make reproduce`; figures are written elsewhere, not over the
    committed ones."""
    folder = tempfile.TemporaryDirectory(prefix="jumprelu-figures-")
    config.add_cleanup(folder.cleanup)
    set_variables(kernel_environment() | {"JUMPRELU_FIGURES": folder.name})


def pytest_collectstart(collector):
    """Warnings and logs are not results."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
