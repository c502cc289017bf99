"""Training checkpoints on any filesystem (local, s3, gs): sealed, verified, found. Knows neither torch nor ray.

A checkpoint is a folder `step-00000040` (`step-00000040-2` if a later attempt wrote that step again). Every rank
uploads its own files and, after them, `rank-R.json` with their sizes and SHA-256; a rank that finds all lists present
writes COMPLETE, which holds the hashes of the lists and what rank 0 says of the checkpoint: one hash chain covers every
byte but COMPLETE's own. What has no COMPLETE, or breaks the chain, is never resumed from.
"""

import hashlib
import json
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyarrow import fs as pafs

from dtrpo_ray.errors import CheckpointError

COMPLETE = "COMPLETE"
VALIDATION = "validation.json"  # beside the sealed files, since it is measured after they were sealed
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"  # what Ray Train 2.60 calls its own list
SCHEMA = 1
ATTEMPTS = 5
MAX_PENDING = 8  # checkpoints that are kept because their validation is still to come
LOWER_IS_BETTER = ("loss", "nll", "nll_chosen")
_NAME = re.compile(r"^step-(\d{8})(?:-(\d+))?$")
_CHUNK_BYTES = 1 << 22
T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A checkpoint folder by name: which optimizer step, written by which attempt of the run."""

    step: int
    attempt: int
    path: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return folder_name(self.step, self.attempt)


def folder_name(step: int, attempt: int) -> str:
    """The name of a checkpoint folder: unique for each step of each attempt."""
    return f"step-{step:08d}" + (f"-{attempt}" if attempt else "")


def open_storage(where: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path in it of a local path or a URI (s3://, gs://, file://).

    Raises CheckpointError for a URI that pyarrow cannot open.
    """
    if "://" not in where:
        return pafs.LocalFileSystem(), str(Path(where).resolve())
    try:
        filesystem, path = pafs.FileSystem.from_uri(where)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{where}: cannot be opened ({error}); give a path or an s3:// or gs:// URI") from None
    return filesystem, path


def forget_ray_snapshot(where: str) -> None:
    """Remove Ray Train's own list of a run's checkpoints, if it is there.

    A new driver chooses among the checkpoints that verify; Ray would refuse to start over one that `prune` removed.
    """
    filesystem, path = open_storage(where)
    with suppress(FileNotFoundError):
        filesystem.delete_file(f"{path}/{RAY_SNAPSHOT}")


def write(folder: Path, filesystem: pafs.FileSystem, path: str, rank: int, facts: dict[str, Any]) -> None:
    """Upload one rank's files, then its list, then COMPLETE if this was the last rank.

    `facts` hold `step` and `num_workers`; COMPLETE carries those of rank 0, so that two ranks which write it at once
    write the same. A failing write is tried ATTEMPTS times, one, two, four, ... seconds apart; then its OSError
    is raised.
    """
    files = {str(f.relative_to(folder)): _local_entry(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    listing = json.dumps({"rank": rank, "facts": facts, "files": files}).encode()
    for name in files:
        _patiently(lambda name=name: _copy(folder / name, filesystem, f"{path}/{name}"))  # type: ignore[misc]
    _patiently(lambda: _put(filesystem, f"{path}/rank-{rank}.json", listing))
    names = [f"rank-{r}.json" for r in range(facts["num_workers"])]
    if _patiently(lambda: all(_exists(filesystem, f"{path}/{name}") for name in names)):
        listings = _patiently(lambda: {name: _get(filesystem, f"{path}/{name}") for name in names})
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in listings.items()}
        record = {"schema": SCHEMA, **json.loads(listings[names[0]])["facts"], "ranks": hashes}
        _patiently(lambda: _put(filesystem, f"{path}/{COMPLETE}", json.dumps(record).encode()))


def places(filesystem: pafs.FileSystem, root: str) -> list[Place]:
    """Every checkpoint folder under `root`, complete or not, the newest first.

    By all that lies in them: on gs:// a folder that nobody made is in no list of its parent.
    """
    entries = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=True))
    inside = [(e.path.removeprefix(f"{root}/").partition("/"), e.type == pafs.FileType.Directory) for e in entries]
    folders = {name for (name, slash, _), is_folder in inside if slash or is_folder}
    named = [(_NAME.match(name), f"{root}/{name}") for name in folders]
    found = [Place(int(match[1]), int(match[2] or 0), path) for match, path in named if match]
    return sorted(found, reverse=True)


