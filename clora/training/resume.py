"""The checkpoints of a run, and the check that the run which continues one is the same: settings, inputs, versions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from clora.config.fields import as_written
from clora.config.reading import REMOVED
from clora.config.settings import DistillConfig
from clora.errors import CloraError
from clora.progress import say
from clora.training.checkpoint import DamagedCheckpoint, UnusableCheckpoint, load_values, stated_values
from clora.training.dtypes import check_dtype

# Settings that a resumed run may change: they bound its length and its memory, choose among what it kept, or name where
# files are.
FREE_TO_CHANGE = {
    "train": {
        "updates",
        "minutes",
        "stop_after",
        "checkpoint_every",
        "keep_checkpoints",
        "preview_every",
        "tracker",
        "export",
        "gradient_rows",
        "forward_rows",
        "teacher_memory_gb",
        "gradient_checkpointing",
        "compile",
        "cuda_graphs",
    },
    "data": {"cache"},
}
# These may be lowered, which is the advice where a run diverged.
RATES = ("learning_rate", "anchor_learning_rate", "critic_learning_rate")


class Checkpoints:
    """The newest checkpoints of a run, a file for each, named by its update.

    Args:
        folder: created with the first file.
        keep: the number of files that are kept.
        inputs: the hash of everything that the run is trained on, by its name for messages.
        earlier: the one file of earlier versions, continued where the folder has none.
        finished: the last checkpoint of the finished run before, continued where that was the same, but shorter.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        inputs: Mapping[str, str] | None = None,
        earlier: Path | None = None,
        finished: Path | None = None,
    ):
        self.folder = folder
        self.keep = keep
        self.inputs = dict(inputs or {})
        self.earlier = earlier
        self.finished = finished
        self._start: tuple[Path, int] | None = None
        self._searched = False
        self._continued: tuple[Path, int] | None = None  # the finished run's
        self._damaged: set[Path] = set()

    def files(self) -> list[Path]:
        """Returns the files of this run, or of one that was stopped in its place, the newest first."""
        found = sorted(self.folder.glob("[0-9]*.safetensors"), key=lambda file: int(file.stem), reverse=True)
        return [*found, self.earlier] if self.earlier is not None and self.earlier.exists() else found

    def last_update(self) -> int | None:
        """Returns the update that the next run goes on from: of the file that this one verified or wrote last."""
        return None if self._start is None else self._start[1]

    def start(self, config: DistillConfig) -> tuple[Path, int] | None:
        """Finds the file to continue, and its update: the newest that is whole. Reports what it passes over.

        Raises:
            CloraError: it was written with other settings or inputs, or none is whole.
        """
        if self._start is None and not self._searched:
            self._start = self._find(config)
            self._searched = True  # it reports once
        return self._start

    def resume(self, config: DistillConfig, load: Callable[[Path], None]) -> None:
        """Loads the file to continue, if there is one; of the folder's, one that ``load`` finds damaged is passed over.

        Raises:
            CloraError: as `start`.
        """
        while (found := self.start(config)) is not None:
            try:
                return load(found[0])
            except DamagedCheckpoint as error:
                if found[0] == self.finished:  # what was loaded of it is no beginning
                    raise
                say(f"{error.reason} and is passed over")
                self._damaged.add(found[0])
                self._start, self._searched = None, False

    def has(self, update: int) -> bool:
        """Reports whether the folder's newest file is that of an update, verified or written here."""
        return self._start == (self.path(update), update)

    def has_end(self, config: DistillConfig) -> bool:
        """Reports whether the folder holds the last checkpoint of a run of this config; of another run it may hold others."""
        try:
            found = self.start(config) if self.files() else None
        except CloraError:
            return False
        if found is None:
            return False
        return config.train.progress(found[1], stated_values(found[0])["seconds"]) >= 1

    def path(self, update: int) -> Path:
        """Returns the file of an update."""
        return self.folder / f"{update:08d}.safetensors"

    def wrote(self, update: int) -> None:
        """Takes note of a new file, and removes all but the newest up to it; later ones are damaged.

        The newest calm one stays too: in a slow explosion all the others may be from within it.
        """
        self._start = (self.path(update), update)
        self._damaged.discard(self.path(update))
        files = self.files()
        later = [file for file in files if file != self.earlier and int(file.stem) > update]
        earlier = files[len(later) :]
        calm = next((file for file in earlier if _is_calm(file)), None)
        for file in [*later, *earlier[self.keep :]]:
            if file != calm:
                file.unlink(missing_ok=True)

    def go_back(self) -> str:
        """Removes the damaged files, and those that a diverged run wrote when it was no longer calm; returns how to go on."""
        for file in self.files():
            if file not in self._damaged and _is_calm(file):
                update = stated_values(file)["update"]
                self._start = (file, update)
                return (
                    f"The checkpoint of update {update} is kept: with lower rates the same command goes on from there"
                )
            file.unlink(missing_ok=True)
        self._start = self._continued
        if self._start is not None:
            return (
                f"With lower rates the same command goes on from update {self._start[1]}, the end of the finished run"
            )
        return "No checkpoint is from before it: with lower rates the same command begins the training anew"

    def finish(self) -> None:
        """Keeps the newest file as that of a finished run and removes the others."""
        files = self.files()
        # It goes last: while it is there, the next run knows that this one has not ended.
        for file in files[1:]:
            file.unlink(missing_ok=True)
        if files and self.finished is not None:
            files[0].replace(self.finished)
        with suppress(OSError):
            self.folder.rmdir()

    def _find(self, config: DistillConfig) -> tuple[Path, int] | None:
        files = self.files()
        for file in files:
            if file in self._damaged:
                continue
            try:
                values = load_values(file)
                notes = check_resumable(file, values, config, self.inputs)
            except DamagedCheckpoint as error:
                say(f"{error.reason} and is passed over")
                self._damaged.add(file)
                continue
            for note in notes:
                say(note)
            return file, values["update"]
        if files:
            raise CloraError(
                f"none of the checkpoints in {self.folder} is whole; remove that folder to start from the beginning"
            )
        return self._find_finished(config)

    def _find_finished(self, config: DistillConfig) -> tuple[Path, int] | None:
        """The finished run's file, unless it was another run, a longer one, or is damaged; its collection is whole."""
        if self.finished is None or not self.finished.exists():
            return None
        try:
            values = load_values(self.finished)
            notes = check_resumable(self.finished, values, config, self.inputs)
        except UnusableCheckpoint as error:
            say(f"training begins anew, and not where the finished run has ended: {error.reason}")
            return None
        for note in notes:
            say(note)
        self._continued = (self.finished, values["update"])
        return self._continued


