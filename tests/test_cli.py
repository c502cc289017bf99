"""The command as a user meets it: quick, one clear message for a mistake, JSON on demand, nothing heavy imported."""

import json
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from commands import dtrpo
from paths import ROOT

from dtrpo_ray.models.registry import save_model
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.models.tokenizer import character_tokenizer

DEMO = str(ROOT / "jobs" / "sudoku.toml")


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["plan", DEMO], ["check", DEMO, "--json"]])
def test_light_verbs_import_neither_torch_nor_ray(words: list[str]) -> None:
    code = f"import sys; sys.argv = {['dtrpo', *words]}; from dtrpo_ray.cli import main\n"
    code += "try: main()\nexcept SystemExit as e: assert not e.code, e.code\n"
    code += "heavy = {'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules); assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_help_names_every_verb() -> None:
    text = dtrpo("--help").stdout
    for verb in (
        "sft",
        "rollout",
        "pair",
        "train",
        "eval",
        "export",
        "serve",
        "report",
        "check",
        "plan",
        "run",
        "models",
        "convert",
    ):
        assert f" {verb} " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nowhere.toml"], "error: nowhere.toml: no such job file"),
        (["train", DEMO, "--set", "train.lrr=1"], "unknown field train.lrr"),
        (["plan", DEMO, "--set", "train.global_batch=7"], "must be a multiple of"),
        (["serve", "nowhere"], "no such job file"),
        (["sft", DEMO, "--set", "sft={}", "--set", "model={path='.'}"], "set sft.lr for model.path"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(words: list[str], message: str) -> None:
    done = dtrpo(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("verb", "message"),
    [("sft", "needs a section [sft]"), ("rollout", "needs a section [rollout]"), ("eval", "has no verifier")],
)
def test_a_verb_that_has_nothing_to_do_says_so_before_anything_starts(verb: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    text = (
        f'name = "t"\nstorage = "{tmp_path}/runs"\n[task]\ntype = "preferences"\nfiles = ["{tmp_path}/pairs.jsonl"]\n'
    )
    text += f'[model]\ntokenizer = "{tmp_path}"\n[model.init]\n[train.objective]\nschedule = "random"\n'
    (tmp_path / "job.toml").write_text(text)
    done = dtrpo(verb, str(tmp_path / "job.toml"))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", ["train", "rollout", "pair", "ref-logps", "eval", "run"])
def test_a_job_that_only_fine_tunes_is_refused_by_the_verbs_that_align(verb: str, tmp_path: Path) -> None:
    done = dtrpo(verb, "jobs/sft.toml", "--set", f"storage={tmp_path}/runs")
    assert done.returncode == 2
    assert "there is no [task] to align on: use sft, prepare, export, serve or report" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_version_is_the_package_s() -> None:
    assert dtrpo("--version").stdout.strip() == version("dtrpo-ray")


@pytest.mark.parametrize("words", [["trian", DEMO], ["train", DEMO, "--nope"], ["train"]])
def test_a_wrong_command_line_is_exit_code_2(words: list[str]) -> None:
    done = dtrpo(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_export_never_overwrites(tmp_path: Path) -> None:
    done = dtrpo("export", DEMO, str(tmp_path))
    assert done.returncode == 2
    assert "already exists" in done.stderr


def test_plan_prints_derived_numbers_as_one_json_line() -> None:
    done = dtrpo("plan", DEMO, "--json", "--set", "train.micro_batch=8")
    value = json.loads(done.stdout.splitlines()[-1])
    train = value["stages"]["train"]
    assert (train["rows_per_worker"], train["accumulation"], train["forwards_per_optimizer_step"]) == (32, 4, 16)
    assert value["parameters"] == 658_816


def test_check_reports_a_valid_job(tmp_path: Path) -> None:
    given, solved = "\n".join(["0234", "3412", "2143", "4321"]), "\n".join(["1234", "3412", "2143", "4321"])
    (tmp_path / "here.jsonl").write_text(json.dumps({"input": given, "output": solved}) + "\n")
    files = f"task.public_tests=['{tmp_path}/here.jsonl', '{tmp_path}/nowhere.jsonl']"
    report = json.loads(dtrpo("check", DEMO, "--json", "--set", files).stdout.splitlines()[-1])
    assert report == {"job": "sudoku", "task": "sudoku", "public_tests": {"here.jsonl": 1, "nowhere.jsonl": "missing"}}


@pytest.mark.parametrize(
    ("verb", "override", "told"),
    [
        ("sft", "storage={file}", "storage = '{file}': no folder to write in"),
        ("check", "task.public_tests=['{file}']", "{file}:1: not a row of a Sudoku test file"),
        ("plan", "model.tokenizer={folder}", "no tokenizer.json or vocab.json"),
    ],
)
def test_a_path_that_cannot_be_used_is_told_before_any_work(
    tmp_path: Path, verb: str, override: str, told: str
) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("words\n")
    folder.mkdir()
    done = dtrpo(verb, DEMO, "--set", override.format(file=file, folder=folder))
    assert done.returncode == 2
    assert told.format(file=file) in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_is_one_message_and_exit_code_130() -> None:
    code = f"import sys, dtrpo_ray.cli as cli; sys.argv = ['dtrpo', 'check', {DEMO!r}]\n"
    code += "def interrupted(*_): raise KeyboardInterrupt\ncli.load_job = interrupted\ncli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 130
    assert done.stderr.strip() == "interrupted: finished stages are kept; run the same command again to continue"


def test_models_lists_every_family_with_its_sources() -> None:
    record = json.loads(dtrpo("models", "--json").stdout.splitlines()[-1])
    facts = {f["model_type"]: f for f in record["families"]}
    assert facts.keys() == {"sdar", "sdar_moe", "Fast_dLLM_Qwen", "llada", "llada2_moe", "Dream"}
    masks = {name: f["mask_id"] for name, f in facts.items()}
    assert masks["Fast_dLLM_Qwen"] == 151665
    assert masks["llada"] == 126336
    assert {name for name, f in facts.items() if f["shift"]} == {"Fast_dLLM_Qwen", "Dream"}
    assert {name for name, f in facts.items() if f["attention"] == "full"} == {"llada", "Dream"}
    assert all(f["sources"] and f["releases"] for f in facts.values())
    page = (ROOT / "docs" / "families.md").read_text()
    assert all(f"| `{name}` |" in page and str(f["mask_id"] or "mask_token_id") in page for name, f in facts.items())


def test_a_lora_job_of_rounds_exports_merged_only(tmp_path: Path) -> None:
    words = ("export", DEMO, str(tmp_path / "new"), "--set", "train.lora.rank=4", "--set", "rounds=2")
    done = dtrpo(*words)
    assert done.returncode == 2
    assert "export with --merged" in done.stderr


@pytest.mark.ray
def test_serve_answers_until_it_is_interrupted(tmp_path: Path, tiny: SDAR) -> None:
    """A model directory by itself and another one beside it: the command's own process, on loopback."""
    save_model(tiny, tmp_path)
    character_tokenizer("abcdefghijklmnopqrstu").save_pretrained(tmp_path)
    words = ["serve", str(tmp_path), "--set", "port=0", "--set", f"other_models.base={tmp_path}", "--json"]
    command = [sys.executable, "-m", "dtrpo_ray", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_take_ctrl_c) as process:
        assert process.stdout is not None
        try:
            said = json.loads(process.stdout.readline())
            assert (said["verb"], said["model"]) == ("serve", "dtrpo")
            assert said["url"].startswith("http://127.0.0.1:")
            names = [card["id"] for card in httpx.get(f"{said['url']}/v1/models").json()["data"]]
            assert names == ["dtrpo", "base"]
            asked = {"prompt": "abc", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
            answers = [
                httpx.post(f"{said['url']}/v1/completions", json={**asked, "model": name}, timeout=60).json()
                for name in names
            ]
            assert answers[0]["choices"] == answers[1]["choices"]
            assert answers[0]["usage"]["completion_tokens"] == 8
            assert "Watch a diffusion language model write" in httpx.get(said["url"]).text
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{said['url']}/health")


def _take_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell ignores it for what it starts in the background


def test_a_conversion_that_fails_is_one_message(tmp_path: Path) -> None:
    done = dtrpo("convert", str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'nowhere'}: no autoregressive model that transformers loads")
    assert len(done.stderr.splitlines()) == 1
    assert (
        dtrpo("convert", "a", "b", "--dtype", "int3").stderr
        == "error: dtype int3: auto (as stored), float32 or bfloat16\n"
    )


def test_check_writes_over_no_file_and_names_a_place_where_it_cannot_write(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    text = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": 1, "chosen": "b", "rejected": "c"}\n'
    data.write_text(text)
    done = dtrpo("check", str(data), "--quarantine", str(data))
    assert (done.returncode, data.read_text()) == (2, text)
    assert done.stderr == f"error: --quarantine {data} exists already; name a file that does not\n"
    nowhere = tmp_path / "no" / "folder.jsonl"
    done = dtrpo("check", str(data), "--quarantine", str(nowhere))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {nowhere}: No such file or directory; name another path")
    assert dtrpo("check", str(data), "--quarantine", str(tmp_path / "bad.jsonl")).returncode == 0
    assert (tmp_path / "bad.jsonl").read_text().count("pairs.jsonl:2") == 1


def test_hub_uris_are_refused_with_the_command_that_fetches() -> None:
    done = dtrpo("check", "hf://datasets/openai/gsm8k")
    assert done.returncode == 2
    assert done.stderr.startswith("error: hf://datasets/openai/gsm8k: hf:// is not read; fetch it with `hf download")
