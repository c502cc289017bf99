"""Files of single responses -> `ResponseRow`s: generations with ground truth, and step maps as samplers write them.

A file row may hold several samples of a prompt; each is a row of its own here, "file:line#2" the second. Steps are kept
as the source counted them: only their order within a block is used (docs/data.md lists what each source writes).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from dtrpo_ray.data.formats.base import RowFormat, attempt, find_format
from dtrpo_ray.data.formats.columns import PROMPT
from dtrpo_ray.data.formats.files import file_name
from dtrpo_ray.data.formats.parsing import (
    MOST,
    Prompt,
    Record,
    Refusal,
    as_float,
    as_integers,
    as_list,
    as_text,
    require_utf8,
)
from dtrpo_ray.data.schemas import arrow_fields
from dtrpo_ray.data.tables import Rejected
from dtrpo_ray.method.trajectory import NEVER

REPLAY_CONTRACT = 1  # the version of SGLang's dllm_replay_* fields that we know
D1_BLOCK = 32
_D1_ENDS = re.compile(r"(<\|eot_id\|>|<\|endoftext\|>).*", re.DOTALL)  # LLaDA's end tokens, spelled out
_SNAPSHOT_LINE = re.compile(r"(\d+), (.*)", re.DOTALL)
_SNAPSHOT_MASK = "<|mdm_mask|>"


@dataclass(frozen=True, slots=True)
class ResponseRow:
    """One response, as text or as ids, and what its source knew about it.

    `response_ids`, `pieces` (tokens as texts), `steps` and `logps` are as long as each other where they are given.
    `origin` and `engine` are set by the format once a row is parsed.
    """

    origin: str = ""
    engine: str = ""
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


RESPONSES = pa.schema([*PROMPT, *arrow_fields(ResponseRow, skip=("origin", "prompt"))])


@dataclass(frozen=True, slots=True)
class ResponseFormat(RowFormat[ResponseRow]):
    """A layout whose rows hold one response or several, which `parse` returns."""

    schema = RESPONSES
    parse: Callable[[Record], list[ResponseRow]]
    engine: str

    def parse_row(self, origin: str, value: Any) -> Iterator[ResponseRow | Rejected]:
        samples = attempt(origin, lambda: self.parse(Record.of_row(value)))
        if isinstance(samples, Rejected):
            yield samples
            return
        for number, sample in enumerate(samples, 1):
            where = origin if len(samples) == 1 else f"{origin}#{number}"
            yield attempt(where, require_response, replace(sample, origin=where, engine=self.engine))


def require_response(row: ResponseRow) -> ResponseRow:
    """Return a response. Raises Refusal for one that breaks a rule of every format."""
    if row.prompt is None and row.prompt_ids is None:
        raise Refusal("missing field", "prompt")
    tokens = row.response_ids if row.response_ids is not None else row.pieces
    for name, values in (("steps", row.steps), ("logps", row.logps)):
        if values is not None and tokens is not None and len(values) != len(tokens):
            raise Refusal("lengths differ", f"{len(values)} {name} for {len(tokens)} tokens")
    if any(step < NEVER for step in row.steps or ()):
        raise Refusal("bad step", f"a step is {min(row.steps or ())}; known are 0 and up, and {NEVER} for never")
    if not (row.response_ids or row.pieces or (row.response or "").strip()):
        raise Refusal("empty side", "response has no text")
    require_utf8([row.prompt, row.response, row.answer, row.pieces])
    return row


# === one raw row -> its samples, a function for each format ===


def _d1_generation(row: Record) -> list[ResponseRow]:
    """d1's evaluation files: LLaDA's text with its end tokens spelled out, and the ground truth."""
    gen_length, steps = row.integer("gen_length", 1), row.integer("steps")
    sample = ResponseRow(
        response=_D1_ENDS.sub("", row.text("generations")),
        answer=row.reference("ground_truth"),
        max_new_tokens=gen_length,
        denoising_steps=min(MOST, max(1, D1_BLOCK * steps // gen_length)),
        prompt=row.text("question"),
    )
    return [sample]


def _generation(row: Record) -> list[ResponseRow]:
    """A prompt (text or messages) and a response, with an answer and a reward if there are any."""
    response, reward = row.text("response"), row.get("reward")
    return [ResponseRow(prompt=row.prompt(), response=response, answer=row.reference("answer"), reward=_reward(reward))]


def _dllm_rl_row(row: Record) -> list[ResponseRow]:
    """dLLM-RL's training rows: a prompt, a response as text and its step map."""
    prompt, response, steps = row.prompt(), row.text("response"), row.integers("step_map")
    answer, reward = row.reference("ground_truth_answer"), _reward(row.get("reward"))
    return [ResponseRow(prompt=prompt, response=response, steps=steps, answer=answer, reward=reward)]