def _is_calm(file: Path) -> bool:
    """Reports a checkpoint that a diverged run may go back to; earlier versions did not record it."""
    values = stated_values(file)
    return bool(values) and values.get("calm", True) is True


def resumable_settings(config: DistillConfig) -> dict[str, Any]:
    """Returns the settings that a resumed run must share with the one that it continues."""
    # The dtype that was computed in is a value of its own: what ``auto`` is depends on the machine.
    return config.recorded(exclude={"output": True, "device": True, "dtype": True, **FREE_TO_CHANGE})


def check_resumable(
    path: Path, values: Mapping[str, Any], config: DistillConfig, inputs: Mapping[str, str]
) -> list[str]:
    """Compares the values of a checkpoint with the run that is to continue it.

    Returns:
        What differs and does no harm, for the user.

    Raises:
        CloraError: it lacks a value, or was written by another run or on other inputs.
    """
    kinds = {"config": dict, "update": int, "seconds": (int, float), "matching": bool}
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise DamagedCheckpoint(path, f"its value {name!r} is {values.get(name)!r}")
    current = resumable_settings(config)
    for section, found in current.items():
        if isinstance(found, Mapping) and not isinstance(values["config"].get(section), Mapping):
            raise DamagedCheckpoint(path, f"its settings of {section} are {values['config'].get(section)!r}")
    if values["update"] > config.train.updates:
        raise UnusableCheckpoint(
            f"checkpoint {path} has made {values['update']} updates, more than train.updates: {config.train.updates}",
            f"set that to {values['update']} to end the run there, higher to go on, or remove the checkpoint to start from "
            "the beginning",
        )
    written, notes = _with_lower_rates(values["config"], current, values["update"])
    added = _added_effects(written, current)
    check_same({**written, "effects": [*written["effects"], *added]} if added else written, current, path)
    if added:
        notes.append(_added_note(path, values, [effect["name"] for effect in added], config))
    # Before the inputs: the base's fingerprints depend on it.
    check_dtype(path, values, config)
    if "inputs" in values:
        before = written["effects"] if isinstance(written.get("effects"), Sequence) else ()
        _check_inputs(values["inputs"], _without_those_of(added, before, inputs, config), path)
    else:
        notes.append(
            f"checkpoint {path} was written by an earlier version, which did not record pictures, instructions and the "
            "base model: continue it only if they are the same"
        )
    return notes


def _with_lower_rates(
    written: Mapping[str, Any], current: Mapping[str, Any], update: int
) -> tuple[dict[str, Any], list[str]]:
    """A checkpoint's settings with the current learning rates where these are lower, and what was lowered."""
    train, accepted, notes = written["train"], {}, []
    for name in RATES:
        # Without a rate of its own anchoring has the other one.
        before, now = (t.get(name) or t.get("learning_rate") for t in (train, current["train"]))
        if isinstance(before, (int, float)) and now < before:
            notes.append(f"train.{name} is {now:g} from update {update} on; it was {before:g}")
        if isinstance(before, (int, float)) and now <= before:
            accepted[name] = current["train"].get(name)
    return {**written, "train": {**train, **accepted}}, notes


