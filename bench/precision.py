"""The error of the low-rank part in each design, for adapters from as strong as the base to a thousandth of it.

`python -m bench.precision` prints the table behind the rule of `csrc_triton/multi_lora/designs.py`, in about three minutes on a
CPU. The error of a layer's output hides it: of a weak adapter nothing may be left while the output looks right. So the change
that the adapter makes is read off the outputs of many tokens, by least squares, and compared with ``B A``. Errors that
differ from token to token average out in this, those that a layer makes for every token alike remain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import machine, records
from bench.arguments import RESULTS, Parser, run, whole

WIDTH, RANK = 256, 16
STRENGTHS = (1.0, 0.1, 0.03, 0.01, 0.001)
CALLS = 64
"""Calls over which stochastic rounding is averaged."""
TOKENS = 1 << 18
CHUNK = 1 << 14
Layer = Callable[[Tensor], Tensor]


def layers(
    weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor, generator: torch.Generator
) -> dict[str, Layer]:
    """Returns the designs as functions of x ``[M, K]``; on a GPU *split* and *fused* are kernels, here their arithmetic.

    "base first" adds the low-rank part to a base that was rounded, as PEFT's layers do.
    """
    dtype = weight.dtype
    exact = weight.float() + lora_B.float() @ lora_A.float()
    merged = torch.addmm(weight, lora_B, lora_A)
    once = stochastic(exact, dtype, generator)
    # The mean over calls is the layer of the mean weight.
    mean = torch.stack([stochastic(exact, dtype, generator).float() for _ in range(CALLS)]).mean(0)

    def split(x: Tensor) -> Tensor:
        return torch.addmm(torch.addmm(bias, x @ lora_A.T, lora_B.T), x, weight.T)

    def base_first(x: Tensor) -> Tensor:
        return torch.addmm(bias, x, weight.T).addmm_(x @ lora_A.T, lora_B.T)

    def fused(x: Tensor) -> Tensor:
        low = x @ lora_A.T
        return (x.float() @ weight.float().T + low.float() @ lora_B.float().T + bias.float()).to(dtype)

    return {
        "fused": fused,
        "split": split,
        "base first": base_first,
        "merged": lambda x: torch.addmm(bias, x, merged.T),
        "merged, rounded stochastically": lambda x: torch.addmm(bias, x, once.T),
        f"the same, mean of {CALLS} calls": lambda x: (x.float() @ mean.T + bias.float()).to(dtype),
    }


def stochastic(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rounds fp32 up or down to a neighbour in ``dtype``, so that the mean is the value."""
    down = value.to(dtype)
    away = down.float() > value
    down = torch.where(away, torch.nextafter(down, torch.full_like(down, -torch.inf)), down)
    up = torch.nextafter(down, torch.full_like(down, torch.inf))
    share = (value - down.float()) / (up.float() - down.float())
    return torch.where(torch.rand(value.shape, generator=generator) < share, up, down)


def errors(strength: float, dtype: torch.dtype, tokens: int = TOKENS, seed: int = 0) -> dict[str, float]:
    """Returns each design's relative error of the low-rank part, ``|found - B A| / |B A|``, Frobenius norms.

    Args:
        strength: ``|B A| / |W|``.
        dtype: of weight, factors and input.
        tokens: rows of x, at least `WIDTH`, without which the change is not determined.
        seed: of everything random.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)
    bias = (0.1 * torch.randn(WIDTH, generator=generator)).to(dtype)
    lora_A = (torch.randn(RANK, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)
    lora_B = torch.randn(WIDTH, RANK, generator=generator)
    lora_B = (lora_B * (strength * weight.float().norm() / (lora_B @ lora_A.float()).norm())).to(dtype)
    delta = lora_B.double() @ lora_A.double()
    designs = layers(weight, bias, lora_A, lora_B, generator)
    gram = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    products = {name: torch.zeros(WIDTH, WIDTH, dtype=torch.float64) for name in designs}
    for done in range(0, tokens, CHUNK):
        x = torch.randn(min(CHUNK, tokens - done), WIDTH, generator=generator).to(dtype)
        gram += x.double().T @ x.double()
        for name, layer in designs.items():
            error = layer(x).double() - bias.double() - x.double() @ (weight.double() + delta).T
            products[name] += error.T @ x.double()
    # The least-squares change of the layer beyond W + B A.
    return {
        name: float(torch.linalg.solve(gram, product.T).norm() / delta.norm()) for name, product in products.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures all strengths in bfloat16 and float16, prints the table and writes it."""
    parser = Parser("bench.precision", main.__doc__)
    parser.add_argument(
        "--tokens", type=whole(WIDTH, 10**9), default=TOKENS, help="rows of the input (default: %(default)s)"
    )
    parser.add_out(RESULTS / "cpu")
    arguments = parser.parse_args(argv)
    out = parser.out(arguments, "tokens")
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        print(f"\n{dtype}: error of the low-rank part, for a delta of this share of the base")
        for strength in STRENGTHS:
            row = errors(strength, dtype, arguments.tokens)
            found.append({"dtype": str(dtype).removeprefix("torch."), "strength": strength, "errors": row})
            if strength == STRENGTHS[0]:
                print("share of the base | " + " | ".join(row))
            print(f"{100 * strength:g} % | " + " | ".join(f"{error:.2g}" for error in row.values()), flush=True)
    sizes = {"width": WIDTH, "rank": RANK, "tokens": arguments.tokens}
    records.write(out / "precision.json", machine.describe_host() | sizes | {"found": found})
    return 0


if __name__ == "__main__":
    run(main)
