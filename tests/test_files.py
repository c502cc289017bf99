"""JSON files of ours: written whole, read with a clear error, hashed by their content."""

import json
from pathlib import Path

import pytest

from dtrpo_ray.errors import DataError
from dtrpo_ray.files import read_json, sha256_json, whole_file, write_json


def test_json_is_written_whole_and_read_with_a_clear_error(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "y.json").write_text("{")
    with pytest.raises(DataError, match=r"y\.json"):
        read_json(tmp_path / "y.json")
    assert sha256_json({"a": 1, "b": 2}) == sha256_json(json.loads('{"b": 2, "a": 1}'))


def write_half(path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_text("{")
        raise TypeError


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_half(tmp_path / "x.json")
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert read_json(tmp_path / "x.json") == {"a": 1}
