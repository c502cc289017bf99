"""The report: one file that needs nothing else, words that match the numbers, and no crash on a poor run."""

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rc_params_from_file
from PIL import Image

from dtrpo_ray.report import page as report
from dtrpo_ray.report.page import headline, pair_up, points, smooth, write_report
from dtrpo_ray.stages import Stage

Row = dict[str, Any]

JOB: Row = {
    "name": "sudoku-demo", "seed": 7, "rounds": 2, "task": {"type": "sudoku"},
    "train": {"lr": 1e-4, "objective": {"type": "dtrpo", "beta": 0.05, "loss_type": "sigmoid", "rpo_alpha": 0.0}},
}  # fmt: skip
KEY, DIGEST = "3f2a9b7c1d5e" + "0" * 52, "ab12" * 16
LINEAGE = [
    Stage("base", KEY, Path("runs/stages/base-3f2a9b7c1d5e"), 123.4, True, {"model/model.safetensors": DIGEST},
          {"loss": 0.25, "step": 40}),
    Stage("train-1", "c" * 64, Path("runs/stages/train-1-cccc"), 9.0, False, {}),
]  # fmt: skip
ANSWER = {"url": "http://127.0.0.1:8000", "prompt": "4000310410300000", "text": "4213314214232431", "reward": 1.0}
PUZZLE, SOLUTION = "4000310010300000", "4213312413422431"
PLOTS = {f"{name}.png" for name in ("base_loss", "train_loss", "margin", "reward_accuracy", "log_ratios", "grad_norm",
                                     "accuracy", "accuracy_public")}  # fmt: skip


def score(
    model: str,
    accuracy: float,
    low: float,
    high: float,
    at: int | float = 1,
    test_set: str = "held-out",
    n: int = 2000,
    forwards: int | None = None,
) -> Row:
    """A row at `at` denoising steps per block, or at that threshold if it is no whole number."""
    correct = round(accuracy * n)
    numbers: Row = {"num_prompts": n, "reward": accuracy, "low": low, "high": high}
    rng = np.random.default_rng([len(model), int(at)])  # each model solves prompts of its own
    numbers["rewards"] = rng.permutation([1.0] * correct + [0.0] * (n - correct)).tolist()
    field = "denoising_steps" if isinstance(at, int) else "threshold"
    setting = {"model": model, "set": test_set, "setting": f"{field}={at}", "temperature": 0.0}
    forwards = forwards or 4 * int(at)
    cost = {"tokens_per_forward": 16 / forwards, "forwards_per_answer": float(forwards), "forwards": [forwards] * n}
    return setting | numbers | cost


def example(**changes: Any) -> Row:
    steps = [0, 1, 1, 0, 2, 2, 3, 3, 4, 5, 4, 5, 7, 6, 7, 6]
    return {"model": "base", "prompt": PUZZLE, "answer": SOLUTION, "response": SOLUTION, "reward": 1.0,
            "block_size": 4, "setting": "denoising_steps=2", "steps": steps,
            "tokens": list(SOLUTION)} | changes  # fmt: skip


def train_rows(count: int, **changes: Any) -> list[Row]:
    return [
        {"step": i, "loss": 0.7 / i, "margin": 0.1 * i, "reward_accuracy": 0.5, "log_ratio_chosen": 0.1,
         "log_ratio_rejected": -0.1 * i, "grad_norm": 1.0} | changes
        for i in range(1, count + 1)
    ]  # fmt: skip


GAIN = [score("base", 0.633, 0.612, 0.654), score("aligned", 0.712, 0.692, 0.732),
        score("base", 0.81, 0.79, 0.83, 2), score("aligned", 0.80, 0.78, 0.82, 2)]  # fmt: skip
PUBLIC = [
    score(model, 0.5, 0.4, 0.6, 1, f"sudoku_4x4_{k}.jsonl", 100) for k in (10, 6) for model in ("base", "aligned")
]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    wrong = example(model="aligned", reward=0.0, response="4" * 16, tokens=["4"] * 16)
    curves = {"base": train_rows(40), "rollout-1": [], "train-1": train_rows(35), "train-2": train_rows(5)}
    return write_report(out, JOB, LINEAGE, curves, {"table": GAIN + PUBLIC, "examples": [example(), wrong]}, ANSWER)


