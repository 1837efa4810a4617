"""A stream of requests for pictures, each with its own LoRA: mixed batches against switching and merging.

`python -m bench.serving`: the studio's pipeline, four steps, 1, 8 and 50 LoRAs. The server is simulated, its work is not: a
batch is computed and timed, and the server's clock goes on by that time. While no request waits it jumps to the next one.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import clora
from bench import machine, records
from bench.arguments import RESULTS, Parser, default_device, device_here, duration, new_folder, run, whole
from bench.step.worker import Clock
from bench.timing import UNFINISHED, countdown
from clora.data.generation import Generator
from clora.lora.state import LoRAState
from clora.models.conditioning import Conditioning
from clora.progress import say
from clora.studio import assets
from clora.studio.effects import EFFECTS
from clora.studio.evaluation import held_out_sources
from clora.studio.pixels import to_tensor
from clora.studio.scenes import SIZE
from clora.studio.teacher_files import load_teachers
from clora.studio.teachers import TEACHERS

ADAPTERS = (1, 8, 50)
REQUESTS = 200
MAX_BATCH = 8
STEPS = 4
SHIFT = 3.0
LOAD = 0.5
"""Rate of the Poisson stream, as a share of the pictures that the pipeline makes without LoRAs in full batches."""
ARRIVALS = ("at once", "poisson")
HALF_GREY = 1 / 255
"""Largest difference of a picture in [-1, 1]: half a grey level of 256."""
SEED = 0
A_DAY = 86400.0


class Request(NamedTuple):
    """A picture that is asked for: when, in which LoRA, and the seed of its noise, which also picks its source."""

    arrival: float
    lora: str
    seed: int


def stream(names: Sequence[str], count: int, rate: float | None) -> list[Request]:
    """Draws requests whose LoRAs are all equally likely: a Poisson stream of this rate per second, or all at once."""
    rng = np.random.default_rng(SEED)
    loras = rng.integers(len(names), size=count)
    arrivals = np.zeros(count) if rate is None else rng.exponential(1 / rate, size=count).cumsum()
    return [Request(float(arrivals[i]), names[loras[i]], i) for i in range(count)]


class Studio:
    """The studio's pipeline, its LoRAs, and the encoded prompts and pictures to edit, encoded before any time counts."""

    def __init__(self, device: torch.device, num_loras: int):
        self.adapter = assets.load_studio(assets.ASSETS, device)
        self.effects = {f"lora_{i}": TEACHERS[i % len(TEACHERS)] for i in range(num_loras)}
        teachers = load_teachers(self.adapter, assets.ASSETS, set(self.effects.values()))
        self.loras = {name: teachers[effect] for name, effect in self.effects.items()}
        prompts = [EFFECTS[effect].prompt for effect in TEACHERS]
        self.text = self.adapter.encode_prompts(prompts)
        self.sources = self.adapter.encode_images(to_tensor(held_out_sources(MAX_BATCH, SIZE)))
        self.generator = Generator(self.adapter)

    def render(self, requests: Sequence[Request]) -> Tensor:
        """Returns the pictures ``[N, 3, H, W]`` of a batch, by whatever the transformer carries."""
        seeds = [request.seed for request in requests]
        prompts = torch.tensor([TEACHERS.index(self.effects[request.lora]) for request in requests])
        sources = self.sources[torch.tensor(seeds) % len(self.sources)]
        conditioning = Conditioning(self.text[prompts], sources)
        ids = torch.zeros(len(seeds), dtype=torch.int64)
        return self.adapter.decode(self.generator.few_step(ids, conditioning, seeds, STEPS, SHIFT))


class Way(ABC):
    """A way to serve requests, on a pipeline of its own."""

    def __init__(self, studio: Studio):
        self.studio = studio

    @abstractmethod
    def pick(self, waiting: Sequence[Request]) -> list[Request]:
        """Chooses the next batch from the requests that wait, in the order of their arrival."""

    @abstractmethod
    def render(self, batch: Sequence[Request]) -> Tensor:
        """Returns the pictures of a batch that `pick` chose."""


class Mixed(Way):
    """`clora.attach`: a batch takes whatever waits."""

    def __init__(self, studio: Studio):
        super().__init__(studio)
        self.bank = clora.attach(studio.adapter.pipeline, studio.loras)

    def pick(self, waiting: Sequence[Request]) -> list[Request]:
        return list(waiting[:MAX_BATCH])

    def render(self, batch: Sequence[Request]) -> Tensor:
        with self.bank.route([request.lora for request in batch]):
            return self.studio.render(batch)


