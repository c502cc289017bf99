"""The HTTP endpoints over a tiny random model: laws of the answers, and a status and body for every refusal."""

import asyncio
import json
import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pytest
import torch
from fastapi.testclient import TestClient
from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import RequestCancelledError
from torch import Tensor

from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.data.rules import check_table
from dtrpo_ray.data.schemas import TRAJECTORY
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.models.tokenizer import character_tokenizer
from dtrpo_ray.serve import app as app_module
from dtrpo_ray.serve.app import MAX_ACTIVE_REQUESTS, create_app
from dtrpo_ray.serve.middleware import MAX_BODY_BYTES, key_digests

torch.set_num_threads(1)

CONFIG = {
    "model_type": "sdar",
    "vocab_size": 7,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "block_size": 4,
    "mask_token_id": 6,
    "eos_token_id": 5,
    "pad_token_id": 5,
    "bos_token_id": 5,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}0{% endif %}"
SERVE = ServeConfig(model_name="tiny", max_new_tokens=64, denoising_steps=2)
HERE = "http://127.0.0.1:8000"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

Json = dict[str, Any]


class Blocked(SDAR):
    """A model whose forwards wait for `release`."""

    release: threading.Event
    begun: threading.Event

    def hidden(self, *args: Any, **kwargs: Any) -> Tensor:
        self.begun.set()
        self.release.wait(30)
        return super().hidden(*args, **kwargs)


class Broken(SDAR):
    """A model whose forwards fail."""

    def hidden(self, *args: Any, **kwargs: Any) -> Tensor:
        raise ValueError("a secret of the inside")


def make_engine(kind: type[SDAR] = SDAR, chat: bool = True, seed: int = 3) -> Engine:
    tokenizer = character_tokenizer("01234")
    tokenizer.chat_template = TEMPLATE if chat else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Engine(kind(dict(CONFIG)), tokenizer)


