"""The numbers of a finished run -> PNG plots and one self-contained report.html. Called when a pipeline ends.

Plain dicts in, files out; imports neither torch nor ray. The page needs no script, no network and no other file: plots
are data URIs, one for light and one for dark. What cannot be drawn is said in a sentence, never dropped in silence.
"""

import base64
import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Row = dict[str, Any]

HELD_OUT = "held-out"
STEP_SHADES = 6  # classes s0..s5 of report.html.jinja
PLOTS = "base_loss train_loss margin reward_accuracy log_ratios grad_norm accuracy accuracy_public".split()


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one rendering of a plot; each stands out from `paper` by 4.5:1, except the grid."""

    paper: str
    ink: str
    grid: str
    base: str
    aligned: str
    chosen: str
    rejected: str


LIGHT = Theme("#ffffff", "#1c2430", "#dde3ea", "#b4500f", "#1d5fbf", "#08735a", "#a3318a")
DARK = Theme("#171c24", "#e3e8ef", "#333d4b", "#f5a15c", "#7db3ff", "#4fd1ac", "#f08fd8")


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of the page: `uris` are its light and dark PNG, empty where `note` says why there is none."""

    name: str
    title: str
    note: str
    alt: str = ""
    uris: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Curve:
    """What one curve plot shows: metric key -> (legend label, theme colour), and a level to compare with."""

    name: str
    title: str
    unit: str
    lines: dict[str, tuple[str, str]]
    level: tuple[float, str] | None = None


def write_report(
    out: Path,
    job: Row,
    lineage: list[Row],
    curves: dict[str, list[Row]],
    evaluation: Row | None,
    answer: Row | None,
) -> Path:
    """Write the plots and report.html into the existing directory `out`; return the page's path.

    Every file is complete or absent; plots that this run cannot have are removed, so `out` never mixes two runs.
    """
    base, rounds = {"base": curves.get("base", [])}, _rounds(curves)
    specs = _curves(job)
    training = [_curve_plot(out, specs[0], base), *(_curve_plot(out, spec, rounds) for spec in specs[1:])]
    pairs = pair_up(evaluation)
    scores = [_accuracy_plot(out, "accuracy", [p for p in pairs if p["set"] == HELD_OUT])]
    scores.append(_accuracy_plot(out, "accuracy_public", [p for p in pairs if p["set"] != HELD_OUT]))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(percent=percent, points=points, duration=duration)
    page = environment.get_template("report.html.jinja").render(
        job=job,
        headline=headline(job, curves, evaluation),
        context=_context(pairs),
        facts=_facts(job),
        scores=scores,
        training=training,
        table={name: [p for p in pairs if p["set"] == name] for name in dict.fromkeys(p["set"] for p in pairs)},
        examples=[_example(job, example) for example in (evaluation or {}).get("examples", [])],
        answer=answer,
        lineage=lineage,
        job_text=json.dumps(job, indent=2, ensure_ascii=False, default=str),
    )
    return _write(out / "report.html", page.encode())


