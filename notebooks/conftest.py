"""Rules for `pytest --nbval notebooks`: kernels as in `make reproduce`, so that the same cells give
the same output."""

from __future__ import annotations

import os
import tempfile

from companion.rails.reproduce import kernel_environment


def pytest_configure(config):
    """Caches are shared with `make reproduce`; figures are written elsewhere, not over the
    committed ones."""
    folder = tempfile.TemporaryDirectory(prefix="jumprelu-figures-")
    config.add_cleanup(folder.cleanup)
    for name, value in (kernel_environment() | {"JUMPRELU_FIGURES": folder.name}).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def pytest_collectstart(collector):
    """Warnings and logs are not results."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr",)
