"""Training checkpoints on any filesystem (local, s3, gs): sealed, verified, found. Knows neither torch nor ray.

A checkpoint is a folder `step-00000040` (`step-00000040-2` if a later attempt wrote that step again). Every rank
uploads its own files and, after them, `rank-R.json` with their sizes and SHA-256; a rank that finds all lists present
writes COMPLETE, which holds the hashes of the lists and rank 0's facts: one hash chain covers every byte but COMPLETE's
own. A checkpoint without COMPLETE, or with a broken chain, is never resumed from.
"""

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypedDict, TypeVar, cast

from pyarrow import fs as pafs

from dtrpo_ray.errors import CheckpointError
from dtrpo_ray.files import open_pyarrow, sha256_file, sha256_stream, whole_file

COMPLETE = "COMPLETE"
SCORES_FILE = "validation.json"  # beside the sealed files, since it is measured after they were sealed
FACTS_SCHEMA = 1
ATTEMPTS = 5
MAX_PENDING = 8  # checkpoints that are kept because their validation is still to come
LOWER_IS_BETTER = ("loss", "nll", "nll_chosen", "held_out_loss")
_NAME = re.compile(r"^step-(\d{8})(?:-(\d+))?$")
_CHUNK_BYTES = 1 << 22
P = ParamSpec("P")
T = TypeVar("T")


class PlanFacts(TypedDict):
    """The rows that were read: the digest of their order, and how many of each epoch."""

    digest: str
    consumed: list[int]


class CheckpointFacts(TypedDict):
    """Rank 0's description of a checkpoint, as JSON in COMPLETE; `config` is a TrainConfig."""

    step: int
    num_workers: int
    zero_stage: int
    precision: str
    label: str
    base: str
    identity: dict[str, str]
    config: dict[str, Any]
    seed: int
    plan: PlanFacts
    metrics: dict[str, float]


class SealedFacts(CheckpointFacts):
    """COMPLETE: the facts, and the SHA-256 of each rank's list of files."""

    schema: int
    ranks: dict[str, str]


class _FileEntry(TypedDict):
    bytes: int
    sha256: str


class _RankListing(TypedDict):
    """The files that a rank uploaded, in its rank-R.json."""

    rank: int
    facts: CheckpointFacts
    files: dict[str, _FileEntry]


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A checkpoint folder by name: its optimizer step, and the attempt of the run that wrote it."""

    step: int
    attempt: int
    path: str


def folder_name(step: int, attempt: int) -> str:
    """The name of a checkpoint folder: unique for each step of each attempt."""
    return f"step-{step:08d}" + (f"-{attempt}" if attempt else "")


def open_storage(where: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem and the path in it of a local path or a URI (s3://, gs://, file://).

    Raises CheckpointError for a URI that pyarrow cannot open.
    """
    try:
        return open_pyarrow(where)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{where}: cannot be opened ({error}); give a path or an s3:// or gs:// URI") from None


def write(folder: Path, filesystem: pafs.FileSystem, path: str, rank: int, facts: CheckpointFacts) -> None:
    """Upload one rank's files, then its list, then COMPLETE if this was the last rank.

    COMPLETE carries the facts of rank 0, so that two ranks which write it at once write the same. A failing write is
    tried ATTEMPTS times, one, two, four, ... seconds apart; then its OSError is raised.
    """
    files = {
        str(f.relative_to(folder)): _FileEntry(bytes=f.stat().st_size, sha256=sha256_file(f))
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }
    for name in files:
        _retry(_copy, folder / name, filesystem, f"{path}/{name}")
    _retry(_put, filesystem, f"{path}/rank-{rank}.json", _RankListing(rank=rank, facts=facts, files=files))
    names = [f"rank-{r}.json" for r in range(facts["num_workers"])]
    if all(_retry(_exists, filesystem, f"{path}/{name}") for name in names):
        listings = {name: _retry(_get, filesystem, f"{path}/{name}") for name in names}
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in listings.items()}
        record = {"schema": FACTS_SCHEMA, **json.loads(listings[names[0]])["facts"], "ranks": hashes}
        _retry(_put, filesystem, f"{path}/{COMPLETE}", record)


