"""Verifiers: right and wrong answers by hand, whole public files, and real generations of LLaDA-8B-Instruct."""

import gzip
import json
import os
import socket
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dtrpo_ray.errors import ConfigError, DataError
from dtrpo_ray.produce.verifiers import countdown, gsm8k, instructions, python_tests, sudoku
from dtrpo_ray.produce.verifiers.extract import last_box, marked_answers

GRID, PUZZLE = "1234341221434321", "1034341201434320"


def read(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def test_the_last_whole_box_counts_braces_balanced() -> None:
    assert last_box(r"\boxed{1} then \boxed{\frac{1}{2}} and \boxed{3") == r"\frac{1}{2}"
    assert last_box("none") is None
    assert list(marked_answers(r"<answer>\boxed{5}</answer> #### 7")) == ["5", r"\boxed{5}", "7"]


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("so \\boxed{1,200} is it, not 7", 1.0),
        ("#### 1200", 1.0),
        ("<answer>$1200.00</answer> of 5", 1.0),
        ("it is 1200.", 1.0),
        ("it is 1200, or 12", 0.0),
        ("\\boxed{x} and 1200", 1.0),
        ("-1200", 0.0),
        ("nothing", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_reads_the_marked_number_or_else_the_last(response: str, reward: float) -> None:
    assert gsm8k.score("", response, "12 * 100 = 1200\n#### 1,200") == reward


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("#### 18\nThat is 3 per day", "18", 1.0),
        ("5-18", "18", 1.0),
        ("x=-18", "-18", 1.0),
        (r"\boxed{1{,}200}", "1200", 1.0),
        (r"\boxed{1\,200}", "1200", 1.0),
        (r"\boxed{1/2}", "2", 0.0),
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        ("<answer>\n3 * 6\n= 18\n</answer>", "18", 1.0),
    ],
)
def test_gsm8k_reads_numbers_as_models_write_them(response: str, answer: str, reward: float) -> None:
    assert gsm8k.score("", response, answer) == reward


def test_every_solution_of_gsm8k_is_right_and_that_of_another_problem_hardly_ever(shared_data: Path) -> None:
    answers = [row["answer"] for row in read(shared_data / "gsm8k" / "test.jsonl")]
    assert all(gsm8k.score("", answer, answer) == 1.0 for answer in answers)
    others = sum(gsm8k.score("", one, other) for one, other in pairwise(answers))
    assert others / len(answers) < 0.05


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{0.5}", 1.0),
        (r"so <answer>\frac12</answer>", 1.0),
        (r"\boxed{2}", 0.0),
        ("no idea", 0.0),
    ],
)
def test_math_compares_as_mathematics(response: str, reward: float) -> None:
    pytest.importorskip("math_verify", reason="the extra `verifiers` is not installed")
    from dtrpo_ray.produce.verifiers import math

    assert math.score("", response, r"\frac{1}{2}") == reward


@pytest.mark.parametrize("response", [r"\boxed{9^{9^{9^9}}}", r"\boxed{100000000!}", r"\boxed{(1+x)^{100000}-1}"])
def test_a_math_answer_without_end_scores_nothing_and_the_next_is_judged(
    response: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("math_verify", reason="the extra `verifiers` is not installed")
    from dtrpo_ray.produce.verifiers import math

    monkeypatch.setattr(math, "SECONDS", 2)
    began = time.perf_counter()
    with pytest.raises(ArithmeticError, match="not compared within 2 s"):  # scored 0, and counted
        math.score("", response, "2")
    assert time.perf_counter() - began < 30
    with pytest.raises(DataError, match="it takes longer than 2 s"):
        math.score("", r"\boxed{2}", "9^{9^{9^9}}")
    with pytest.raises(DataError, match="it holds no mathematics"):
        math.score("", r"\boxed{2}", "")
    assert math.score("", r"\boxed{2}", "2") == 1.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (f"<answer>\n{GRID}\n</answer>", 1.0),
        ("The grid is 1234 3412 2143 4321", 1.0),
        (f"{GRID} is wrong, <answer>{GRID[4:] + GRID[:4]}</answer>", 0.0),
        (PUZZLE, 0.0),
        ("", 0.0),
    ],
)
def test_sudoku_finds_the_puzzle_in_the_prompt_and_the_grid_in_the_prose(response: str, reward: float) -> None:
    assert sudoku.score(f"Solve the following Sudoku puzzle: {PUZZLE}\n", response) == reward


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        (r"\boxed{49 + 55 - 53}", 1.0),
        (r"\boxed{55 - 53 + 49 = 51}", 1.0),
        ("49+55=104,104-53=51", 1.0),
        (r"\boxed{55 - 53}", 0.0),
        (r"\boxed{51}", 0.0),
        (r"\boxed{49 + 55 - 53 + 53 - 53}", 0.0),
        (r"\boxed{__import__('os').system('true')}", 0.0),
        (r"\boxed{9**9**9}", 0.0),
        (r"\boxed{49/(55-55)}", 0.0),
        ("(" * 150, 0.0),
    ],
)
def test_countdown_wants_every_number_once_and_the_target(response: str, reward: float) -> None:
    assert countdown.score("", response, "[[49, 55, 53], 51]") == reward
    assert countdown.score("", response, '[["49", 55.0, 53], "51"]') == reward
    assert countdown.score("Numbers: [49, 55, 53]\nTarget: 51", response) == reward


