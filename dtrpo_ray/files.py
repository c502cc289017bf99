"""Files on disk and on object stores: open, hash, read JSON, and write so that no half-written file has its name."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from dtrpo_ray.errors import DataError


def join_path(where: str, name: str) -> str:
    """Return the path or URI of `name` in a folder; the options of a URI (`?region=...`) stay at its end."""
    path, mark, options = where.partition("?") if "://" in where else (where, "", "")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def open_pyarrow(where: str) -> tuple[pafs.FileSystem, str]:
    """Return pyarrow's filesystem of a path or URI (s3://, gs://, file://), and the path in it.

    Raises ValueError or OSError for a URI that pyarrow cannot open.
    """
    filesystem, path = pafs.FileSystem.from_uri(where if "://" in where else str(Path(where).resolve()))
    return filesystem, path


def open_filesystem(where: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a path or URI and the path in it: pyarrow's own, else fsspec's. Raises DataError."""
    if where.startswith("hf://"):
        remedy = "fetch it with `hf download REPO --repo-type dataset --local-dir data/NAME`"
        raise DataError(f"{where}: hf:// is not read; {remedy}, and name the local files")
    try:
        return open_pyarrow(where)
    except (ValueError, OSError) as refused:
        try:
            import fsspec

            filesystem, path = fsspec.core.url_to_fs(where)
        except (ImportError, ValueError, OSError) as error:
            raise DataError(f"{where}: cannot be opened ({refused}; {error})") from None
        return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def sha256_json(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_stream(stream: BufferedReader | pa.NativeFile) -> str:
    """Return the SHA-256 of the bytes of an open file, pyarrow's streams included."""
    return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a local file's bytes."""
    with path.open("rb") as file:
        return sha256_stream(file)


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that is not empty. Raises DataError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    if not lines:
        raise DataError(f"{path}: is empty")
    return lines


def read_json(path: Path) -> Any:
    """Read a JSON file that we wrote. Raises DataError naming it."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: missing or damaged ({error})") from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a name to write to, which becomes `path` once the block ends; however many processes write it at once."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder to fill, which becomes `path`, in place of any old one, once the block ends."""
    partial = partial_folder(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(path, ignore_errors=True)
    partial.replace(path)


def partial_folder(path: Path) -> Path:
    """Return the name of a folder while it is being filled."""
    return path.with_name(path.name + ".partial")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
