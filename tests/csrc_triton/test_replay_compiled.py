"""Replayed launches of compiled kernels, past Triton's JIT: the launcher gets what the JIT gives it. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CALLS = [f"{design} {name}" for design in ("fused", "split") for name in ("one layer", "q, k, v", "gradients")]


@pytest.fixture(scope="module")
def launched(triton_cache):
    """What the launcher got, by call: of the JIT, then of the replay. This file is run as a script."""
    pytest.importorskip("triton")
    if torch.version.hip:
        pytest.skip("only for NVIDIA GPUs")
    folder = {"TRITON_CACHE_DIR": str(triton_cache)}
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, __file__], env=inherited | folder, capture_output=True, text=True, timeout=600
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


@pytest.mark.parametrize("call", [*CALLS, "add"])
def test_the_launcher_gets_what_the_jit_gives_it(launched, call):
    ways, (jit, recorded, tape) = zip(*launched[call], strict=True)
    assert ways == ("tensors", "tensors", "pointers")
    assert tape == recorded == jit
    assert any("lora_A" in launch or "trained lora_A" in launch for launch in tape)


def calls():
    """The ops' calls by name, and the names of their tensors by address."""
    from clora import ops

    x, weight, bias = torch.randn(3, 4, 64), torch.randn(64, 64), torch.randn(64)
    a, b, scale, ids = torch.randn(2, 16, 64), torch.randn(2, 64, 16), torch.ones(2), torch.tensor([1, -1, 0])
    trained = [factor.clone().requires_grad_() for factor in (x, a, b)]
    named = {"x": x, "weight": weight, "bias": bias, "lora_A": a, "lora_B": b, "scale": scale, "ids": ids}
    named |= dict(zip(("trained x", "trained lora_A", "trained lora_B"), trained, strict=True))
    layer, others = (weight, bias, a, b), [(torch.randn(64, 64), None, torch.randn(2, 16, 64), b.clone()) for _ in "kv"]

    def gradients(design):
        y = ops.multi_lora_linear(trained[0], weight, bias, *trained[1:], scale, ids, design=design)
        torch.autograd.grad(y, trained, torch.ones(3, 4, 64))

    found = {"add": lambda: ops.multi_lora_add(x, x, a, b, scale, ids)}
    for design in ("fused", "split"):
        found[f"{design} one layer"] = lambda d=design: ops.multi_lora_linear(x, *layer, scale, ids, design=d)
        found[f"{design} q, k, v"] = lambda d=design: ops.multi_lora_linears(x, [layer, *others], scale, ids, design=d)
        found[f"{design} gradients"] = lambda d=design: gradients(d)
    return found, {tensor.data_ptr(): name for name, tensor in named.items()}


def launches():
    """Of each call, how the launcher got its tensors, and everything that it got: by the JIT, while recorded, replayed."""
    import triton

    from bench import host
    from csrc_triton import replay

    seen = []

    class Driver(host.StubDriver):
        @staticmethod
        def _launch(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
            seen.append([x, y, z, stream, id(function), *arguments])

        def get_current_stream(self, device):
            return 7

    def readable(value):
        if isinstance(value, torch.Tensor):
            value = value.data_ptr()
        return names.get(value, "memory") if isinstance(value, int) and value > 1 << 32 else value

    host.pretend_gpu()
    triton.runtime.driver.set_active(Driver())
    found, names = calls()
    results = {}
    for name, call in found.items():
        results[name] = []
        for replay.enabled in (False, True, True):
            seen.clear()
            call()
            kernels = [launch[4] for launch in seen]
            way = (
                "tensors" if any(isinstance(value, torch.Tensor) for launch in seen for value in launch) else "pointers"
            )
            read = [[kernels.index(launch[4]), *map(readable, launch[:4] + launch[5:])] for launch in seen]
            results[name].append((way, read))
    return results


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(launches()))
