"""Finished stages are found by their inputs' hash; what was cut off or damaged never passes for whole."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dtrpo_ray.stages import MANIFEST, Store


def quiet(text: str) -> None:
    del text


def make(folder: Path) -> dict[str, Any]:
    (folder / "out.txt").write_text("made")
    return {"rows": 1}


def fail(folder: Path) -> dict[str, Any]:
    raise AssertionError(f"{folder} should have been reused")


def test_the_same_inputs_are_made_once(tmp_path: Path) -> None:
    first = Store(tmp_path, announce=quiet).stage("s", {"a": 1}, ["*.txt"], make)
    again = Store(tmp_path, announce=quiet).stage("s", {"a": 1}, ["*.txt"], fail)
    assert (first.reused, again.reused) == (False, True)
    assert (first.key, first.digest, first.summary) == (again.key, again.digest, again.summary)


def test_two_commands_make_a_stage_once(tmp_path: Path) -> None:
    """The second waits for the first and finds its work, and says so."""
    said: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def slowly(folder: Path) -> dict[str, Any]:
        begun.set()
        assert go_on.wait(60)
        return make(folder)

    with ThreadPoolExecutor(2) as commands:
        first = commands.submit(Store(tmp_path, announce=quiet).stage, "s", {"a": 1}, ["*.txt"], slowly)
        assert begun.wait(60)
        announce = lambda text: said.append(text) or go_on.set()  # noqa: E731
        second = commands.submit(Store(tmp_path, announce=announce).stage, "s", {"a": 1}, ["*.txt"], fail)
        assert (first.result(60).reused, second.result(60).reused) == (False, True)
    assert said[0].endswith("another command is making it; waiting")
    assert "reused" in said[1]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_command_asks_for_a_stage_many_times_and_makes_it_once(tmp_path: Path, fresh: bool) -> None:
    Store(tmp_path, announce=quiet).stage("s", {}, ["*.txt"], make)
    made: list[Path] = []
    said: list[str] = []
    store = Store(tmp_path, fresh, said.append)
    for _ in range(3):
        assert store.stage("s", {}, ["*.txt"], lambda folder: made.append(folder) or make(folder)).reused != fresh
    assert (len(made), len(said)) == (int(fresh), 1)


def test_other_inputs_are_another_stage(tmp_path: Path) -> None:
    store = Store(tmp_path, announce=quiet)
    assert store.stage("s", {"a": 1}, ["*"], make).path != store.stage("s", {"a": 2}, ["*"], make).path


def test_an_interrupted_stage_is_not_finished(tmp_path: Path) -> None:
    store = Store(tmp_path, announce=quiet)

    def interrupted(folder: Path) -> dict[str, Any]:
        make(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.stage("s", {}, ["*.txt"], interrupted)
    assert not store.stage("s", {}, ["*.txt"], make).reused


@pytest.mark.parametrize("damage", ["change", "remove", "manifest"])
def test_a_damaged_stage_is_made_anew(tmp_path: Path, damage: str) -> None:
    said: list[str] = []
    store = Store(tmp_path, announce=said.append)
    path = store.stage("s", {}, ["*.txt"], make).path
    if damage == "change":
        (path / "out.txt").write_text("tampered")
    elif damage == "remove":
        (path / "out.txt").unlink()
    else:
        (path / MANIFEST).write_text('{"key":')
    assert not store.stage("s", {}, ["*.txt"], make).reused
    assert any("damaged" in line for line in said)


def test_fresh_starts_anew(tmp_path: Path) -> None:
    Store(tmp_path, announce=quiet).stage("s", {}, ["*.txt"], make)
    assert not Store(tmp_path, fresh=True, announce=quiet).stage("s", {}, ["*.txt"], make).reused
