"""``clora distill``: from the user's own pipeline, LoRA files and images to a collection."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from clora.bank.graphs import check_graphs
from clora.bank.pages import teacher_pages
from clora.collection.hub import Destination, cached_revision, check_destination, is_repo_id, upload
from clora.collection.metadata import LORA_FILE, SAMPLES_FILE, Collection
from clora.collection.samples import draw_samples
from clora.collection.write import (
    COLLECTION_FILES,
    add_samples,
    check_output,
    is_finished,
    make_collection,
    name_repository,
    write_collection,
)
from clora.commands.checks import find_file_problems
from clora.commands.folder import CACHE, CHECKPOINT, EARLIER_CHECKPOINT, FINISHED, with_run_dtype
from clora.commands.inputs import Inputs, hash_pictures, inputs_digest, read_inputs, trained_on
from clora.commands.tracking import find_tracker, tracked
from clora.commands.watching import watched
from clora.config.settings import DistillConfig
from clora.config.training import TrainConfig
from clora.data.batches import DistillData
from clora.data.cache import Cache
from clora.data.prepare import encode_data
from clora.devices import find_device
from clora.errors import CloraError
from clora.files import check_writable, remove_orphans
from clora.locks import locked, shared
from clora.lora.state import LoRAState
from clora.models import ModelAdapter
from clora.models.loading import load_adapter, load_teacher
from clora.progress import say, stage, up_to
from clora.report.history import HISTORY
from clora.report.previews import PREVIEWS
from clora.report.run_report import RUN_REPORT
from clora.stopping import Stopped, StopRequest, stop_requests
from clora.studio import assets
from clora.training.faults import LOSSES
from clora.training.previews import Previews
from clora.training.resume import Checkpoints
from clora.training.student import first_student, student_layers, train_student
from clora.training.trainer import Report


def distill(
    config: DistillConfig, push_to_hub: str | None = None, private: bool = False, push_samples: bool = False
) -> Path:
    """Distils the user's LoRA files into one collection.

    A folder that already holds the finished collection of the same settings and inputs is left as it is.

    Args:
        config: the settings.
        push_to_hub: repository on the Hub that the collection is uploaded to. Login and rights are checked before
            training; it is created after it, when the collection has been verified.
        private: create that repository private; a public one is refused.
        push_samples: upload ``samples.png`` too, which shows pictures from training.

    Returns:
        The collection's folder.

    Raises:
        CloraError: anything in the input that cannot be used; nothing is written then. Another run writes there.
        KeyboardInterrupt: Ctrl-C; what was rendered, and the training up to the update that was running, are kept.
        Stopped: SIGTERM, SIGHUP or ``train.stop_after``, likewise.
    """
    if not isinstance(config, DistillConfig):
        found = type(config).__name__
        raise CloraError(f"expected a DistillConfig, found {found}; load it with clora.load_config(path)")
    find_file_problems(config).refuse()
    output = check_output(config.output)
    cache_folder = check_writable(config.data.cache or output / CACHE)
    destination = None
    if push_to_hub is not None:
        destination = check_destination(Destination(push_to_hub, private, push_samples))
    elif private or push_samples:
        raise CloraError("private and push_samples concern an upload; expected push_to_hub with them")
    minutes = config.train.stop_after
    with (
        stop_requests(None if minutes is None else 60 * minutes) as stop,
        locked(output),
        shared(cache_folder, remove_cache_orphans) if config.data.cache else nullcontext(),
    ):
        remove_run_orphans(output)
        return _distill(config, output, Cache(cache_folder), destination, stop)


def _distill(
    config: DistillConfig, output: Path, cache: Cache, destination: Destination | None, stop: StopRequest
) -> Path:
    device = find_device(config.device)
    is_auto = config.dtype == "auto"
    config, line = with_run_dtype(config, device)
    if line or (is_auto and config.dtype != "float32"):
        say(line or f"dtype: auto is {config.dtype} here")
    with stage("load pipeline and LoRAs", None):
        config, adapter = load_adapter(config)
        transformer = adapter.pipeline.transformer
        teachers = {effect.name: load_teacher(effect, transformer) for effect in config.effects}
        # Before training, so that the hashes are those of the files that were read.
        inputs = read_inputs(config, adapter.pipeline)
        collection = _describe(config, adapter, teachers, inputs_digest(config, inputs))
        same = [collection, *_as_before(collection, [inputs_digest(config, inputs, d) for d in ("auto", config.dtype)])]
    # Rendering takes hours; wrong layers, CUDA graphs that cannot be and a checkpoint of another run are refused before it.
    student_layers(transformer, config.student.targets)
    if config.train.cuda_graphs:
        paged = teacher_pages(config.train.teacher_memory_gb, transformer, list(teachers.values())) is not None
        check_graphs(transformer, paged)
    checkpoints = Checkpoints(
        output / CHECKPOINT,
        config.train.keep_checkpoints,
        trained_on(config, inputs, teachers),
        earlier=output / EARLIER_CHECKPOINT,
        finished=output / FINISHED,
    )
    is_done = is_finished(output, *same)
    if is_done and checkpoints.has_end(config):
        # The run was stopped between its collection and its end. Without samples it goes on from its last checkpoint,
        # which is the trained one, and writes the same collection.
        is_done = (output / SAMPLES_FILE).exists()
        if is_done:
            _tidy_up(output, config, checkpoints)
    _announce(output, config, checkpoints, is_done)
    if destination is not None:
        say(_upload_notice(destination))
    repo_id = None if destination is None else destination.repo_id
    if not is_done:
        with _reporting_what_is_kept(checkpoints):
            data = encode_data(config, adapter, teachers, cache, device)
            _check_unchanged(inputs, config)
            student = _train(config, adapter, teachers, data, output, checkpoints, stop)
            write_collection(student, collection, output, transformer.dtype, repo_id)
            _add_samples(output, destination, lambda: draw_samples(config, adapter, student, data, device))
        _tidy_up(output, config, checkpoints)
    elif destination is not None:
        name_repository(output, destination.repo_id, destination.samples)
    if destination is not None:
        _upload_verified(output, same, destination)
    return output


def _train(
    config: DistillConfig,
    adapter: ModelAdapter,
    teachers: dict[str, LoRAState],
    data: DistillData,
    output: Path,
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> LoRAState:
    """Trains the student under a bar; numbers go to history, report and tracker, pictures to the previews."""
    device = find_device(config.device)
    start = first_student(config, adapter, teachers, data, checkpoints)
    first = checkpoints.last_update() or 0
    with (
        training_bar(f"distil into {output.name}", config.train) as show,
        tracked(find_tracker(config.train.tracker), output, config.model_dump(mode="json")) as log,
        watched(output, first, device, show, log) as report,
    ):
        previews = None
        if data.previews is not None:
            previews = Previews(config, adapter, data, output / PREVIEWS, device, first)
        return train_student(config, adapter, teachers, data, report, checkpoints, stop, start, previews)


def _tidy_up(output: Path, config: DistillConfig, checkpoints: Checkpoints) -> None:
    """Leaves, beside the collection, only the last checkpoint, for more updates: the folder is made to be shared.

    The checkpoints go last. While the folder has them, the next run completes what a stopped one has left.
    """
    if config.data.cache is None:
        for folder in subfolders(output / CACHE):
            if folder != checkpoints.folder:
                shutil.rmtree(folder, ignore_errors=True)
    checkpoints.finish()


def _upload_notice(destination: Destination) -> str:
    """States, before training, what will be uploaded and who will see it."""
    seen = "a private repository" if destination.private else "public if it is new; --private makes it private"
    samples = "uploaded too" if destination.samples else "not uploaded; --push-samples does that"
    return (
        f"at the end the collection is uploaded to {destination.repo_id} ({seen}). {SAMPLES_FILE}, which shows pictures "
        f"from training, is {samples}"
    )


def _upload_verified(output: Path, same: Sequence[Collection], destination: Destination) -> None:
    """Uploads a collection as it was written, by this version or an earlier one (`_as_before`).

    Raises:
        CloraError: its files have changed since, or it cannot be uploaded.
    """
    if not is_finished(output, *same):
        raise CloraError(
            f"{output} is not uploaded: its files are no longer as they were written; run the command again"
        )
    files = (*COLLECTION_FILES, SAMPLES_FILE) if destination.samples else COLLECTION_FILES
    say(f"uploaded to {upload(output, destination, files)}")


def _describe(
    config: DistillConfig, adapter: ModelAdapter, teachers: Mapping[str, LoRAState], inputs_sha256: str
) -> Collection:
    """Returns the description of the collection that a run makes, with the hash of its inputs."""
    folder = Path(config.pipeline)
    metadata = {name: lora.metadata for name, lora in teachers.items()}
    collection = make_collection(
        config,
        adapter,
        base_model=_name_of_base(adapter.pipeline, folder) if folder.exists() else config.pipeline,
        loras={effect.name: Path(effect.lora) for effect in config.effects},
        # kohya and ai-toolkit write the licence under the ModelSpec name.
        licenses={name: keys.get("modelspec.license") or keys.get("license") for name, keys in metadata.items()},
        base_revision=None if folder.exists() else cached_revision(config.pipeline),
    )
    provenance = {**collection.provenance, "inputs_sha256": inputs_sha256}
    return collection.model_copy(update={"provenance": provenance})


def _as_before(collection: Collection, digests: Iterable[str]) -> Iterator[Collection]:
    """The same run's description as earlier versions wrote it, without its dtype, with each of the hashes that they had."""
    settings = {name: value for name, value in collection.provenance.items() if name != "dtype"}
    for inputs_sha256 in digests:
        yield collection.model_copy(update={"provenance": {**settings, "inputs_sha256": inputs_sha256}})