def test_countdown_divides_exactly() -> None:
    assert countdown.score("", r"\boxed{3 \times (8 \div 6) - 1}", "[[3, 8, 6, 1], 3]") == 1.0


# By LLaDA-8B-Instruct, at 128, 256 and 512 tokens: d1 (arXiv 2504.12216) reports 68.7, 76.7 and 78.2 % on GSM8K's 1,319
# problems, of which these files hold 1,130, and 20.7, 19.5 and 16.0 % on Countdown, by rules of its own.
def test_real_generations_score_near_what_was_reported_of_them(shared_data: Path) -> None:
    correct: dict[Any, list[float]] = defaultdict(list)
    for task, verifier in (("gsm8k", gsm8k), ("countdown", countdown), ("sudoku", sudoku)):
        for row in read(shared_data / "llada_generations" / f"{task}.jsonl.gz"):
            if (truth := row["ground_truth"]) is None:
                continue  # six of GSM8K's, which no verifier can score
            answer = truth if isinstance(truth, str) else json.dumps(truth)
            text = row["generations"].split("<|eot_id|>")[0].split("<|endoftext|>")[0]
            correct[task, row["gen_length"]].append(verifier.score(row["question"], text, answer))
    found = {key: round(100 * sum(rewards) / len(rewards), 1) for key, rewards in correct.items()}
    assert [found["gsm8k", n] for n in (128, 256, 512)] == pytest.approx([68.7, 76.7, 78.2], abs=4)
    assert [found["countdown", n] for n in (128, 256, 512)] == pytest.approx([20.7, 19.5, 16.0], abs=4)
    assert max(found["sudoku", n] for n in (128, 256, 512)) < 15


HUMANEVAL = {
    "prompt": "def double(x):\n    '''Twice x.'''\n",
    "test": "def check(f):\n    assert f(2) == 4\n    assert f(-1) == -2\n",
    "entry_point": "double",
}
MBPP = {"test_list": ["assert double(2) == 4", "assert double(0) == 0"], "test_setup_code": ""}


@pytest.mark.parametrize("tests", [HUMANEVAL, MBPP])
@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("```python\ndef double(x):\n    return 2 * x\n```", 1.0),
        ("Here:\n```\ndef double(x):\n    return x + x\n```\nDone.", 1.0),
        ("def double(x):\n    return x**3", 0.0),
        ("def double(x) return", 0.0),
        ("import sys\ndef double(x):\n    return 0\nsys.exit(0)", 0.0),
        ("import os\nos._exit(0)", 0.0),
    ],
)
def test_code_passes_if_its_tests_run_to_their_end(tests: dict[str, Any], response: str, reward: float) -> None:
    assert python_tests.score("", response, json.dumps(tests)) == reward


def test_a_completion_of_the_signature_is_code_too() -> None:
    assert python_tests.score("", "    return 2 * x\n", json.dumps(HUMANEVAL)) == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    pass",
        "import time\ntime.sleep(60)",
        "x = bytearray(1 << 31)",
        "open('f', 'wb').write(bytes(1 << 22))",
        "import os, time\nif os.fork():\n    time.sleep(60)",
        "import os\nassert 'HOME' not in os.environ and os.listdir('.') == []\nraise SystemExit(1)",
    ],
)
def test_code_that_goes_too_far_fails_in_bounded_time(code: str) -> None:
    began = time.perf_counter()
    assert not python_tests.passes(code, "", wall_seconds=2)
    assert time.perf_counter() - began < 20


