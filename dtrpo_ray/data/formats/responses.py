"""Files of single responses -> `ResponseRow`s: generations with ground truth, and step maps as samplers write them.

A file row may hold several samples of a prompt; each is a row of its own here, "file:line#2" the second. Steps are kept
as the source counted them: only their order within a block is used (docs/data.md lists what each source writes).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtrpo_ray.data.formats import views
from dtrpo_ray.data.formats.batches import raw_rows, recognised
from dtrpo_ray.data.formats.columns import PROMPT, prompt_columns
from dtrpo_ray.data.formats.files import Shard, data_files, file_name, plan_shards
from dtrpo_ray.data.formats.parsing import D1_BLOCK, D1_STOPPED, MOST, Refusal, one_row, parted, reference
from dtrpo_ray.data.formats.parsing import field as required
from dtrpo_ray.data.formats.parsing import text as as_text
from dtrpo_ray.data.formats.preferences import Prompt, messages, require_utf8, row_object
from dtrpo_ray.data.formats.views import View
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.method.trajectory import NEVER

REPLAY_CONTRACT = 1  # of SGLang's dllm_replay_* fields
_STOPPED = re.compile(D1_STOPPED, re.DOTALL)
_SNAPSHOT_LINE = re.compile(r"(\d+), (.*)", re.DOTALL)
_SNAPSHOT_MASK = "<|mdm_mask|>"


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """One response, as text or as ids, and what its source knew about it.

    `response_ids`, `pieces` (tokens as texts), `steps` and `logps` are as long as each other where they are given.
    """

    origin: str
    engine: str
    prompt: Prompt | None = None
    response: str | None = None
    answer: str | None = None
    prompt_ids: list[int] | None = None
    response_ids: list[int] | None = None
    pieces: list[str] | None = None
    steps: list[int] | None = None
    logps: list[float] | None = None
    reward: float | None = None
    denoising_steps: int | None = None
    max_new_tokens: int | None = None


_INTS = pa.list_(pa.int32())
# responses in columns: the fields of a ResponseRow
RESPONSES = pa.schema(
    [
        *PROMPT,
        ("engine", pa.string()),
        ("response", pa.string()),
        ("answer", pa.string()),
        ("prompt_ids", _INTS),
        ("response_ids", _INTS),
        ("pieces", pa.list_(pa.string())),
        ("steps", _INTS),
        ("logps", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("denoising_steps", pa.int32()),
        ("max_new_tokens", pa.int32()),
    ]
)


def as_table(rows: Sequence[ResponseRow]) -> pa.Table:
    """Responses as RESPONSES."""
    same = set(RESPONSES.names) - {"prompt", "messages"}
    columns: dict[str, Any] = {name: [getattr(row, name) for row in rows] for name in same}
    return pa.table(columns | prompt_columns([row.prompt for row in rows]), schema=RESPONSES)


# === 1. Files -> responses ===


def read_responses(where: str | Path) -> tuple[list[ResponseRow], list[Rejected]]:
    """The responses of a file or folder, and the samples refused.

    Raises DataError for a file that cannot be read, holds no row, or has columns of no known format.
    """
    return parted(row for file in data_files(str(where)) for row in read_file(file))


def read_file(file: str) -> Iterator[ResponseRow | Rejected]:
    """The responses of a file and the rows refused, one after the other."""
    form = recognise(file)
    for shard in plan_shards(file):
        yield from read_shard(form, shard)


def read_shard(form: "Format", shard: Shard) -> Iterator[ResponseRow | Rejected]:
    """The samples of one part of a file."""
    for origin, value in raw_rows(shard):
        yield from _responses(form, origin, value)


def read_tables(form: "Format", shard: Shard) -> Iterator[tuple[pa.Table, list[Rejected]]]:
    """What `read_shard` reads, a batch at a time: the samples as RESPONSES, and those refused."""
    parse = partial(_responses, form)
    yield from views.tables(shard, form.views, parse, as_table, {"engine": form.engine})


def _responses(form: "Format", origin: str, value: Any) -> Iterator[ResponseRow | Rejected]:
    try:
        with one_row():
            samples = form.parse(value if isinstance(value, str) else row_object(value))
    except Refusal as refusal:
        yield Rejected(origin, *refusal.args)
        return
    for number, sample in enumerate(samples, 1):
        where = origin if len(samples) == 1 else f"{origin}#{number}"
        try:
            with one_row():
                row = _checked(ResponseRow(where, form.engine, **sample))
        except Refusal as refusal:
            yield Rejected(where, *refusal.args)
        else:
            yield row


def _checked(row: ResponseRow) -> ResponseRow:
    """The rules that hold for every format."""
    if row.prompt is None and row.prompt_ids is None:
        raise Refusal("missing field", "prompt")
    tokens = row.response_ids if row.response_ids is not None else row.pieces
    for name in ("steps", "logps"):
        values = getattr(row, name)
        if values is not None and tokens is not None and len(values) != len(tokens):
            raise Refusal("lengths differ", f"{len(values)} {name} for {len(tokens)} tokens")
    if any(step < NEVER for step in row.steps or ()):
        raise Refusal("bad step", f"a step is {min(row.steps or ())}; known are 0 and up, and {NEVER} for never")
    if not (row.response_ids or row.pieces or (row.response or "").strip()):
        raise Refusal("empty side", "response has no text")
    require_utf8([row.prompt, row.response, row.answer, row.pieces])
    return row


# === 2. One raw row -> the fields of its samples, a function for each format ===

Samples = list[dict[str, Any]]


def _d1_generation(row: dict[str, Any]) -> Samples:
    """d1's evaluation files: LLaDA's text with its end tokens spelled out, and the ground truth."""
    gen_length, steps = _integer(row, "gen_length", 1), _integer(row, "steps")
    text = as_text(required(row, "generations"), "generations")
    known = {"answer": _answer(row, "ground_truth"), "max_new_tokens": gen_length}
    known["denoising_steps"] = min(MOST, max(1, D1_BLOCK * steps // gen_length))
    return [{"prompt": as_text(required(row, "question"), "question"), "response": _STOPPED.sub("", text), **known}]


def _generation(row: dict[str, Any]) -> Samples:
    """A prompt (text or messages) and a response, with an answer and a reward if there are any."""
    text = as_text(required(row, "response"), "response")
    return [{"prompt": _prompt(row), "response": text, "answer": _answer(row, "answer"), **_reward(row.get("reward"))}]


def _dllm_rl_row(row: dict[str, Any]) -> Samples:
    """dLLM-RL's training rows: a prompt, a response as text and its step map."""
    fields: dict[str, Any] = {"prompt": _prompt(row), "response": as_text(required(row, "response"), "response")}
    steps = _integers(required(row, "step_map"), "step_map")
    return [{**fields, "steps": steps, "answer": _answer(row, "ground_truth_answer"), **_reward(row.get("reward"))}]