def facts_of(filesystem: pafs.FileSystem, place: Place) -> dict[str, Any]:
    """What COMPLETE says. Raises CheckpointError if it is missing, damaged or of another schema.

    Here and in `verify`, reading that fails is tried again as writing is; then its OSError is raised, which says
    nothing about the checkpoint.
    """
    try:
        record: dict[str, Any] = json.loads(_patiently(lambda: _get(filesystem, f"{place.path}/{COMPLETE}")))
        known = record["schema"] == SCHEMA and {"step", "num_workers", "ranks"} <= record.keys()
    except FileNotFoundError:
        raise CheckpointError(f"{place.path}: no {COMPLETE}: it was never finished") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place.path}: {COMPLETE} is damaged ({error!r})") from None
    if not known:
        raise CheckpointError(f"{place.path}: {COMPLETE} has schema {record['schema']}, this version reads {SCHEMA}")
    return record


def verify(filesystem: pafs.FileSystem, place: Place, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Check the whole chain, the contents of every `parts`-th file from `part` on; returns what COMPLETE says.

    Raises CheckpointError naming the first file that is missing, of another size or of another hash.
    """
    record = facts_of(filesystem, place)
    entries: list[tuple[str, dict[str, Any]]] = []
    for name, digest in sorted(record["ranks"].items()):
        try:
            listing = _patiently(lambda name=name: _get(filesystem, f"{place.path}/{name}"))  # type: ignore[misc]
        except FileNotFoundError:
            raise CheckpointError(f"{place.path}: {name} is missing") from None
        if hashlib.sha256(listing).hexdigest() != digest:
            raise CheckpointError(f"{place.path}: {name} is not the list that {COMPLETE} was written for")
        entries += sorted(json.loads(listing)["files"].items())
    infos = _patiently(lambda: filesystem.get_file_info([f"{place.path}/{name}" for name, _ in entries]))
    for (name, entry), info in zip(entries, infos, strict=True):
        if info.type != pafs.FileType.File or info.size != entry["bytes"]:
            raise CheckpointError(f"{place.path}: {name} has {info.size} bytes, {entry['bytes']} were written")
    for name, entry in entries[part::parts]:
        digest = _patiently(lambda name=name: _remote_sha256(filesystem, f"{place.path}/{name}"))  # type: ignore[misc]
        if digest != entry["sha256"]:
            raise CheckpointError(f"{place.path}: {name} has changed since it was written (its SHA-256 differs)")
    return record


def require_any(root: str) -> None:
    """Raise CheckpointError where no checkpoint of a run was ever finished."""
    filesystem, path = open_storage(root)
    found = places(filesystem, path)
    if not any(_exists(filesystem, f"{place.path}/{COMPLETE}") for place in found):
        raise CheckpointError(f"{root}: holds no whole checkpoint to go on from ({len(found)} unfinished)")


def root_of(run: Path, recorded: str) -> str:
    """Where the checkpoints of a stage's folder lie now: those inside it moved with it when it was finished."""
    inside = run / Path(recorded).name
    return str(inside) if "://" not in recorded and inside.is_dir() else recorded


def download(filesystem: pafs.FileSystem, path: str, to: Path) -> None:
    """Copy a checkpoint to a local folder."""
    shutil.rmtree(to, ignore_errors=True)
    pafs.copy_files(path, str(to), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem())


@contextmanager
def local_folder(where: str) -> Iterator[Path]:
    """A checkpoint's folder, downloaded for the time of the block where `where` is a URI. Raises CheckpointError."""
    if "://" not in where:
        yield Path(where)
        return
    filesystem, path = open_storage(where)
    with tempfile.TemporaryDirectory() as made:
        try:
            download(filesystem, path, Path(made) / Path(path).name)
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be downloaded ({error})") from None
        yield Path(made) / Path(path).name


def remove(filesystem: pafs.FileSystem, place: Place) -> None:
    """Delete a checkpoint, COMPLETE first: a deletion that is cut off leaves nothing that looks whole."""
    if _exists(filesystem, f"{place.path}/{COMPLETE}"):
        filesystem.delete_file(f"{place.path}/{COMPLETE}")
    remove_folder(filesystem, place.path)


def remove_folder(filesystem: pafs.FileSystem, path: str) -> None:
    """Delete a folder with all in it; one that is gone, or that nobody made (gs://), is no error."""
    with suppress(FileNotFoundError):
        filesystem.delete_dir(path)


def write_validation(filesystem: pafs.FileSystem, path: str, metrics: dict[str, float]) -> None:
    """Put the metrics of a validation beside the checkpoint in the folder `path`, if that is still there."""
    if _exists(filesystem, f"{path}/{COMPLETE}"):
        _patiently(lambda: _put(filesystem, f"{path}/{VALIDATION}", json.dumps(metrics).encode()))


def validation_of(filesystem: pafs.FileSystem, place: Place) -> dict[str, float] | None:
    """The metrics of a checkpoint's validation, {} if it failed; None if there was none, or it cannot be read."""
    try:
        measured: dict[str, float] = json.loads(_get(filesystem, f"{place.path}/{VALIDATION}"))
    except (OSError, ValueError):
        return None
    return measured


def prune(filesystem: pafs.FileSystem, root: str, keep: int, best: str | None, validated: bool = False) -> list[Place]:
    """Remove all whole checkpoints but the newest `keep` and the one with the best metric `best`; returns the removed.

    The newest are those of the last attempt: an earlier one's of a later step were not resumed from. Unfinished ones
    are left alone: another rank may be writing there. So are, where checkpoints are `validated`, at most MAX_PENDING
    that wait for it: they are validated in their order, so none that is older than one which was.
    """
    whole: list[tuple[Place, dict[str, Any]]] = []
    pending: list[Place] = []
    waiting = validated
    for place in sorted(places(filesystem, root), key=lambda place: (place.attempt, place.step), reverse=True):
        with suppress(CheckpointError, OSError):  # what cannot be read now is left alone
            metrics, measured = facts_of(filesystem, place).get("metrics", {}), validation_of(filesystem, place)
            whole.append((place, {**metrics, **(measured or {})}))
            waiting = waiting and measured is None
            pending += [place] if waiting else []
    kept = {place for place, _ in whole[:keep]} | set(pending[-MAX_PENDING:])
    scored = [(metrics[best], place) for place, metrics in whole if best in metrics]
    if scored:
        kept.add((min if best in LOWER_IS_BETTER else max)(scored)[1])
    removed = [place for place, _ in whole if place not in kept]
    for place in removed:
        with suppress(FileNotFoundError):  # a validation and an upload may prune at once
            remove(filesystem, place)
    return removed


def _patiently(action: Callable[[], T]) -> T:
    for attempt in range(ATTEMPTS - 1):
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(2**attempt)
    return action()


def _local_entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _copy(file: Path, filesystem: pafs.FileSystem, path: str) -> None:
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with file.open("rb") as source, filesystem.open_output_stream(path) as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def _put(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """A whole file or none: an object store's put is, a local file is renamed."""
    local = filesystem.type_name == "local"
    written = f"{path}.{uuid.uuid4().hex}.partial" if local else path
    with filesystem.open_output_stream(written) as target:
        target.write(content)
    if local:
        filesystem.move(written, path)


def _get(filesystem: pafs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as source:
        content: bytes = source.read()
    return content


def _exists(filesystem: pafs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type == pafs.FileType.File)


def _remote_sha256(filesystem: pafs.FileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