def client_of(engine: Engine, *keys: str) -> TestClient:
    return TestClient(create_app(engine, SERVE, key_digests(keys)), HERE, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with client_of(engine) as client:
        yield client


@pytest.fixture
def blocked() -> Iterator[Engine]:
    engine = make_engine(Blocked)
    engine.model.release, engine.model.begun = threading.Event(), threading.Event()
    yield engine
    engine.model.release.set()


def complete(client: TestClient, **body: Any) -> Json:
    response = client.post(COMPLETIONS, json={"prompt": "0123", **body})
    assert response.status_code == 200, response.text
    value: Json = response.json()
    return value


def texts(answer: Json) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def ask(client: TestClient, **body: Any) -> Json:
    messages = [{"role": "user", "content": "0123"}]
    response = client.post(CHAT, json={"messages": messages, **body})
    assert response.status_code == 200, response.text
    value: Json = response.json()
    return value


# --- answers ---------------------------------------------------------------------------------------------------


def test_greedy_is_what_the_engine_generates(client: TestClient, engine: Engine) -> None:
    (expected,) = engine.generate([engine.encode("0123")], SamplingParams(max_new_tokens=10, denoising_steps=2), [0])
    answer = complete(client, temperature=0, max_tokens=10)
    assert texts(answer) == [engine.decode(expected.text_ids)]
    assert answer["usage"]["completion_tokens"] == len(expected.text_ids)


def test_steps_and_threshold_reach_the_sampler(client: TestClient, engine: Engine) -> None:
    ids = [engine.encode("01")]
    for extra, params in [
        ({"steps": 1}, SamplingParams(max_new_tokens=24, denoising_steps=1)),
        ({"steps": 4}, SamplingParams(max_new_tokens=24, denoising_steps=4)),
        ({"threshold": 0.5}, SamplingParams(max_new_tokens=24, denoising_steps=2, threshold=0.5)),
        (
            {"tokens_per_step": 3},
            SamplingParams(max_new_tokens=24, denoising_steps=2, remasking="low_confidence_top_k", tokens_per_step=3),
        ),
        (
            {"entropy_bound": 0.7},
            SamplingParams(max_new_tokens=24, denoising_steps=2, remasking="entropy_bounded", entropy_bound=0.7),
        ),
        (
            {"remasking": "sequential", "steps": 3},
            SamplingParams(max_new_tokens=24, denoising_steps=3, remasking="sequential"),
        ),
        ({"stop_token_ids": [1]}, SamplingParams(max_new_tokens=24, denoising_steps=2, stop_token_ids=(1,))),
        ({"ignore_eos": True}, SamplingParams(max_new_tokens=24, denoising_steps=2, ignore_eos=True)),
    ]:
        (expected,) = engine.generate(ids, params, [0])
        answer = complete(client, prompt="01", temperature=0, max_tokens=24, return_trajectory=True, **extra)
        assert answer["choices"][0]["trajectory"]["num_forwards"] == expected.num_forwards
        assert texts(answer) == [engine.decode(expected.text_ids)]


def test_same_seed_same_text_and_no_seed_another(client: TestClient) -> None:
    seeded = [texts(complete(client, seed=7, n=4, max_tokens=24)) for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert len({tuple(texts(complete(client, n=4, max_tokens=24))) for _ in range(3)}) == 3
    assert texts(complete(client, seed=-8, n=4, max_tokens=24)) != seeded[0]


def test_a_choice_keeps_its_text_whatever_n_is(client: TestClient) -> None:
    few, many = (texts(complete(client, seed=1, n=n, max_tokens=24)) for n in (2, 5))
    assert many[:2] == few
    assert len(set(many)) > 1


def test_choices_come_prompt_by_prompt(client: TestClient) -> None:
    prompts = ["2", "0123012", "31"]
    answer = complete(client, prompt=prompts, n=3, temperature=0, max_tokens=8)
    assert [choice["index"] for choice in answer["choices"]] == list(range(9))
    alone = [texts(complete(client, prompt=prompt, temperature=0, max_tokens=8))[0] for prompt in prompts]
    assert texts(answer) == [text for text in alone for _ in range(3)]


def test_an_empty_prompt_is_a_prompt(client: TestClient) -> None:
    assert complete(client, prompt="", seed=0)["usage"]["prompt_tokens"] == 0


def test_usage_counts_each_prompt_once_and_each_choice(client: TestClient) -> None:
    answer = complete(client, prompt=["0", "0123012"], n=3, seed=0, max_tokens=9, return_trajectory=True)
    lengths = [len(choice["trajectory"]["tokens"]) for choice in answer["choices"]]
    assert answer["usage"] == {"prompt_tokens": 8, "completion_tokens": sum(lengths), "total_tokens": 8 + sum(lengths)}
    assert [len(text) for text in texts(answer)] == lengths  # a character is a token here


def test_finish_reason_tells_an_end_from_a_limit(client: TestClient) -> None:
    answer = complete(client, prompt=["0", "1", "2", "3"], n=16, seed=5, max_tokens=6)
    reasons = {(len(choice["text"]) == 6, choice["finish_reason"]) for choice in answer["choices"]}
    assert reasons == {(True, "length"), (False, "stop")}


def test_stop_cuts_before_its_earliest_match(client: TestClient) -> None:
    wide = {"seed": 4, "n": 16, "max_tokens": 12}
    whole = texts(complete(client, **wide))
    early, late = max(whole, key=len)[2:4], max(whole, key=len)[4:6]
    assert len(early + late) == 4
    cuts = [min((at for at in (text.find(early), text.find(late)) if at >= 0), default=None) for text in whole]
    answer = complete(client, **wide, stop=[late, early])
    assert texts(answer) == [text[:cut] for text, cut in zip(whole, cuts, strict=True)]
    assert any(cut is not None for cut in cuts)
    assert all(c["finish_reason"] == "stop" for c, cut in zip(answer["choices"], cuts, strict=True) if cut is not None)
    assert texts(complete(client, **wide, stop="no such text")) == whole


def test_a_trajectory_is_a_row_of_the_store(client: TestClient, engine: Engine) -> None:
    """What the endpoint decodes can train: the rows pass the table's rules, and are what rollout would have written."""
    (expected,) = engine.generate([engine.encode("01")], SamplingParams(max_new_tokens=10, denoising_steps=4), [0])
    answer = complete(client, prompt="01", temperature=0, max_tokens=10, steps=4, return_trajectory=True, n=2)
    rows = [choice["trajectory"] for choice in answer["choices"]]
    table = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "tokens"} for row in rows], TRAJECTORY)
    check_table(table, "the endpoint")
    assert set(rows[0]) == {*TRAJECTORY.names, "tokens"}
    for row in rows:
        assert (row["response_ids"], row["steps"]) == (expected.ids, expected.steps)
        assert row["logps"] == pytest.approx(expected.logps, abs=1e-5)
        assert row["num_forwards"] == expected.num_forwards
        assert "".join(row["tokens"]) == row["response"] == engine.decode(expected.text_ids)
    assert complete(client)["choices"][0]["trajectory"] is None