def _name_of_base(pipeline: Any, folder: Path) -> str:
    """Names a local pipeline: the studio's, or the hub id that it was once loaded from, if its folder states one."""
    if folder.resolve() == (assets.ASSETS / "pipeline").resolve():
        return assets.BASE_MODEL
    stated = json.loads((folder / "model_index.json").read_text("utf-8")).get("_name_or_path")
    if isinstance(stated, str) and is_repo_id(stated) and not Path(stated).exists():
        return stated
    return f"a local {type(pipeline).__name__} (folder {folder.resolve().name})"


def _announce(output: Path, config: DistillConfig, checkpoints: Checkpoints, is_done: bool) -> None:
    """Reports a run that is done or goes on, or a collection that is replaced.

    Raises:
        CloraError: the checkpoint is another run's, or was trained on other inputs.
    """
    if is_done:
        say(
            f"{output} holds the finished collection of these settings and inputs: nothing is trained. To train it "
            "again, remove that folder, or name another output"
        )
    elif (start := checkpoints.start(config)) is not None:
        file, update = start
        if file == checkpoints.finished:
            say(f"going on at update {update}, where the finished run in {output} has ended")
        else:
            say(f"resuming at update {update} of the run in {output}")
    elif (output / LORA_FILE).exists():
        say(
            f"{output} holds a finished collection of other settings or inputs, which this run replaces at its end; name "
            "another output to keep it"
        )


