"""The command line. Each command imports what it needs when it runs, so that ``--help`` is instant."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from clora.errors import CloraError, printable
from clora.files import TEMPLATES
from clora.heap import keep_freed_memory
from clora.progress import say
from clora.stopping import Stopped
from clora.threads import limit_spinning
from clora.version import __version__

if TYPE_CHECKING:
    from clora.config.settings import DistillConfig

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Many effect LoRAs and few-step sampling in one LoRA.\n\nStart with [bold]clora demo[/bold]: it needs no GPU "
    "and no download, and takes minutes.",
    epilog="Examples:\n\n[bold]clora demo[/bold]\n\n[bold]clora distill my.yaml train.updates=500[/bold]\n\n"
    "[bold]clora inspect my_lora.safetensors[/bold]\n\n[bold]clora studio path[/bold]",
)
studio = typer.Typer(no_args_is_help=True, help="The small trained pipeline that ships with clora.")
app.add_typer(studio, name="studio")

# Arguments and options that several commands share.
Config = Annotated[Path, typer.Argument(help="YAML file: pipeline, effects, data, student, train.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the file's.")
]
Preset = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="A recipe for what the file leaves out: paper, or clora, which is ours."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[str, typer.Option(help="auto, cpu, mps, cuda or cuda:0; auto takes a CUDA GPU if there is one.")]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Leave out tensors whose names begin like this, * for any text ('lora_te', '*.norm'); may be repeated.",
    ),
]
Folder = Annotated[Path | None, typer.Argument(help="Studio folder; by default the one that ships with clora.")]


def main() -> None:
    """Runs the command line; a user's mistake is printed without a traceback, and the exit code is 1."""
    limit_spinning()  # before a command imports torch
    keep_freed_memory()
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except CloraError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is not None:  # of a file, and not of what is printed
            raise
        # What is still to be written would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail(f"the output cannot be written: {error.strerror}; make room where it goes")


def _fail(problem: str) -> None:
    message = Text("error: ", style="bold red").append(printable(problem), style="not bold default")
    Console(stderr=True).print(message, soft_wrap=True)
    sys.exit(1)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"clora {__version__}")
        raise typer.Exit


def _show_example(value: bool) -> None:
    if value:
        typer.echo((TEMPLATES / "distill.yaml").read_text("utf-8"), nl=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html, grid.png, metrics.json and the LoRA.")] = Path(
        "clora-demo"
    ),
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of every random number.")] = 0,
    effects: Annotated[
        str | None,
        typer.Option(help="Names of effects, separated by commas. Any but the default eight take minutes more."),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Train longer, render the targets and measure every row again: most of an hour on two cores."
        ),
    ] = False,
    device: Device = "auto",
) -> None:
    """Distil the studio's effect LoRAs into one, measure it and write a report.

    Example: [bold]clora demo --effects snow,mirror,thermal --out my-demo[/bold]
    """
    from clora.commands.demo import run_demo

    report = run_demo(out, seed, None if effects is None else _split(effects), full, device)
    typer.echo(f"report: {report}")


@app.command("try")
def try_(
    collection: Annotated[
        str | None, typer.Argument(help="Folder, file or hub id of a collection; by default the demo's.")
    ] = None,
    photo: Annotated[
        Path | None, typer.Argument(help="Picture of any size and proportion; a collection of the studio needs none.")
    ] = None,
    effects: Annotated[
        str | None, typer.Option(help="Names of effects, separated by commas; by default all of the collection.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The sheet, a PNG file.")] = Path("sheet.png"),
    pictures: Annotated[Path | None, typer.Option(help="Folder for the single pictures, in their full size.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the noise.")] = 0,
    device: Device = "auto",
    pipeline: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the base model, where the collection states none that can be found."),
    ] = None,
) -> None:
    """Edit your own picture with every effect of a collection; one sheet shows the picture and all results.

    Runs the stock pipeline of the collection's base model. The picture is cropped around its centre.

    Example: [bold]clora try clora-demo/collection photo.jpg --effects snow,mirror[/bold]
    """
    from clora.commands.try_ import try_collection

    names = None if effects is None else _split(effects)
    typer.echo(f"sheet: {try_collection(collection, photo, names, out, pictures, seed, device, pipeline)}")