def test_logprobs_are_the_trajectorys(client: TestClient) -> None:
    asked = {"seed": 3, "max_tokens": 10, "steps": 2, "n": 3}
    for choice in complete(client, **asked, return_trajectory=True, logprobs=2)["choices"]:
        found, row = choice["logprobs"], choice["trajectory"]
        count = len(row["tokens"])
        assert found["tokens"] == row["tokens"]
        assert found["token_logprobs"] == row["logps"][:count]
        assert found["text_offset"] == list(range(count))  # a character is a token here
        for logp, best in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
            assert 1 <= len(best) <= 2
            assert max(best.values()) >= logp - 1e-6
    content = ask(client, **asked, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in content)
    assert complete(client, **asked, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] is None


def test_alternatives_end_with_the_vocabulary(client: TestClient) -> None:
    """Asked for more than there are: each token but the mask once, special ones by their spelling, and valid JSON."""
    asked = {"seed": 3, "max_tokens": 10, "ignore_eos": True}
    every = {*"01234", "<|endoftext|>"}
    whole = complete(client, **asked, logprobs=20)["choices"][0]["logprobs"]["top_logprobs"]
    chunks = events(client, **asked, logprobs=20)
    parts = [top for chunk in chunks for c in chunk["choices"] for top in c["logprobs"]["top_logprobs"]]
    content = ask(client, **asked, logprobs=True, top_logprobs=20)["choices"][0]["logprobs"]["content"]
    talked = [{each["token"]: each["logprob"] for each in entry["top_logprobs"]} for entry in content]
    for tops in (whole, parts, talked):
        assert len(tops) == 10
        for top in tops:
            assert top.keys() == every
            assert sum(math.exp(logp) for logp in top.values()) == pytest.approx(1, abs=1e-4)


def test_token_ids_are_a_prompt_too(client: TestClient) -> None:
    text = complete(client, prompt=["0123", "4"], temperature=0)
    ids = complete(client, prompt=[[0, 1, 2, 3], [4]], temperature=0)
    assert texts(text) == texts(ids)
    assert texts(complete(client, prompt=[0, 1, 2, 3], temperature=0)) == texts(text)[:1]


def test_chat_is_the_completion_of_its_template(client: TestClient) -> None:
    answer = ask(client, temperature=0, max_tokens=8)
    message = answer["choices"][0]["message"]
    completion = complete(client, prompt="01230", temperature=0, max_tokens=8)
    assert message == {"role": "assistant", "content": texts(completion)[0]}
    assert answer["object"] == "chat.completion"
    assert answer["usage"]["prompt_tokens"] == 5
    assert ask(client, temperature=0, max_completion_tokens=8)["choices"] == answer["choices"]


def test_chat_without_a_limit_takes_the_servers(client: TestClient) -> None:
    assert ask(client, seed=2, n=8)["usage"]["completion_tokens"] <= 8 * SERVE.max_new_tokens
    nearly_full = [{"role": "user", "content": "0" * 249}]
    assert client.post(CHAT, json={"messages": nearly_full}).json()["usage"]["completion_tokens"] <= 6


def test_answers_have_openais_shape(client: TestClient) -> None:
    answer = complete(client, model="tiny", user="someone", seed=0)
    assert set(answer) == {"id", "object", "created", "model", "choices", "usage"}
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["choices"][0]["logprobs"] is None


def test_small_endpoints(client: TestClient) -> None:
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"], card["block_size"]) == ("tiny", "model", 256, 4)
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    assert set(client.get("/version").json()) == {"version"}


# --- refusals --------------------------------------------------------------------------------------------------