def _rollout(row: Record) -> list[ResponseRow]:
    """dLLM-RL's and DiRL's rollouts: lists over the samples of a prompt; DiRL's also have the ids."""
    outputs, maps = row.items("full_output"), row.items("step_map")
    if len(outputs) != len(maps):
        raise Refusal("lengths differ", f"{len(maps)} of step_map for {len(outputs)} samples")
    if not outputs:
        raise Refusal("empty side", "full_output has no sample")
    columns = {name: row.get(name) for name in ("token_ids", "prompt_ids", "rewards", "prompt", "ground_truth_answer")}
    samples = []
    for i, (output, steps) in enumerate(zip(outputs, maps, strict=True)):
        one = Record({n: v[i] if isinstance(v, list) and len(v) == len(outputs) else v for n, v in columns.items()})
        sample = ResponseRow(
            response=as_text(output, "full_output"),
            steps=as_integers(steps, "step_map"),
            prompt=None if one.get("prompt") is None else one.text("prompt"),
            answer=one.reference("ground_truth_answer"),
            reward=_reward(one.get("rewards")),
        )
        if one.get("token_ids") is not None:
            sample = replace(sample, response_ids=one.integers("token_ids"), prompt_ids=one.integers("prompt_ids"))
        samples.append(sample)
    return samples


def _jetengine(row: Record) -> list[ResponseRow]:
    """JetEngine's answer to a request, beside the prompt that was asked."""
    ids, steps = row.integers("token_ids"), row.integers("first_unmask_times")
    response, (prompt, prompt_ids) = row.text_or_empty("text"), _prompt_or_ids(row)
    sample = ResponseRow(response_ids=ids, steps=steps, response=response, prompt=prompt, prompt_ids=prompt_ids)
    if row.get("logprobs") is None:
        return [sample]
    return [replace(sample, logps=[as_float(value, "logprobs holds") for value in row.items("logprobs")])]


def _sglang(row: Record) -> list[ResponseRow]:
    """SGLang's replay fields, as DARE reads them: the terminal block whole, steps from 1."""
    if not isinstance(found := row.require("meta_info"), dict):
        raise Refusal("wrong type", "meta_info is not an object")
    meta = Record(found)
    version = meta.require("dllm_replay_contract_version")
    if version != REPLAY_CONTRACT:
        raise Refusal("unknown version", f"dllm_replay_contract_version is {version}; known is {REPLAY_CONTRACT}")
    ids, stop = meta.integers("dllm_replay_token_ids"), meta.integer("dllm_stop_length")
    steps = meta.integers("dllm_replay_step_maps")
    if name := row.first(("token_ids", "output_ids")):
        said = as_list(row.get(name), "output_ids")
        if len(said) != stop or said != ids[:stop]:
            raise Refusal("tokens rewritten", "the replayed ids do not begin with the ids of the response")
    response, (prompt, prompt_ids) = row.text_or_empty("text"), _prompt_or_ids(row)
    return [ResponseRow(response_ids=ids, steps=steps, response=response, prompt=prompt, prompt_ids=prompt_ids)]


