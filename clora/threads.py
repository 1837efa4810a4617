"""Limits how long torch's threads on the CPU spin for each other before they sleep."""

from __future__ import annotations

import os
import sys

# libgomp's default is 300000: milliseconds, on a core that another process may need. Lower counts gain more beside a busy
# process on some machines, but at 1000 an idle machine loses a tenth of its updates.
SPINS = "10000"


def limit_spinning() -> None:
    """Limits the spinning of libgomp, the OpenMP of torch on Linux, unless the user has set how threads wait.

    Two threads that spin for each other beside any busy process waste most of their time. libgomp reads the variable
    when it is loaded, so this has no effect after ``import torch``.
    """
    if sys.platform == "linux" and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