@app.command()
def distill(
    config: Config,
    overrides: Overrides = None,
    example: Annotated[
        bool, typer.Option("--example", callback=_show_example, is_eager=True, help="Print an example and exit.")
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO", help="Upload the collection to this repository of the Hugging Face Hub."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create that repository private.")] = False,
    push_samples: Annotated[
        bool, typer.Option("--push-samples", help="Upload samples.png too, which shows pictures from training.")
    ] = False,
    preset: Preset = None,
) -> None:
    """Distil your own LoRA files on your own pipeline.

    Start from the commented example: [bold]clora distill --example > my.yaml[/bold]

    Example: [bold]clora distill my.yaml train.updates=500 --push-to-hub me/my-collection[/bold]

    Example: [bold]clora distill my.yaml --preset paper[/bold]
    """
    loaded = _load(config, overrides or (), preset)
    from clora.commands.distill import distill as run

    try:
        typer.echo(f"collection: {run(loaded, push_to_hub, private, push_samples)}")
    except (KeyboardInterrupt, Stopped):
        say(f"to go on: {shlex.join(['clora', *sys.argv[1:]])}")
        raise


@app.command()
def prompts(
    config: Config,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the prompts file, edits included.")] = False,
    preset: Preset = None,
) -> None:
    """Write student prompts, triggers and general instructions to a file that you may edit before training.

    The file is `prompts.file` of the config, by default my.prompts.yaml beside my.yaml.

    Example: [bold]clora prompts my.yaml prompts.paraphrases=6[/bold]
    """
    loaded = _load(config, overrides or (), preset, with_prompts=False)
    from clora.commands.prompts import similarity_table, write_prompts

    file = loaded.prompts.file or str(config.with_suffix(".prompts.yaml"))
    Console().print(similarity_table(write_prompts(loaded, file, overwrite)))
    typer.echo(f"prompts: {file}")
    if loaded.prompts.file is None:
        typer.echo(f"to train with it, write into {config}:  prompts: {{file: {Path(file).name}}}")


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: AsJson = False, preset: Preset = None) -> None:
    """Show what a distillation will need and do, and what is wrong with its config, pictures and LoRA files.

    Reads the values of the LoRA files, and no weights of the model.

    Example: [bold]clora plan my.yaml train.batch_size=2[/bold]
    """
    loaded = _load(config, overrides or (), preset)
    from clora.commands.plan import make_plan, render

    found = make_plan(loaded)
    _print(found, render, as_json)
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A .safetensors LoRA or a folder with one.")],
    as_json: AsJson = False,
    pipeline: Annotated[
        Path | None, typer.Option(help="Pipeline folder; shows which of its layers the LoRA changes.")
    ] = None,
    ignore: Ignore = None,
) -> None:
    """Show a LoRA's format, model family, adapter types, ranks, alphas and effective scales, and all its problems.

    Example: [bold]clora inspect my_lora.safetensors[/bold]
    """
    from clora.lora.inspect import check_usable, render
    from clora.lora.inspect import inspect as describe

    info = describe(path, pipeline, ignore or ())
    _print(info, render, as_json)
    check_usable(info)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Output folder of a run, finished or not.")],
) -> None:
    """Write a run's report.html anew from its history: losses, gradients, rates, memory.

    A run writes it too, every half a minute.

    Example: [bold]clora report my-collection[/bold]
    """
    from clora.report.run_report import write_run_report

    typer.echo(f"report: {write_run_report(run)}")


