"""Makes updates of the studio's demo, one for each line of its input, and prints their times, losses and memory.

A script, not a module: it also runs on other commits (``PYTHONPATH``).
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.functional import pad

from clora.heap import keep_freed_memory
from clora.studio import targets
from clora.studio.assets import ASSETS, load_studio
from clora.studio.demo_config import DEFAULT_EFFECTS, demo_config
from clora.studio.teacher_files import load_teachers
from clora.training.faults import LOSSES
from clora.training.student import train_student

EFFECTS = list(DEFAULT_EFFECTS)
STATUS = Path("/proc/self/status")


class Ended(Exception):
    """The input has ended."""


def main() -> None:
    """Reads the arguments, loads the studio and trains."""
    parser = argparse.ArgumentParser(prog="python -m bench.update_worker", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=["anchoring", "matching"])
    parser.add_argument("--rows", type=gradient_rows, help="train.gradient_rows: a number, or null for no bound")
    parser.add_argument("--peers", action="store_true", help="three copies of the model, one row a pass")
    parser.add_argument("--adamw", action="store_true", help="for the student too, as the peers have it")
    arguments = parser.parse_args()
    keep_freed_memory()
    adapter = load_studio(ASSETS, "cpu")
    loras = load_teachers(adapter, ASSETS, EFFECTS)
    config = demo_config(EFFECTS, 0)
    train = {"gradient_rows": arguments.rows, "updates": 10**6}
    train["anchor_share"] = float(arguments.kind == "anchoring")
    if arguments.adamw:
        train["optimizer"] = "adamw"
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    data = targets.training_data(adapter, EFFECTS, config, targets.load_targets(ASSETS))
    gc.collect()
    before = peak_mib(reset=True)
    clock = [time.process_time()]

    def report(update, values) -> None:
        seconds = time.process_time() - clock[0]
        losses = {name: values[name] for name in LOSSES[1:] if name in values}
        print(json.dumps({"seconds": seconds, "losses": losses, "peak_mib": peak_mib() - before}), flush=True)
        if not sys.stdin.readline():
            raise Ended
        clock[0] = time.process_time()

    try:
        if arguments.peers:
            from bench.step.peers import ThreeCopies

            ThreeCopies(world(config, adapter, loras, data)).fit(report)
        else:
            train_student(config, adapter, loras, data, report)
    except Ended:
        pass


def gradient_rows(text: str) -> int | None:
    """Reads a number of rows, or null."""
    if text != "null" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 or null, found {text!r}")
    return None if text == "null" else int(text)


def world(config, adapter, loras, data) -> SimpleNamespace:
    """Returns what the peers' trainer asks for. Their teachers have all layers of the blocks, of one rank."""
    from clora.lora.layers import block_layers, linear_shapes
    from clora.lora.state import LoRAModule, LoRAState

    transformer = adapter.pipeline.transformer
    shapes = linear_shapes(transformer)
    rank = max(lora.max_rank for lora in loras.values())
    padded = {}
    for name, lora in loras.items():
        modules = {}
        for layer in block_layers(transformer):
            outputs, inputs = shapes[layer]
            own = lora.modules.get(layer) or LoRAModule(torch.zeros(1, inputs), torch.zeros(outputs, 1))
            missing = rank - len(own.lora_A)
            modules[layer] = LoRAModule(pad(own.lora_A, (0, 0, 0, missing)), pad(own.lora_B, (0, missing)))
        padded[name] = LoRAState(modules)
    copies = iter([adapter])
    return SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        effects=tuple(loras),
        case=SimpleNamespace(samples=config.train.batch_size),
        adapter=lambda: next(copies, None) or load_studio(ASSETS, "cpu"),
        teachers=lambda transformer: padded,
        data=lambda adapter: data,
    )


def peak_mib(reset: bool = False) -> float:
    """Returns the most memory that this process has had, on Linux; since the last reset, which keeps today's."""
    if not STATUS.exists():
        return 0.0
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
