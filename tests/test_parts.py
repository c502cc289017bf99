"""Parts of work on a pool of actors: each once, whatever is killed, and an error that names the part to mend."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dtrpo_ray.config import ClusterConfig
from dtrpo_ray.errors import DataError
from dtrpo_ray.parts import Pool, run_parts

pytestmark = pytest.mark.usefixtures("local_ray")
ONE = ClusterConfig(num_actors=1)


class Writer:
    """Writes its part to a file, counting the tries; what `trouble` names happens once."""

    def __init__(self, trouble: str, at: int) -> None:
        self.trouble, self.at = trouble, at

    def __call__(self, part: int, out: Path) -> dict[str, Any]:
        with (out / "tries.txt").open("a") as tries:
            tries.write(f"{part}\n")
        if part == self.at and self.trouble == "kill" and not (out / "killed").exists():
            (out / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if part == self.at and self.trouble == "unreadable" and not (out / "mended").exists():
            raise DataError(f"shard-{part}: cannot be read")
        (out / f"part-{part}.txt").write_text(str(part * part))
        return {"rows": 1, "square": part * part}


def pool(trouble: str = "none", at: int = 2) -> Pool:
    return Pool(Writer, {"trouble": trouble, "at": at})


def tries(out: Path) -> list[int]:
    return sorted(int(line) for line in (out / "tries.txt").read_text().split())


def test_a_worker_killed_in_the_middle_loses_and_repeats_nothing_that_is_done(tmp_path: Path) -> None:
    done = run_parts(range(4), pool("kill"), tmp_path, ONE, "squares")
    assert [part["square"] for part in done] == [0, 1, 4, 9]
    assert sorted(path.name for path in tmp_path.glob("part-*")) == [f"part-{i}.txt" for i in range(4)]
    assert tries(tmp_path).count(2) == 2  # the killed try and the next


def test_an_unreadable_part_is_named_and_a_rerun_does_the_rest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shard-2: cannot be read"):
        run_parts(range(4), pool("unreadable"), tmp_path, ONE, "squares")
    before = tries(tmp_path)
    (tmp_path / "mended").touch()
    done = run_parts(range(4), pool("unreadable"), tmp_path, ONE, "squares")
    assert [part["square"] for part in done] == [0, 1, 4, 9]
    assert tries(tmp_path).count(0) == before.count(0) == 1
    again = run_parts(range(4), pool(), tmp_path, ONE, "squares")  # all is done: no worker starts
    assert again == done