REFUSALS: list[tuple[Json, int, str | None, str | None]] = [
    ({"logprobs": 21}, 400, "logprobs", None),
    ({"block_length": 8}, 400, "block_length", None),
    ({"small_block_size": 3}, 400, "small_block_size", None),
    ({"small_block_size": 0}, 400, "small_block_size", None),
    ({"tokens_per_step": 5}, 400, "tokens_per_step", None),
    ({"remasking": "entropy_bounded"}, 400, None, None),
    ({"remasking": "sequential", "threshold": 0.5}, 400, None, None),
    ({"logprobs": 1, "echo": True, "max_tokens": 1}, 400, "echo", "unsupported_parameter"),  # log-likelihoods
    ({"echo": True}, 400, "echo", "unsupported_parameter"),
    ({"best_of": 3}, 400, "best_of", "unsupported_parameter"),
    ({"logit_bias": {"1": 2}}, 400, "logit_bias", "unsupported_parameter"),
    ({"temprature": 0}, 400, "temprature", "unsupported_parameter"),
    ({"guided_json": {"type": "object"}}, 400, "guided_json", "unsupported_parameter"),
    ({"stream_options": {"every": 1}}, 400, "stream_options", "unsupported_parameter"),
    ({"temperature": 3}, 400, "temperature", None),
    ({"stop": ["1", ""]}, 400, "stop", None),
    ({"prompt": None}, 400, "prompt", None),
    ({"prompt": [1, 7]}, 400, "prompt", None),  # no such id
    ({"prompt": [1, 6]}, 400, "prompt", None),  # the mask token
    ({"prompt": []}, 400, "prompt", None),
    ({"prompt": "x"}, 400, "prompt", None),  # no such character in the vocabulary
    ({"prompt": "0<|MASK|>"}, 400, "prompt", None),
    ({"n": 33, "prompt": ["0", "1"]}, 400, None, None),
    ({"steps": 1, "threshold": 0.5}, 400, None, None),
    ({"steps": 5}, 400, "steps", None),
    ({"max_tokens": 65}, 400, "max_tokens", None),
    ({"prompt": "0" * 241}, 400, "prompt", "context_length_exceeded"),
    ({"model": "gpt"}, 404, "model", "model_not_found"),
]


@pytest.mark.parametrize(("body", "status", "param", "code"), REFUSALS, ids=lambda value: str(value)[:30])
def test_every_refusal_has_its_status_and_body(
    client: TestClient, body: Json, status: int, param: str | None, code: str | None
) -> None:
    response = client.post(COMPLETIONS, json={"prompt": "0", **body})
    error = response.json()["error"]
    assert response.status_code == status
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert 10 < len(error["message"]) < 400
    assert (param or "") in error["message"]


def test_a_full_context_is_still_answered(client: TestClient) -> None:
    assert complete(client, prompt="0" * 240, max_tokens=16)["usage"]["prompt_tokens"] == 240


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", COMPLETIONS, b"{", 400),
        ("POST", COMPLETIONS, b"", 400),
        ("POST", COMPLETIONS, b"[]", 400),
        ("POST", COMPLETIONS, b"[" * 100_000, 400),
        ("POST", COMPLETIONS, b'{"prompt": "0", "temperature": NaN}', 400),
        ("POST", COMPLETIONS, b'"\xff"', 400),
        ("POST", COMPLETIONS, b'{"prompt": "\\ud800"}', 400),  # half a character
        ("POST", COMPLETIONS, b'{"prompt": "0", "model": "\\ud800"}', 404),
        ("POST", COMPLETIONS, b'{"prompt": "0", "\\ud800": 1}', 400),
        ("POST", CHAT, b'{"messages": []}', 400),
        ("GET", COMPLETIONS, b"", 405),
        ("GET", "/v1/nothing", b"", 404),
        ("POST", COMPLETIONS, b" " * (MAX_BODY_BYTES + 1), 413),
    ],
    ids=lambda value: str(value)[:24],
)
def test_bytes_that_are_no_request(client: TestClient, method: str, path: str, content: bytes, status: int) -> None:
    response = client.request(method, path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_without_a_length_is_bounded_too(client: TestClient) -> None:
    chunks = iter([b" " * 2**16] * 17)
    assert client.post(COMPLETIONS, content=chunks).status_code == 413


def test_a_request_is_bounded_in_memory(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "MAX_BATCH_TOKENS", 4 * 20)
    assert complete(client, n=4, max_tokens=16)["usage"]["prompt_tokens"] == 4
    refused = client.post(COMPLETIONS, json={"prompt": "0123", "n": 5, "max_tokens": 16})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")


def test_a_model_without_a_chat_template_says_so() -> None:
    with client_of(make_engine(chat=False)) as client:
        response = client.post(CHAT, json={"messages": [{"role": "user", "content": "0"}]})
    assert response.status_code == 400
    assert "chat template" in response.json()["error"]["message"]


def test_a_failure_inside_is_a_500_that_tells_nothing() -> None:
    with client_of(make_engine(Broken)) as client:
        response = client.post(COMPLETIONS, json={"prompt": "0"})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "secret" not in response.text
        assert client.get("/ready").status_code == 200  # its place in the queue is free again


def test_tokenize_is_what_a_request_would_read(client: TestClient) -> None:
    found = client.post("/tokenize", json={"prompt": "0123"}).json()
    assert found == {"tokens": [0, 1, 2, 3], "count": 4, "max_model_len": 256}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "01"}]}).json()
    assert chat["tokens"] == [0, 1, 0]
    assert client.post("/tokenize", json={}).status_code == 400
    assert client.post("/tokenize", json={"prompt": "x"}).status_code == 400


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("token", ["<|endoftext|>", "<|MASK|>"])
def test_a_message_holds_no_control_token(client: TestClient, role: str, token: str) -> None:
    """A user who types the token that ends a turn would end it; a raw prompt is the caller's own."""
    messages = [{"role": "user", "content": "0"}, {"role": role, "content": f"1{token}2"}]
    for path in (CHAT, "/tokenize"):
        refused = client.post(path, json={"messages": messages})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "messages")
        assert f"messages.1.content holds '{token}'" in error["message"]
    parts = [{"type": "text", "text": token[:5]}, {"type": "text", "text": token[5:]}]
    assert client.post(CHAT, json={"messages": [{"role": "user", "content": parts}]}).status_code == 400
    assert client.post("/tokenize", json={"prompt": "1<|endoftext|>2"}).json()["tokens"] == [1, 5, 2]


