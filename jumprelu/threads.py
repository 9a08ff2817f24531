"""How the threads of torch wait for each other. Imports no torch, for it must come before torch."""

import os
import sys

PASSIVE_WAITING: dict[str, str] = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""Environment variables of child processes: threads that wait spin for some microseconds and then
sleep. OpenMP's own spin for long, and take the cores away from the threads that are waited for as
soon as anything else runs: a step then takes more than twice as long (notebook 10).
"""


def wait_passively() -> None:
    """Set `PASSIVE_WAITING` in this process, unless torch is loaded (OpenMP reads the variables
    once, then) or the user has set one of the variables that say how OpenMP's threads wait."""
    set_by_user = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys()
    if "torch" not in sys.modules and not set_by_user:
        os.environ.update(PASSIVE_WAITING)
