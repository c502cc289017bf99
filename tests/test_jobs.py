"""Every job file of jobs/ runs in a fresh clone: in a copy of the repository's files, with nothing beside it."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import dtrpo
from paths import ROOT
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from transformers import AutoModelForCausalLM

from dtrpo_ray.config.load import load_job
from dtrpo_ray.models.tokenizer import encode_prompt, load_tokenizer, mask_token_id, turn_end_id
from dtrpo_ray.produce.verifiers import countdown, gsm8k, instructions

NEEDS_WEIGHTS = "language"  # a converted language model, which a clone does not have
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.toml") if path.stem != NEEDS_WEIGHTS)
DATA = ROOT / "jobs" / "data"
ONE = ["cluster.num_workers=1", "cluster.num_actors=1"]
PUZZLE = [
    "sft.num_examples=64", "sft.global_batch=32", "sft.micro_batch=32", "model.init.num_layers=1",
    "rollout.num_prompts=8", "rollout.num_samples=2", "rollout.denoising_steps=[2]",
]  # fmt: skip
# job -> the verb and the settings that make it small; a puzzle stops at the rollout, since its base has learnt nothing
SHRUNK: dict[str, tuple[str, list[str]]] = {
    "countdown": ("rollout", PUZZLE),
    "demo": ("rollout", PUZZLE),
    "instructions": ("train", ["task.max_rows=24", "train.max_steps=2"]),
    "prompts": ("train", ["rounds=1", "train.max_steps=2"]),
    "sft": ("sft", ["sft.max_steps=2"]),
    "score": ("train", ["train.max_steps=2"]),
    "text": ("train", ["train.max_steps=2"]),
}


def tracked() -> list[str]:
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in found.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a clone has, in a folder with nothing beside it."""
    root = tmp_path_factory.mktemp("alone") / "repository"
    for name in tracked():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    return root


def lines(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.mark.parametrize("job", JOBS)
def test_a_fresh_clone_passes_the_check(job: str, clone: Path) -> None:
    done = dtrpo("check", f"jobs/{job}.toml", "--strict", cwd=clone)
    assert done.returncode == 0, done.stderr


def test_nothing_that_ships_names_a_folder_beside_the_repository() -> None:
    shipped = ("README.md", "CONTRIBUTING.md", "Makefile", "docs/", "jobs/", "cluster/", "dtrpo_ray/", "benchmarks/")
    for name in tracked():
        if name.startswith(shipped) and not name.endswith((".png", ".safetensors")):
            assert "../shared" not in (ROOT / name).read_text(), name


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("job", sorted(SHRUNK))
def test_a_fresh_clone_runs_it(job: str, clone: Path, tmp_path: Path) -> None:
    verb, small = SHRUNK[job]
    settings = [word for item in [f"storage={tmp_path}", *ONE, *small] for word in ("--set", item)]
    done = dtrpo(verb, f"jobs/{job}.toml", "--json", *settings, cwd=clone)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = Path(json.loads(done.stdout.splitlines()[-1])["directory"])
    if verb in ("train", "sft"):
        steps = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(steps) == 2
        assert (folder / "model" / "model.safetensors").exists()
        if verb == "sft":  # the result of a job without a task
            assert {"nll_place_4", "held_out_nll", "held_out_nll_place_4"} <= json.loads(steps[-1]).keys()
            done = dtrpo("export", f"jobs/{job}.toml", str(tmp_path / "model"), *settings, cwd=clone)
            assert done.returncode == 0, done.stderr[-3000:]
            assert "on the files of `[sft]`" in (tmp_path / "model" / "README.md").read_text()
            weights = "model.safetensors"
            assert (tmp_path / "model" / weights).read_bytes() == (folder / "model" / weights).read_bytes()
    else:
        assert any((folder / "table").glob("*.parquet"))


@pytest.mark.ray
@pytest.mark.usefixtures("no_shared_ray")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; make test-vllm has it")
def test_a_fresh_clone_runs_the_drafts(clone: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "dtrpo_ray", "train", "jobs/drafts.toml", "--json"]
    words += [word for item in [f"storage={tmp_path}", *ONE, "train.max_steps=2"] for word in ("--set", item)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=clone, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_job_is_run() -> None:
    """The tests of the pipeline run sudoku.toml."""
    assert set(JOBS) == {*SHRUNK, "sudoku", "drafts"}


def test_our_data_is_what_the_jobs_need() -> None:
    """The counts, different rows, and answers that the verifiers read: of the recorded responses some are right."""
    pairs, problems, asked = (lines(f"{name}.jsonl") for name in ("preferences", "word_problems", "instructions"))
    assert len({json.dumps(row["prompt"]) for row in pairs}) == len(pairs) == 50
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    assert len({row["question"] for row in problems}) == len(problems) == 200
    for row in problems:
        answer = str(row["answer"])
        assert gsm8k.score("", f"#### {answer.rsplit('#### ')[-1]}", answer) == 1
        assert gsm8k.score("", answer.split(".\n")[0], answer) == 1  # the working ends in the result too
    for row in asked:
        names = {name: row[name] for name in ("instruction_id_list", "kwargs")}
        assert 0 <= instructions.score(str(row["prompt"]), "A walk, in the rain.", json.dumps(names)) <= 1
    rows = lines("trajectories.jsonl")
    rewards = [countdown.score("", str(r["response"]), json.dumps(r["ground_truth_answer"])) for r in rows]
    by_prompt = [set(rewards[at : at + 4]) for at in range(0, len(rewards), 4)]
    assert by_prompt == [{0.0, 1.0}] * 24


def test_our_tokenizer_has_what_a_diffusion_model_needs() -> None:
    tokenizer = load_tokenizer(DATA / "tokenizer")
    text = "Anna has 42 apples, naïve café: 漢字 😀.\n\tdone"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert mask_token_id(tokenizer) == 1
    assert turn_end_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    opening = tokenizer.decode(encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}]))
    assert opening == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert sum(file.stat().st_size for file in (DATA / "tokenizer").iterdir()) < 200_000