def _rollout(row: dict[str, Any]) -> Samples:
    """dLLM-RL's and DiRL's rollouts: lists over the samples of a prompt; DiRL's also have the ids."""
    outputs, maps = _list(required(row, "full_output"), "full_output"), _list(required(row, "step_map"), "step_map")
    columns = {name: row.get(name) for name in ("token_ids", "prompt_ids", "rewards", "prompt", "ground_truth_answer")}
    samples = []
    for i, (output, steps) in enumerate(_together(outputs, maps, "step_map")):
        one = {name: v[i] if isinstance(v, list) and len(v) == len(outputs) else v for name, v in columns.items()}
        sample: dict[str, Any] = {"response": as_text(output, "full_output"), "steps": _integers(steps, "step_map")}
        sample |= {"prompt": None if one["prompt"] is None else as_text(one["prompt"], "prompt")}
        sample |= {"answer": _answer(one, "ground_truth_answer"), **_reward(one["rewards"])}
        if one["token_ids"] is not None:
            sample["response_ids"] = _integers(one["token_ids"], "token_ids")
            sample["prompt_ids"] = _integers(required(one, "prompt_ids"), "prompt_ids")
        samples.append(sample)
    if not samples:
        raise Refusal("empty side", "full_output has no sample")
    return samples


def _jetengine(row: dict[str, Any]) -> Samples:
    """What JetEngine returns for a request, beside the prompt that was asked."""
    ids = _integers(required(row, "token_ids"), "token_ids")
    steps = _integers(required(row, "first_unmask_times"), "first_unmask_times")
    sample: dict[str, Any] = {"response_ids": ids, "steps": steps}
    sample |= {"response": as_text(row.get("text") or "", "text"), **_prompt_or_ids(row)}
    if row.get("logprobs") is not None:
        sample["logps"] = [_float(value, "logprobs holds") for value in _list(row["logprobs"], "logprobs")]
    return [sample]


