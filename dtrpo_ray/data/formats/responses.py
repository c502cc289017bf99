"""Files of single responses -> `ResponseRow`s: generations with ground truth, and step maps as samplers write them.

A file row may hold several samples of a prompt; each is a row of its own here, "file:line#2" the second. Steps are kept
as the source counted them: only their order within a block is used (docs/data.md lists what each source writes).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from dtrpo_ray.data.formats.base import Row, RowFormat, find_format
from dtrpo_ray.data.formats.files import file_name
from dtrpo_ray.data.formats.parsing import (
    AS_NAMED,
    MOST,
    Columns,
    Prompt,
    Record,
    Refusal,
    as_float,
    as_integers,
    as_list,
    as_text,
    require_utf8,
)
from dtrpo_ray.method.trajectory import NEVER

REPLAY_CONTRACT = 1  # the version of SGLang's dllm_replay_* fields that we know
D1_BLOCK = 32
_D1_ENDS = re.compile(r"(<\|eot_id\|>|<\|endoftext\|>).*", re.DOTALL)  # LLaDA's end tokens, spelled out
_SNAPSHOT_LINE = re.compile(r"(\d+), (.*)", re.DOTALL)
_SNAPSHOT_MASK = "<|mdm_mask|>"


@dataclass(frozen=True, slots=True)
class ResponseRow(Row):
    """One response, as text or as ids, and what its source knew about it.

    `response_ids`, `pieces` (tokens as texts), `steps` and `logps` are as long as each other where they are given.
    """

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

    def require(self) -> Self:
        """Return the response. Raises Refusal for one that breaks a rule of every format."""
        if self.prompt is None and self.prompt_ids is None:
            raise Refusal("missing field", "prompt")
        tokens = self.response_ids if self.response_ids is not None else self.pieces
        for name, values in (("steps", self.steps), ("logps", self.logps)):
            if values is not None and tokens is not None and len(values) != len(tokens):
                raise Refusal("lengths differ", f"{len(values)} {name} for {len(tokens)} tokens")
        if (least := min(self.steps or (0,))) < NEVER:
            raise Refusal("bad step", f"a step is {least}; known are 0 and up, and {NEVER} for never")
        if not (self.response_ids or self.pieces or (self.response or "").strip()):
            raise Refusal("empty side", "response has no text")
        require_utf8([self.prompt, self.response, self.answer, self.pieces])
        return self

    @property
    def is_answered(self) -> bool:
        """Return whether the row has a reference answer."""
        return self.answer is not None


# === one raw row -> its response or list of them, a function for each format ===


def _d1_generation(row: Record) -> ResponseRow:
    """d1's evaluation files: LLaDA's text with its end tokens spelled out, and the ground truth."""
    gen_length, steps = row.size("gen_length"), row.integer("steps")
    return ResponseRow(
        "d1",
        response=_D1_ENDS.sub("", row.text("generations")),
        answer=row.reference("ground_truth"),
        max_new_tokens=gen_length,
        denoising_steps=min(MOST, max(1, D1_BLOCK * steps // gen_length)),
        prompt=row.text("question"),
    )


def _generation(row: Record) -> ResponseRow:
    """A prompt (text or messages) and a response, with an answer and a reward if there are any."""
    response, prompt = row.text("response"), row.prompt("prompt")
    return ResponseRow("unknown", prompt, response, row.reference("answer"), reward=_reward(row, "reward"))


def _dllm_rl_row(row: Record) -> ResponseRow:
    """dLLM-RL's training rows: a prompt, a response as text and its step map."""
    prompt, response, steps = row.prompt("prompt"), row.text("response"), row.integers("step_map")
    answer = row.reference("ground_truth_answer")
    return ResponseRow("dLLM-RL", prompt, response, answer, steps=steps, reward=_reward(row, "reward"))


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
            "dLLM-RL/DiRL",
            response=as_text(output, "full_output"),
            steps=as_integers(steps, "step_map"),
            prompt=None if one.get("prompt") is None else one.text("prompt"),
            answer=one.reference("ground_truth_answer"),
            reward=_reward(one, "rewards"),
        )
        if one.get("token_ids") is not None:
            sample = replace(sample, response_ids=one.integers("token_ids"), prompt_ids=one.integers("prompt_ids"))
        samples.append(sample)
    return samples


def _jetengine(row: Record) -> ResponseRow:
    """JetEngine's answer to a request, beside the prompt that was asked."""
    ids, steps = row.integers("token_ids"), row.integers("first_unmask_times")
    sample = replace(_answer(row), engine="JetEngine", response_ids=ids, steps=steps)
    if row.get("logprobs") is None:
        return sample
    return replace(sample, logps=[as_float(value, "logprobs holds") for value in row.items("logprobs")])


