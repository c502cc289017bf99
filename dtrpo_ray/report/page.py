"""The numbers of a finished run -> PNG plots and one self-contained report.html. Called when a pipeline ends.

It imports neither torch nor ray. The page needs no script, no network and no other file: plots are data URIs, one for
light and one for dark. A sentence takes the place of a plot that cannot be drawn.
"""

import base64
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dtrpo_ray.config.decode import STEPS, Setting
from dtrpo_ray.files import whole_file
from dtrpo_ray.metrics import TERM_METRICS
from dtrpo_ray.report.evaluation import (
    HELD_OUT,
    Comparison,
    Evaluation,
    Example,
    Score,
    against_base,
    compare,
    is_graded,
    p_text,
    reward_text,
)
from dtrpo_ray.stages import Stage

Metrics = Mapping[str, float]  # one line of metrics.jsonl

HERE = Path(__file__).parent
BASE, ALIGNED, CHOSEN, REJECTED = "C0", "C1", "C2", "C3"  # the colour cycle of light.mplstyle and dark.mplstyle


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of the page: a light and a dark PNG as data URIs, or none and in `note` the reason."""

    title: str
    note: str
    alt: str = ""
    uris: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Curve:
    """One plot of metrics: key -> colour, and a level to compare with."""

    name: str
    title: str
    unit: str
    colors: dict[str, str]
    level: tuple[float, str] | None = None


@dataclass(frozen=True, slots=True)
class ScorePair:
    """Base beside aligned on one test set at one setting.

    `change` compares them prompt by prompt; it is None if either is missing.
    """

    set: str
    setting: Setting
    base: Score | None
    aligned: Score | None
    change: Comparison | None

    @property
    def gain(self) -> float | None:
        """Aligned minus base, in percentage points."""
        return 100 * self.change["gain"] if self.change else None


class Answer(TypedDict):
    """A served model's answer; `reward` is None if the task has no verifier."""

    url: str
    prompt: str
    text: str
    reward: float | None


class Cell(NamedTuple):
    """One token of a denoising: `step` counts from 1; `rank` is its order within the block, None if never unmasked."""

    token: str
    given: bool
    step: int
    wanted: str
    rank: int | None


def write_report(
    out: Path,
    job: dict[str, Any],
    lineage: Sequence[Stage],
    curves: Mapping[str, Sequence[Metrics]],
    evaluation: Evaluation | None,
    answer: Answer | None,
) -> Path:
    """Write the plots and report.html into the existing directory `out`; return the page's path.

    `job` is the job as JSON. Every file appears whole or not at all. A plot that this run lacks is removed, so `out`
    never mixes two runs.
    """
    base, others = curves.get("base", []), [*_curves(job), *_term_curves(_rounds(curves))]
    training = [_curve_plot(out, curve, [base]) for curve in _base_curves(base)]
    training += [_curve_plot(out, curve, _rounds(curves)) for curve in others]
    pairs = pair_up(evaluation)
    held_out, public = [p for p in pairs if p.set == HELD_OUT], [p for p in pairs if p.set != HELD_OUT]
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    environment.filters.update(mean=_mean_text, points=points, p_text=p_text, reward=reward_text)
    graded = evaluation is not None and is_graded(evaluation["table"])
    measure = "Mean reward" if graded else "Accuracy"
    environment.filters["setting"] = lambda text: Setting.parse(text).label
    page = environment.get_template("page.html.jinja").render(
        job=job,
        headline=headline(job, curves, evaluation),
        held_out=held_out,
        controls=_controls(evaluation),
        measure=measure,
        scores=[
            _reward_plot(out, "accuracy", f"{measure} on held-out prompts", held_out),
            _reward_plot(out, "accuracy_public", f"{measure} on public test sets", public),
        ],
        sets=_by_set(pairs),
        examples=[_drawn(job, example) for example in (evaluation["examples"] if evaluation else ())],
        training=training,
        answer=answer,
        lineage=lineage,
        job_text=json.dumps(job, indent=2, ensure_ascii=False, default=str),
    )
    with whole_file(out / "report.html") as partial:
        partial.write_text(page, "utf-8")
    return out / "report.html"


