"""Files -> tables, part by part: counts that add up, duplicates across parts, buckets, and cuts at any point."""

import gzip
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paths import ROOT
from pyarrow import feather

from dtrpo_ray.config.load import load_job
from dtrpo_ray.config.task import PreferencesTask, TrajectoriesTask
from dtrpo_ray.config.train import SFTConfig
from dtrpo_ray.data import prepare, tables
from dtrpo_ray.data.formats import files
from dtrpo_ray.data.schemas import EXAMPLE, PREFERENCE, TRAJECTORY
from dtrpo_ray.data.tables import check_folder, read_manifest, read_table
from dtrpo_ray.data.tasks.puzzles import generate_puzzles
from dtrpo_ray.errors import DataError
from dtrpo_ray.models.tokenizer import character_tokenizer, encode_prompt, eos_token_id, load_tokenizer, turn_end_id

GRID: dict[str, Any] = {"block_size": 4, "block_origin": "global", "shift": 0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer("0123456789").save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """23 rows in parts of 5: row 7 is no JSON, 9 has a letter, 12 and 20 repeat row 1, 13 repeats row 2."""
    monkeypatch.setattr(files, "PART_ROWS", 5)
    rows = [json.dumps({"prompt": f"{i}", "chosen": "1" * (i + 1), "rejected": "2"}) for i in range(23)]
    rows[6], rows[8], rows[11], rows[19] = "{", rows[8].replace("11", "1x"), rows[0], rows[0]
    rows[12] = rows[1]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def task(path: Path, **changes: Any) -> PreferencesTask:
    return PreferencesTask.model_validate({"type": "preferences", "files": [str(path)], **changes})


def imported(config: PreferencesTask | TrajectoriesTask, tokenizer: Path, out: Path, schema: Any) -> dict[str, Any]:
    hashes = {file: f"hash of {file}" for file in config.files}
    importer = prepare.Importer(prepare.ImportJob(config, tokenizer, GRID, hashes))
    out.mkdir(exist_ok=True)
    done = [importer(part, out) for part in prepare.import_parts(config)]
    return prepare.finish_import(done, schema, out)


def test_every_row_ends_in_one_place_and_the_counts_add_up(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "table"
    counts = imported(task(source), tokenizer, out, PREFERENCE)
    refused = {"duplicate row": 3, "bad JSON": 1, "cannot be tokenized": 1}
    assert counts == {"rows": 23, "good": 18, "refused": refused}
    table = read_table(out, PREFERENCE)
    lines = sorted(int(origin.rsplit(":", 1)[1]) for origin in table["origin"].to_pylist())
    assert lines == [n for n in range(1, 24) if n not in (7, 9, 12, 13, 20)]
    assert set(table["data_hash"].to_pylist()) == {f"hash of {source}"}
    quarantine = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(int(row["origin"].rsplit(":", 1)[1]) for row in quarantine) == [7, 9, 12, 13, 20]
    assert (read_manifest(out) or {})["counts"] == counts
    assert check_folder(out, PREFERENCE).totals == {"rows": 18, "good": 18, "refused": {}}


def test_what_is_ignored_or_truncated_is_counted_and_rows_are_shown(tokenizer: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "pairs.jsonl", tmp_path / "table"
    rows: list[dict[str, Any]] = [{"prompt": f"{i}" * (i + 1), "chosen": "1", "rejected": "2"} for i in range(5)]
    rows[0] |= {"source": "a"}
    rows[4] |= {"notes": "b"}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = imported(task(path, max_prompt_tokens=2), tokenizer, out, PREFERENCE)
    refused = {"unknown column": 1}
    assert counts == {"rows": 5, "good": 4, "refused": refused, "ignored": {"source": 1}, "truncated": 2}
    manifest = read_manifest(out) or {}
    assert manifest["counts"] == counts
    assert manifest["examples"][1] == {"prompt": "11", "chosen": "1<|endoftext|>", "rejected": "2<|endoftext|>"}
    assert len(manifest["examples"]) == 3
    job = tmp_path / "job.toml"
    job.write_text(f"""
        name = "check"
        task = {{type = "preferences", files = ["{path}"], max_prompt_tokens = 2}}
        model = {{tokenizer = "{tokenizer}", init = {{hidden_size = 16, num_layers = 1, num_heads = 1}}}}
        train = {{objective = {{schedule = "random"}}}}
    """)
    (report,) = prepare.check_job(load_job(job, ()))
    assert (report.totals, list(report.examples)) == (counts, manifest["examples"])


def test_a_prompt_shorter_than_what_its_answers_share_is_a_warning(tmp_path: Path) -> None:
    path, shared = tmp_path / "pairs.jsonl", "The capital of France, which you ask for, is "
    path.write_text(json.dumps({"prompt": "Of", "chosen": shared + "Paris", "rejected": shared + "Lyon"}) + "\n")
    assert "begin alike" in prepare.check_data(str(path))[0].warnings[0]


def test_rows_of_like_length_share_a_file(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    imported(task(source), tokenizer, tmp_path / "table", PREFERENCE)
    for file in (tmp_path / "table").glob("part-*.parquet"):
        bucket = int(file.stem.rsplit("-", 1)[1])
        for row in pq.read_table(file).to_pylist():
            tokens = len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
            assert bucket // 2 < tokens <= bucket


def dropping_once() -> Any:
    """`prepare._drop` until the second share that has rows to go."""
    real, dropped = prepare._drop, []

    def drop(doomed: dict[str, Any], out: Path) -> None:
        if doomed and dropped:
            raise KeyboardInterrupt
        dropped.extend(doomed)
        real(doomed, out)

    return drop


@pytest.mark.parametrize("cut", ["nothing", "the last part", "two drops", "the duplicates", "the manifest"])
@pytest.mark.parametrize("ids_at_once", [3, 2_000_000])
def test_a_cut_off_import_ends_in_the_same_table(
    source: Path, tokenizer: Path, tmp_path: Path, cut: str, ids_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are written again under the same names, and what was marked to go goes once, however the ids are shared."""
    whole, out = tmp_path / "whole", tmp_path / "table"
    counts = imported(task(source), tokenizer, whole, PREFERENCE)
    monkeypatch.setattr(tables, "IDS_AT_ONCE", ids_at_once)
    importer = prepare.Importer(prepare.ImportJob(task(source), tokenizer, GRID, {str(source): f"hash of {source}"}))
    parts = prepare.import_parts(task(source))
    assert len(parts) == 5
    out.mkdir()
    done = [importer(part, out) for part in parts]
    if cut == "the last part":
        done[-1] = importer(parts[-1], out)
    if cut == "two drops":
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "_drop", dropping_once())
            with suppress(KeyboardInterrupt):
                prepare.finish_import(done, PREFERENCE, out)
    if cut in ("the duplicates", "the manifest"):
        prepare.finish_import(done, PREFERENCE, out)
        (out / "manifest.json").unlink()
    if cut == "the duplicates":  # one of two files was rewritten when it was cut: put the other back
        fresh = tmp_path / "fresh"
        fresh.mkdir()
        importer(parts[3], fresh)
        for file in fresh.glob("part-*.parquet"):
            file.replace(out / file.name)
    assert prepare.finish_import(done, PREFERENCE, out) == counts
    assert read_table(out, PREFERENCE).equals(read_table(whole, PREFERENCE))
    dropped = [bool(json.loads(file.read_text())) for file in out.glob("duplicates-*.json")]
    assert (len(dropped), sum(dropped)) == ((7, 2) if ids_at_once == 3 else (1, 1))
    assert (out / "quarantine.jsonl").read_text().count("duplicate row") == 3


def test_strict_stops_at_the_first_bad_row_and_max_rows_reads_no_further(
    source: Path, tokenizer: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:7: bad JSON: .* \(strict\)"):
        imported(task(source, strict=True), tokenizer, tmp_path / "strict", PREFERENCE)
    counts = imported(task(source, strict=True, max_rows=6), tokenizer, tmp_path / "six", PREFERENCE)
    assert counts == {"rows": 6, "good": 6, "refused": {}}


def test_responses_become_trajectories_and_unpaired_rows_count_two_to_a_pair(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps({"full_output": ["34", "5"], "step_map": [[1, 2], [1, 2, 3]], "prompt": "12"}) + "\n")
    config = TrajectoriesTask.model_validate({"type": "trajectories", "files": [str(path)]})
    counts = imported(config, tokenizer, tmp_path / "table", TRAJECTORY)
    assert counts == {"rows": 2, "good": 1, "refused": {"lengths differ": 1}}
    assert read_table(tmp_path / "table", TRAJECTORY)["steps"].to_pylist() == [[1, 2]]
    path = tmp_path / "kto.jsonl"
    rows = [{"prompt": "1", "completion": str(i), "label": i < 2} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = imported(task(path), tokenizer, tmp_path / "pairs", PREFERENCE)
    assert counts == {"rows": 3, "good": 2, "refused": {"no partner": 1}}
    counts = imported(task(path, max_rows=2), tokenizer, tmp_path / "two", PREFERENCE)  # both good: rows, not pairs
    assert counts == {"rows": 2, "good": 0, "refused": {"no partner": 2}}


def test_a_file_with_a_plus_in_its_name_is_counted_like_any_other(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a + b.jsonl"
    pair = {"prompt": "1", "chosen": "2", "rejected": "3"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (pair, pair | {"prompt": "4"}, pair)))
    counts = imported(task(path), tokenizer, tmp_path / "table", PREFERENCE)
    assert counts == {"rows": 3, "good": 2, "refused": {"duplicate row": 1}}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.parquet", "rows.arrow"])
def test_max_rows_counts_rows_of_any_kind_of_file(tokenizer: Path, tmp_path: Path, name: str) -> None:
    path, rows = tmp_path / name, [{"prompt": f"{i}", "chosen": "1", "rejected": "2"} for i in range(9)]
    lines = "\n\n".join(json.dumps(row) for row in rows)  # blank lines are no rows
    if name.endswith((".parquet", ".arrow")):
        table = pa.Table.from_pylist(rows)
        pq.write_table(table, path) if name.endswith(".parquet") else feather.write_feather(table, path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(rows) if name.endswith(".json") else lines)
    config = PreferencesTask.model_validate({"type": "preferences", "files": [str(path)] * 2, "max_rows": 13})
    counts = imported(config, tokenizer, tmp_path / "table", PREFERENCE)
    assert counts == {"rows": 13, "good": 9, "refused": {"duplicate row": 4}}


@pytest.mark.parametrize("ending", [".jsonl", ".parquet", ".jsonl.gz"])
@pytest.mark.parametrize(
    ("weights", "most", "read"),
    [((3, 1), None, [9, 3]), ((0.3, 0.1), None, [9, 3]), ((1, 1), 8, [4, 4]), ((1, 1), None, [9, 9])],
)
def test_a_mixture_reads_its_files_in_proportion_and_tells_their_shares(
    tokenizer: Path, tmp_path: Path, ending: str, weights: Any, most: int | None, read: list[int]
) -> None:
    """Row 2 of the second file repeats a row of the first: it goes, and the shares are of what is left."""
    paths = [tmp_path / f"{name}{ending}" for name in "ab"]
    for at, path in enumerate(paths):
        rows = [{"prompt": f"{at}{i}", "chosen": "1", "rejected": "2"} for i in range(9 + at)]
        rows[1] |= {"prompt": "01"}
        write(path, rows)
    config = task(paths[0], files=[str(path) for path in paths], weights=weights, max_rows=most)
    counts = imported(config, tokenizer, tmp_path / "table", PREFERENCE)
    assert counts["rows"] == sum(read)
    assert counts["refused"] == {"duplicate row": 1}
    assert counts["files"] == {str(paths[0]): read[0], str(paths[1]): read[1] - 1}
    assert (read_manifest(tmp_path / "table") or {})["counts"] == counts
    assert f"{read[0] / (sum(read) - 1):.1%} of the table, {read[0]} rows: {paths[0]}" in tables.count_lines(counts)[-2]


def write(path: Path, rows: list[Any]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def test_weights_are_one_for_each_file_and_leave_a_row_of_each(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [{"prompt": "1", "chosen": "1", "rejected": "2"}])
    for weights, message in (([1, 2], "weights has 2 numbers for 1 of files"), ([0], "must be above 0")):
        with pytest.raises(ValueError, match=message):
            task(path, weights=weights)
    with pytest.raises(DataError, match=r"no row of it would be read"):
        prepare.import_parts(task(path, files=[str(path)] * 2, weights=[1, 5]))


@pytest.mark.parametrize("origin", ["global", "response"])
@pytest.mark.parametrize("puzzle", ["sudoku", "countdown"])
def test_generated_examples_are_on_the_grid_of_any_model_in_its_own_tokens(
    puzzle: str, origin: Any, tmp_path: Path
) -> None:
    """Prompts as a rollout encodes them; the answer, and an end token where its length varies, in whole blocks."""
    tokenizer = load_tokenizer(ROOT / "jobs" / "data" / "tokenizer")  # of words, not of the puzzle's characters
    settings = [f"task={{type='{puzzle}'}}", "sft.num_examples=20", f"model={{path='{tmp_path}'}}"]
    (tmp_path / "config.json").touch()
    job = load_job(ROOT / "jobs" / "sudoku.toml", settings)
    assert prepare.write_examples(job, tokenizer, 8, origin, tmp_path) == {"examples": 20}
    assert job.puzzle is not None
    rows = read_table(tmp_path, EXAMPLE).to_pylist()
    for row, made in zip(generate_puzzles(job.puzzle, 20, "train", 0), rows, strict=True):
        assert made["prompt_ids"] == encode_prompt(tokenizer, row["prompt"])
        answer, end = encode_prompt(tokenizer, row["answer"]), eos_token_id(tokenizer)
        filled = made["chosen_ids"][len(answer) :]
        assert made["chosen_ids"][: len(answer)] == answer
        assert set(filled) <= {end}
        assert puzzle == "sudoku" or filled
        assert (len(made["chosen_ids"]) + (len(made["prompt_ids"]) if origin == "global" else 0)) % 8 == 0


@pytest.mark.parametrize("origin", ["global", "response"])
def test_chats_become_examples_that_end_as_the_chosen_side_of_a_pair(origin: Any, tmp_path: Path) -> None:
    """The same chat as an example and as a pair has the same ids; counts, duplicates and the quarantine are shared."""
    folder, turns = ROOT / "jobs" / "data" / "tokenizer", [{"role": "user", "content": "Hi"}]
    answer = [{"role": "assistant", "content": "Hello."}]
    long = [{"role": "user", "content": "word " * 30}, {"role": "assistant", "content": "word " * 300}]
    rows: list[Any] = [{"messages": turns + answer + long}, {"messages": turns + answer}, {"messages": turns}]
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": [*turns, *answer] * 2}]))
    pairs.write_text(json.dumps({"prompt": turns, "chosen": answer, "rejected": long[1:]}) + "\n")
    limits = {"max_prompt_tokens": 20, "max_response_tokens": 100}
    made = {}
    for config, schema in (
        (SFTConfig.model_validate({"files": [str(chats)], **limits}), EXAMPLE),
        (task(pairs, max_prompt_tokens=20), PREFERENCE),
    ):
        importer = prepare.Importer(
            prepare.ImportJob(config, folder, GRID | {"block_origin": origin}, dict.fromkeys(config.files, "hash"))
        )
        out = tmp_path / config.type
        out.mkdir()
        done = [importer(part, out) for part in prepare.import_parts(config)]
        made[config.type] = prepare.finish_import(done, schema, out), read_table(out, schema).to_pylist()
    counts, examples = made["sft"]
    refused = {"duplicate row": 2, "prompt too long": 1, "no answer": 1}
    assert counts == {"rows": 6, "good": 2, "refused": refused, "truncated": 1}
    (pair,) = made["preferences"][1]
    short = next(row for row in examples if row["origin"].endswith(":1#1"))
    assert (short["prompt_ids"], short["chosen_ids"]) == (pair["prompt_ids"], pair["chosen_ids"])
    tokenizer = load_tokenizer(folder)
    assert turn_end_id(tokenizer) in short["chosen_ids"]
    last = next(row for row in examples if row["origin"].endswith(":4#2"))
    assert last["prompt_ids"] == encode_prompt(tokenizer, turns)  # the older turns were dropped


@pytest.mark.ray
def test_ctrl_c_and_the_same_command_again_give_every_row_once(tokenizer: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": f"{i}", "chosen": "1" * (i % 9 + 1), "rejected": "0"}) for i in range(40_000)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    job = tmp_path / "job.toml"
    job.write_text(f"""
        name = "cut"
        storage = "{tmp_path / "runs"}"
        task = {{type = "preferences", files = ["{tmp_path / "pairs.jsonl"}"]}}
        model = {{tokenizer = "{tokenizer}", init = {{hidden_size = 16, num_layers = 1, num_heads = 1}}}}
        train = {{objective = {{schedule = "random"}}}}
        cluster = {{num_actors = 1}}
    """)
    command = [sys.executable, "-m", "dtrpo_ray", "prepare", str(job), "--json"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=_take_ctrl_c)
    while not (done := list(tmp_path.glob("runs/stages/pairs-*.partial/table/done/*.json"))) and first.poll() is None:
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    assert "Traceback" not in first.communicate(timeout=60)[1]
    assert first.returncode == 130
    assert done
    assert not list(tmp_path.glob("runs/stages/pairs-*/stage.json"))

    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "part(s) were done before" in again.stderr
    made = json.loads(again.stdout.splitlines()[-1])
    assert made["summary"] == {"pairs": 40_000, "rows": 40_000, "good": 40_000, "refused": {}}
    origins = read_table(Path(made["directory"]) / "table", PREFERENCE)["origin"].to_pylist()
    assert sorted(int(origin.rsplit(":", 1)[1]) for origin in origins) == list(range(1, 40_001))


def _take_ctrl_c() -> None:
    """A shell that runs tests in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