def test_metrics_count_what_was_decoded() -> None:
    with client_of(make_engine()) as client:
        answer = complete(client, temperature=0, max_tokens=16, steps=2, return_trajectory=True, ignore_eos=True)
        row = answer["choices"][0]["trajectory"]
        lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    steps, positions, tokens = (
        float(lines[f'vllm:diffusion_num_{name}_total{{model_name="tiny"}}'])
        for name in ("denoising_steps", "canvas_positions", "committed_tokens")
    )
    assert tokens == len(row["response_ids"]) == 16
    # as `vllm bench serve` reads them: positions over steps is a canvas, and each canvas has a commit among its steps
    assert positions / steps == 4
    assert steps - tokens / (positions / steps) == row["num_forwards"] == 8
    assert float(lines['dtrpo:requests_total{model_name="tiny",outcome="complete"}']) == 1
    assert float(lines['vllm:num_requests_running{model_name="tiny"}']) == 0


# --- streams ---------------------------------------------------------------------------------------------------


def events(client: TestClient, path: str = COMPLETIONS, **body: Any) -> list[Json]:
    asked = {"prompt": "0123"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "0123"}]}
    response = client.post(path, json={**asked, "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last = response.text.strip().split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(line.removeprefix("data: "), parse_constant=pytest.fail) for line in lines]


@pytest.mark.parametrize("extra", [{}, {"stop": ["12", "401", "31"], "ignore_eos": True}, {"logprobs": 1}], ids=str)
def test_a_stream_adds_up_to_the_answer(client: TestClient, extra: Json) -> None:
    asked = {"seed": 11, "n": 6, "max_tokens": 19, "steps": 2, **extra}
    whole = complete(client, **asked)
    chunks = events(client, **asked, stream_options={"include_usage": True})
    *parts, last = chunks
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({chunk["id"] for chunk in chunks}) == 1
    for expected in whole["choices"]:
        mine = [c for chunk in parts for c in chunk["choices"] if c["index"] == expected["index"]]
        assert "".join(c["text"] for c in mine) == expected["text"]
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + [expected["finish_reason"]]
        if "logprobs" in extra:
            tokens = [t for c in mine for t in c["logprobs"]["tokens"]]
            assert tokens == expected["logprobs"]["tokens"]
    assert len(parts) > len(whole["choices"])  # by blocks
    assert "usage" not in parts[0]


def test_a_chat_stream_names_its_role_once(client: TestClient) -> None:
    asked = {"seed": 1, "max_tokens": 12, "ignore_eos": True, "n": 2}
    whole, chunks = ask(client, **asked), events(client, CHAT, **asked)
    for expected in whole["choices"]:
        deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == expected["index"]]
        assert [d["role"] for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert "".join(d["content"] for d in deltas) == expected["message"]["content"]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def test_every_denoising_step_can_be_seen(client: TestClient) -> None:
    asked = {"seed": 2, "max_tokens": 10, "steps": 4, "ignore_eos": True}
    chunks = events(client, **asked, return_trajectory=True, stream_options={"include_denoising": True})
    row = next(c["trajectory"] for chunk in chunks for c in chunk["choices"] if c["trajectory"])
    steps = [chunk["denoising"] for chunk in chunks if "denoising" in chunk]
    assert [s["step"] for s in steps] == list(range(row["num_forwards"]))
    shown = {place: token for s in steps for place, token in zip(s["places"], s["token_ids"], strict=True)}
    assert [shown[place] for place in range(len(row["response_ids"]))] == row["response_ids"]
    assert all(0 < p <= 1 for s in steps for p in s["probabilities"])
    assert all(s["block_start"] <= place < s["block_start"] + 4 for s in steps for place in s["places"])
    assert [s["block_start"] for s in steps] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8]
    odd = events(client, prompt="01234", max_tokens=8, stream_options={"include_denoising": True}, ignore_eos=True)
    assert {chunk["denoising"]["block_start"] for chunk in odd if "denoising" in chunk} == {-1, 3, 7}


def test_a_failure_in_a_stream_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    with client_of(make_engine(Broken)) as client:
        (error,) = events(client)
        assert error["error"]["type"] == "server_error"
        assert "secret" not in json.dumps(error)
        assert client.get("/ready").status_code == 200


SCOPE = {
    "type": "http", "method": "POST", "path": COMPLETIONS, "raw_path": b"", "query_string": b"",
    "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
}  # fmt: skip


def test_a_stream_has_freed_its_place_when_it_sends_its_last_bytes(engine: Engine) -> None:
    """A reader that stalls there holds no place, and one that asks again at once finds it free."""
    app, active = create_app(engine, SERVE, ()), list[int]()
    body = json.dumps({"prompt": "0123", "max_tokens": 8, "stream": True}).encode()

    async def stream() -> None:
        asked = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            for message in asked:
                return message
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if b"[DONE]" in message.get("body", b""):
                active.append(app.state.service.num_active)

        await asyncio.wait_for(app({**SCOPE}, receive, send), 30)

    asyncio.run(stream())
    assert active == [0]


def test_a_client_that_hangs_up_frees_its_place(blocked: Engine) -> None:
    """With the forward it hung up in done, nothing of the request is left: neither in the queue nor in the decoder."""
    app = create_app(blocked, SERVE, ())
    service = app.state.service
    body = {"prompt": "0123", "max_tokens": 64, "ignore_eos": True}

    async def hang_up(stream: bool) -> None:
        sent: list[Any] = []
        gone = asyncio.Event()
        asked = iter([{"type": "http.request", "body": json.dumps({**body, "stream": stream}).encode()}])

        async def receive() -> Any:
            for message in asked:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        call = asyncio.ensure_future(app({**SCOPE}, receive, send))
        for _ in range(1000):
            if service.served["tiny"].num_running:
                break
            await asyncio.sleep(0.01)
        assert service.num_active == 1
        gone.set()
        await asyncio.wait_for(call, 10)
        assert service.num_active == 0

    for stream in (True, False):
        blocked.model.release.clear()
        asyncio.run(hang_up(stream))
        blocked.model.release.set()
        for _ in range(500):
            if not service.served["tiny"].num_running:
                break
            time.sleep(0.01)
        assert service.served["tiny"].num_running == 0
        assert service.served["tiny"].counters.denoising_steps < 8


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("way", ["disconnect", "receive raises", "send raises", "cancel"])
def test_no_way_to_hang_up_keeps_a_place(engine: Engine, way: str, stream: bool) -> None:
    """Before the first byte, in the middle and with the last: the place is free again, and the decoder is empty."""
    app = create_app(engine, SERVE, ())
    service = app.state.service
    body = json.dumps({"prompt": "0123", "max_tokens": 24, "ignore_eos": True, "stream": stream, "n": 2}).encode()

    async def hang_up(turns: int) -> None:
        """Hang up after so many turns of the event loop or messages, in this way."""
        gone, sent = asyncio.Event(), list[Any]()
        asked = iter([{"type": "http.request", "body": body}])

        async def receive() -> Any:
            for message in asked:
                return message
            await gone.wait()
            if way == "receive raises":
                raise RequestCancelledError("1")
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)
            if way == "send raises" and len(sent) > turns:
                raise TaskCancelledError(error_message="gone")

        call = asyncio.ensure_future(app({**SCOPE}, receive, send))
        for _ in range(turns):
            await asyncio.sleep(0)
            if turns % 2:  # in the middle of an answer
                await asyncio.sleep(0.002)
        if way == "cancel":
            call.cancel()
        elif way != "send raises":
            gone.set()
        await asyncio.wait({call}, timeout=60)
        assert call.done()
        if not call.cancelled():
            call.exception()

    async def run() -> None:
        await asyncio.gather(*(hang_up(turns) for turns in range(40)))

    asyncio.run(run())
    assert service.num_active == 0
    for _ in range(500):
        if not (service.served["tiny"].num_running or service.served["tiny"].num_waiting):
            break
        time.sleep(0.01)
    assert (service.served["tiny"].num_running, service.served["tiny"].num_waiting) == (0, 0)


