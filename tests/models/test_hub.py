"""A model by its hub id, against a server with the hub's paths: fetched once, without code or pickles, and offline."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.hub import ModelSource

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{ }",
    "merges.txt": b"a b",
    "chat_template.jinja": b"{{ messages }}",
    "modeling_remote.py": b"raise SystemExit",
    "pytorch_model.bin": b"pickle",
    "onnx/model.safetensors": b"others",
}
SCRIPT = """
import sys
from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.hub import ModelSource
for where in sys.argv[1:]:
    try:
        source = ModelSource.find(where)
        print(source.name, source.commit, *sorted(str(f.relative_to(source.path)) for f in source.path.rglob("*")))
    except ModelError as error:
        print(error)
"""


class Hub(ThreadingHTTPServer):
    """The hub's answers about one model, org/tiny, of which the branch `main` and the tag `v1` may differ."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs = {"main": self.commit(FILES), "v1": self.commit({**FILES, "model.safetensors": b"older"})}
        self.downloads: list[str] = []

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr(files).encode()).hexdigest()
        self.commits[name] = files
        return name


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        path = self.path.partition("?")[0].strip("/").split("/")
        commit, body = "", None
        if path[:4] == ["api", "models", "org", "tiny"]:
            commit = self.server.refs.get(path[5], path[5])
            files = self.server.commits.get(commit, {})
            tree = [{"type": "file", "path": n, "size": len(b), "oid": sha1(b)} for n, b in files.items()]
            known = {"revision": {"id": "org/tiny", "sha": commit, "siblings": []}, "tree": tree}
            body = json.dumps(known[path[4]]).encode() if files else None
        elif path[:3] == ["org", "tiny", "resolve"]:
            commit, name = path[3], "/".join(path[4:])
            body = self.server.commits[commit].get(name)
            self.server.downloads += [name] if self.command == "GET" else []
        self.send_response(200 if body is not None else 404)
        if body is None:
            self.send_header("X-Error-Code", "RevisionNotFound" if "tiny" in path else "RepoNotFound")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{sha1(body or b"")}"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_GET = do_HEAD

    def log_message(self, format: str, *args: object) -> None:
        pass


def sha1(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def find(hub: Hub, home: Path, *where: str, **more: str) -> list[str]:
    """What a process says that looks for models, with the hub's environment variables and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    mine = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home)}
    words = [sys.executable, "-c", SCRIPT, *where]
    done = subprocess.run(words, env={**kept, **mine, **more}, capture_output=True, text=True, cwd=home, check=True)
    return done.stdout.splitlines()


def test_a_model_is_fetched_once_without_code_and_pickles_and_then_read_offline(hub: Hub, tmp_path: Path) -> None:
    main, wanted = hub.refs["main"], "chat_template.jinja config.json merges.txt model.safetensors tokenizer.json"
    [first] = find(hub, tmp_path, "org/tiny")
    assert first == f"org/tiny@{main} {main} {wanted}"
    assert sorted(hub.downloads) == wanted.split()
    assert find(hub, tmp_path, "org/tiny", HF_HUB_OFFLINE="1") == [first]
    old = hub.refs["v1"]
    again, *olds = find(hub, tmp_path, "org/tiny", "org/tiny@v1", f"org/tiny@{old}")
    assert (again, olds) == (first, [f"org/tiny@{old} {old} {wanted}"] * 2)
    assert sorted(hub.downloads) == sorted([*wanted.split(), "model.safetensors"])  # the only file that v1 has changed
    hub.refs["main"] = old  # the branch moves: so does the model that its name means, but not that of a commit
    assert find(hub, tmp_path, "org/tiny", f"org/tiny@{main}") == [olds[0], first]


def test_what_the_hub_does_not_give_is_one_message_with_a_remedy(hub: Hub, tmp_path: Path) -> None:
    absent = find(hub, tmp_path, "org/absent", "org/tiny@v9") + find(hub, tmp_path, "org/tiny", HF_HUB_OFFLINE="1")
    for where, said in zip(("org/absent", "org/tiny@v9", "org/tiny"), absent, strict=True):
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        assert said.startswith(f"{where}: no such directory, and not to be had from {endpoint} (")
        assert said.endswith("or copy the files here, and give their directory")
    hub.refs["main"] = hub.commit({name: body for name, body in FILES.items() if not name.endswith("safetensors")})
    assert find(hub, tmp_path, "org/tiny") == [
        "org/tiny: has no config.json or no *.safetensors; other weights are not read"
    ]


def test_a_directory_is_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert ModelSource.find("org/tiny") == ModelSource(tmp_path / "org" / "tiny", "tiny")
    for absent in ("./absent/model", "org/absent", "models/absent", "absent", "/absent/model", "a/b/c"):
        with pytest.raises(ModelError, match=f"^{absent}: no such model directory; a hub id is"):
            ModelSource.find(absent)