def _sglang(row: Record) -> ResponseRow:
    """SGLang's replay fields, as DARE reads them: the terminal block whole, steps from 1."""
    if not isinstance(found := row.require("meta_info"), dict):
        raise Refusal("wrong type", "meta_info is not an object")
    meta = Record(found)
    version = meta.require("dllm_replay_contract_version")
    if version != REPLAY_CONTRACT:
        raise Refusal("unknown version", f"dllm_replay_contract_version is {version}; known is {REPLAY_CONTRACT}")
    ids, stop = meta.integers("dllm_replay_token_ids"), meta.integer("dllm_stop_length")
    steps = meta.integers("dllm_replay_step_maps")
    said = row.first("token_ids", "output_ids")
    if said is not None and (stop > len(ids) or as_list(said, "output_ids") != ids[:stop]):
        raise Refusal("tokens rewritten", "the replayed ids do not begin with the ids of the response")
    return replace(_answer(row), engine="SGLang", response_ids=ids, steps=steps)


def _answer(row: Record) -> ResponseRow:
    """Return an engine's answer: its text, and its prompt as far as the row has it."""
    response = as_text(row.get("text") or "", "text")
    return replace(_asked(row), response=response)


def _asked(row: Record) -> ResponseRow:
    """Return a response's prompt alone: as text or messages, and as ids (SGLang calls them input_ids)."""
    ids = row.first("prompt_ids", "input_ids")
    found = None if ids is None else as_integers(ids, "prompt_ids")
    return ResponseRow(prompt=None if row.get("prompt") is None else row.prompt("prompt"), prompt_ids=found)


def _step_map(row: Record) -> ResponseRow:
    """A step map over tokens as texts."""
    pieces = [as_text(piece, "tokens") for piece in row.items("tokens")]
    if row.get("remask_events"):
        raise Refusal("tokens rewritten", f"{row.get('remask_events')} tokens were masked again")
    steps = row.integers("step_map")
    return ResponseRow("step map", row.prompt("prompt") if row.get("prompt") else "", pieces=pieces, steps=steps)


def _id_snapshots(row: Record) -> ResponseRow:
    """The response's ids after every step (Dream's history, d3LLM); `mask_id` marks what was still masked."""
    mask = row.integer("mask_id")
    states = [as_integers(state, "snapshots") for state in row.items("snapshots")]
    steps = _steps_of(states, mask)
    return replace(_asked(row), engine="snapshots", response_ids=states[-1], steps=steps)


def _text_snapshots(row: Record) -> ResponseRow:
    """LLaDA's visualisation files: "STEP, *token&*token&..." a line, which may hold line ends of its own."""
    states = []
    for line in re.split(r"\r?\n(?=\d+, \*)", row.text("text").rstrip("\r\n")):
        found = _SNAPSHOT_LINE.fullmatch(line)
        if found is None or not found[2].startswith("*") or not found[2].endswith("&"):
            raise Refusal("not a snapshot", f'{line[:40]!r} is not "STEP, *token&*token&"')
        states.append(found[2][1:-1].split("&*"))
    return ResponseRow("LLaDA", "", pieces=states[-1], steps=_steps_of(states, _SNAPSHOT_MASK))


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


_ASKED = frozenset(["question", "extracted_output", "correctness"])  # what the prompt renders, and how it was scored
RESPONSE_FORMATS = (
    RowFormat("d1 generations", ("question", "generations", "ground_truth", "gen_length", "steps"), _d1_generation),
    RowFormat("dLLM-RL and DiRL rollouts", ("full_output", "step_map"), _rollout, beside=_ASKED),
    RowFormat("dLLM-RL training rows", ("prompt", "response", "step_map"), _dllm_rl_row, beside=_ASKED),
    RowFormat("JetEngine", ("token_ids", "first_unmask_times"), _jetengine),
    RowFormat("SGLang, DARE", ("meta_info",), _sglang),
    RowFormat("step map over texts", ("tokens", "step_map"), _step_map),
    RowFormat("snapshots of ids", ("snapshots", "mask_id"), _id_snapshots),
    RowFormat("generations", ("prompt", "response"), _generation),
)
TEXT_FORMAT = RowFormat("LLaDA snapshots", (), _text_snapshots)


def response_format(file: str, task: Columns = AS_NAMED) -> RowFormat[ResponseRow]:
    """Return the format of a file by the columns of its first rows. Raises DataError if it has none."""
    if file_name(file).endswith(".txt"):
        return TEXT_FORMAT
    return find_format(file, RESPONSE_FORMATS, "responses", task)


def _reward(row: Record, name: str) -> float | None:
    return None if row.get(name) is None else as_float(row.get(name), "the reward is")