def _sglang(row: dict[str, Any]) -> Samples:
    """SGLang's replay fields, as DARE reads them: the terminal block whole, steps from 1."""
    meta = required(row, "meta_info")
    if not isinstance(meta, dict):
        raise Refusal("wrong type", "meta_info is not an object")
    version = required(meta, "dllm_replay_contract_version")
    if version != REPLAY_CONTRACT:
        raise Refusal("unknown version", f"dllm_replay_contract_version is {version}; known is {REPLAY_CONTRACT}")
    ids = _integers(required(meta, "dllm_replay_token_ids"), "dllm_replay_token_ids")
    stop, steps = _integer(meta, "dllm_stop_length"), required(meta, "dllm_replay_step_maps")
    said = next((row[name] for name in ("token_ids", "output_ids") if row.get(name) is not None), None)
    said = None if said is None else _list(said, "output_ids")
    if said is not None and (len(said) != stop or said != ids[:stop]):
        raise Refusal("tokens rewritten", "the replayed ids do not begin with the ids of the response")
    sample = {"response_ids": ids, "steps": _integers(steps, "dllm_replay_step_maps")}
    return [{**sample, "response": as_text(row.get("text") or "", "text"), **_prompt_or_ids(row)}]


def _step_map(row: dict[str, Any]) -> Samples:
    """A step map over tokens as texts."""
    pieces = [as_text(piece, "tokens") for piece in _list(required(row, "tokens"), "tokens")]
    if row.get("remask_events"):
        raise Refusal("tokens rewritten", f"{row['remask_events']} tokens were masked again")
    steps = _integers(required(row, "step_map"), "step_map")
    return [{"prompt": _prompt(row) if row.get("prompt") else "", "pieces": pieces, "steps": steps}]


def _id_snapshots(row: dict[str, Any]) -> Samples:
    """The response's ids after every step (Dream's history, d3LLM); `mask_id` marks what was still masked."""
    mask = _integer(row, "mask_id")
    states = [_integers(state, "snapshots") for state in _list(required(row, "snapshots"), "snapshots")]
    steps = _steps_of(states, mask)
    return [{"response_ids": states[-1], "steps": steps, **_prompt_or_ids(row)}]


def _text_snapshots(text: str) -> Samples:
    """LLaDA's visualisation files: "STEP, *token&*token&..." a line, which may hold line ends of its own."""
    states = []
    for line in re.split(r"\r?\n(?=\d+, \*)", text.rstrip("\r\n")):
        found = _SNAPSHOT_LINE.fullmatch(line)
        if found is None or not found[2].startswith("*") or not found[2].endswith("&"):
            raise Refusal("not a snapshot", f'{line[:40]!r} is not "STEP, *token&*token&"')
        states.append(found[2][1:-1].split("&*"))
    return [{"prompt": "", "pieces": states[-1], "steps": _steps_of(states, _SNAPSHOT_MASK)}]


