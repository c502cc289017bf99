"""Align a converted language model on word problems beside the controls, and look at the answers as language.

    python -m benchmarks.language jobs/language.toml --seeds 0 --arms dtrpo imitation --out runs/language

The arms and their paired tests are those of benchmarks/alignment.py. For each model and setting this adds what a reward
may be bought with: the answers' NLL under the autoregressive source, distinct bigrams and length. It also adds the NLL
by place in the block during [sft], and answers before and after. The source is model.path, as `dtrpo convert` wrote it:
under a causal mask its logits are the original's. If model.path has been trained since, name the converted model with
--source. Finished stages are reused. Writes OUT.json and OUT.md.
"""

import json
from argparse import Namespace
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from benchmarks.alignment import TITLES, Measured, evaluate_arms, markdown, measured, parser
from dtrpo_ray.config.decode import STEPS, Setting
from dtrpo_ray.config.job import Job
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.data.tables import read_table
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.models.base import DiffusionLM, token_logps
from dtrpo_ray.pipeline import TABLE, Pipeline
from dtrpo_ray.report.evaluation import HELD_OUT, Z95

BATCH = 16  # answers of one forward
SHOWN = 3  # prompts whose answers are printed
LAST_STEPS = 5  # of [sft], whose mean is printed

Ids = tuple[int, ...]


class Answer(NamedTuple):
    """An answer to a held-out prompt at a setting: `ids` end with the token that ends the answer, if there is one."""

    arm: str
    setting: str
    prompt_id: str
    prompt: str
    text: str
    correct: bool
    prompt_ids: Ids
    ids: Ids


class Quality(NamedTuple):
    """The answers of a model at a setting. `nll` is in nats a token, the mean over the answers.

    `change` is the mean of the paired difference in `nll` to base, and `half` that of its 95 % interval.
    """

    arm: str
    setting: str
    nll: float
    change: float
    half: float
    distinct_2: float
    tokens: float


def read_answers(arm: str, table: Path, stop_ids: frozenset[int]) -> Iterator[Answer]:
    """Yield the answers to held-out prompts in the table of an evaluation."""
    for row in read_table(table, TRAJECTORY).sort_by("row_id").to_pylist():
        if row["prompt_id"].startswith(f"{HELD_OUT}/"):
            ids = row["response_ids"]
            end = next((at + 1 for at, token in enumerate(ids) if token in stop_ids), len(ids))
            texts, correct = (row["prompt_id"], row["prompt"], row["response"]), row["reward"] >= 1
            setting = row["row_id"].rsplit("/", 2)[1]
            yield Answer(arm, setting, *texts, correct, tuple(row["prompt_ids"]), tuple(ids[:end]))


@torch.no_grad()
def source_nll(model: DiffusionLM, rows: Sequence[tuple[Ids, Ids]]) -> list[float]:
    """Return the nats per token of each (prompt, answer) under a causal mask, as the model's source has them."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    device = next(model.parameters()).device
    made = [0.0] * len(rows)
    for first in range(0, len(rows), BATCH):
        here = order[first : first + BATCH]
        # padding is behind the tokens, and under a causal mask none of them sees it
        ids = pad_sequence([torch.tensor(rows[i][0] + rows[i][1], device=device) for i in here], batch_first=True)
        places = torch.arange(ids.shape[1], device=device)
        hidden = model.hidden(ids, places.expand(ids.shape), (places[:, None] >= places)[None, None])
        for at, i in enumerate(here):
            prompt, answer = rows[i]
            before = hidden[at, len(prompt) - 1 : len(prompt) + len(answer) - 1]
            logps = token_logps(model.logits, before, torch.tensor(answer, device=device), model.vocab_size)
            made[i] = -float(logps.mean())
    return made


def qualities(answers: Sequence[Answer], nlls: Sequence[float]) -> list[Quality]:
    """Describe the answers of each model at each setting; `nlls` are theirs."""
    nll = {(a.arm, a.setting, a.prompt_id): value for a, value in zip(answers, nlls, strict=True)}
    cells: dict[tuple[str, str], list[Answer]] = {}
    for a in answers:
        cells.setdefault((a.arm, a.setting), []).append(a)
    made = []
    for (arm, setting), here in cells.items():
        changes = [nll[arm, setting, a.prompt_id] - nll["base", setting, a.prompt_id] for a in here]
        half = Z95 * stdev(changes) / sqrt(len(changes))
        bigrams = [pair for a in here for pair in pairwise(a.ids)]
        distinct, tokens = len(set(bigrams)) / len(bigrams), fmean(len(a.ids) for a in here)
        mean = fmean(nll[arm, setting, a.prompt_id] for a in here)
        made.append(Quality(arm, setting, mean, fmean(changes), half, distinct, tokens))
    return made


def places_lines(pipeline: Pipeline, seed: int) -> list[str]:
    """Return the table of the NLL by place in the block, at the first and the last steps of [sft]."""
    lines = [row for row in pipeline.curves().get("base", ()) if "nll_place_1" in row]
    if not lines:
        return []
    names = sorted(
        (name for name in lines[0] if name.startswith("nll_place_")), key=lambda n: int(n.rpartition("_")[2])
    )
    spans = {f"step {lines[0]['step']}": lines[:1], f"mean of the last {LAST_STEPS}": lines[-LAST_STEPS:]}
    return [
        "",
        f"## NLL by place in the block during `[sft]`, seed {seed}",
        "",
        "Nats a token, on the rows of a step before it changes the weights. With one epoch no row was seen before.",
        "",
        "| steps | " + " | ".join(name.rpartition("_")[2] for name in names) + " |",
        "|---|" + "---|" * len(names),
        *(
            f"| {span} | " + " | ".join(f"{fmean(row[name] for row in rows):.2f}" for name in names) + " |"
            for span, rows in spans.items()
        ),
    ]


def before_training(engine: Engine, job: Job, asked: dict[str, Answer]) -> list[Answer]:
    """Return the converted model's answers to the prompts of some answers, at each budget."""
    assert job.eval is not None
    made = []
    for steps in job.eval.budgets:
        params = SamplingParams(max_new_tokens=job.eval.max_new_tokens, denoising_steps=steps)
        done = engine.generate([list(a.prompt_ids) for a in asked.values()], params, [0] * len(asked))
        for a, answer in zip(asked.values(), done, strict=True):
            ids = tuple(answer.text_ids)
            made.append(
                a._replace(
                    arm="before", setting=str(Setting(STEPS, steps)), text=engine.decode(ids), ids=ids, correct=False
                )
            )
    return made