def _step_map(row: Record) -> list[ResponseRow]:
    """A step map over tokens as texts."""
    pieces = [as_text(piece, "tokens") for piece in row.items("tokens")]
    if row.get("remask_events"):
        raise Refusal("tokens rewritten", f"{row.get('remask_events')} tokens were masked again")
    steps = row.integers("step_map")
    return [ResponseRow(prompt=row.prompt() if row.get("prompt") else "", pieces=pieces, steps=steps)]


def _id_snapshots(row: Record) -> list[ResponseRow]:
    """The response's ids after every step (Dream's history, d3LLM); `mask_id` marks what was still masked."""
    mask = row.integer("mask_id")
    states = [as_integers(state, "snapshots") for state in row.items("snapshots")]
    steps, (prompt, prompt_ids) = _steps_of(states, mask), _prompt_or_ids(row)
    return [ResponseRow(response_ids=states[-1], steps=steps, prompt=prompt, prompt_ids=prompt_ids)]


def _text_snapshots(row: Record) -> list[ResponseRow]:
    """LLaDA's visualisation files: "STEP, *token&*token&..." a line, which may hold line ends of its own."""
    states = []
    for line in re.split(r"\r?\n(?=\d+, \*)", row.text("text").rstrip("\r\n")):
        found = _SNAPSHOT_LINE.fullmatch(line)
        if found is None or not found[2].startswith("*") or not found[2].endswith("&"):
            raise Refusal("not a snapshot", f'{line[:40]!r} is not "STEP, *token&*token&"')
        states.append(found[2][1:-1].split("&*"))
    return [ResponseRow(prompt="", pieces=states[-1], steps=_steps_of(states, _SNAPSHOT_MASK))]


def _steps_of(states: Sequence[Sequence[int] | Sequence[str]], mask: int | str) -> list[int]:
    """Return the step, from 1, whose snapshot is the first to show each token; NEVER where none does."""
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


_D1 = ("question", "generations", "ground_truth", "gen_length", "steps")
RESPONSE_FORMATS = (
    ResponseFormat("d1 generations", _D1, _d1_generation, "d1"),
    ResponseFormat("dLLM-RL and DiRL rollouts", ("full_output", "step_map"), _rollout, "dLLM-RL/DiRL"),
    ResponseFormat("dLLM-RL training rows", ("prompt", "response", "step_map"), _dllm_rl_row, "dLLM-RL"),
    ResponseFormat("JetEngine", ("token_ids", "first_unmask_times"), _jetengine, "JetEngine"),
    ResponseFormat("SGLang, DARE", ("meta_info",), _sglang, "SGLang"),
    ResponseFormat("step map over texts", ("tokens", "step_map"), _step_map, "step map"),
    ResponseFormat("snapshots of ids", ("snapshots", "mask_id"), _id_snapshots, "snapshots"),
    ResponseFormat("generations", ("prompt", "response"), _generation, "unknown"),
)
TEXT_FORMAT = ResponseFormat("LLaDA snapshots", (), _text_snapshots, "LLaDA")


def response_format(file: str) -> ResponseFormat:
    """Return the format of a file by the columns of its first rows. Raises DataError if it has none."""
    if file_name(file).endswith(".txt"):
        return TEXT_FORMAT
    return find_format(file, RESPONSE_FORMATS, "responses")


def _prompt_or_ids(row: Record) -> tuple[Prompt | None, list[int] | None]:
    """Return the prompt as text or messages, and as ids (SGLang calls them input_ids); None for what is missing."""
    name = row.first(("prompt_ids", "input_ids"))
    ids = None if name is None else as_integers(row.get(name), "prompt_ids")
    return None if row.get("prompt") is None else row.prompt(), ids


def _reward(value: Any) -> float | None:
    return None if value is None else as_float(value, "the reward is")