@pytest.mark.parametrize("begun", [False, True])
def test_an_event_stream_is_done_however_it_ends(begun: bool) -> None:
    """Where it never began, which runs nothing of it, and where closing it fails as Ray fails."""
    done = list[bool]()

    class Events:
        def __aiter__(self) -> Any:
            return self

        async def __anext__(self) -> bytes:
            await asyncio.Event().wait()
            raise AssertionError

        async def aclose(self) -> None:
            if begun:
                raise TaskCancelledError(error_message="gone")

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if not begun:
            await asyncio.Event().wait()

    events: Any = Events()
    with suppress(TaskCancelledError):
        asyncio.run(app_module.EventStream(events, lambda: done.append(True))(SCOPE, receive, send))
    assert done == [True]


# --- models ----------------------------------------------------------------------------------------------------


def test_models_are_told_apart_by_name_and_swapped_in_place(engine: Engine) -> None:
    other = make_engine(seed=4)
    app = create_app(engine, SERVE, (), {"base": other})
    asked = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
    with TestClient(app, HERE) as client:
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny", "base"]
        mine, its = (texts(complete(client, model=name, **asked)) for name in ("tiny", "base"))
        assert mine != its
        assert texts(complete(client, **asked)) == mine
        app.state.service.swap("tiny", other)
        assert texts(complete(client, model="tiny", **asked)) == its