def places(filesystem: pafs.FileSystem, root: str) -> list[Place]:
    """List every checkpoint folder under `root`, complete or not, the newest first.

    They are found by the files in them: on gs:// a folder that nobody created is in no listing of its parent.
    """
    entries = filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True, recursive=True))
    inside = [(e.path.removeprefix(f"{root}/").partition("/"), e.type == pafs.FileType.Directory) for e in entries]
    folders = {name for (name, slash, _), is_folder in inside if slash or is_folder}
    named = [(_NAME.match(name), f"{root}/{name}") for name in folders]
    found = [Place(int(match[1]), int(match[2] or 0), path) for match, path in named if match]
    return sorted(found, reverse=True)


def facts_of(filesystem: pafs.FileSystem, place: Place) -> SealedFacts:
    """Read COMPLETE. Raises CheckpointError if it is missing, damaged or of another schema.

    Here and in `verify`, a failing read is tried again as a write is; then its OSError is raised, which says nothing
    about the checkpoint.
    """
    try:
        record = json.loads(_retry(_get, filesystem, f"{place.path}/{COMPLETE}"))
        schema, missing = record["schema"], SealedFacts.__required_keys__ - record.keys()
    except FileNotFoundError:
        raise CheckpointError(f"{place.path}: no {COMPLETE}: it was never finished") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place.path}: {COMPLETE} is damaged ({error!r})") from None
    if schema != FACTS_SCHEMA:
        raise CheckpointError(f"{place.path}: {COMPLETE} has schema {schema}, this version reads {FACTS_SCHEMA}")
    if missing:
        raise CheckpointError(f"{place.path}: {COMPLETE} is damaged (lacks {', '.join(sorted(missing))})")
    return cast(SealedFacts, record)


def verify(filesystem: pafs.FileSystem, place: Place, part: int = 0, parts: int = 1) -> SealedFacts:
    """Check the whole chain, and the contents of every `parts`-th file from `part` on; returns COMPLETE's facts.

    Raises CheckpointError naming the first file that is missing, of another size or of another hash.
    """
    record = facts_of(filesystem, place)
    entries: list[tuple[str, _FileEntry]] = []
    for name, digest in sorted(record["ranks"].items()):
        try:
            listing = _retry(_get, filesystem, f"{place.path}/{name}")
        except FileNotFoundError:
            raise CheckpointError(f"{place.path}: {name} is missing") from None
        if hashlib.sha256(listing).hexdigest() != digest:
            raise CheckpointError(f"{place.path}: {name} is not the list that {COMPLETE} was written for")
        entries += sorted(json.loads(listing)["files"].items())
    infos = _retry(filesystem.get_file_info, [f"{place.path}/{name}" for name, _ in entries])
    for (name, entry), info in zip(entries, infos, strict=True):
        if info.type != pafs.FileType.File or info.size != entry["bytes"]:
            raise CheckpointError(f"{place.path}: {name} has {info.size} bytes, {entry['bytes']} were written")
    for name, entry in entries[part::parts]:
        if _retry(_remote_sha256, filesystem, f"{place.path}/{name}") != entry["sha256"]:
            raise CheckpointError(f"{place.path}: {name} has changed since it was written (its SHA-256 differs)")
    return record


def require_any(root: str) -> None:
    """Raise CheckpointError where no checkpoint of a run was ever finished."""
    filesystem, path = open_storage(root)
    found = places(filesystem, path)
    if not any(_exists(filesystem, f"{place.path}/{COMPLETE}") for place in found):
        raise CheckpointError(f"{root}: holds no whole checkpoint to go on from ({len(found)} unfinished)")


def root_of(run: Path, recorded: str) -> str:
    """Return the current place of a stage's checkpoints: those inside its folder moved with it when it finished."""
    inside = run / Path(recorded).name
    return str(inside) if "://" not in recorded and inside.is_dir() else recorded


def download(filesystem: pafs.FileSystem, path: str, to: Path) -> None:
    """Copy a checkpoint to a local folder."""
    shutil.rmtree(to, ignore_errors=True)
    pafs.copy_files(path, str(to), source_filesystem=filesystem, destination_filesystem=pafs.LocalFileSystem())


