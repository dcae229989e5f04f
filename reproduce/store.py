"""Run folders: written whole or not at all, checksummed, safe to load, shared by concurrent processes.

    <root>/runs/<name>/              one finished run
        config.json                  what was run: the whole identity
        environment.json             versions, hardware, commit, hash of the method's source
        metrics.json                 ACC, ASR, RA, counts, seconds, what the method reports
        history.jsonl                one line per epoch
        predictions.npz              per-sample predicted labels
        samples.npz                  what figures show: a few images and attention maps, or sentences and activations
        scores.npz                   with a defense that detects: per-sample suspicion, and what was flagged
        model.safetensors            weights, unless the defense leaves the victim's as they are (with a victim also
                                     trigger.safetensors: the trigger's state; with some defenses
                                     defense.safetensors: an inverted trigger, intervals of activations)
        manifest.json                SHA-256 of each file
        done                         SHA-256 of the manifest; written last
    <root>/failed/<name>.txt         traceback of a run that failed
    <root>/progress/<name>           last finished epoch of a training under way
    <root>/locks/<name>              held while a process computes the run

A run is assembled in a temporary folder and renamed into place. Whatever does not match its checksums is reported,
moved aside and computed again. So is a run whose tensors were left out when it was exported, once another needs them.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from reproduce.metrics import Detection, Predictions

# How the names of runs end: a seed and the identity of a configuration.
_NAMED = re.compile(r"-s\d+-([0-9a-f]{12})")


def identity(config: dict[str, Any]) -> str:
    """Twelve hexadecimal digits that stand for a whole configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Run:
    """A finished, verified run folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def files(self) -> set[str]:
        """Names of the files that its checksums vouch for."""
        return set(self.json("manifest"))

    def json(self, name: str) -> dict[str, Any]:
        """config, environment, metrics or manifest."""
        return json.loads((self.path / f"{name}.json").read_text())

    def history(self) -> list[dict[str, Any]]:
        """One row per epoch: phase, epoch, rate, loss and its terms, train_acc; acc, asr where asked for."""
        return [json.loads(line) for line in (self.path / "history.jsonl").read_text().splitlines()]

    def predictions(self) -> Predictions:
        """Per-sample predictions."""
        return Predictions(**self.arrays("predictions"))

    def detection(self) -> Detection | None:
        """Per-sample outcome of a defense that detects."""
        return Detection(**self.arrays("scores")) if (self.path / "scores.npz").exists() else None

    def hits(self) -> dict[str, np.ndarray]:
        """Per-sample outcome (bool) behind each measure that counts."""
        detection = self.detection()
        return self.predictions().hits() | (detection.hits() if detection else {})

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of predictions.npz, samples.npz or scores.npz."""
        with np.load(self.path / f"{name}.npz", allow_pickle=False) as archive:
            return dict(archive)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of model.safetensors, trigger.safetensors or defense.safetensors."""
        return tensors_from_bytes((self.path / f"{name}.safetensors").read_bytes())


class Store:
    """All runs below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, name: str, holding: str | None = None) -> Run | None:
        """The run, if it is finished and matches its checksums; `holding`: and if it has these tensors."""
        run = Run(self.root / "runs" / name)
        whole = run.path.is_dir() and damage(run.path) is None
        return run if whole and (holding is None or f"{holding}.safetensors" in run.files()) else None

    def names(self) -> list[str]:
        """All runs that are there, whole or damaged."""
        return sorted(path.name for path in (self.root / "runs").glob("*") if path.is_dir())

    def failures(self) -> list[str]:
        """All runs whose last attempt failed."""
        return sorted(path.stem for path in (self.root / "failed").glob("*.txt"))

    def status(self, name: str) -> str:
        """done, failed, damaged or missing."""
        path = self.root / "runs" / name
        if path.is_dir():
            return "done" if damage(path) is None else "damaged"
        return "failed" if self.failure(name) is not None else "missing"

    def failure(self, name: str) -> str | None:
        """Traceback of the last failed attempt."""
        path = self.root / "failed" / f"{name}.txt"
        return path.read_text() if path.exists() else None

    def fail(self, name: str, traceback: str) -> None:
        """Keep the traceback of a failed attempt."""
        write_atomically(self.root / "failed" / f"{name}.txt", traceback.encode())

    def set_aside(self, name: str) -> str | None:
        """Move a damaged run out of the way; says what was wrong with it, None if there was nothing to move."""
        path = self.root / "runs" / name
        if not path.is_dir() or (reason := damage(path)) is None:
            return None
        self._move(path, "damaged")
        return reason

    def outdate(self, name: str, config: dict[str, Any], predictions: Predictions) -> list[str]:
        """Move the runs that were made from another version of a run out of the way, and name them: those of a victim
        that predicts otherwise. config, predictions: of the version that is to stand.

        Runs say in environment.json, as `made_from`, what the runs they needed predicted. The cells of older ones that
        do not say are kept only if the version that is there predicts the same.
        """
        there = self.find(name)
        same = there is not None and there.predictions().digest() == predictions.digest()
        moved = []
        for other in self.names():
            run = Run(self.root / "runs" / other)
            # Another process may move it meanwhile; a damaged one is computed again anyway.
            with contextlib.suppress(OSError, ValueError):
                made_from = run.json("environment").get("made_from")
                stale = run.json("config").get("victim") == config and not same if made_from is None \
                    else made_from.get(name, predictions.digest()) != predictions.digest()
                if stale:
                    self._move(run.path, "replaced")
                    moved.append(other)
        return moved

    def lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Only one process computes a run; the others wait here."""
        return locked(self.root / "locks" / name)

    def write(self, name: str, *, config: dict, environment: dict, metrics: dict, history: list[dict],
              arrays: dict[str, dict[str, np.ndarray]], tensors: dict[str, dict[str, Tensor]]) -> Run:
        """Assemble and publish a run. `arrays` and `tensors` map file stem -> content."""
        with self._assembly(name) as partial:
            for stem, content in (("config", config), ("environment", environment), ("metrics", metrics)):
                (partial / f"{stem}.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
            (partial / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
            for stem, content in arrays.items():
                buffer = io.BytesIO()
                np.savez_compressed(buffer, **content)
                (partial / f"{stem}.npz").write_bytes(buffer.getvalue())
            for stem, content in tensors.items():
                (partial / f"{stem}.safetensors").write_bytes(serialised(content))
            target = self._publish(partial, name)
        (self.root / "failed" / f"{name}.txt").unlink(missing_ok=True)
        self.progress(name).clear()
        return Run(target)

    def adopt(self, run: Run, leave_out: tuple[str, ...] = ()) -> None:
        """Copy a verified run of another store into this one, without the files named, unless it is there already.

        One that is there and predicts otherwise is replaced, and what was made from it set aside.
        """
        wanted = run.files() - {*leave_out}
        there = self.find(run.name)
        same = there is not None and there.predictions().digest() == run.predictions().digest()
        if same and wanted <= there.files():
            return
        self.set_aside(run.name)
        if not same:
            self.outdate(run.name, run.json("config"), run.predictions())
        with self._assembly(run.name) as partial:
            for name in wanted:
                shutil.copyfile(run.path / name, partial / name)
            self._publish(partial, run.name)

    @contextlib.contextmanager
    def _assembly(self, name: str) -> Iterator[Path]:
        """A folder to assemble a run in; what could not be finished, on a full disk say, does not stay."""
        partial = self.root / "partial" / f"{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        partial.mkdir(parents=True)
        try:
            yield partial
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _publish(self, partial: Path, name: str) -> Path:
        """Seal an assembled folder with its checksums and move it into place; a run that is there is moved aside."""
        manifest = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        (partial / "done").write_text(_sha256(partial / "manifest.json") + "\n")
        target = self.root / "runs" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            self._move(target, "replaced")
        partial.rename(target)
        return target

    def _move(self, run: Path, folder: str) -> None:
        target = self.root / folder / f"{run.name}-{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        run.rename(target)

    def progress(self, name: str, about: str = "") -> "Progress":
        """The resumable state of one training."""
        return Progress(self.root / "progress" / name, about)

    def sweep(self) -> None:
        """Remove what killed processes left half-written more than a day ago."""
        for path in (self.root / "partial").glob("*"):
            with contextlib.suppress(FileNotFoundError):    # finished, or swept by another process
                if time.time() - path.stat().st_mtime > 86400:
                    shutil.rmtree(path, ignore_errors=True)


class Progress:
    """The last finished epoch of a training, in one file: SHA-256, then safetensors with the history as metadata.

    Saved at most every `interval` seconds; a file that does not match its checksum is ignored, and so is one that is
    `about` something else (the digest of a trigger that now came out otherwise, say).
    """

    interval = 1.0

    def __init__(self, path: Path, about: str = "") -> None:
        self.path = path
        self.about = about
        self.saved_at = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor], list[dict[str, float]]] | None:
        if not self.path.exists():
            return None
        content = self.path.read_bytes()
        digest, history_length, body = content[:32], int.from_bytes(content[32:40], "little"), content[40:]
        if hashlib.sha256(body).digest() != digest:
            return None
        found = json.loads(body[:history_length])
        if found[:1] != [self.about]:
            return None
        history = found[1]
        return len(history), tensors_from_bytes(body[history_length:]), history

    def save(self, epoch: int, tensors: dict[str, Tensor], history: list[dict[str, float]]) -> None:
        if time.monotonic() - self.saved_at < self.interval:
            return
        text = json.dumps([self.about, history]).encode()
        body = text + serialised(tensors)
        write_atomically(self.path, hashlib.sha256(body).digest() + len(text).to_bytes(8, "little") + body)
        self.saved_at = time.monotonic()

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def damage(path: Path) -> str | None:
    """What is wrong with a run folder, None if every file is there and matches its checksum, and the configuration the
    name."""
    try:
        if (path / "done").read_bytes().strip() != _sha256(path / "manifest.json").encode():
            return "manifest.json does not match its checksum"
        manifest = json.loads((path / "manifest.json").read_text())
        for name, digest in manifest.items():
            if _sha256(path / name) != digest:
                return f"{name} does not match its checksum"
        if (named := _NAMED.search(path.name)) and named.end() == len(path.name) \
                and named[1] != identity(json.loads((path / "config.json").read_text())):
            return "config.json is that of another run"
    except FileNotFoundError as missing:
        return f"{Path(missing.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    return None


def serialised(tensors: dict[str, Tensor]) -> bytes:
    """Named tensors as safetensors has them, wherever they lie."""
    return tensors_to_bytes({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors, the same wherever they lie; of none the empty string."""
    return hashlib.sha256(serialised(tensors)).hexdigest() if tensors else ""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait here. The lock dies with its holder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """All of it, or what was there before; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
