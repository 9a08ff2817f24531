"""Passive waiting is set in time, and only where nobody has said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from jumprelu.threads import PASSIVE_WAITING

NAMES = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}


@pytest.mark.parametrize(
    ("first", "user", "expected"),
    [
        ("", {}, PASSIVE_WAITING),
        ("", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("", {"KMP_BLOCKTIME": "1"}, {"KMP_BLOCKTIME": "1"}),
        ("import torch", {}, {}),
    ],
)
def test_at_import(first, user, expected):
    code = f"import os; {first or 'pass'}\nimport jumprelu\n"
    code += f"print(sorted((n, os.environ[n]) for n in {NAMES!r} if n in os.environ))"
    env = {name: value for name, value in os.environ.items() if name not in NAMES} | user
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.stdout.strip() == repr(sorted(expected.items())), result.stderr