# ---- the evaluation in words and pairs


def points(difference: float) -> str:
    """A signed difference in percentage points; one that rounds to nothing has no sign."""
    return f"{difference:+z.1f}".replace("-", "−").replace("+0.0", "0.0")


def _mean_text(row: Score) -> str:
    """Format a mean reward in percent with its interval; lines break only between the two."""
    share, low, high = (f"{100 * part:.1f}" for part in (row["reward"], row["low"], row["high"]))
    return f"{share}\N{NO-BREAK SPACE}% [{low},\N{NO-BREAK SPACE}{high}]"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def pair_up(evaluation: Evaluation | None) -> list[ScorePair]:
    """Put base beside aligned for each set and setting of an evaluation at one temperature; the held-out set first."""
    table = evaluation["table"] if evaluation else []
    scores = {(row["set"], row["setting"], row["model"]): row for row in table}
    changes = {(row["set"], row["setting"]): row for row in against_base(_comparisons(evaluation))}
    pairs = []
    for test_set, setting in dict.fromkeys((row["set"], row["setting"]) for row in table):
        base, aligned = (scores.get((test_set, setting, model)) for model in ("base", "aligned"))
        pairs.append(ScorePair(test_set, Setting.parse(setting), base, aligned, changes.get((test_set, setting))))
    return sorted(pairs, key=lambda pair: (pair.set != HELD_OUT, _natural(pair.set), pair.set, pair.setting))


def _comparisons(evaluation: Evaluation | None) -> list[Comparison]:
    """Return the comparisons of an evaluation, made from its table only where it has none: they take resampling."""
    if evaluation is None:
        return []
    return evaluation["comparison"] if "comparison" in evaluation else compare(evaluation["table"])


def _controls(evaluation: Evaluation | None) -> list[tuple[Score, Comparison]]:
    """Return each control's row on held-out prompts, with the aligned model minus it."""
    table = evaluation["table"] if evaluation else []
    scores = {(row["model"], row["set"], row["setting"]): row for row in table}
    more = [row for row in _comparisons(evaluation) if row["against"] != "base" and row["set"] == HELD_OUT]
    return [(scores[row["against"], row["set"], row["setting"]], row) for row in more]