# ---- numbers into words


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A signed difference in percentage points; one that rounds to nothing has no sign."""
    text = f"{difference:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _solved(row: Row) -> str:
    return f"{percent(row['accuracy'])} % [{percent(row['low'])}, {percent(row['high'])}]"


def pair_up(evaluation: Row | None) -> list[Row]:
    """Rows of the evaluation -> base beside aligned per set, budget and temperature; the held-out set first.

    `gain` is aligned minus base in points (None if either is missing); `apart`: their intervals do not overlap.
    """
    cells: dict[tuple[Any, ...], Row] = {}
    for row in (evaluation or {}).get("table", []):
        key = (row["set"], row["budget"], row["temperature"])
        cells.setdefault(key, dict(zip(("set", "budget", "temperature"), key, strict=True)))[row["model"]] = row
    for cell in cells.values():
        base, aligned = cell.setdefault("base", None), cell.setdefault("aligned", None)
        both = base is not None and aligned is not None
        cell["gain"] = 100 * (aligned["accuracy"] - base["accuracy"]) if both else None
        cell["apart"] = both and (aligned["low"] > base["high"] or aligned["high"] < base["low"])
    return sorted(cells.values(), key=lambda c: (c["set"] != HELD_OUT, c["set"], c["temperature"], c["budget"]))


def headline(job: Row, curves: dict[str, list[Row]], evaluation: Row | None) -> str:
    """The result in one sentence, at the held-out budget with the largest gain; a loss is called a loss."""
    pairs = [p for p in pair_up(evaluation) if p["set"] == HELD_OUT and p["gain"] is not None]
    if not pairs:
        return _unevaluated(curves, evaluation)
    best = max(pairs, key=lambda p: p["gain"])
    base, aligned, gain = best["base"], best["aligned"], points(best["gain"])
    steps = _count(best["budget"], "denoising step") + " per block"
    if len({p["temperature"] for p in pairs}) > 1:
        steps += f" and temperature {best['temperature']}"
    noun = "prompt" if job.get("task", {}).get("type") == "preferences" else "puzzle"
    result = f"{_solved(aligned)} of {_count(aligned['num_prompts'], f'held-out {noun}')}, the base {_solved(base)}"
    overlap = "" if best["apart"] else "; the intervals overlap"
    if gain == "0.0":
        aside = ", its best budget" if len(pairs) > 1 else ""
        return f"No gain from alignment: at {steps}{aside}, the aligned model solves {result}."
    if best["gain"] < 0:
        start = "A loss at every budget; the smallest" if len(pairs) > 1 else "A loss"
        return f"{start}: at {steps} the aligned model solves {result}{overlap}."
    return f"At {steps} the aligned model solves {result}{overlap + ', so this may be chance' if overlap else ''}."


def _unevaluated(curves: dict[str, list[Row]], evaluation: Row | None) -> str:
    why = "No evaluation was run" if evaluation is None else "No held-out set was evaluated for both models"
    segments, _ = _segments(list(_rounds(curves).values()), "loss")
    if not segments:
        return f"{why}, and no training loss was logged."
    steps, loss = np.concatenate(segments).T
    return f"{why}; the training loss was {loss[0]:.3f} at step {steps[0]:.0f} and {loss[-1]:.3f} at step {steps[-1]:.0f}."


def _context(pairs: list[Row]) -> str:
    """All held-out gains, so that the headline's choice of one is open to view."""
    held = [p for p in pairs if p["set"] == HELD_OUT and p["gain"] is not None]
    if len(held) < 2:
        return ""
    gains = ", ".join(f"{points(p['gain'])} at {p['budget']}" for p in held)
    apart = sum(p["apart"] for p in held)
    return (
        f"This is the largest gain of {len(held)}. Aligned minus base in points, by denoising steps per block: {gains}. "
        f"The 95 % intervals are apart at {apart} of {len(held)}."
    )


def _facts(job: Row) -> dict[str, str]:
    train = job.get("train") or {}
    objective = train.get("objective") or {}
    facts = {
        "Task": (job.get("task") or {}).get("type"), "Rounds": job.get("rounds"), "Objective": objective.get("type"),
        "β": objective.get("beta"), "Learning rate": train.get("lr"), "Seed": job.get("seed"),
    }  # fmt: skip
    return {name: str(value) for name, value in facts.items() if value is not None}


# ---- curves


def _rounds(curves: dict[str, list[Row]]) -> dict[str, list[Row]]:
    def number(stage: str) -> int:
        return int("".join(re.findall(r"\d+", stage)) or 0)

    return {stage: curves[stage] for stage in sorted((s for s in curves if s.startswith("train")), key=number)}


def _curves(job: Row) -> list[Curve]:
    objective = (job.get("train") or {}).get("objective") or {}
    preference = objective.get("type", "dtrpo") != "sft" and not objective.get("sft_weight")
    start = (math.log(2), "log 2: policy = reference") if objective.get("loss_type", "sigmoid") == "sigmoid" else None
    ratios = {"log_ratio_chosen": ("chosen", "chosen"), "log_ratio_rejected": ("rejected", "rejected")}
    return [
        Curve("base_loss", "Base model: training loss", "loss", {"loss": ("loss", "base")}),
        Curve("train_loss", "Alignment: training loss", "loss", {"loss": ("loss", "aligned")}, start if preference else None),
        Curve("margin", "Margin: β × (chosen − rejected log-ratio)", "margin", {"margin": ("margin", "aligned")}, (0.0, "")),
        Curve("reward_accuracy", "Reward accuracy: pairs with a positive margin", "share of pairs",
              {"reward_accuracy": ("reward accuracy", "aligned")}, (0.5, "one half")),
        Curve("log_ratios", "Log-ratio of policy to reference", "nats per response", ratios, (0.0, "")),
        Curve("grad_norm", "Alignment: gradient norm", "norm", {"grad_norm": ("gradient norm", "aligned")}),
    ]  # fmt: skip


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _bounds(rounds: Sequence[list[Row]]) -> list[float]:
    """Where each round begins on the common step axis; the last entry is where the last one ends."""
    lasts = [max((row["step"] for row in rows if _finite(row.get("step"))), default=0) for rows in rounds]
    return [0, *accumulate(lasts)]