def test_a_request_that_is_read_while_its_model_is_swapped_ends_with_the_old_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "DEADLINE_SECONDS", 20)
    app = create_app(engine, SERVE, ())
    asked = {"prompt": "0123", "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    reading, go, encode = threading.Event(), threading.Event(), engine.encode
    with TestClient(app, HERE) as client, ThreadPoolExecutor(1) as pool:
        before = texts(complete(client, **asked))
        monkeypatch.setattr(engine, "encode", lambda prompt: (reading.set(), go.wait(10), encode(prompt))[-1])
        answer = pool.submit(client.post, COMPLETIONS, json=asked)
        assert reading.wait(10)
        app.state.service.swap("tiny", make_engine(seed=4))
        go.set()
        assert texts(answer.result(30).json()) == before
        assert texts(complete(client, **asked)) != before


# --- keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer ", "Bearer right", "Basic right-1", "right-1", "Bearer é"])
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/models", "/openapi.json", "/v1/nothing"])
def test_without_a_right_key_nothing_is_answered(engine: Engine, header: str | None, path: str) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    client = client_of(engine, "right-1", "right-2")
    response = client.request("POST", path, content=b"{", headers=headers)  # 401 before the body is looked at
    assert response.status_code == 401
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["Bearer right-1", "Bearer right-2", "bearer right-1"])
def test_any_right_key_is_let_in(engine: Engine, header: str) -> None:
    client = client_of(engine, "right-1", "right-2")
    assert client.get("/v1/models", headers={"Authorization": header}).status_code == 200


def test_probes_need_no_key(engine: Engine) -> None:
    client = client_of(engine, "right")
    assert [client.get(path).status_code for path in ("/health", "/ready", "/version")] == [200, 200, 200]


def test_a_mount_point_does_not_open_the_gate(engine: Engine) -> None:
    client = TestClient(create_app(engine, SERVE, key_digests(["right"])), root_path="/mounted")
    assert client.get("/mounted/v1/models").status_code == 401
    assert client.get("/mounted/health").status_code == 200


# --- browsers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:9", 200),
        ("[::1]:8000", 200),
        ("192.0.2.7", 200),  # an address cannot be resolved to another
        ("rebound.example", 403),
        ("rebound.example:8000", 403),
        ("localhost.rebound.example", 403),
        ("127.0.0.1.rebound.example", 403),
        ("[::1", 403),
        ("", 403),
        ("\xff", 403),
    ],
)
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models"])
def test_without_keys_no_name_but_localhost_is_answered(
    engine: Engine, client: TestClient, host: str, status: int, path: str
) -> None:
    """DNS rebinding: to the browser, a page of rebound.example is then of the same origin."""
    headers = {"Host": host.encode("latin-1")}
    answer = client.get(path, headers=headers)
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["code"] == "host_not_allowed"
    keyed = client_of(engine, "right").get(path, headers={**headers, "Authorization": b"Bearer right"})
    assert keyed.status_code == 200  # a proxy in front may serve under any name