def _natural(name: str) -> list[str | int]:
    """Split a name so that its numbers sort as numbers."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _by_set(pairs: list[ScorePair]) -> dict[str, list[ScorePair]]:
    return {name: list(members) for name, members in groupby(pairs, key=lambda pair: pair.set)}


def headline(job: dict[str, Any], curves: Mapping[str, Sequence[Metrics]], evaluation: Evaluation | None) -> str:
    """Say the result in one sentence, at the held-out setting with the largest gain; call a loss a loss."""
    gains = [(p.gain, p) for p in pair_up(evaluation) if p.set == HELD_OUT and p.gain is not None]
    if not gains:
        return _training_headline(curves, evaluation)
    gain, best = max(gains, key=lambda gain: gain[0])
    assert best.base is not None
    assert best.aligned is not None
    assert best.change is not None
    test = f"; {p_text(best.change['p_value'])}"
    graded = is_graded([best.base, best.aligned])
    noun = "prompt" if graded or "files" in (job.get("task") or {}) else "puzzle"
    prompts = _count(best.aligned["num_prompts"], f"held-out {noun}")
    base, aligned = _mean_text(best.base), _mean_text(best.aligned)
    solves = f"has a mean reward of {aligned} on" if graded else f"solves {aligned} of"
    result = f"at {best.setting.label} the aligned model {solves} {prompts}, the base {base}"
    if points(gain) == "0.0":
        return f"No gain from alignment: {'at its best, ' if len(gains) > 1 else ''}{result}."
    if gain < 0:
        return f"{'A loss at every setting; the smallest' if len(gains) > 1 else 'A loss'}: {result}{test}."
    return f"A{result[1:]}{test}{', so this may be chance' if best.change['verdict'] == 'same' else ''}."


def _training_headline(curves: Mapping[str, Sequence[Metrics]], evaluation: Evaluation | None) -> str:
    why = "No held-out set was evaluated for both models" if evaluation else "No evaluation was run"
    segments = _segments(_rounds(curves) or [curves.get("base", [])], "loss")
    if not segments:
        return f"{why}, and no training loss was logged."
    (start, first), (end, last) = segments[0][0], segments[-1][-1]
    return f"{why}; the training loss was {first:.3f} at step {start:.0f} and {last:.3f} at step {end:.0f}."


# ---- training curves


def _base_curves(rows: Sequence[Metrics]) -> list[Curve]:
    """Return the plots of the base's training, of the rows held out and of places in a block where they were logged."""
    logged = {name for row in rows for name in row}
    held_out, places = "held_out_nll", sorted((name for name in logged if name.startswith("nll_place_")), key=_natural)
    found = [Curve("base_loss", "Base model: training loss", "loss", {"loss": BASE})]
    if held_out in logged:
        found.append(Curve("base_held_out", "Base model: NLL on rows held out", "nats per token", {held_out: ALIGNED}))
    if places:
        shown = {places[at * (len(places) - 1) // 3] for at in range(4)}  # the first, the last and two between
        colors = {name: f"C{number}" for number, name in enumerate(sorted(shown, key=_natural))}
        found.append(Curve("base_places", "Base model: NLL by place in the block", "nats per hidden token", colors))
    return found


def _curves(job: dict[str, Any]) -> list[Curve]:
    objective = (job.get("train") or {}).get("objective") or {}
    plain = (
        objective.get("type", "dtrpo") in ("dtrpo", "elbo_dpo") and objective.get("loss_type", "sigmoid") == "sigmoid"
    )
    start = (math.log(2), "log 2: policy = reference") if plain and not objective.get("rpo_alpha") else None
    ratios = {"log_ratio_chosen": CHOSEN, "log_ratio_rejected": REJECTED}
    return [
        Curve("train_loss", "Alignment: training loss", "loss", {"loss": ALIGNED}, start),
        Curve("margin", "Margin: β × (chosen − rejected log-ratio)", "margin", {"margin": ALIGNED}, (0, "")),
        Curve("reward_accuracy", "Reward accuracy: pairs with a positive margin", "share of pairs",
              {"reward_accuracy": ALIGNED}, (0.5, "one half")),
        Curve("log_ratios", "Log-ratio of policy to reference", "nats per response", ratios, (0, "")),
        Curve("grad_norm", "Alignment: gradient norm", "norm", {"grad_norm": ALIGNED}),
    ]  # fmt: skip


def _term_curves(rounds: Sequence[Sequence[Metrics]]) -> list[Curve]:
    """Return the plots of the loss's two terms where their gradients were logged."""
    preference, nll, cosine = TERM_METRICS
    if not any(cosine in row for rows in rounds for row in rows):
        return []
    return [
        Curve("grad_terms", "Gradient norms of the two terms", "norm", {preference: CHOSEN, nll: BASE}),
        Curve("grad_cosine", "Cosine of the two terms' gradients", "cosine", {cosine: ALIGNED}, (0, "")),
    ]


def _rounds(curves: Mapping[str, Sequence[Metrics]]) -> list[Sequence[Metrics]]:
    return [curves[name] for name in sorted(curves, key=_natural) if name.startswith("train")]


def _bounds(rounds: Sequence[Sequence[Metrics]]) -> list[float]:
    """Return the steps on a common axis at which rounds begin, and the step at which the last one ends."""
    return [0, *accumulate(np.max(_finite_rows(rows, "step"), initial=0) for rows in rounds)]


def _segments(rounds: Sequence[Sequence[Metrics]], key: str) -> list[np.ndarray]:
    """Return an array [n, 2] of (step on the common axis, value) for each round with a usable row."""
    found = [(start, _finite_rows(rows, "step", key)) for start, rows in zip(_bounds(rounds), rounds, strict=False)]
    return [np.add(segment, (start, 0)) for start, segment in found if len(segment)]


def _finite_rows(rows: Sequence[Metrics], *keys: str) -> np.ndarray:
    """Return an array [rows, keys] of the rows in which all of the keys are finite numbers."""
    values = np.array([[row.get(key) for key in keys] for row in rows], dtype=float).reshape(-1, len(keys))
    return values[np.isfinite(values).all(axis=1)]


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred running mean over an odd `window`, cut off at the ends."""
    total, index = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _curve_plot(out: Path, curve: Curve, rounds: Sequence[Sequence[Metrics]]) -> Plot:
    data = {key: _segments(rounds, key) for key in curve.colors}
    num_rows, bounds = sum(map(len, rounds)), _bounds(rounds)
    if not all(data.values()):
        lacking = " or ".join(key for key, segments in data.items() if not segments)
        why = f"none of the {_count(num_rows, 'logged row')} has {lacking}" if num_rows else "nothing was logged"
        return _skip(out, curve.name, curve.title, why)
    window = 2 * (max(len(segment) for segments in data.values() for segment in segments) // 30) + 1
    note = f"Light: each logged row. Strong: centred mean of {window} rows." if window > 1 else "Each logged row."
    alt = f"Line plot over {_count(int(bounds[-1]), 'optimizer step')}:"
    for key, segments in data.items():
        missing = num_rows - sum(map(len, segments))
        note += f" {missing} of {_count(num_rows, 'row')} without a usable {key} left out." if missing else ""
        first, last = smooth(segments[0][:, 1], window)[0], smooth(segments[-1][:, 1], window)[-1]
        alt += f" {key.replace('_', ' ')} begins at {first:.3g} and ends at {last:.3g}."

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for key, color in curve.colors.items():
            label = key.removeprefix("log_ratio_").replace("_", " ") + f", mean of {window} rows" * (window > 1)
            _draw_segments(axes, data[key], window, color, label)
        if curve.level:
            axes.axhline(curve.level[0], lw=1, ls=(0, (4, 3)), label=curve.level[1] or None)
        if len(rounds) > 1:
            _mark_rounds(axes, bounds)
        _dress(axes, "optimizer step", curve.unit)
        _crown(figure, axes, curve.title)

    return _save(out, curve.name, Plot(curve.title, note, alt), draw)


def _draw_segments(axes: Axes, segments: list[np.ndarray], window: int, color: str, label: str) -> None:
    raw = {"lw": 0.8, "alpha": 0.35} if window > 1 else {"marker": "o", "ms": 3}
    for number, (steps, values) in enumerate(segment.T for segment in segments):
        label = "" if number else label
        axes.plot(steps, values, color=color, label="" if window > 1 else label, **raw)
        if window > 1:
            axes.plot(steps, smooth(values, window), color=color, lw=1.8, label=label)


def _mark_rounds(axes: Axes, bounds: list[float]) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.1 * (high - low))  # room for the labels above the curves
    for number, start in enumerate(bounds[:-1], 1):
        axes.axvline(start, lw=0.9, ls=":", alpha=float(number > 1))
        word = f"round {number}" if number == 1 or len(bounds) < 7 else f"{number}"
        axes.annotate(word, (start, 0.985), xycoords=axes.get_xaxis_transform(), xytext=(4, 0),
                      textcoords="offset points", va="top")  # fmt: skip


# ---- plots of rewards


def _reward_plot(out: Path, name: str, title: str, pairs: list[ScorePair]) -> Plot:
    sets = _by_set(pairs)
    if not sets:
        return _skip(out, name, title, "no such set was evaluated")
    columns = 2 if len(sets) == 4 else min(len(sets), 3)
    rows = -(-len(sets) // columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for place, (axes, (test_set, members)) in enumerate(zip(grid, sets.items(), strict=False)):
            _draw_rewards(axes, members, labelled=columns == 1)
            _dress(axes, "", "%" if place % columns == 0 else "")
            short = test_set.removesuffix(".jsonl")
            axes.set_title("" if test_set == HELD_OUT else short if len(short) <= 20 else short[:19] + "…")
        for axes in grid[len(sets) :]:
            axes.set_axis_off()
        figure.supxlabel("denoising forwards per answer")
        _crown(figure, grid[0], title)

    note = "Bars: 95 % intervals. Solid: by steps per block. Dashed: by threshold. The numbers are the settings."
    alt = f"{title} against denoising forwards per answer, with 95 % intervals; the numbers are in the table below."
    return _save(out, name, Plot(title, note, alt), draw, height=0.9 + 2.4 * rows)


def _draw_rewards(axes: Axes, pairs: list[ScorePair], labelled: bool) -> None:
    for (color, model, marker, side), field in product(
        ((BASE, "base", "s", -1), (ALIGNED, "aligned", "o", 1)), dict.fromkeys(pair.setting.field for pair in pairs)
    ):
        both = [(pair, pair.base if model == "base" else pair.aligned) for pair in pairs if pair.setting.field == field]
        measured = [(pair, score) for pair, score in both if score]
        rows = [(r["forwards_per_answer"], 100 * r["reward"], 100 * r["low"], 100 * r["high"]) for _, r in measured]
        x, mean, low, high = np.array(rows).reshape(-1, 4).T
        reach, steps = np.maximum([mean - low, high - mean], 0), field == STEPS
        label = model if field == pairs[0].setting.field else None  # a model has one name in the legend
        axes.errorbar(x, mean, reach, color=color, marker=marker, ls="-" if steps else "--", label=label)
        for index, (pair, _) in enumerate(measured if labelled else ()):
            above = side * (pair.gain or 0) >= 0  # the better model's number above its bar, the other's below
            axes.annotate(str(pair.setting.value), (x[index], (high if above else low)[index]), color=color,
                          xytext=(0, 4 if above else -4), textcoords="offset points", ha="center",
                          va="bottom" if above else "top")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.15 if labelled else 0.05)


# ---- drawing and writing


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _crown(figure: Figure, axes: Axes, title: str) -> None:
    """Title and legend in rows of their own above the axes, where no curve can run through them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, title=title,
                  title_fontproperties={"size": 11, "weight": "bold"}, alignment="left")  # fmt: skip


def _save(out: Path, name: str, plot: Plot, draw: Callable[[Figure], None], height: float = 3.3) -> Plot:
    """Draw in both themes; the light one is also the file `name`.png."""
    images = []
    for theme in ("light", "dark"):
        with style.context([HERE / "plots.mplstyle", HERE / f"{theme}.mplstyle"]):
            figure, buffer = Figure(figsize=(5.4, height)), io.BytesIO()
            draw(figure)
            figure.savefig(buffer, format="png")
            images.append(buffer.getvalue())
    with whole_file(out / f"{name}.png") as partial:
        partial.write_bytes(images[0])
    return replace(plot, uris=tuple("data:image/png;base64," + base64.b64encode(i).decode() for i in images))


def _skip(out: Path, name: str, title: str, why: str) -> Plot:
    (out / f"{name}.png").unlink(missing_ok=True)
    return Plot(title, f"Not drawn: {why}.")


# ---- example denoisings


def _drawn(job: dict[str, Any], example: Example) -> tuple[Example, bool, list[list[Cell]], int]:
    """Return an example, whether it is a grid of Sudoku, its tokens cut into the blocks, and the most steps of a block.

    `steps` count denoising forwards over the response from 0, negative if none unmasked the token. The response ends
    on the block grid, so blocks are counted back from the end and only the first may be short.
    """
    size, tokens, steps = example["block_size"], example["tokens"], example["steps"]
    prompt, answer = example["prompt"], example["answer"]
    sudoku = (job.get("task") or {}).get("type") == "sudoku" and len(tokens) == len(prompt) == len(answer) == 16
    wanted = answer if sudoku and example["reward"] < 1 else tokens
    blocks = []
    for start, end in pairwise([0, *range(len(tokens) % size or size, len(tokens) + 1, size)]):
        ranks = {step: rank for rank, step in enumerate(sorted({step for step in steps[start:end] if step >= 0}))}
        blocks.append([
            Cell(tokens[i], sudoku and prompt[i] != "0", step=steps[i] + 1, rank=ranks.get(steps[i]),
                 wanted=wanted[i] if wanted[i] != tokens[i] else "")
            for i in range(start, end)
        ])  # fmt: skip
    most = max((cell.rank + 1 for block in blocks for cell in block if cell.rank is not None), default=1)
    return example, sudoku, blocks, most