def _check_unchanged(inputs: Inputs, config: DistillConfig) -> None:
    """Raises CloraError if a picture was replaced while it was read: the hashes would be those of another one."""
    for folder, found in hash_pictures(config).items():
        if found != inputs.pictures[folder]:
            raise CloraError(f"{folder}: pictures have changed while they were read; start the same command again")


@contextmanager
def _reporting_what_is_kept(checkpoints: Checkpoints) -> Iterator[None]:
    """Reports, where a run is stopped, what the next one begins with."""
    try:
        yield
    except (KeyboardInterrupt, Stopped):
        update = checkpoints.last_update()
        if update is not None:
            say(f"stopped; the same command goes on from update {update}")
        else:
            say(
                "stopped; what was encoded and rendered is kept for the same command; of the training nothing is kept "
                "before the first checkpoint (train.checkpoint_every)"
            )
        raise


def _add_samples(output: Path, destination: Destination | None, draw: Callable[[], bytes]) -> None:
    """Adds sample pictures to a collection; whatever goes wrong with them, the collection stays."""
    try:
        if destination is None:
            add_samples(output, draw())
        else:
            add_samples(output, draw(), destination.repo_id, destination.samples)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        say(f"no {SAMPLES_FILE} is made: {reason}")


OWN_FILES = "|".join(map(re.escape, ("README.md", LORA_FILE, SAMPLES_FILE, HISTORY, RUN_REPORT)))


def remove_run_orphans(output: Path) -> None:
    """Removes what killed runs left half-written in an output folder, which this run holds."""
    for folder in (output, output / "scheduler"):
        remove_orphans(folder, rf"{OWN_FILES}|scheduler_config\.json|{EARLIER_CHECKPOINT}")
    remove_orphans(output / CHECKPOINT, r"\d+\.safetensors")
    with suppress(OSError):  # not empty, or not there
        (output / CHECKPOINT).rmdir()
    remove_cache_orphans(output / CACHE)


def subfolders(folder: Path) -> list[Path]:
    """Returns the folders in a folder, none where it is missing."""
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def remove_cache_orphans(folder: Path) -> None:
    """Removes what killed runs left half-written in a cache that no other run uses."""
    for kind in subfolders(folder):
        remove_orphans(kind, r"[0-9a-f]{64}\.safetensors")


@contextmanager
def training_bar(title: str, train: TrainConfig) -> Iterator[Report]:
    """Yields a report for `train_student` that moves a bar: by updates, or by seconds where time bounds the run."""
    start = time.monotonic()
    seconds = None if train.minutes is None else round(60 * train.minutes)
    with stage(title, train.updates if seconds is None else seconds) as advance:
        # Where time bounds the run, nobody knows the number of updates: the bar counts seconds.
        move = up_to(advance)

        def report(update: int, values: Mapping[str, float]) -> None:
            losses = {name: values[name] for name in LOSSES if name in values}
            if seconds is None:
                move(update, losses)
            else:
                move(min(round(time.monotonic() - start), seconds), {"update": update, **losses})

        yield report
