"""The HTTP endpoints over a tiny random model: laws of the answers, and a status and body for every refusal."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from dtrpo_ray import app as app_module
from dtrpo_ray.app import MAX_BODY_BYTES, MAX_PENDING, create_app
from dtrpo_ray.config import ServeConfig
from dtrpo_ray.engine import Engine
from dtrpo_ray.models.registry import build_model
from dtrpo_ray.sampler import Generation, SamplingParams
from dtrpo_ray.tokenizer import character_tokenizer

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
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

Json = dict[str, Any]


class Blocked(Engine):
    """An engine whose decoding waits for `release`."""

    release: threading.Event
    begun: threading.Event

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Generation]:
        self.begun.set()
        self.release.wait(30)
        return super().generate(prompts, params, seeds)


class Broken(Engine):
    """An engine whose decoding fails."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Generation]:
        raise ValueError("a secret of the inside")


def make_engine(kind: type[Engine] = Engine, chat: bool = True) -> Engine:
    tokenizer = character_tokenizer("01234")
    tokenizer.chat_template = TEMPLATE if chat else None
    return kind(build_model(CONFIG, seed=3), tokenizer)


def client_of(engine: Engine, *keys: str) -> TestClient:
    return TestClient(create_app(engine, SERVE, frozenset(keys)), raise_server_exceptions=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with client_of(engine) as client:
        yield client


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    engine = make_engine(Blocked)
    assert isinstance(engine, Blocked)
    engine.release, engine.begun = threading.Event(), threading.Event()
    yield engine
    engine.release.set()


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
    (expected,) = engine.generate([engine.encode("0123")], SamplingParams(10, 2), [0])
    answer = complete(client, temperature=0, max_tokens=10)
    assert texts(answer) == [engine.decode(expected.text_ids)]
    assert answer["usage"]["completion_tokens"] == len(expected.text_ids)


def test_steps_and_threshold_reach_the_sampler(client: TestClient, engine: Engine) -> None:
    ids = [engine.encode("01")]
    for extra, params in [
        ({"steps": 1}, SamplingParams(24, 1)),
        ({"steps": 4}, SamplingParams(24, 4)),
        ({"threshold": 0.5}, SamplingParams(24, 2, threshold=0.5)),
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
    lengths = [len(choice["trajectory"]["token_ids"]) for choice in answer["choices"]]
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


def test_trajectory_orders_every_token(client: TestClient, engine: Engine) -> None:
    (expected,) = engine.generate([engine.encode("01")], SamplingParams(10, 4), [0])
    answer = complete(client, prompt="01", temperature=0, max_tokens=10, steps=4, return_trajectory=True)
    trajectory = answer["choices"][0]["trajectory"]
    count = len(expected.text_ids)
    assert trajectory["token_ids"] == expected.text_ids
    assert trajectory["steps"] == expected.steps[:count]
    assert "".join(trajectory["tokens"]) == texts(answer)[0]
    assert complete(client)["choices"][0]["trajectory"] is None


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
    ({"stream": True}, 400, "stream", "unsupported_parameter"),
    ({"logprobs": 1}, 400, "logprobs", "unsupported_parameter"),
    ({"echo": True}, 400, "echo", "unsupported_parameter"),
    ({"best_of": 3}, 400, "best_of", "unsupported_parameter"),
    ({"logit_bias": {"1": 2}}, 400, "logit_bias", "unsupported_parameter"),
    ({"temperature": 3}, 400, "temperature", None),
    ({"stop": ["1", ""]}, 400, "stop", None),
    ({"prompt": None}, 400, "prompt", None),
    ({"prompt": [1, 2]}, 400, "prompt", None),
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
    client = TestClient(create_app(engine, SERVE, frozenset({"right"})), root_path="/mounted")
    assert client.get("/mounted/v1/models").status_code == 401
    assert client.get("/mounted/health").status_code == 200


# --- one thread decodes, the loop answers -----------------------------------------------------------------------


def test_a_slow_generation_blocks_neither_health_nor_the_deadline(
    blocked: Blocked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "DEADLINE_SECONDS", 0.3)
    lifted = {"x-request-timeout-seconds": "0"}
    with client_of(blocked) as client, ThreadPoolExecutor(2) as pool:
        slow = pool.submit(client.post, COMPLETIONS, json={"prompt": "0"}, headers=lifted)
        assert blocked.begun.wait(10)
        assert client.get("/health").status_code == 200
        assert not slow.done()
        queued = client.post(COMPLETIONS, json={"prompt": "0"})
        assert [slow.result(10).status_code, queued.status_code] == [504, 504]
        assert queued.json()["error"]["type"] == "timeout_error"
        blocked.release.set()
        monkeypatch.setattr(app_module, "DEADLINE_SECONDS", 30)
        assert client.post(COMPLETIONS, json={"prompt": "0"}).status_code == 200


def test_a_full_queue_asks_clients_to_come_back(blocked: Blocked) -> None:
    with client_of(blocked) as client, ThreadPoolExecutor(MAX_PENDING) as pool:
        waiting = [pool.submit(client.post, COMPLETIONS, json={"prompt": "0"}) for _ in range(MAX_PENDING)]
        assert blocked.begun.wait(10)
        for _ in range(200):
            if client.get("/ready").status_code == 503:
                break
            time.sleep(0.02)
        refused = client.post(COMPLETIONS, json={"prompt": "0"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["Retry-After"] == "1"
        assert client.get("/health").status_code == 200
        blocked.release.set()
        assert {future.result(30).status_code for future in waiting} == {200}
        assert client.get("/ready").status_code == 200