def _steps_of(states: list[list[Any]], mask: Any) -> list[int]:
    """The step, from 1, whose snapshot is the first to show each token; NEVER where none does."""
    if not states:
        raise Refusal("missing field", "snapshots")
    steps = [NEVER] * len(states[0])
    for number, state in enumerate(states, 1):
        if len(state) != len(steps):
            raise Refusal("lengths differ", f"snapshot {number} has {len(state)} tokens of {len(steps)}")
        for at, token in enumerate(state):
            if token != mask and steps[at] == NEVER:
                steps[at] = number
            if steps[at] != NEVER and token != states[steps[at] - 1][at]:
                raise Refusal("tokens rewritten", f"place {at} is {states[steps[at] - 1][at]!r}, then {token!r}")
    return steps


@dataclass(frozen=True, slots=True)
class Format:
    """A layout of response rows; a file has it if it has all its columns, and the first that fits wins.

    `parse` gives the samples of a row; `views` read whole columns of it.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[[Any], Samples]
    engine: str
    views: tuple[View, ...] = ()


_D1 = ("question", "generations", "ground_truth", "gen_length", "steps")
FORMATS = (
    Format("d1 generations", _D1, _d1_generation, "d1", views.D1_GENERATIONS),
    Format("dLLM-RL and DiRL rollouts", ("full_output", "step_map"), _rollout, "dLLM-RL/DiRL"),
    Format("dLLM-RL training rows", ("prompt", "response", "step_map"), _dllm_rl_row, "dLLM-RL", views.TRAINING_ROWS),
    Format("JetEngine", ("token_ids", "first_unmask_times"), _jetengine, "JetEngine", views.JETENGINE),
    Format("SGLang, DARE", ("meta_info",), _sglang, "SGLang"),
    Format("step map over texts", ("tokens", "step_map"), _step_map, "step map"),
    Format("snapshots of ids", ("snapshots", "mask_id"), _id_snapshots, "snapshots"),
    Format("generations", ("prompt", "response"), _generation, "unknown", views.GENERATIONS),
)
TEXT_FORMAT = Format("LLaDA snapshots", (), _text_snapshots, "LLaDA")


def recognise(file: str) -> Format:
    """The format of a file by the columns of its first rows. Raises DataError if it has none."""
    if file_name(file).endswith(".txt"):
        return TEXT_FORMAT
    return recognised(file, FORMATS, "responses")


def _prompt(row: dict[str, Any]) -> Prompt:
    prompt = required(row, "prompt")
    return prompt if isinstance(prompt, str) else messages(prompt, "prompt")


def _prompt_or_ids(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt as ids if they are there (SGLang calls them input_ids), and as text or messages if that is there."""
    ids = next((row[name] for name in ("prompt_ids", "input_ids") if row.get(name) is not None), None)
    return {
        "prompt_ids": None if ids is None else _integers(ids, "prompt_ids"),
        "prompt": None if row.get("prompt") is None else _prompt(row),
    }


def _answer(row: dict[str, Any], name: str) -> str | None:
    return reference(row.get(name), name)


def _reward(value: Any) -> dict[str, Any]:
    return {"reward": None if value is None else _float(value, "the reward is")}


def _float(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refusal("wrong type", f"{where} a {type(value).__name__}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise Refusal("bad value", f"{where} a number beyond float64") from None


def _integer(row: dict[str, Any], name: str, least: int = 0) -> int:
    value = required(row, name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refusal("wrong type", f"{name} is a {type(value).__name__}, not an integer")
    if not least <= value <= MOST:
        raise Refusal("bad value", f"{name} is {str(value)[:20]}; expected {least} to {MOST}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise Refusal("wrong type", f"{where} is a {type(value).__name__}, not a list")
    return value


def _integers(value: Any, where: str) -> list[int]:
    values = _list(value, where)
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
        raise Refusal("wrong type", f"{where} is not a list of integers")
    if values and not -MOST <= min(values) <= max(values) <= MOST:
        raise Refusal("bad value", f"{where} holds a number beyond int32")
    return values


def _together(one: list[Any], other: list[Any], where: str) -> Iterator[tuple[Any, Any]]:
    if len(one) != len(other):
        raise Refusal("lengths differ", f"{len(other)} of {where} for {len(one)} samples")
    return zip(one, other, strict=True)