@contextmanager
def local_folder(where: str) -> Iterator[Path]:
    """Yield a checkpoint's folder, downloaded for the block's duration if `where` is a URI. Raises CheckpointError."""
    if "://" not in where:
        yield Path(where)
        return
    filesystem, path = open_storage(where)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            download(filesystem, path, Path(scratch) / Path(path).name)
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be downloaded ({error})") from None
        yield Path(scratch) / Path(path).name


def remove(filesystem: pafs.FileSystem, place: Place) -> None:
    """Delete a checkpoint, COMPLETE first: a deletion that is cut off leaves nothing that looks whole."""
    if _exists(filesystem, f"{place.path}/{COMPLETE}"):
        filesystem.delete_file(f"{place.path}/{COMPLETE}")
    remove_folder(filesystem, place.path)


def remove_folder(filesystem: pafs.FileSystem, path: str) -> None:
    """Delete a folder with all in it; one that is gone, or was never created (gs://), is no error."""
    with suppress(FileNotFoundError):
        filesystem.delete_dir(path)


def write_validation(filesystem: pafs.FileSystem, path: str, metrics: dict[str, float]) -> None:
    """Put the metrics of a validation beside the checkpoint in the folder `path`, if that is still there."""
    if _exists(filesystem, f"{path}/{COMPLETE}"):
        _retry(_put, filesystem, f"{path}/{SCORES_FILE}", metrics)


def validation_of(filesystem: pafs.FileSystem, place: Place) -> dict[str, float] | None:
    """Return the metrics of a checkpoint's validation, {} if it failed, None if there is none that can be read."""
    try:
        return cast(dict[str, float], json.loads(_get(filesystem, f"{place.path}/{SCORES_FILE}")))
    except (OSError, ValueError):
        return None


def prune(filesystem: pafs.FileSystem, root: str, keep: int, best: str | None, validated: bool = False) -> list[Place]:
    """Remove all whole checkpoints but the newest `keep` and the one with the best metric `best`; returns the removed.

    The newest are those of the last attempt: later steps of an earlier one were not resumed from. Unfinished
    checkpoints stay: another rank may be writing there. Where checkpoints are `validated`, at most MAX_PENDING that
    still wait for it stay too; they are validated in order, so none waits that is older than a validated one.
    """
    whole: list[tuple[Place, dict[str, float]]] = []
    pending: list[Place] = []
    waiting = validated
    for place in sorted(places(filesystem, root), key=lambda place: (place.attempt, place.step), reverse=True):
        with suppress(CheckpointError, OSError):  # what cannot be read now is left alone
            metrics, measured = facts_of(filesystem, place)["metrics"], validation_of(filesystem, place)
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


def _retry(action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    for attempt in range(ATTEMPTS - 1):
        try:
            return action(*args, **kwargs)
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(2**attempt)
    return action(*args, **kwargs)


def _copy(file: Path, filesystem: pafs.FileSystem, path: str) -> None:
    filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with file.open("rb") as source, filesystem.open_output_stream(path) as target:
        shutil.copyfileobj(source, target, _CHUNK_BYTES)


def _put(filesystem: pafs.FileSystem, path: str, value: Mapping[str, Any]) -> None:
    """Write JSON as a whole file or not at all: an object store's put is atomic, a local file is renamed."""
    whole = whole_file(Path(path)) if filesystem.type_name == "local" else nullcontext(path)
    with whole as name, filesystem.open_output_stream(str(name)) as target:
        target.write(json.dumps(value).encode())


def _get(filesystem: pafs.FileSystem, path: str) -> bytes:
    with filesystem.open_input_stream(path) as source:
        return cast(bytes, source.read())


def _exists(filesystem: pafs.FileSystem, path: str) -> bool:
    return bool(filesystem.get_file_info(path).type == pafs.FileType.File)


def _remote_sha256(filesystem: pafs.FileSystem, path: str) -> str:
    with filesystem.open_input_stream(path) as source:
        return sha256_stream(source)