def _segments(rounds: Sequence[list[Row]], key: str) -> tuple[list[np.ndarray], int]:
    """Arrays [n, 2] of (step on the common axis, value), one per round that has any; and the count of unusable rows."""
    segments, missing = [], 0
    for start, rows in zip(_bounds(rounds), rounds, strict=False):
        usable = [(start + r["step"], r[key]) for r in rows if _finite(r.get("step")) and _finite(r.get(key))]
        missing += len(rows) - len(usable)
        if usable:
            segments.append(np.array(usable, dtype=float))
    return segments, missing


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred running mean over an odd `window`; at the ends, over the part of the window that exists."""
    total, index = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _curve_plot(out: Path, curve: Curve, rounds: dict[str, list[Row]]) -> Plot:
    data = {key: _segments(list(rounds.values()), key) for key in curve.lines}
    empty = [key for key, (segments, _) in data.items() if not segments]
    num_rows = sum(map(len, rounds.values()))
    if empty:
        why = f"none of the {_count(num_rows, 'logged row')} has {' or '.join(empty)}" if num_rows else "nothing was logged"
        return _skip(out, curve.name, curve.title, f"Not drawn: {why}.")
    longest = max(len(segment) for segments, _ in data.values() for segment in segments)
    window = 2 * (longest // 30) + 1
    bounds = _bounds(list(rounds.values()))
    note = f"Light: each logged row. Strong: centred mean of {window} rows." if window > 1 else "Each logged row."
    for key, (_, missing) in data.items():
        note += f" {missing} of {_count(num_rows, 'row')} without a usable {key} left out." if missing else ""
    ends = [(label, smooth(np.concatenate(data[key][0])[:, 1], window)) for key, (label, _) in curve.lines.items()]
    alt = f"Line plot over {_count(int(bounds[-1]), 'optimizer step')} in {_count(len(rounds), 'stage')}: "
    alt += "; ".join(f"{label} begins at {mean[0]:.3g} and ends at {mean[-1]:.3g}" for label, mean in ends) + "."

    def draw(figure: Figure, theme: Theme) -> None:
        axes = _axes(figure, figure.subplots(), theme, "optimizer step", curve.unit)
        for key, (label, color) in curve.lines.items():
            name = f"{label}, mean of {window} rows" if window > 1 else label
            _lines(axes, data[key][0], window, getattr(theme, color), name)
        if curve.level:
            axes.axhline(curve.level[0], color=theme.ink, lw=1, ls=(0, (4, 3)), label=curve.level[1] or None, zorder=1)
        _mark_rounds(axes, bounds, theme)
        _dress(figure, axes, theme, curve.title)

    return _save(out, curve.name, curve.title, note, alt, draw)


def _lines(axes: Axes, segments: list[np.ndarray], window: int, color: str, label: str) -> None:
    for number, segment in enumerate(segments):
        steps, values = segment.T
        marker = "o" if len(steps) < 12 else None
        name = label if number == 0 else None
        if window > 1:
            axes.plot(steps, values, color=color, lw=0.8, alpha=0.35)
            axes.plot(steps, smooth(values, window), color=color, lw=1.8, label=name)
        else:
            axes.plot(steps, values, color=color, lw=1.4, marker=marker, ms=3.5, label=name)


def _mark_rounds(axes: Axes, bounds: list[float], theme: Theme) -> None:
    if len(bounds) < 3:
        return
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.1 * (high - low))  # room for the round labels above the curves
    for number, start in enumerate(bounds[:-1], 1):
        if number > 1:
            axes.axvline(start, color=theme.ink, lw=0.9, ls=":")
        word = f"round {number}" if number == 1 or len(bounds) < 7 else str(number)
        axes.annotate(word, (start, 0.985), xycoords=axes.get_xaxis_transform(), xytext=(4, 0),
                      textcoords="offset points", va="top", fontsize=8.5, color=theme.ink)  # fmt: skip