def test_our_language_model_loads_and_says_digits() -> None:
    model = AutoModelForCausalLM.from_pretrained(DATA / "language_model", dtype="float32")
    tokenizer = load_tokenizer(DATA / "language_model")
    ids = tokenizer("How many apples are there?", return_tensors="pt")
    said = model.generate(**ids, do_sample=False, max_new_tokens=3)[0, ids["input_ids"].shape[1] :]
    assert re.fullmatch(r"\d*", tokenizer.decode(said, skip_special_tokens=True))
    assert load_job(ROOT / "jobs" / "drafts.toml", _absolute()).drafts


def _absolute() -> list[str]:
    """The paths of jobs/drafts.toml, which start from the repository, from anywhere."""
    return [
        f"task.files=['{DATA}/word_problems.jsonl']",
        f"model.tokenizer={DATA}/tokenizer",
        f"drafts.model={DATA}/language_model",
    ]


# === What git and `ray job submit --working-dir .` leave out ===

BIG = ("out/model/model.safetensors", "models/base/model.safetensors", "data/set/train.parquet", "runs/stages/x/m.bin")
KEPT = ("dtrpo_ray/data/x.py", "dtrpo_ray/models/x.py", "jobs/data/x.jsonl", "tests/data/x.py", "tests/models/x.py")


def walk(folder: Path) -> list[Path]:
    """The files that Ray's own walk of a working directory would upload."""
    found: list[Path] = []
    _dir_travel(folder, [_get_excludes(folder, get_runtime_env_default_excludes())], found.append, True)
    return [path for path in found if path.is_file()]


def test_an_upload_after_export_and_download_is_small(clone: Path) -> None:
    for name in (*BIG, *KEPT):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        with (clone / name).open("wb") as file:
            file.truncate(2 * 10**9 if name in BIG else 10)
    try:
        uploaded = walk(clone)
        names = {str(path.relative_to(clone)) for path in uploaded}
        assert names >= {*KEPT, "jobs/run.py", "jobs/data/tokenizer/tokenizer.json", "dtrpo_ray/data/schemas.py"}
        assert not names & set(BIG)
        assert sum(path.stat().st_size for path in uploaded) < 20 * 10**6
    finally:
        for name in (*BIG, *KEPT):
            (clone / name).unlink()


def test_git_ignores_the_same() -> None:
    words = ["git", "check-ignore", "--no-index", *BIG, *KEPT]
    said = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert said == list(BIG)