class Switched(Way):
    """diffusers' `set_adapters`: a batch takes the oldest request and all others of its LoRA."""

    def __init__(self, studio: Studio):
        super().__init__(studio)
        self.pipe = studio.adapter.pipeline
        for name, state in studio.loras.items():
            self.pipe.load_lora_weights(diffusers_file(state), adapter_name=name)
        self.active: str | None = None

    def pick(self, waiting: Sequence[Request]) -> list[Request]:
        return list(islice((request for request in waiting if request.lora == waiting[0].lora), MAX_BATCH))

    def render(self, batch: Sequence[Request]) -> Tensor:
        if batch[0].lora != self.active:
            self.active = batch[0].lora
            self.pipe.set_adapters(self.active)
        return self.studio.render(batch)


class MergedBatches(Switched):
    """diffusers' `fuse_lora` before, `unfuse_lora` after such a batch."""

    def render(self, batch: Sequence[Request]) -> Tensor:
        # Layers that this LoRA does not change are not merged, and would add the LoRA that is set.
        self.pipe.set_adapters(batch[0].lora)
        self.pipe.fuse_lora(components=["transformer"], adapter_names=[batch[0].lora])
        try:
            return self.studio.render(batch)
        finally:
            self.pipe.unfuse_lora(components=["transformer"])


class MergedRequests(MergedBatches):
    """The same for each request."""

    def pick(self, waiting: Sequence[Request]) -> list[Request]:
        return [waiting[0]]


WAYS: Mapping[str, Callable[[Studio], Way]] = {
    "attach": Mixed,
    "set_adapters": Switched,
    "fuse_lora per batch": MergedBatches,
    "fuse_lora per request": MergedRequests,
}


@dataclass(frozen=True)
class Served:
    """The outcome of a stream: its seconds from first arrival to last picture, and each request's latency."""

    seconds: float
    latencies: list[float]

    def figures(self) -> dict[str, float]:
        p95 = float(np.percentile(self.latencies, 95))
        return {"images_per_s": len(self.latencies) / self.seconds, "p95_s": p95}


def serve(
    requests: Sequence[Request], way: Way, now: Callable[[], float], time_left: Callable[[], float] = lambda: A_DAY
) -> Served | None:
    """Serves a stream, one batch after the other; ``now`` reads the clock that times them. None if the time ends first."""
    left = sorted(requests)
    clock, latencies = left[0].arrival, []
    while left:
        if time_left() <= 0:
            return None
        waiting = [request for request in left if request.arrival <= clock]
        if not waiting:
            clock = left[0].arrival
            continue
        batch = way.pick(waiting)
        begun = now()
        way.render(batch)
        clock += now() - begun
        latencies += [clock - request.arrival for request in batch]
        left = [request for request in left if request not in batch]
    return Served(clock - min(request.arrival for request in requests), latencies)


def check(ways: Mapping[str, Way], requests: Sequence[Request]) -> dict[str, float]:
    """Renders some requests in every way; returns the largest difference of each from PEFT's pictures.

    Raises:
        ValueError: a picture differs by half a grey level.
    """
    reference = pictures(ways["set_adapters"], requests)
    differences = {name: float((pictures(way, requests) - reference).abs().max()) for name, way in ways.items()}
    wrong = {name: value for name, value in differences.items() if not value < HALF_GREY}
    if wrong:
        raise ValueError(f"pictures differ from those of set_adapters by more than {HALF_GREY:.4f}: {wrong}")
    return differences


def pictures(way: Way, requests: Sequence[Request]) -> Tensor:
    """Renders requests as a way batches them, in the order of the requests."""
    found: dict[Request, Tensor] = {}
    left = list(requests)
    while left:
        batch = way.pick(left)
        found |= zip(batch, way.render(batch), strict=True)
        left = [request for request in left if request not in batch]
    return torch.stack([found[request] for request in requests])