def test_no_answer_redirects(client: TestClient) -> None:
    for path in ("/v1/models/", "/health/", "/v1/completions/"):
        answer = client.get(path, follow_redirects=False)
        assert (answer.status_code, answer.headers.get("location")) == (404, None)


def test_no_site_frames_the_page(client: TestClient) -> None:
    policy = client.get("/").headers["content-security-policy"].split("; ")
    assert {"frame-ancestors 'none'", "default-src 'none'", "connect-src 'self'"} <= set(policy)


# --- one thread decodes, the loop answers -----------------------------------------------------------------------


def test_a_slow_generation_blocks_neither_health_nor_the_deadline(
    blocked: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "DEADLINE_SECONDS", 3)
    lifted = {"x-request-timeout-seconds": "0"}
    with client_of(blocked) as client, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(client.post, COMPLETIONS, json={"prompt": "0"}, headers=lifted)
        assert blocked.model.begun.wait(10)
        assert client.get("/health").status_code == 200
        assert not slow.done()
        queued = client.post(COMPLETIONS, json={"prompt": "0"})
        assert [slow.result(10).status_code, queued.status_code] == [504, 504]
        assert queued.json()["error"]["type"] == "timeout_error"
        blocked.model.release.set()
        monkeypatch.setattr(app_module, "DEADLINE_SECONDS", 30)
        assert client.post(COMPLETIONS, json={"prompt": "0"}).status_code == 200


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("stuck", ["decode", "encode"])
def test_a_deadline_is_answered_whatever_is_stuck(
    blocked: Engine, stuck: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoding thread, or the thread that tokenizes; a stream that has begun ends with an error event."""
    monkeypatch.setattr(app_module, "DEADLINE_SECONDS", 2)
    go, encode, decode, late = threading.Event(), blocked.encode, blocked.decode, list[bool]()
    blocked.model.release.set()
    body = {"prompt": "0", "stream": stream, "max_tokens": 64, "ignore_eos": True}
    if stuck == "encode":
        monkeypatch.setattr(blocked, "encode", lambda prompt: (go.wait(30) or late.append(True), encode(prompt))[-1])
    else:
        monkeypatch.setattr(blocked, "decode", lambda ids: (go.wait(30) or late.append(True), decode(ids))[-1])
    with client_of(blocked) as client:
        answer = client.post(COMPLETIONS, json=body)
        if stuck == "decode" and stream:
            assert answer.status_code == 200
            error, last = answer.text.strip().split("\n\n")
            assert (json.loads(error.removeprefix("data: "))["error"]["code"], last) == ("deadline", "data: [DONE]")
        else:
            assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
        assert not late  # it was stuck still
        assert client.app.state.service.num_active == 0
        go.set()


def test_a_request_counts_from_before_its_prompt_is_tokenized(blocked: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "MAX_ACTIVE_REQUESTS", 1)
    blocked.model.release.set()
    reading, go, encode = threading.Event(), threading.Event(), blocked.encode
    monkeypatch.setattr(blocked, "encode", lambda prompt: (reading.set(), go.wait(30), encode(prompt))[-1])
    with client_of(blocked) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, COMPLETIONS, json={"prompt": "0"})
        assert reading.wait(30)
        assert client.post(COMPLETIONS, json={"prompt": "0"}).status_code == 429
        go.set()
        assert first.result(30).status_code == 200
        assert client.post(COMPLETIONS, json={"prompt": "x"}).status_code == 400  # and a refused one counts no longer
        assert client.post(COMPLETIONS, json={"prompt": "0"}).status_code == 200


def test_a_full_queue_asks_clients_to_come_back(blocked: Engine) -> None:
    with client_of(blocked) as client, ThreadPoolExecutor(MAX_ACTIVE_REQUESTS) as pool:
        waiting = [pool.submit(client.post, COMPLETIONS, json={"prompt": "0"}) for _ in range(MAX_ACTIVE_REQUESTS)]
        assert blocked.model.begun.wait(10)
        for _ in range(200):
            if client.get("/ready").status_code == 503:
                break
            time.sleep(0.02)
        refused = client.post(COMPLETIONS, json={"prompt": "0"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["Retry-After"] == "1"
        assert client.get("/health").status_code == 200
        blocked.model.release.set()
        assert {future.result(30).status_code for future in waiting} == {200}
        assert client.get("/ready").status_code == 200
