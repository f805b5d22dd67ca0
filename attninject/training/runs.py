"""The folder of a run: its lock, its log, its checkpoints. Every write is whole or not there.

    experiment.json            the settings
    log.csv                    a row per epoch; epoch 0 is the model before any training
    measured.json              the newest epoch per class, and its confidence in bins: what a report compares
    checkpoint.safetensors     where `--resume` goes on; checkpoint.previous.safetensors is the one before
    classes.txt                names of the classes, in the order of the outputs
    best.safetensors           what ships: a delta that `ai.load` reads (without blocks: a state dict)
    last.safetensors           the same at the last epoch's end

A checkpoint is one safetensors file with JSON metadata, a checksum of that and one per tensor; nothing in it is executed.
"""

from __future__ import annotations

import csv
import json
import os
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from attninject import __version__
from attninject.delta_file import detached, save_tensors
from attninject.errors import CheckpointError, DeltaError, RunError
from attninject.files import raw_bytes, replacing
from attninject.wording import first_line

FORMAT = 1
KEY, SUM = "attninject_checkpoint", "attninject_checksum"
CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
BEST, LAST, LOG = "best.safetensors", "last.safetensors", "log.csv"
SETTINGS, CLASSES, MEASURED = "experiment.json", "classes.txt", "measured.json"


def classes_in(folder: Path) -> tuple[str, ...]:
    """Names of a run's classes, in the order of its outputs."""
    try:
        return tuple((folder / CLASSES).read_text(encoding="utf-8").split("\n")[:-1])
    except UnicodeDecodeError as error:
        raise RunError(f"{folder / CLASSES} is damaged: {first_line(error)}") from error


class Folder:
    """One run's folder, held by one process at a time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: IO[str] | None = None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def begin(self, resume: bool) -> None:
        """Make the folder and take its lock; an older run in it is only touched to go on with it.

        Raises:
            RunError: another run is in it, is at work in it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a+")
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written: {error.strerror}; choose another `out`"
            ) from error
        self._take_lock()
        there = [name for name in (CHECKPOINT, PREVIOUS, LAST) if (self.path / name).exists()]
        checkpoints = [name for name in there if name != LAST]
        if there and not resume:
            self.end()
            how = "go on with it (resume), or take" if checkpoints else "take"
            raise RunError(f"{self.path} holds a run already ({there[0]}): {how} another `out`")
        if resume and not checkpoints:
            self.end()
            raise RunError(f"there is nothing to resume in {self.path}: it has no {CHECKPOINT}")
        for litter in self.path.glob(".*.safetensors.*.tmp"):  # of a run that was killed while it wrote
            litter.unlink(missing_ok=True)

    def _take_lock(self) -> None:
        """By hand: filelock would lock on Windows too, but its 3.x empties the file, and the holder's number with it."""
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process, however it dies
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip()
            self._let_go()
            raise RunError(
                f"another run is at work in {self.path}" + (f" (process {holder})" if holder else "")
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        _HELD.add(self)

    def end(self) -> None:
        """Give the lock back; also where a loader process still has the file open."""
        if self._lock is not None:
            with suppress(ImportError, OSError):
                import fcntl

                fcntl.flock(self._lock, fcntl.LOCK_UN)
            self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write(self, name: str, text: str) -> None:
        """A text file, whole or not at all."""
        with self.replacing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @contextmanager
    def replacing(self, name: str, keep: str | None = None) -> Iterator[Path]:
        """A temporary file that takes the place of `name` once the body is through and the disk has it.

        `keep`: the name under which what was there before stays.

        Raises:
            RunError: the disk is full or the folder read-only; what was there before stays.
        """
        target = self.path / name
        try:
            with replacing(target) as temporary:
                yield temporary
                with temporary.open("rb+") as stream:
                    os.fsync(stream.fileno())
                if keep is not None and target.exists():
                    self._keep(target, self.path / keep)
        except Exception as error:
            from safetensors import SafetensorError

            cause = error.__cause__ if isinstance(error, DeltaError) else error
            if not isinstance(cause, OSError | SafetensorError):
                raise
            raise RunError(
                f"{target} cannot be written ({error}); the run stops, {self.last_good()}"
            ) from error

    def last_good(self) -> str:
        """Which checkpoint a message may offer."""
        for name in (CHECKPOINT, PREVIOUS):
            path = self.path / name
            with suppress(CheckpointError):
                if path.exists():
                    meta = read_meta(path)
                    return f"the last good checkpoint is {path} (epoch {meta['epoch']}, step {meta['step']})"
        return "there is no checkpoint yet"

    # --- checkpoints ---

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """A new checkpoint; the one before it stays as `checkpoint.previous`."""
        held = detached(tensors)
        record = {
            **meta,
            "format": FORMAT,
            "version": __version__,
            "checksums": {k: _checksum(t) for k, t in held.items()},
            "forms": {k: _form(t) for k, t in held.items()},
        }
        text = json.dumps(record)
        with self.replacing(CHECKPOINT, keep=PREVIOUS) as temporary:
            save_tensors(held, temporary, {KEY: text, SUM: _text_checksum(text)})

    @staticmethod
    def _keep(present: Path, name: Path) -> None:
        """A second name for a file, so that at no time there is none."""
        link = name.with_name(f".{name.name}.{os.getpid()}.tmp")
        try:
            os.link(present, link)
            os.replace(link, name)
        except OSError:  # no hard links here
            os.replace(present, name)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The checkpoint to go on from.

        Raises:
            CheckpointError: it is torn, altered or no checkpoint; the other one is offered if it is good.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            path = self.path / PREVIOUS
        try:
            return read(path)
        except CheckpointError as error:
            other = self.path / PREVIOUS
            if path == other or not other.exists():
                raise
            try:
                _, meta = read(other)
            except CheckpointError:
                raise error from None
            raise CheckpointError(
                f"{error}; {other} is good (epoch {meta['epoch']}, step {meta['step']}): "
                f"put it in the place of {path.name} to go on from there"
            ) from error

    # --- the log ---

    def log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The CSV file, written anew: a resumed run leaves no row of what it lost."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with self.replacing(LOG) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)


_HELD: weakref.WeakSet[Folder] = weakref.WeakSet()


def let_go_in_child() -> None:
    """In a forked process: close the locks inherited, which would outlive the run that was killed."""
    for folder in _HELD:
        folder._let_go()


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(raw_bytes(tensor))


def _form(tensor: Tensor) -> str:
    """What the same bytes are read as."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _text_checksum(text: str) -> str:
    return str(zlib.crc32(text.encode()))


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            written = file.metadata() or {}
        text = written.get(KEY, "null")
        meta = json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint ({error})") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version of attninject")
    if written.get(SUM) != _text_checksum(text):
        raise CheckpointError(f"{path} is damaged: its counters and settings are not those that were saved")
    return meta


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a checkpoint, all compared with their checksums."""
    from safetensors.torch import load_file

    meta = read_meta(path)
    try:
        tensors = load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    sums = meta["checksums"]
    forms = meta.get("forms")  # a checkpoint of an earlier attninject has none
    wrong = [k for k in {**tensors, **sums} if k not in tensors or sums.get(k) != _checksum(tensors[k])]
    wrong += [k for k, t in tensors.items() if forms is not None and forms.get(k) != _form(t)]
    if wrong:
        raise CheckpointError(f"{path} is damaged: the values of {wrong[0]} are not those that were saved")
    return tensors, meta
