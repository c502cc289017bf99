"""Clients nobody here wrote against the endpoint: openai, lm-eval, schemathesis, and a crowd of requests."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import openai
import pytest
import schemathesis
import torch
import uvicorn
from hypothesis import HealthCheck, given, settings
from openai.types import chat, completion_create_params
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.serve import api
from dtrpo_ray.serve.app import create_app
from dtrpo_ray.serve.middleware import key_digests
from tests.serve.test_app import SERVE, make_engine

pytestmark = pytest.mark.extra

torch.set_num_threads(1)

PROMPTS = ["0123", "4", "01230123012", "34"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    """The app in a real HTTP server on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_app(engine, SERVE, key_digests(["a-key"]), {"base": make_engine(seed=4)})
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="a-key", max_retries=0)


# --- openai ---


def test_openai_completes_and_streams_the_same(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "0123", "seed": 5, "max_tokens": 30, "n": 2}
    extra = {"steps": 2, "ignore_eos": True}
    whole = client.completions.create(**asked, logprobs=1, extra_body=extra)
    parts = {0: "", 1: ""}
    usage = None
    chunks = client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}, extra_body={**extra, "return_trajectory": True}
    )
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            parts[choice.index] += choice.text
    assert [choice.text for choice in whole.choices] == [parts[0], parts[1]]
    assert usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 60
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.token_logprobs or []) == 30


def test_openai_chats_sync_and_async(client: openai.OpenAI, url: str) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "0123"}]}]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert whole.choices[0].logprobs is not None

    async def stream() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="a-key") as other:
            chunks = await other.chat.completions.create(**asked, stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in chunks if c.choices])

    assert asyncio.run(stream()) == whole.choices[0].message.content
    assert [model.id for model in client.models.list()] == ["tiny", "base"]


def test_openai_raises_the_errors_it_knows(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.completions.create(model="gpt", prompt="0")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="0", logprobs=1, echo=True, max_tokens=1)
    assert (caught.value.param, caught.value.code) == ("echo", "unsupported_parameter")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


@pytest.mark.parametrize(
    ("ours", "theirs", "refused"),
    [
        (api.CompletionRequest, completion_create_params.CompletionCreateParamsBase, set[str]()),
        (
            api.ChatRequest,
            chat.completion_create_params.CompletionCreateParamsBase,
            {"audio", "moderation", "prediction", "web_search_options"},
        ),
    ],
    ids=["completions", "chat"],
)
def test_each_field_of_openai_is_on_one_list(ours: Any, theirs: Any, refused: set[str]) -> None:
    """Served, taken where it asks for nothing, harmless, or refused: a new release's fields are put on one of them."""
    fields = get_type_hints(theirs).keys()
    assert {*fields} - {*ours.model_fields} - ours.harmless == refused


# --- lm-eval ---


@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_lm_eval_runs_its_generate_tasks(
    kind: str, url: str, client: openai.OpenAI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task of four documents whose targets are what the model says: exact match 1, seed and temperature 0 sent."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    lm_eval = pytest.importorskip("lm_eval")
    chat = kind == "local-chat-completions"
    rows = []
    for prompt in PROMPTS:
        sampling: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 8, "seed": 1234, "stop": ["\n"]}
        if chat:
            said = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **sampling)
            text = said.choices[0].message.content or ""
        else:
            text = client.completions.create(prompt=prompt, **sampling).choices[0].text
        rows.append({"question": prompt, "answer": text})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "puzzle",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    endpoint = "chat/completions" if chat else "completions"
    args = {"model": "tiny", "base_url": f"{url}/v1/{endpoint}", "tokenizer_backend": None, "num_concurrent": 2}
    args |= {"tokenized_requests": False, "max_retries": 1}
    found = lm_eval.simple_evaluate(
        model=kind, model_args=args, tasks=[task], apply_chat_template=chat, bootstrap_iters=0, limit=4
    )
    assert found["results"]["puzzle"]["exact_match,none"] == 1.0


# --- schemathesis ---


@pytest.fixture(scope="module")
def specification(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json", headers={"Authorization": "Bearer a-key"})


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fits", "does not fit"])
def test_no_request_breaks_the_server(specification: Any, mode: GenerationMode) -> None:
    """Statuses, media types and bodies as the specification says, and no 5xx, for what fits the schema and what not.

    The schema cannot say that two fields exclude each other: such requests are refused, so acceptance is not checked.
    """
    headers = {"Authorization": "Bearer a-key"}
    tried = 0

    def check(case: schemathesis.Case) -> None:
        nonlocal tried
        case.call_and_validate(headers=headers, excluded_checks=[positive_data_acceptance], timeout=60)
        tried += 1

    quick = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    for found in specification.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.POSITIVE or operation.body:
            quick(given(case=operation.as_strategy(generation_mode=mode))(check))()
    assert tried > 12 * 2


# --- a crowd ---


def test_a_crowd_gets_what_each_would_alone(url: str) -> None:
    """48 requests at once, of eight kinds, half of them streamed: each answer is the one it gets by itself."""
    extras: list[dict[str, Any]] = [{"steps": 1}, {"steps": 4}, {"threshold": 0.4}, {"tokens_per_step": 2}]
    extras += [{"entropy_bound": 0.5}, {"remasking": "sequential"}, {"top_p": 0.5}, {"n": 3}]
    kinds = [{"prompt": PROMPTS[i % 4], "seed": i, "max_tokens": 8 + 7 * i, **e} for i, e in enumerate(extras)]
    headers = {"Authorization": "Bearer a-key"}

    def ask(number: int) -> str:
        body = {**kinds[number % 8], "stream": number >= 24}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        if number < 24:
            return "|".join(choice["text"] for choice in answer.json()["choices"])
        parts: dict[int, str] = {}
        for line in answer.text.split("\n\n")[:-2]:
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                parts[choice["index"]] = parts.get(choice["index"], "") + choice["text"]
        return "|".join(parts[index] for index in sorted(parts))

    alone = [ask(number) for number in range(8)]
    with ThreadPoolExecutor(48) as pool:
        assert list(pool.map(ask, range(48))) == alone * 6