def poor(out: Path, **changes: Any) -> str:
    """The page of a run that has nothing but what is given (and so draws nothing else)."""
    given: Row = {"job": JOB, "lineage": [], "curves": {}, "evaluation": None, "answer": None} | changes
    return write_report(out, **given).read_text()


class Outline(HTMLParser):
    """Start tags with their attributes; fails on tags that do not balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ---- the page


def test_page_needs_nothing_else(full: Path) -> None:
    text = full.read_text()
    outline = Outline(text)
    addresses = [v for _, a in outline.tags for k, v in a.items() if k in ("src", "href", "srcset", "action", "data")]
    assert len(addresses) == 2 * len(PLOTS)  # a light and a dark image each
    assert all(value and value.startswith("data:image/png;base64,") for value in addresses)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in outline.tags}
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_page_is_accessible(full: Path) -> None:
    text = full.read_text()
    tags = Outline(text).tags
    assert all(len(attributes["alt"] or "") > 40 for tag, attributes in tags if tag == "img")
    assert all(attributes.get("scope") for tag, attributes in tags if tag == "th")
    assert [tag for tag, _ in tags].count("table") == [tag for tag, _ in tags].count("caption")
    assert ("html", {"lang": "en"}) in tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags


def test_every_plot_is_a_whole_png(full: Path) -> None:
    assert {path.name for path in full.parent.iterdir()} == PLOTS | {"report.html"}
    for name in PLOTS:
        assert (full.parent / name).stat().st_size > 1000
        with Image.open(full.parent / name) as image:
            assert (image.format, image.width) == ("PNG", 1080)
            assert np.asarray(image.convert("L")).std() > 5  # not blank


def test_first_words_are_the_result(full: Path) -> None:
    body = full.read_text().split("<main>")[1].replace("\N{NO-BREAK SPACE}", " ")
    assert body.split("</h1>")[0].strip() == (
        "<h1>At 1 step per block the aligned model solves 71.2 % [69.2, 73.2] of 2,000 held-out puzzles, "
        "the base 63.3 % [61.2, 65.4]; p &lt; 0.001."
    )
    assert "+7.9 at 1 step per block, −1.0 at 2 steps per block" in body
    assert "significant (p &lt; 0.05) at 1 of 2" in body
    assert body.count('<span class="better">▲ +7.9</span>') == 1
    assert "[+5.0, +10.8], p &lt; 0.001" in body
    assert body.count("<small>2,000 prompts</small>") == 4


def test_lineage_is_shown(full: Path) -> None:
    text = full.read_text()
    assert f"<code>{KEY[:12]}</code>" in text
    assert KEY not in text
    assert DIGEST in text
    assert [text.count(f"<td>{word}</td>") for word in ("reused", "made")] == [1, 1]
    assert "2 min 3 s" in text
    assert "loss 0.25" in text


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    pages = [poor(tmp_path, curves={"base": train_rows(3)}) for _ in range(2)]
    assert pages[0] == pages[1]


HOSTILE = "<script>alert('x')</script>&\"'><img src=x onerror=y>"


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    table = [score(model, 0.5, 0.4, 0.6, 1, name) for model in ("base", "aligned") for name in (HOSTILE, r"$\frac{$")]
    bad = example(**dict.fromkeys(("model", "prompt", "answer", "response"), HOSTILE), tokens=[HOSTILE] * 16)
    lineage = [Stage(HOSTILE, HOSTILE, Path(HOSTILE), 1.0, True, {HOSTILE: HOSTILE}, {HOSTILE: HOSTILE})]
    job = JOB | {"name": HOSTILE, "task": {"type": HOSTILE}, "train": {"objective": {"type": HOSTILE}}}
    text = poor(tmp_path, job=job, lineage=lineage, evaluation={"table": table, "examples": [bad]},
                answer=dict.fromkeys(ANSWER, HOSTILE) | {"reward": 0.5})  # fmt: skip
    tags = Outline(text).tags
    assert "script" not in {tag for tag, _ in tags}
    assert not any("onerror" in attributes for _, attributes in tags)
    assert text.count("&lt;script&gt;") >= 15


def test_interrupt_keeps_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = poor(tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        poor(tmp_path, job=JOB | {"name": "other"})
    assert (tmp_path / "report.html").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_import_is_light() -> None:
    code = "import sys, dtrpo_ray.report.page; print({'torch', 'ray', 'matplotlib.pyplot'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the headline


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        (GAIN, "At 1 step per block the aligned model solves 71.2 % [69.2, 73.2] of 2,000 held-out puzzles, "
               "the base 63.3 % [61.2, 65.4]; p < 0.001."),
        ([score("base", 0.80, 0.78, 0.82, 4), score("aligned", 0.81, 0.79, 0.83, 4)],
         "At 4 steps per block the aligned model solves 81.0 % [79.0, 83.0] of 2,000 held-out puzzles, "
         "the base 80.0 % [78.0, 82.0]; p = 0.446, so this may be chance."),
        ([score("base", 0.8, 0.78, 0.82), score("aligned", 0.8, 0.78, 0.82)],
         "No gain from alignment: at 1 step per block the aligned model solves 80.0 % [78.0, 82.0] of 2,000 "
         "held-out puzzles, the base 80.0 % [78.0, 82.0]."),
        ([score("base", 0.80, 0.78, 0.82), score("aligned", 0.79, 0.77, 0.81),
          score("base", 0.9, 0.88, 0.92, 2), score("aligned", 0.7, 0.68, 0.72, 2)],
         "A loss at every setting; the smallest: at 1 step per block the aligned model solves 79.0 % "
         "[77.0, 81.0] of 2,000 held-out puzzles, the base 80.0 % [78.0, 82.0]; p = 0.453."),
        ([score("base", 1.0, 0.9, 1.0, n=1), score("aligned", 0.0, 0.0, 0.1, n=1)],
         "A loss: at 1 step per block the aligned model solves 0.0 % [0.0, 10.0] of 1 held-out puzzle, "
         "the base 100.0 % [90.0, 100.0]; p = 1.000."),
        (GAIN[:1] + PUBLIC, "No held-out set was evaluated for both models, and no training loss was logged."),
    ],
)  # fmt: skip
def test_headline(table: list[Row], expected: str) -> None:
    text = headline(JOB, {}, {"table": table, "examples": []})
    assert text.replace("\N{NO-BREAK SPACE}", " ") == expected


def test_headline_without_evaluation() -> None:
    curves = {"train-1": train_rows(2), "train-2": [{"step": 3, "loss": 0.125}]}
    assert headline(JOB, {}, None) == "No evaluation was run, and no training loss was logged."
    assert headline(JOB, curves, None) == (
        "No evaluation was run; the training loss was 0.700 at step 1 and 0.125 at step 5."
    )


def test_differences_have_one_sign_and_no_negative_zero() -> None:
    assert [points(value) for value in (7.94, -7.94, 0.04, -0.04, 0.0)] == ["+7.9", "−7.9", "0.0", "0.0", "0.0"]


def test_swapping_the_models_negates_the_gain_and_keeps_the_verdict() -> None:
    swap = {"base": "aligned", "aligned": "base"}
    swapped = pair_up({"table": [row | {"model": swap[row["model"]]} for row in GAIN]})
    pairs = pair_up({"table": GAIN})
    assert [p.gain for p in pairs] == pytest.approx([7.9, -1.0])
    assert [p.gain for p in swapped] == pytest.approx([-7.9, 1.0])
    assert [p.change and p.change["verdict"] for p in pairs] == ["better", "same"]
    assert [p.change and p.change["verdict"] for p in swapped] == ["worse", "same"]


def test_sets_come_held_out_first_then_by_number() -> None:
    pairs = pair_up({"table": PUBLIC + GAIN})
    names = list(dict.fromkeys(p.set for p in pairs))
    assert names == ["held-out", "sudoku_4x4_6.jsonl", "sudoku_4x4_10.jsonl"]


def test_a_threshold_compares_accuracy_and_forwards(tmp_path: Path) -> None:
    rows = [
        score("base", 0.8, 0.7, 0.9, 0.9, n=100, forwards=8),
        score("aligned", 0.8, 0.7, 0.9, 0.9, n=100, forwards=6),
    ]
    rows += [score(model, 0.5, 0.4, 0.6, 2, n=100) for model in ("base", "aligned")]
    found = {pair.setting.label: pair for pair in pair_up({"table": rows})}
    assert list(found) == ["2 steps per block", "threshold 0.9"]
    text = poor(tmp_path, evaluation={"table": rows, "examples": [example(setting="threshold=0.9")]})
    assert '<th scope="row">threshold 0.9</th>' in text
    assert re.search(
        r"<td>8.0 / 6.0\s*<small class=\"verdict\">−2.00 \[−2.00, −2.00\], p &lt; 0.001</small></td>", text
    )
    assert re.search(r"<td>8.0\s*</td>", text)  # equal forwards at two steps: nothing to test
    assert "threshold 0.9, blocks of 4" in text


def test_sets_whose_names_sort_alike_keep_all_their_budgets() -> None:
    names = ("test1.jsonl", "test01.jsonl")
    table = [
        score(model, 0.5, 0.4, 0.6, k, name, 10) for k in (1, 2, 4) for name in names for model in ("base", "aligned")
    ]
    found = report._by_set(pair_up({"table": table}))
    assert {name: [pair.setting.value for pair in pairs] for name, pairs in found.items()} == {
        name: [1, 2, 4] for name in names
    }


def test_only_a_preference_loss_starts_at_log_2() -> None:
    for kind, level in (("dtrpo", True), ("elbo_dpo", True), ("imitation", False), ("sft", False)):
        curves = report._curves({"train": {"objective": {"type": kind}}})
        assert (curves[0].level is not None) == level


# ---- curves


def test_smooth_is_a_mean() -> None:
    rng = np.random.default_rng(0)
    noise, line = rng.normal(size=50), np.arange(50.0)
    assert smooth(noise, 1) == pytest.approx(noise)
    assert smooth(np.full(5, 3.0), 9) == pytest.approx([3.0] * 5)
    assert smooth(line, 7)[3:-3] == pytest.approx(line[3:-3])
    assert smooth(line, 7)[[0, -1]] == pytest.approx([1.5, 47.5])  # the means of 0..3 and of 46..49


def test_rounds_follow_one_another_in_number_order() -> None:
    curves = {"train-10": train_rows(2), "base": train_rows(9), "train-2": train_rows(3)}
    first, second = report._segments(report._rounds(curves), "loss")
    assert first[:, 0].tolist() == [1, 2, 3]
    assert second[:, 0].tolist() == [4, 5]


def test_missing_keys_are_said_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "margin.png").write_text("of an earlier run")
    rows = train_rows(4)
    for row in rows:
        del row["margin"]
    rows[0]["grad_norm"], rows[1]["grad_norm"] = math.nan, None
    del rows[2]["step"]
    text = poor(tmp_path, curves={"train-1": rows, "base": [{"note": 1}]})
    assert "none of the 4 logged rows has margin" in text
    assert "none of the 1 logged row has loss" in text
    assert "3 of 4 rows without a usable grad_norm left out" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html", "train_loss.png", "reward_accuracy.png", "log_ratios.png", "grad_norm.png"
    }  # fmt: skip


@pytest.mark.parametrize("evaluation", [None, {"table": [], "examples": []}])
def test_a_run_without_anything_has_a_page(tmp_path: Path, evaluation: Row | None) -> None:
    text = poor(tmp_path, job={"name": "bare"}, evaluation=evaluation)
    Outline(text)
    assert text.count("Not drawn") == len(PLOTS)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


# ---- example denoisings


def test_sudoku_marks_givens_and_wrong_digits() -> None:
    wrong = example(reward=0.0, tokens=["1", *SOLUTION[1:]])
    cells = [cell for block in report._drawn(JOB, wrong)[2] for cell in block]
    assert [i for i, cell in enumerate(cells) if cell.given] == [0, 4, 5, 8, 10]
    assert [cell.wanted for cell in cells] == ["4"] + [""] * 15
    assert [cell.step for cell in cells][:8] == [1, 2, 2, 1, 3, 3, 4, 4]
    assert [cell.rank for cell in cells][:8] == [0, 1, 1, 0, 0, 0, 1, 1]


def test_another_valid_completion_is_not_called_wrong() -> None:
    blocks = report._drawn(JOB, example(tokens=["1", *SOLUTION[1:]]))[2]
    assert not any(cell.wanted for block in blocks for cell in block)


def test_verdicts_are_words(full: Path) -> None:
    text = full.read_text()
    assert (text.count("✗ wrong"), text.count("✓ correct")) == (1, 2)  # examples and the served answer
    assert text.count("≠</span>") == sum(digit != "4" for digit in SOLUTION)


def test_blocks_end_on_the_grid_and_may_hold_unfinished_tokens(tmp_path: Path) -> None:
    text = example(prompt="3 5 7", answer="3*5+7", tokens=["3", "*", "5", "+", " ", "\n"], steps=[0, 1, 3, 2, 2, -1])
    blocks = report._drawn(JOB | {"task": {"type": "countdown"}}, text)[2]
    assert [len(block) for block in blocks] == [2, 4]
    assert [cell.rank for block in blocks for cell in block] == [0, 1, 1, 0, 0, None]
    page = poor(tmp_path, evaluation={"table": [], "examples": [text]})
    assert "␣" in page
    assert "⏎" in page
    assert "never unmasked" in page


# ---- colours


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_enough_everywhere() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = (report.HERE / "page.html.jinja").read_text()
    schemes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in re.findall(r":root \{(.*?)\}", style, re.S)]
    plots = [rc_params_from_file(report.HERE / f"{name}.mplstyle", False, False) for name in ("light", "dark")]
    assert [scheme["paper"] for scheme in schemes] == [rc["figure.facecolor"] for rc in plots]
    texts, backs = ("ink", "soft", "good", "bad", "accent"), ("paper", "card")
    pairs = [(scheme[text], scheme[back]) for scheme in schemes for text in texts for back in backs]
    for rc in plots:
        others = {"axes.facecolor", "figure.facecolor", "grid.color", "axes.prop_cycle"}
        lines = {rc[name] for name in set(rc) - others} | set(rc["axes.prop_cycle"].by_key()["color"])
        assert rc["axes.facecolor"] == rc["figure.facecolor"]
        assert len(lines) == 5  # ink, base, aligned, chosen, rejected
        pairs += [(line, rc["figure.facecolor"]) for line in lines]
    cells = re.findall(r"background: (#\w{6}); color: (#\w{6})", style)
    assert len(cells) == 8  # six shades, never, wanted
    assert min(contrast(*pair) for pair in pairs + cells) >= 4.5


def test_job_is_printed_whole(full: Path) -> None:
    shown = re.search(r"defaults included</summary><pre>(.*?)</pre>", full.read_text(), re.S)
    assert shown is not None
    assert json.loads(shown[1].replace("&#34;", '"')) == JOB


def test_the_gradients_of_the_two_terms_are_drawn_where_they_were_logged(tmp_path: Path) -> None:
    rows = train_rows(4)
    assert report._term_curves([rows]) == []
    for row in (rows[0], rows[3]):
        row |= {"grad_norm_preference": 0.1, "grad_norm_nll": 2.0, "grad_cosine": -0.5}
    text = poor(tmp_path, curves={"train-1": rows})
    assert "2 of 4 rows without a usable grad_norm_nll left out" in text
    assert {"grad_terms.png", "grad_cosine.png"} <= {file.name for file in tmp_path.iterdir()}


def test_the_bases_held_out_nll_and_four_places_of_a_block_are_drawn_where_they_were_logged(tmp_path: Path) -> None:
    assert [curve.name for curve in report._base_curves(train_rows(3))] == ["base_loss"]
    places = {f"nll_place_{place}": 1.0 for place in range(1, 33)}
    rows = [{**row, **places} for row in train_rows(2)] + [{**train_rows(3)[2], **places, "held_out_nll": 0.5}]
    found = {curve.name: list(curve.colors) for curve in report._base_curves(rows)}
    assert found["base_held_out"] == ["held_out_nll"]
    assert found["base_places"] == [f"nll_place_{place}" for place in (1, 11, 21, 32)]
    poor(tmp_path, curves={"base": rows})
    assert {"base_held_out.png", "base_places.png"} <= {file.name for file in tmp_path.rglob("*.png")}