FORGERIES = [
    "import __main__\nprint(__main__.__dict__)\nraise SystemExit(0)",
    "import sys\nprint(sys._getframe(1).f_locals, sys._getframe(1).f_code.co_consts)\nraise SystemExit(0)",
    "import builtins, os\nbuiltins.exec = os._exit = os.write = print",
    "import os\nos.write(3, b'0' * 32)\nos._exit(0)",
    "def double(x):\n    import os\n    os._exit(0)",
    "def double(x):\n    raise SystemExit(0)",
]
_FIND_THE_WORD = """
import gc, os
for found in gc.get_objects():
    if type(found).__name__ == "partial" and len(found.args) == 2 and isinstance(found.args[1], bytes):
        found()
        os._exit(0)
"""
LOOKS = [  # each would find the word or the way to it
    _FIND_THE_WORD,
    "import __main__\n__main__._REFUSED = ()\n__main__.refuse_to_look.__defaults__ = ()\n" + _FIND_THE_WORD,
    "import ctypes",
    "import sys\nsys.settrace(lambda *_: None)",
    "compile('1', '', 'eval').replace(co_name='x')",
]


def require(isolated: bool) -> None:
    if isolated and not python_tests.namespaces():
        pytest.skip("this machine permits no user namespaces")


@pytest.mark.parametrize("code", FORGERIES)
@pytest.mark.parametrize("isolated", [True, False])
def test_a_pass_cannot_be_forged_by_leaving_early_or_by_what_frames_and_modules_hold(code: str, isolated: bool) -> None:
    require(isolated)
    assert not python_tests._run(code, "assert double(2) == 4", 20, isolated)


