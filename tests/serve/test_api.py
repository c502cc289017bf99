"""Request schemas: what clients send is taken, what would change an answer's meaning is refused by name."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from dtrpo_ray.serve.api import MAX_CHOICES, UNSUPPORTED, ChatRequest, CompletionRequest, TokenizeRequest, Trajectory

TURN = [{"role": "user", "content": "hi"}]
OTHER: dict[Any, dict[str, None]] = {CompletionRequest: {"messages": None}, ChatRequest: {"prompt": None}}

REFUSED: list[tuple[str, Any]] = [
    ("echo", True),
    ("best_of", 2),
    ("logit_bias", {"5": 1}),
    ("suffix", "end"),
    ("min_p", 0.1),
    ("frequency_penalty", 0.5),
    ("presence_penalty", -1),
    ("repetition_penalty", 1.2),
    ("min_tokens", 3),
    ("response_format", {"type": "json_object"}),
    ("tools", [{"type": "function"}]),
    ("functions", [{}]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("function_call", {"name": "f"}),
    ("modalities", ["text", "audio"]),
    ("reasoning_effort", "high"),
    ("verbosity", "low"),
    ("bad_words", ["a"]),
    ("length_penalty", 2.0),
    ("use_beam_search", True),
    ("include_stop_str_in_output", True),
    ("skip_special_tokens", False),
    ("add_special_tokens", True),
]

# of vLLM, SGLang and OpenAI, or of nobody
UNKNOWN: list[tuple[str, Any]] = [
    ("guided_json", {}),
    ("guided_choice", ["a"]),
    ("structured_outputs", {"regex": "a"}),
    ("regex", "a*"),
    ("ebnf", "root"),
    ("json_schema", "{}"),
    ("chat_template", "{{ messages }}"),
    ("chat_template_kwargs", {"enable_thinking": False}),
    ("continue_final_message", True),
    ("add_generation_prompt", False),
    ("documents", [{}]),
    ("prompt_logprobs", 1),
    ("prompt_embeds", "AAAA"),
    ("allowed_token_ids", [1]),
    ("truncate_prompt_tokens", 1),
    ("return_token_ids", True),
    ("logits_processors", ["a"]),
    ("vllm_xargs", {"a": 1}),
    ("web_search_options", {}),
    ("prediction", {"type": "content", "content": "a"}),
    ("Temperature", 0),
    ("nothing-of-the-kind" * 9, 1),
]

NEUTRAL: list[tuple[str, Any]] = [
    ("stream", False),
    ("echo", False),
    ("logprobs", False),
    ("top_logprobs", 0),
    ("best_of", 1),
    ("logit_bias", {}),
    ("suffix", ""),
    ("top_p", 1),
    ("top_p", 1.0),
    ("frequency_penalty", 0.0),
    ("response_format", {"type": "text"}),
    ("tools", []),
    ("tool_choice", "none"),
    ("tool_choice", "auto"),
    ("modalities", ["text"]),
    ("skip_special_tokens", True),
    ("remasking", "low_confidence"),
]

OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", "16"),
    ("max_tokens", 1.5),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", float("nan")),
    ("seed", 2**63),
    ("seed", 0.5),
    ("n", 0),
    ("n", MAX_CHOICES + 1),
    ("n", True),
    ("stop", ""),
    ("stop", ["a", 1]),
    ("stop", ["x"] * 17),
    ("steps", 0),
    ("threshold", 0.0),
    ("threshold", 1.0),
    ("return_trajectory", "yes"),
    ("prompt", []),
    ("prompt", 3),
    ("prompt", [[1, -2]]),
    ("prompt", [[]]),
    ("prompt", [1, True]),
    ("prompt", [1, "a"]),
    ("logprobs", 21),
    ("logprobs", True),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("remasking", "random"),
    ("tokens_per_step", 0),
    ("entropy_bound", -1.0),
    ("stop_token_ids", [-1]),
    ("stream", 1),
    ("prompt", ["a"] * (MAX_CHOICES + 1)),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
@pytest.mark.parametrize("request_type", [CompletionRequest, ChatRequest])
def test_refuses_by_name_what_it_cannot_honour(request_type: Any, field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        request_type.model_validate({"prompt": "a", "messages": TURN, field: value} | OTHER[request_type])
    (problem,) = caught.value.errors()
    assert (problem["type"], problem["loc"]) == (UNSUPPORTED, (field,))


@pytest.mark.parametrize(("field", "value"), UNKNOWN, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("request_type", [CompletionRequest, ChatRequest])
def test_refuses_by_name_what_is_on_no_list(request_type: Any, field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        request_type.model_validate({"prompt": "a", "messages": TURN, field: value} | OTHER[request_type])
    (problem,) = caught.value.errors()
    assert (problem["type"], problem["loc"]) == (UNSUPPORTED, (field[:80],))
    request_type.model_validate({"prompt": "a", "messages": TURN, field: None} | OTHER[request_type])


@pytest.mark.parametrize(
    ("field", "meant"),
    [("temprature", "temperature"), ("max_token", "max_tokens"), ("topp", "top_p"), ("guided_json", None)],
)
def test_a_misspelt_field_is_told_the_right_one(field: str, meant: str | None) -> None:
    with pytest.raises(ValidationError, match=f"did you mean {meant}\\?" if meant else "leave the field out"):
        CompletionRequest.model_validate({"prompt": "a", field: 1})


def test_fields_inside_a_body_are_told_apart_too() -> None:
    for body, loc in (
        ({"stream_options": {"include_use": True}}, ("stream_options", "include_use")),
        ({"messages": [{**TURN[0], "tool_calls": [{}]}]}, ("messages", 0, "tool_calls")),
    ):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate({"messages": TURN, **body})
        assert [(p["type"], p["loc"]) for p in caught.value.errors()] == [(UNSUPPORTED, loc)]
    answered = {"role": "assistant", "content": "a", "name": "bot", "annotations": [], "tool_calls": None}
    options = {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": True}
    assert len(ChatRequest.model_validate({"messages": [*TURN, answered], "stream_options": options}).messages) == 2


@pytest.mark.parametrize(("field", "value"), NEUTRAL)
def test_takes_values_that_ask_for_nothing(field: str, value: object) -> None:
    assert CompletionRequest.model_validate({"prompt": "a", field: value}).prompt == ["a"]


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE)
def test_refuses_values_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": "a", field: value})
    assert caught.value.errors()[0]["loc"][0] == field


def test_defaults_are_openais() -> None:
    request = CompletionRequest.model_validate({"prompt": "a"})
    assert (request.max_tokens, request.temperature, request.n, request.stop) == (16, 1.0, 1, [])


def test_null_is_absent_and_harmless_fields_are_dropped() -> None:
    fields = ("model", "temperature", "seed", "n", "stop", "steps", "threshold", "max_tokens", "stream", "logprobs")
    nulls = dict.fromkeys(fields)
    harmless = {"user": "x", "store": True, "metadata": {"run": "7"}, "service_tier": "auto", "request_id": "1"}
    with_nulls = CompletionRequest.model_validate({"prompt": "a", **harmless, **nulls})
    assert with_nulls == CompletionRequest.model_validate({"prompt": "a"})


def test_one_text_is_a_list_of_one() -> None:
    one = CompletionRequest.model_validate({"prompt": "a", "stop": "x"})
    assert one == CompletionRequest.model_validate({"prompt": ["a"], "stop": ["x"]})


@pytest.mark.parametrize("extra", [{"steps": 2, "threshold": 0.9}, {"prompt": ["a"] * 9, "n": 8}])
def test_refuses_fields_that_do_not_fit_together(extra: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"exclude|exceed"):
        CompletionRequest.model_validate({"prompt": "a", **extra})


@pytest.mark.parametrize(
    "messages",
    [[], "hi", [{"role": "user"}], [{"role": "robot", "content": "a"}], [{"role": "user", "content": [1]}]],
)
def test_refuses_messages_of_another_shape(messages: object) -> None:
    with pytest.raises(ValidationError, match="messages"):
        ChatRequest.model_validate({"messages": messages})


def test_the_specification_says_what_is_refused() -> None:
    """A field that is not served has its neutral values and null, all of which are taken, and no other."""
    for request_type in (CompletionRequest, ChatRequest):
        schema = request_type.model_json_schema()
        fields = schema["properties"]
        assert schema["additionalProperties"] is False
        assert fields.keys() >= request_type.harmless
        for name, value in REFUSED:
            assert value not in fields[name]["enum"]
            assert None in fields[name]["enum"]
            for neutral in fields[name]["enum"]:
                request_type.model_validate({"prompt": "a", "messages": TURN, name: neutral} | OTHER[request_type])
    (prompt, messages) = TokenizeRequest.model_json_schema()["oneOf"]
    assert (prompt["required"], messages["required"]) == (["prompt"], ["messages"])


def test_one_column_of_a_trajectory_is_sometimes_null() -> None:
    """An import may leave columns null; an answer has each always, or never."""
    fields = Trajectory.model_json_schema()["properties"]
    assert [name for name, field in fields.items() if "anyOf" in field] == ["denoising_steps"]
    assert {name for name, field in fields.items() if field.get("type") == "null"} >= {"origin", "answer", "reward"}


def filled(head: str, item: str, tail: str) -> Any:
    """A body of 1 MiB, the size of the largest that is read."""
    return json.loads(head + ",".join([item] * ((2**20 - len(head) - len(tail)) // (len(item) + 1))) + tail)


HOSTILE: list[tuple[type[CompletionRequest] | type[ChatRequest] | type[TokenizeRequest], Any]] = [
    (CompletionRequest, filled('{"prompt": [', "-1", "]}")),
    (CompletionRequest, filled('{"prompt": [', "1.5", "]}")),
    (CompletionRequest, filled('{"prompt": [', "[]", "]}")),
    (CompletionRequest, {"prompt": [[]] * MAX_CHOICES}),
    (CompletionRequest, filled('{"prompt": [[', "1", "]]}")),
    (CompletionRequest, filled('{"prompt": "0", "stop": [', "1", "]}")),
    (CompletionRequest, filled('{"prompt": "0", "stop_token_ids": [', "-1", "]}")),
    (CompletionRequest, {"prompt": "0", **{f"x{i}": 1 for i in range(10**5)}}),
    (ChatRequest, filled('{"messages": [', "1", "]}")),
    (ChatRequest, filled('{"messages": [', "{}", "]}")),
    (ChatRequest, filled('{"messages": [', '{"role": "user", "content": ""}', "]}")),  # more than a chat may have
    (ChatRequest, {"messages": [{}] * 4000}),
    (ChatRequest, filled('{"messages": [{"role": "user", "content": [', "{}", "]}]}")),
    (ChatRequest, {"messages": [{"role": "user", "content": "", **{f"x{i}": 1 for i in range(10**5)}}]}),
    (TokenizeRequest, {"messages": [{}] * 4000}),
]


@pytest.mark.parametrize(("kind", "body"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_large_wrong_body_has_few_errors(kind: type[CompletionRequest], body: Any) -> None:
    """An error for each of its entries took seconds on the event loop, and memory that was never given back."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 20