def _added_effects(written: Mapping[str, Any], current: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The effects that the config has after all those of the checkpoint; none where it does not begin with them."""
    before, now = written.get("effects"), current["effects"]
    return now[len(before) :] if isinstance(before, list) and before and now[: len(before)] == before else []


def _added_note(path: Path, values: Mapping[str, Any], names: Sequence[str], config: DistillConfig) -> str:
    """Returns the note that a run goes on with more effects.

    Raises:
        CloraError: the run has ended, so that they would not be learned.
        UnusableCheckpoint: of an earlier version, which does not state whether the other inputs are the same.
    """
    listed, update = ", ".join(names), values["update"]
    if "inputs" not in values:
        raise UnusableCheckpoint(
            f"checkpoint {path} was written by an earlier version, to which no effect can be added ({listed})",
            "choose another output",
        )
    if config.train.progress(update, values["seconds"]) >= 1:
        minutes = f", train.minutes above {values['seconds'] / 60:.3g}" if config.train.minutes is not None else ""
        raise CloraError(
            f"effects: {listed} would be added to a run that has ended; set train.updates above {update}{minutes}, by as "
            f"much as they are to be trained, or remove {path} to train all effects from the beginning"
        )
    return f"new from update {update} on: {listed}" + (", without a phase of anchoring" if values["matching"] else "")


def _without_those_of(
    added: Sequence[Mapping[str, Any]],
    before: Sequence[Mapping[str, Any]],
    inputs: Mapping[str, str],
    config: DistillConfig,
) -> dict[str, str]:
    """The inputs but for those that only added effects have: their LoRAs, and pictures of folders of their own."""
    earlier = {as_written(config.data.sources)} | {e[key] for e in before for key in ("sources", "targets")}
    folders = {e[key] for e in added for key in ("sources", "targets")} - earlier - {None}
    loras = {lora_input(effect["name"]) for effect in added}
    return {
        name: hashed
        for name, hashed in inputs.items()
        if name not in loras and not any(name == picture_input(folder, Path(name).name) for folder in folders)
    }


def lora_input(effect: str) -> str:
    """Returns the name of an effect's LoRA among a run's inputs."""
    return f"the LoRA of effect {effect!r}"


def picture_input(folder: str, name: str) -> str:
    """Returns the name of a picture among a run's inputs."""
    return f"picture {Path(folder) / name}"


def check_same(written: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Raises CloraError unless a checkpoint was written with the current values."""
    for key, reason in REMOVED.items():
        section, _, name = key.partition(".")
        if name in written.get(section, {}) and name not in current.get(section, {}):
            raise UnusableCheckpoint(
                f"checkpoint {path} was written by an earlier version with {key}, which was removed, since {reason}",
                "continue it with that version, or remove it to start from the beginning",
            )
    changed = []
    for key in current:
        if written.get(key) != current[key]:
            changed += _named(key, written.get(key), current[key])
    if changed:
        raise UnusableCheckpoint(
            f"checkpoint {path} was written by another run ({'; '.join(changed)})",
            "restore the old settings and files to continue it (effects may be added after the others, learning rates "
            "lowered), or remove it to start from the beginning",
        )


def _named(key: str, written: Any, current: Any) -> Iterable[str]:
    """The settings of a section that differ."""
    if isinstance(written, Mapping) and isinstance(current, Mapping):
        for k in sorted({*written, *current}):
            if written.get(k) != current.get(k):
                yield from _named(f"{key}.{k}", written.get(k), current.get(k))
    elif isinstance(written, (list, Mapping)) or isinstance(current, (list, Mapping)):
        yield f"other {key}"
    else:
        was, now = ("unset" if value is None else repr(value) for value in (written, current))
        yield f"{key} was {was}, is {now}"


def _check_inputs(written: Any, current: Mapping[str, str], path: Path) -> None:
    """Raises CloraError, with the names, if an input is not what a checkpoint was trained on."""
    if not isinstance(written, Mapping):
        raise DamagedCheckpoint(path, f"its inputs are {written!r}")
    changes = []
    for name in dict.fromkeys((*current, *written)):
        if name not in written:
            changes.append(f"{name} is new")
        elif name not in current:
            changes.append(f"{name} is gone")
        elif written[name] != current[name]:
            changes.append(f"{name} has changed")
    if changes:
        shown = "\n  ".join([*changes[:10], *([f"and {len(changes) - 10} more"] if len(changes) > 10 else [])])
        raise UnusableCheckpoint(
            f"checkpoint {path} was trained on other inputs:\n  {shown}\n",
            "restore them to continue it, or remove it to start from the beginning",
        )
