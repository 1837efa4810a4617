"""One call of a design between the profiler's marks: `ncu --profile-from-start off python -m bench.profiled fused`."""

from __future__ import annotations

import sys

import torch

from bench import designs
from bench.cases import DesignCase

CASE = DesignCase(mode="forward", in_features=3072, out_features=3072, samples=2, tokens=4096, adapters=1, rank=64)


def main(design: str, case: DesignCase = CASE, device: str = "cuda") -> int:
    """Calls the design three times, so that it is compiled and chosen, and once to be profiled."""
    call = designs.providers(case)[f"ours_{design}"](designs.make_inputs(case, torch.device(device)))
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
