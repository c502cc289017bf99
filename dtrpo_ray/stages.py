"""Finished work on disk: a stage is a folder named by the hash of all its inputs, sealed by a manifest.

A stage is made in `NAME-KEY.partial` and renamed after its manifest is written, so a folder with the final name is
complete. Training may resume in a `.partial` folder of the same key; nothing takes one for finished.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeAlias

from filelock import FileLock, Timeout

from dtrpo_ray.errors import ConfigError
from dtrpo_ray.files import partial_folder, sha256_file, sha256_json, write_json

MANIFEST = "stage.json"
CODE_CONTRACT = 15  # raise it when a stage's output for the same inputs changes

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
JsonObject: TypeAlias = Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage: `key` names its inputs, `digest` its outputs."""

    name: str
    key: str
    path: Path
    seconds: float
    reused: bool
    outputs: dict[str, str]
    summary: JsonObject = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over all output hashes, the input of later stages."""
        return sha256_json(self.outputs)

    def row(self) -> JsonObject:
        """Return the stage as commands print it in JSON."""
        facts = asdict(self)
        return {"stage": facts.pop("name"), "key": facts.pop("key"), "directory": str(facts.pop("path")), **facts}


class Store:
    """The stages of a storage path. A command looks for each stage once; with `fresh` it makes each once."""

    def __init__(self, root: Path, fresh: bool = False, announce: Callable[[str], None] = print) -> None:
        self.root, self.fresh, self.announce = root / "stages", fresh, announce
        self.known: dict[str, Stage] = {}  # by key, in the order they were asked for

    def make_folders(self) -> None:
        """Make the folders of stages and their locks. Raises ConfigError if that fails."""
        try:
            for folder in (self.root, self.root.with_name("locks")):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"storage = {str(self.root.parent)!r}: no folder to write in ({error})") from None

    def stage(self, name: str, inputs: JsonObject, outputs: Iterable[str], make: Callable[[Path], JsonObject]) -> Stage:
        """Return the finished stage of these inputs, or make it: `make(folder)` writes and returns a summary.

        `outputs` are the globs of files that later stages read, hashed into the manifest; a finished stage is reused
        only if each hash still holds.
        """
        key = sha256_json({"stage": name, "inputs": inputs, "contract": CODE_CONTRACT})
        if key in self.known:
            return self.known[key]
        self.make_folders()
        path = self.root / f"{name}-{key[:12]}"
        partial = partial_folder(path)
        with self._lock(path.name):
            if self.fresh:
                for old in (path, partial):
                    shutil.rmtree(old, ignore_errors=True)
            elif found := self._find(name, key, path):
                self.announce(f"{name}: reused {key[:12]} ({path})")
                return self.known.setdefault(key, found)
            partial.mkdir(exist_ok=True)
            began = time.perf_counter()
            summary = make(partial)
            seconds = time.perf_counter() - began
            files = [file for glob in outputs for file in sorted(partial.glob(glob))]
            hashes = {str(file.relative_to(partial)): sha256_file(file) for file in files}
            facts = {"seconds": seconds, "outputs": hashes, "summary": summary}
            write_json(partial / MANIFEST, {"name": name, "key": key, "inputs": inputs, **facts})
            partial.replace(path)
        self.announce(f"{name}: made {key[:12]} in {seconds:.1f} s ({path})")
        self.known[key] = Stage(name, key, path, seconds, reused=False, outputs=hashes, summary=summary)
        return self.known[key]

    def _lock(self, name: str) -> AbstractContextManager[object]:
        """Lock a stage, so that a second command waits and then finds it. A dead process holds no lock."""
        lock = FileLock(self.root.with_name("locks") / f"{name}.lock")
        try:
            return lock.acquire(timeout=0)
        except Timeout:
            self.announce(f"{name}: another command is making it; waiting")
            return lock.acquire()

    def _find(self, name: str, key: str, path: Path) -> Stage | None:
        with suppress(FileNotFoundError, json.JSONDecodeError, KeyError):
            record = json.loads((path / MANIFEST).read_text())
            broken = [f for f, digest in record["outputs"].items() if sha256_file(path / f) != digest]
            if record["key"] == key and not broken:
                facts = {name: record[name] for name in ("seconds", "outputs", "summary")}
                return Stage(name, key, path, reused=True, **facts)
        if path.exists():
            self.announce(f"{name}: {path} is damaged (its hashes do not hold); making it anew")
            shutil.rmtree(path)
        return None