@pytest.mark.parametrize("code", LOOKS)
@pytest.mark.parametrize("isolated", [True, False])
def test_looking_for_the_word_is_refused(
    code: str, isolated: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where nothing is refused, the same code passes; so it is the refusal that fails it."""
    require(isolated)
    code = "def double(x):\n    return 2 * x\n" + code
    assert not python_tests._run(code, "assert double(2) == 4", 20, isolated)
    source = python_tests._SANDBOX.read_text()
    (tmp_path / "open.py").write_text(source.replace("    refuse_to_look()\n", "    pass\n"))
    monkeypatch.setattr(python_tests, "_SANDBOX", tmp_path / "open.py")
    assert python_tests._run(code, "assert double(2) == 4", 20, isolated)


def test_output_without_end_stays_out_of_this_process() -> None:
    code = "import os\nwhile True:\n    os.write(1, bytes(1 << 20))\n    os.write(3, bytes(1 << 20))"
    assert not python_tests.passes(code, "", wall_seconds=3)


def test_namespaces_close_off_network_processes_and_files(tmp_path: Path) -> None:
    if not python_tests.namespaces():
        pytest.skip("this machine permits no user namespaces")
    for code in (
        "import socket\nsocket.create_connection(('127.0.0.1', PORT))",
        f"open('{tmp_path}/x', 'w')",
        f"import os\nos.kill({os.getpid()}, 0)",
        f"open('/proc/{os.getpid()}/environ')",
        f"import socket\nsocket.socket(socket.AF_UNIX).connect('{tmp_path}/listens')",
        "for i in range(100):\n    open(str(i), 'wb').write(bytes(1 << 20))",  # 100 MiB, 1 MiB a file
    ):
        (tmp_path / "listens").unlink(missing_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as pathname:
            pathname.bind(f"{tmp_path}/listens")
            pathname.listen()
            assert not python_tests.passes(code.replace("PORT", str(server.getsockname()[1])), "")
    assert python_tests.passes("open('x', 'w').write('1')", "assert open('x').read() == '1'")


@pytest.mark.parametrize(
    "code",
    [
        "import os\nif not os.fork():\n    os.setsid()\n    os.execv('/bin/sh', ['NAME', '-c', 'sleep 30; :'])",
        "import os, sys\nos.execv(sys.executable, ['NAME', '-c', 'import ctypes, os, time;"
        "ctypes.CDLL(None).prctl(1, 0); os.setsid(); time.sleep(30)'])",
    ],
)
def test_what_code_started_ends_with_it(tmp_path: Path, code: str) -> None:
    require(True)
    name = f"survivor-{tmp_path.name}"
    python_tests.passes(code.replace("NAME", name), "", wall_seconds=3)
    time.sleep(0.5)
    assert not any(name in file.read_text() for file in Path("/proc").glob("[0-9]*/cmdline") if file.exists())


def test_a_machine_without_namespaces_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_tests, "_run", lambda *_, isolated: not isolated)
    assert not python_tests.namespaces.__wrapped__()
    monkeypatch.setattr(python_tests, "namespaces", python_tests.namespaces.__wrapped__)
    assert "ran without namespaces" in python_tests.caution()
    monkeypatch.setattr(python_tests, "_run", lambda *_, isolated: False)
    with pytest.raises(ConfigError, match="fails on an empty test within the limits"):
        python_tests.namespaces()


def test_the_reference_solutions_of_humaneval_and_mbpp_pass(shared_data: Path) -> None:
    rows = read(shared_data / "humaneval" / "HumanEval.jsonl.gz")[:6]
    assert all(python_tests.score("", r["prompt"] + r["canonical_solution"], json.dumps(r)) for r in rows)
    assert not any(python_tests.score("", r["prompt"] + "    pass", json.dumps(r)) for r in rows[:2])
    rows = read(shared_data / "mbpp" / "mbpp.jsonl")[:6]
    assert all(python_tests.score("", r["code"], json.dumps(r)) for r in rows)


def held(name: str, text: str, **kwargs: Any) -> float:
    return instructions.score("", text, json.dumps({"instruction_id_list": [name], "kwargs": [kwargs]}))


FOLLOWED: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "A Cat and a dog.", "A cat."),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "at least"}, "cat cat", "cat"),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, "cat", "cat cat"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "a Cat"),
    ("keywords:letter_frequency", {"letter": "E", "let_frequency": 2, "let_relation": "at least"}, "eel", "el"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "A. B!", "A b."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", "just three words"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        'a\n\n"Then, b',
        "then\n\nb",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. hello", "Bye."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S hello", "P.S. hello"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n** b"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. Done", "Done. Say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'so "the end."', "The end. So"),
    ("startend:quotation", {}, '"said"', '"said'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A B c", "A b"),
    ("change_case:english_capital", {}, "ALL OF IT", "All of it"),
    ("change_case:english_lowercase", {}, "all of it", "All of it"),
    ("punctuation:no_comma", {}, "a b", "a, b"),
]


@pytest.mark.parametrize(("name", "kwargs", "right", "wrong"), FOLLOWED)
def test_each_instruction_tells_a_text_that_follows_it(name: str, kwargs: Any, right: str, wrong: str) -> None:
    assert (held(name, right, **kwargs), held(name, wrong, **kwargs)) == (1.0, 0.0)
    assert held(name, " ", **kwargs) == 0.0


def test_languages_are_told_apart() -> None:
    pytest.importorskip("langdetect", reason="the extra `verifiers` is not installed")
    german = "Das ist ein ganz gewöhnlicher deutscher Satz über das Wetter."
    assert held("language:response_language", german, language="de") == 1.0
    assert held("language:response_language", german, language="en") == 0.0


def test_every_row_of_ifeval_names_known_instructions_with_arguments_they_take(shared_data: Path) -> None:
    rows = read(shared_data / "ifeval" / "input_data.jsonl")
    known = {name for name, *_ in FOLLOWED} | {"language:response_language"}
    assert known == set(instructions.INSTRUCTIONS)
    assert {name for row in rows for name in row["instruction_id_list"]} == known
    rows = [row for row in rows if "language:response_language" not in row["instruction_id_list"]]
    shares = [instructions.score("", "A text, of little use.", json.dumps(row)) for row in rows]
    assert all(0.0 <= share <= 1.0 for share in shares)
    with pytest.raises(DataError, match="instruction 'no:such' is not one of keywords:existence"):
        held("no:such", "text")


def test_the_share_of_instructions_is_the_reward() -> None:
    answer = {"instruction_id_list": ["punctuation:no_comma", "startend:quotation"], "kwargs": [{}, {"x": None}]}
    assert instructions.score("", "no comma", json.dumps(answer)) == 0.5