@app.command()
def export(
    path: Annotated[Path, typer.Argument(help="A LoRA of any format (file or folder), or a collection.")],
    output: Annotated[Path, typer.Option(help="The new .safetensors file; for peft the new folder.")],
    format: Annotated[
        str, typer.Option(help="diffusers (one rank, alpha = rank), peft, kohya, comfyui or bare.")
    ] = "diffusers",
    rank: Annotated[int | None, typer.Option(help="Largest rank to keep, by SVD.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Instead of a rank: share of each module's squared singular values to keep, such as 0.99."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="fp32, bf16, fp16 or fp8; by default as in the file. fp8 is plain float8_e4m3fn, which clora, "
            "diffusers and ComfyUI read; other programs may not."
        ),
    ] = None,
    pipeline: Annotated[
        Path | None,
        typer.Option(help="Folder of the base model, if the LoRA's names do not identify it; DoRA needs its weights."),
    ] = None,
    max_error: Annotated[
        float,
        typer.Option(help="Largest relative error of factors for changes without low rank (DoRA, full-matrix LoKr)."),
    ] = 0.01,
    ignore: Ignore = None,
    as_json: AsJson = False,
) -> None:
    """Write a LoRA in another format, at a lower rank or in another type; shows the error of every module.

    With --energy, diffusers' format gets the largest rank that a module needs, the other formats a rank for each module.

    Example: [bold]clora export my-collection --rank 16 --dtype fp16 --output small.safetensors[/bold]
    """
    from clora.lora.convert import convert_lora, render

    report = convert_lora(path, output, format, rank, energy, dtype, pipeline, max_error, ignore or ())
    _print(report, render, as_json)


@studio.command()
def build(
    folder: Annotated[Path, typer.Argument(help="Where to build: new, or a copy of a studio to go on from.")],
    stages: Annotated[str | None, typer.Option(help="Stages to run, separated by commas; by default all.")] = None,
    photos: Annotated[
        Path | None, typer.Option(help="Folder of photographs with their table; by default those that ship.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Build a studio from its seeds; finished stages are skipped, one that was cut off goes on.

    Example: [bold]clora studio build ./my-studio --stages teachers-1[/bold]
    """
    from clora.studio.making.build import build as run

    run(folder, None if stages is None else _split(stages), device, photos)


@studio.command()
def check(folder: Folder = None, device: Device = "auto") -> None:
    """Measure the studio against its floors: autoencoder, judges, general edits, every teacher.

    Example: [bold]clora studio check[/bold]
    """
    from clora.studio.check import check as run

    run(folder, device)


@studio.command()
def example(
    folder: Annotated[Path, typer.Argument(help="New folder for the config, pictures and instructions.")],
    effects: Annotated[
        str | None, typer.Option(help="Teachers to distil, separated by commas; by default all.")
    ] = None,
    studio_folder: Annotated[
        Path | None, typer.Option("--studio", help="Folder of a built studio; by default the one that ships.")
    ] = None,
) -> None:
    """Write all that [bold]clora distill[/bold] needs to make one LoRA of the studio's teachers.

    Example: [bold]clora studio example ./example --effects snow,mirror[/bold]
    """
    from clora.studio.example import write_example as run

    typer.echo(str(run(folder, studio_folder, None if effects is None else _split(effects))))


@studio.command()
def path() -> None:
    """Print the studio's pipeline folder, for DiffusionPipeline.from_pretrained.

    Example: [bold]ls $(clora studio path)[/bold]
    """
    from clora.studio.assets import pipeline_folder

    typer.echo(str(pipeline_folder()))


def _load(config: Path, overrides: Iterable[str], preset: str | None, with_prompts: bool = True) -> DistillConfig:
    """Reads a config and states what a preset sets; the error about a bad one also lists what is wrong with its files."""
    from clora.config.presets import describe_preset
    from clora.config.settings import load_config

    try:
        loaded = load_config(config, overrides, with_prompts, preset)
        if preset is not None:
            say(describe_preset(preset, loaded))
        return loaded
    except CloraError as error:
        from clora.commands.checks import add_file_problems

        raise add_file_problems(error, config, overrides) from error


def _print(found: Mapping[str, Any], render: Callable[[Mapping[str, Any]], Any], as_json: bool) -> None:
    """Prints a result as JSON, or laid out for the terminal, where a long path stays on one line."""
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(render(found), crop=False)


def _split(names: str) -> list[str]:
    found = [name.strip() for name in names.split(",") if name.strip()]
    if not found:
        raise CloraError(f"expected names separated by commas, found {names!r}")
    return found
