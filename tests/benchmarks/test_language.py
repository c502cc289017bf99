"""The arms on a converted language model, from a random Llama to the page; and the measures of answers as language."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import language
from benchmarks.language import Answer, qualities, source_nll
from dtrpo_ray.data.tasks import word_problems
from dtrpo_ray.models.convert import convert
from dtrpo_ray.models.registry import load_model
from dtrpo_ray.pipeline import Pipeline

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SMALL = [
    "task.steps=[1, 1]", "task.largest=12", "cluster.num_workers=1", "cluster.num_actors=1",
    "sft.num_examples=3840", "sft.global_batch=64", "sft.micro_batch=64", "sft.lr=1e-2", "sft.precision=fp32",
    "rollout.num_prompts=32", "rollout.num_samples=4", "eval.num_prompts=12",
    "train.max_steps=3", "train.global_batch=4", "train.micro_batch=4", "train.precision=fp32",
]  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, with a tokenizer of words and a chat template."""
    folder = tmp_path_factory.mktemp("source")
    texts = [text for row in word_problems.generate(500, "train", (1, 2), 99, seed=0) for text in row.values()]
    words = ByteLevelBPETokenizer()
    words.train_from_iterator(texts, vocab_size=500, special_tokens=SPECIAL, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words._tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], extra_special_tokens=SPECIAL[1:]
    )
    tokenizer.chat_template = (ROOT / "jobs" / "data" / "tokenizer" / "chat_template.jinja").read_text()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=0, bos_token_id=0, pad_token_id=0, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(llama: Path) -> Path:
    convert(str(llama), llama.parent / "converted", block_size=4)
    return llama.parent / "converted"


def test_the_nll_is_that_of_the_source(llama: Path, converted: Path) -> None:
    """Answers of several lengths, in batches of several lengths, against one forward of the Llama for each."""
    made = torch.Generator().manual_seed(1)
    draw = lambda count: tuple(torch.randint(3, 300, (count,), generator=made).tolist())  # noqa: E731
    rows = [(draw(3 + i % 7), draw(1 + i % 5)) for i in range(20)]
    source = LlamaForCausalLM.from_pretrained(llama).eval()
    with torch.no_grad():
        for (prompt, answer), found in zip(rows, source_nll(load_model(converted), rows), strict=True):
            logits = source(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
            assert found == pytest.approx(float(wanted), abs=1e-5)


def test_answers_are_compared_with_bases_answer_to_the_same_prompt() -> None:
    texts = {("base", "p0"): (1, 2, 1, 2), ("base", "p1"): (3, 4), ("dtrpo", "p1"): (3,), ("dtrpo", "p0"): (1, 2)}
    nlls = [2.0, 5.0, 4.0, 1.0]
    answers = [Answer(arm, "denoising_steps=2", name, "", "", True, (), ids) for (arm, name), ids in texts.items()]
    base, ours = qualities(answers, nlls)
    assert (base.nll, base.change, base.half) == (3.5, 0, 0)
    assert (base.distinct_2, base.tokens) == (3 / 4, 3)  # (1, 2) twice, (2, 1), (3, 4)
    assert (ours.nll, ours.change, ours.distinct_2, ours.tokens) == (2.5, -1, 1, 1.5)
    assert ours.half == 0  # both answers are one nat below base's


def run_here(parts: Sequence[Any], make: Callable[[], Any], out: Path, *_: object, **__: object) -> list[Any]:
    """Do what `run_parts` does, in this process."""
    out.mkdir(exist_ok=True)
    worker = make()
    return [worker(part, out) for part in parts]


def test_arms_without_training_are_the_base_and_the_page_says_so(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray: examples, evaluations and page are real, and each training returns the model that enters it."""
    monkeypatch.setattr("dtrpo_ray.pipeline.run_parts", run_here)
    monkeypatch.setattr("benchmarks.alignment.ray_session", lambda cluster: nullcontext())
    monkeypatch.setattr(Pipeline, "_train", lambda self, name, config, base, *_, **__: base)
    monkeypatch.setattr(Pipeline, "policy", lambda self, number: self.base())
    job, out = str(ROOT / "jobs" / "language.toml"), tmp_path / "page"
    options = ["--seeds", "0", "--arms", "dtrpo", "imitation", "--storage", str(tmp_path / "runs"), "--out", str(out)]
    small = ["sft.num_examples=20", "eval.num_prompts=6", "eval.max_new_tokens=12"]
    settings = [word for item in [f"model.path={converted}", *small] for word in ("--set", item)]
    monkeypatch.setattr(sys, "argv", ["language", job, *options, *settings])
    language.main()
    record, page = json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()
    cells = {(a, f"denoising_steps={steps}") for a in ("base", "dtrpo", "imitation") for steps in (1, 2, 4)}
    assert {(row["arm"], row["setting"]) for row in record["solved"]} == cells
    assert {(row["arm"], row["setting"]) for row in record["answers"]} == cells
    assert all(len(row["rewards"]) == 6 for row in record["solved"])
    assert all(row["nll"] > 0 and row["change"] == row["half"] == 0 for row in record["answers"])
    assert page.count("p = 1.000") == 2 * 3
    assert page.count("+0.000 ± 0.000") == 2 * 3
    shown = [line.split(" | ")[1:] for line in page.splitlines() if line.startswith(("| converted,", "| base |"))]
    assert len({tuple(row) for row in shown[-18:]}) <= 9  # three prompts, three settings: both models say the same
    stages = sorted((tmp_path / "runs" / "stages").iterdir())
    language.main()
    assert out.with_suffix(".md").read_text() == page
    assert sorted((tmp_path / "runs" / "stages").iterdir()) == stages


@pytest.mark.usefixtures("local_ray")
def test_a_random_llama_goes_the_whole_way_and_a_second_run_makes_nothing(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, out = str(ROOT / "jobs" / "language.toml"), tmp_path / "page"
    options = ["--seeds", "0", "--arms", "dtrpo", "imitation", "--storage", str(tmp_path / "runs"), "--out", str(out)]
    settings = [word for item in [f"model.path={converted}", *SMALL] for word in ("--set", item)]
    monkeypatch.setattr(sys, "argv", ["language", job, *options, *settings])
    language.main()
    record, page = json.loads(out.with_suffix(".json").read_text()), out.with_suffix(".md").read_text()
    cells = {(arm, f"denoising_steps={steps}") for arm in ("base", "dtrpo", "imitation") for steps in (1, 2, 4)}
    assert {(row["arm"], row["setting"]) for row in record["solved"]} == cells
    assert {(row["arm"], row["setting"]) for row in record["answers"]} == cells
    assert all(len(row["rewards"]) == 12 for row in record["solved"])
    assert all(row["nll"] > 0 for row in record["answers"])
    for heading in ("dTRPO minus each other arm", "NLL by place in the block", "The answers as language"):
        assert f"## {heading}" in page
    assert "| converted, not trained | denoising_steps=1 |" in page
    stages = sorted((tmp_path / "runs" / "stages").iterdir())
    # examples, base, rollout, pairs and the base's evaluation are both arms' own
    assert len(stages) == 5 + 2 * 2
    out.with_suffix(".md").unlink()
    language.main()
    assert out.with_suffix(".md").read_text() == page
    assert sorted((tmp_path / "runs" / "stages").iterdir()) == stages
