"""How the threads of torch wait for each other. Imports no torch, for it must come before torch."""

import os
import sys

PASSIVE_WAITING: dict[str, str] = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
"""Environment variables with which waiting threads sleep. Give them to every child process.

By default OpenMP's threads spin while they wait, which takes the cores away from the threads that
are waited for as soon as anything else runs: beside one busy process a training step on 2 cores
then takes some ten times as long as with these (notebook 10 has the measurement).
"""


def wait_passively() -> None:
    """Set `PASSIVE_WAITING` in this process, unless torch is loaded (OpenMP reads the variables
    once, then) or the user has set one of the variables that say how OpenMP's threads wait."""
    set_by_user = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys()
    if "torch" not in sys.modules and not set_by_user:
        os.environ.update(PASSIVE_WAITING)