def answer_lines(found: Sequence[Quality], samples: Sequence[Answer], seed: int) -> list[str]:
    """Return the tables of the answers as language, and of some answers."""
    titles = {"before": "converted, not trained", **TITLES}
    lines = [
        "",
        f"## The answers as language, seed {seed}",
        "",
        "NLL: nats a token under the autoregressive source, the mean over the answers; in brackets its paired "
        "difference to base with the 95 % interval. Distinct bigrams: the share of different pairs among all pairs of "
        "neighbouring tokens. Tokens: mean length, the end token included.",
        "",
        "| model | setting | NLL | distinct bigrams | tokens |",
        "|---|---|---|---|---|",
    ]
    for q in found:
        change = "" if q.arm == "base" else f" ({q.change:+.3f} ± {q.half:.3f})"
        lines.append(f"| {TITLES[q.arm]} | {q.setting} | {q.nll:.3f}{change} | {q.distinct_2:.3f} | {q.tokens:.1f} |")
    lines += ["", f"## Answers to the first {SHOWN} held-out prompts, seed {seed}", ""]
    for prompt_id in dict.fromkeys(a.prompt_id for a in samples):
        here = [a for a in samples if a.prompt_id == prompt_id]
        lines += [f"> {here[0].prompt}", "", "| model | setting | answer |", "|---|---|---|"]
        lines += [
            f"| {titles[a.arm]} | {a.setting} | `{a.text.replace(chr(10), ' / ').replace('|', '¦')}` |" for a in here
        ]
        lines.append("")
    return lines[:-1]


def describe(engine: Engine, pipeline: Pipeline, answers: list[Answer]) -> tuple[list[Quality], list[str]]:
    """Return the qualities of one seed's answers, and their part of the page; `engine` has the converted model."""
    rows = list(dict.fromkeys((a.prompt_ids, a.ids) for a in answers))  # models often give the same answer
    known = dict(zip(rows, source_nll(engine.model, rows), strict=True))
    found = qualities(answers, [known[a.prompt_ids, a.ids] for a in answers])
    shown = sorted({a.prompt_id for a in answers})[:SHOWN]
    samples = [a for a in answers if a.prompt_id in shown]
    first = before_training(engine, pipeline.job, {a.prompt_id: a for a in samples})
    seed = pipeline.job.seed
    return found, [*places_lines(pipeline, seed), *answer_lines(found, [*first, *samples], seed)]


def measure(options: Namespace, seed: int) -> tuple[list[Measured], list[Quality], list[str]]:
    """Run the arms of one seed, and return what they solve, their answers' qualities, and that part of the page."""
    rows: list[Measured] = []
    answers: list[Answer] = []
    engine: Engine | None = None
    for arm, pipeline, value in evaluate_arms(options.job, seed, options.storage, options.arms, options.overrides):
        tables = {stage.name: stage.path / TABLE for stage in pipeline.lineage()}
        rows += measured(arm, seed, value, with_base=engine is None)
        if engine is None:
            engine = Engine.load(options.source or pipeline.initial().path)
            answers += read_answers("base", tables["eval-base"], engine.model.stop_ids)
        answers += read_answers(arm, tables["eval-aligned"], engine.model.stop_ids)
    assert engine is not None
    return rows, *describe(engine, pipeline, answers)


def main() -> None:
    """Measure and describe every seed, writing the page after each."""
    made = parser(__doc__, Path("runs/language"))
    made.add_argument("--source", type=Path, help="the converted model, if model.path has been trained since")
    options = made.parse_args()
    rows: list[Measured] = []
    found: list[dict[str, object]] = []
    more: list[str] = []
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        solved, described, lines = measure(options, seed)
        rows += solved
        found += [{"seed": seed, **quality._asdict()} for quality in described]
        more += lines
        record = {"solved": [row._asdict() for row in rows], "answers": found}
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        page = markdown(rows, options.job, options.overrides) + "\n".join(more) + "\n"
        options.out.with_suffix(".md").write_text(page)
        print(page, flush=True)


if __name__ == "__main__":
    main()
