"""One call of a design between the profiler's marks: `ncu --profile-from-start off python -m bench.profiled fused`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bench import designs
from bench.arguments import Parser, require_gpu, run
from bench.cases import DesignCase
from csrc_triton.multi_lora.designs import DESIGNS

CASE = DesignCase(mode="forward", in_features=3072, out_features=3072, samples=2, tokens=4096, adapters=1, rank=64)


def main(argv: Sequence[str] | None = None, case: DesignCase = CASE, device: str = "cuda") -> int:
    """Calls the design three times, so that it is compiled and chosen, and once to be profiled."""
    parser = Parser("bench.profiled", __doc__.splitlines()[0])
    parser.add_argument("design", choices=DESIGNS)
    design = parser.parse_args(argv).design
    require_gpu(torch.device(device))
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
    run(main)