def base_rate(studio: Studio, now: Callable[[], float]) -> float:
    """Measures the pictures per second of the plain pipeline in full batches."""
    batch = [Request(0.0, "lora_0", seed) for seed in range(MAX_BATCH)]
    seconds = []
    for _ in range(4):
        begun = now()
        studio.render(batch)
        seconds.append(now() - begun)
    return MAX_BATCH / statistics.median(seconds[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Measures each number of LoRAs, goes on where an earlier run stopped, and prints a table.

    Returns:
        0; 4 if the time ended first.
    """
    parser = Parser("bench.serving", __doc__.splitlines()[0])
    parser.add_argument("--device", type=device_here, default=default_device())
    parser.add_out(RESULTS)
    parser.add_argument("--adapters", type=whole(), nargs="+", default=ADAPTERS)
    parser.add_argument("--requests", type=whole(), default=REQUESTS)
    parser.add_argument("--rounds", type=whole(), default=1, help="streams of each kind and way, in turns")
    parser.add_argument("--budget-s", type=duration, default=A_DAY, help="stop after this time; a later run goes on")
    arguments = parser.parse_args(argv)
    device = arguments.device
    left = countdown(arguments.budget_s)
    place = machine.slug(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu"
    others = ["requests"] if set(arguments.adapters) <= set(ADAPTERS) else ["requests", "adapters"]
    folder = new_folder(parser.out(arguments, *others) / place)
    tables = []
    for count in arguments.adapters:
        path = folder / f"serving-{count}.json"
        record = records.read(path)
        if not is_current(record, arguments.requests):
            record = begin(count, arguments.requests, device)
        if left() > 0:
            measure(record, device, arguments.rounds, left, lambda record, path=path: records.write(path, record))
        tables.append(table(record))
    print("\n\n".join(tables))
    return UNFINISHED if left() <= 0 else 0


def is_current(record: dict | None, requests: int) -> bool:
    return record is not None and record.get("tree") == machine.tree() and record["requests"] == requests


def begin(count: int, requests: int, device: torch.device) -> dict:
    return {
        "name": f"serving-{count}",
        "adapters": count,
        "requests": requests,
        "tree": machine.tree(),
        "commit": machine.commit(),
        "machine": machine.describe_host(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "served": [],
    }


def measure(
    record: dict, device: torch.device, rounds: int, left: Callable[[], float], save: Callable[[dict], None]
) -> None:
    """Serves the streams that a record lacks, as long as there is time left."""
    done = {(row["round"], row["arrival"], row["way"]) for row in record["served"]}
    todo = [(turn, arrival, way) for turn in range(rounds) for arrival in ARRIVALS for way in turned(turn)]
    todo = [job for job in todo if job not in done]
    if not todo:
        return
    clock = Clock(device)
    studio = Studio(device, record["adapters"])
    names = list(studio.loras)
    if "rate" not in record:
        record |= {"clock": clock.name, "threads": torch.get_num_threads(), "rate": LOAD * base_rate(studio, clock.now)}
    ways = {name: make(Studio(device, record["adapters"])) for name, make in WAYS.items()}
    record["largest_difference"] = check(ways, stream(names, MAX_BATCH, None))
    for turn, arrival, way in todo:
        requests = stream(names, record["requests"], None if arrival == "at once" else record["rate"])
        served = serve(requests, ways[way], clock.now, left)
        if served is None:
            return
        record["served"].append({"round": turn, "arrival": arrival, "way": way, **served.figures()})
        say(
            f"{record['name']}: {len(record['served'])} of {rounds * len(ARRIVALS) * len(WAYS)} streams, {way}, {arrival}"
        )
        save(record)


def turned(turn: int) -> list[str]:
    """The ways, each round beginning with another one."""
    names = list(WAYS)
    first = turn % len(names)
    return names[first:] + names[:first]


def table(record: dict) -> str:
    """Returns a record's figures as a table in Markdown: medians over rounds, with the least and the most."""
    lines = [
        f"**{record['name']}** ({record['requests']} requests, {record['gpu'] or record['machine']['processor']}; "
        f"Poisson stream of {record.get('rate', 0):.3g} a second)",
        "",
        "| way | images/s at once | p95 at once, s | images/s, Poisson | p95, Poisson, s |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        cells = []
        for arrival in ARRIVALS:
            rows = [row for row in record["served"] if (row["arrival"], row["way"]) == (arrival, way)]
            cells += [spread([row[name] for row in rows]) for name in ("images_per_s", "p95_s")]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    if not values:
        return "not measured yet"
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def diffusers_file(state: LoRAState) -> dict[str, Tensor]:
    """A LoRA as the tensors of a file that diffusers loads."""
    tensors = {}
    for name, module in state.modules.items():
        tensors[f"transformer.{name}.lora_A.weight"] = module.lora_A
        tensors[f"transformer.{name}.lora_B.weight"] = module.lora_B
    return tensors


if __name__ == "__main__":
    run(main)
