"""decoder: requests join, leave, share and give back between any two steps, and none of it changes a response."""

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dtrpo_ray.config.decode import Remasking
from dtrpo_ray.decode import decoder as module
from dtrpo_ray.decode.decoder import Decoder, decode_all, pages_needed
from dtrpo_ray.decode.policies import POLICIES
from dtrpo_ray.decode.types import Committed, DecoderEvent, Generation, SamplingParams, Unmasked
from dtrpo_ray.errors import DataError
from dtrpo_ray.method.trajectory import GIVEN
from dtrpo_ray.models.sdar import SDAR

B, VOCAB, EOS, MASK = 4, 23, 21, 22
MakeModel = Callable[..., SDAR]
LONG = [7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8]
REQUESTS: list[tuple[list[int], SamplingParams]] = [
    ([3, 1], SamplingParams(max_new_tokens=14, denoising_steps=2)),
    (LONG, SamplingParams(max_new_tokens=5, denoising_steps=4, temperature=0.7)),
    (LONG, SamplingParams(max_new_tokens=9, denoising_steps=1, temperature=1.3, top_p=0.8)),
    ([*LONG[:8], 1], SamplingParams(max_new_tokens=12, denoising_steps=1, threshold=0.2)),
    ([5], SamplingParams(max_new_tokens=10, denoising_steps=1, remasking="low_confidence_top_k", tokens_per_step=3)),
    (
        LONG[:9],
        SamplingParams(
            max_new_tokens=11, denoising_steps=1, remasking="entropy_bounded", entropy_bound=2.0, temperature=0.9
        ),
    ),
    (
        [4, 4, 1, 2],
        SamplingParams(max_new_tokens=8, denoising_steps=2, remasking="sequential", temperature=1.0, top_k=5),
    ),
    (LONG, SamplingParams(max_new_tokens=16, denoising_steps=3)),
]


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> SDAR:
    """It never ends a response by itself."""
    model = make_model(seed=4).requires_grad_(False)
    model.eos_id = VOCAB  # no such token
    return model


@pytest.fixture(scope="module")
def alone(model: SDAR) -> list[Generation]:
    return [decode_all(model, [prompt], params, [seed])[0] for seed, (prompt, params) in enumerate(REQUESTS)]


def collect(decoder: Decoder) -> dict[Hashable, Generation]:
    return {key: event for key, event in decoder.step() if isinstance(event, Generation)}


def run(decoder: Decoder) -> dict[Hashable, Generation]:
    made: dict[Hashable, Generation] = {}
    while decoder.rows:
        made |= collect(decoder)
    return made


def same(got: Generation, expected: Generation) -> bool:
    assert got.logps == pytest.approx(expected.logps, abs=1e-5)
    return replace(got, logps=[]) == replace(expected, logps=[])


# --- a request is the same whatever happens around it ---


@pytest.mark.parametrize("order", [range(8), range(7, -1, -1)], ids=["forwards", "backwards"])
@pytest.mark.parametrize("every", [0, 1, 3], ids="{} steps between".format)
def test_requests_join_at_any_step_and_change_nobody(
    model: SDAR, alone: list[Generation], order: range, every: int
) -> None:
    """Prompts, lengths, policies, temperatures and seeds all differ; some rows and pages are too few at times."""
    decoder = Decoder(model, 5, 24)
    made: dict[Hashable, Generation] = {}
    for key in order:
        prompt, params = REQUESTS[key]
        while not decoder.admit(key, prompt, params, key):
            made |= collect(decoder)
        for _ in range(every):
            made |= collect(decoder)
    made |= run(decoder)
    assert all(same(made[key], expected) for key, expected in enumerate(alone))
    assert len(decoder.pool.idle) == 24


def test_a_prompt_read_in_parts_is_the_prompt(
    model: SDAR, alone: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PREFILL_TOKENS", 4)
    monkeypatch.setattr(module, "MAX_PASS_TOKENS", 8)
    decoder = Decoder(model, 8, 99)
    for key, (prompt, params) in enumerate(REQUESTS):
        assert decoder.admit(key, prompt, params, key)
    made = run(decoder)
    assert all(same(made[key], expected) for key, expected in enumerate(alone))


def test_the_committing_pass_is_the_next_blocks_first_step(model: SDAR) -> None:
    """Five blocks of two steps, the prompt included, take ten passes: reading and committing take none of their own."""
    decoder = Decoder(model, 1, 99)
    decoder.admit(0, LONG[:8], SamplingParams(max_new_tokens=20, denoising_steps=2), 0)
    (made,) = run(decoder).values()
    assert (made.num_forwards, decoder.counters.passes) == (10, 10)
    assert decoder.counters.pass_tokens == 12 + 4 + 4 * (8 + 4)


@pytest.mark.parametrize("kind", ["block", "full"])
def test_a_crowd_takes_the_passes_of_one(kind: str, tiny_config: dict[str, Any], model: SDAR) -> None:
    """Eight prompts are read in one pass, and eight blocks denoised in one."""
    model = model if kind == "block" else build(Full, tiny_config)
    params, prompts = SamplingParams(max_new_tokens=20, denoising_steps=2), [[n, *LONG[:7]] for n in range(1, 9)]
    passes = []
    for crowd in (prompts[:1], prompts):
        decoder = Decoder(model, 8, 99)
        for key, prompt in enumerate(crowd):
            assert decoder.admit(key, prompt, params, 0)
        run(decoder)
        passes.append(decoder.counters.passes)
    assert passes == [10, 10]


# --- prefixes and pages ---


def test_what_prompts_share_is_run_once(model: SDAR, alone: list[Generation]) -> None:
    """Admitted together: the 12 whole tokens that three prompts begin with, and 8 of a fourth, are read once."""
    decoder = Decoder(model, 8, 99)
    for key in (1, 2, 3, 7):
        decoder.admit(key, *REQUESTS[key], key)
    assert decoder.counters.reused_tokens == 12 + 8 + 12
    made = run(decoder)
    assert all(same(made[key], alone[key]) for key in (1, 2, 3, 7))
    decoder.admit("again", *REQUESTS[7], 7)
    assert decoder.counters.reused_tokens == 32 + 12
    assert same(run(decoder)["again"], alone[7])


def test_the_next_turn_reuses_the_answer(model: SDAR) -> None:
    decoder = Decoder(model, 1, 99)
    decoder.admit(0, LONG[:8], SamplingParams(max_new_tokens=12, denoising_steps=2), 0)
    first = run(decoder)[0]
    turn = [*LONG[:8], *first.ids, 5, 3]
    decoder.admit(1, turn, SamplingParams(max_new_tokens=8, denoising_steps=2), 0)
    assert decoder.counters.reused_tokens == 8 + 8  # the last block is never committed: nothing followed it
    assert same(run(decoder)[1], decode_all(model, [turn], SamplingParams(max_new_tokens=8, denoising_steps=2), [0])[0])


def test_memory_is_bounded_and_old_prefixes_make_room(model: SDAR) -> None:
    rng = np.random.default_rng(0)
    decoder = Decoder(model, 4, 6)
    for key in range(20):
        prompt = rng.integers(0, 20, 13).tolist()
        assert pages_needed(model, 13, 8) == 6
        assert decoder.admit(key, prompt, SamplingParams(max_new_tokens=8, denoising_steps=4), 0)
        assert not decoder.admit("too many", [1], SamplingParams(max_new_tokens=1, denoising_steps=1), 0)
        assert same(
            run(decoder)[key], decode_all(model, [prompt], SamplingParams(max_new_tokens=8, denoising_steps=4), [0])[0]
        )
    assert all(keys.shape[0] == 7 for keys, _ in decoder.keys.layers.values())


@pytest.mark.parametrize("after", [0, 1, 2, 5])
def test_cancelling_frees_everything_and_hurts_nobody(
    model: SDAR, alone: list[Generation], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the request that was reading a prompt for the others."""
    monkeypatch.setattr(module, "PREFILL_TOKENS", 4)
    decoder = Decoder(model, 8, 99)
    for key in (1, 2, 3, 7):
        decoder.admit(key, *REQUESTS[key], key)
    made: dict[Hashable, Generation] = {}
    for _ in range(after):
        made |= collect(decoder)
    decoder.cancel(1)
    decoder.cancel("nobody")
    made |= run(decoder)
    assert all(same(made[key], alone[key]) for key in (2, 3, 7))
    assert len(decoder.pool.idle) == 99
    assert not decoder.unfilled


# --- events ---


def test_events_tell_the_response(model: SDAR) -> None:
    decoder = Decoder(model, 2, 99)
    decoder.admit(
        "seen",
        [3, 1],
        SamplingParams(max_new_tokens=14, denoising_steps=3, temperature=0.8, top_logprobs=3),
        5,
        watch=True,
    )
    decoder.admit("unseen", [3, 1], SamplingParams(max_new_tokens=14, denoising_steps=3, temperature=0.8), 5)
    events: list[tuple[Hashable, DecoderEvent]] = []
    while decoder.rows:
        events += decoder.step()
    (done,) = [e for key, e in events if key == "seen" and isinstance(e, Generation)]
    steps = [e for key, e in events if key == "seen" and isinstance(e, Unmasked)]
    blocks = [e for key, e in events if key == "seen" and isinstance(e, Committed)]
    assert not [e for key, e in events if key == "unseen" and isinstance(e, Unmasked)]
    assert [t for b in blocks for t in b.ids] == done.ids
    assert [s for b in blocks for s in b.steps] == done.steps
    assert [e.step for e in steps] == list(range(done.num_forwards))
    for event in steps:
        assert [done.steps[p] for p in event.places] == [event.step] * len(event.places)
        assert [done.ids[p] for p in event.places] == event.ids
    assert sorted(done.top) == list(range(len(done.ids)))
    for place, best in done.top.items():
        assert len(best) == 3
        assert best == sorted(best, key=lambda pair: -pair[1])
        assert best[0][1] >= done.logps[place] - 1e-6


# --- tokens ---


def test_padded_ids_and_the_mask_are_never_taken(model: SDAR) -> None:
    for temperature in (0.0, 5.0):
        params = SamplingParams(max_new_tokens=16, denoising_steps=1, temperature=temperature)
        made = decode_all(model, [[i] for i in range(20)], params, range(20), num_tokens=6)
        assert {token for g in made for token in g.ids} <= set(range(6))


def test_stop_token_ids_end_a_response_and_ignore_eos_goes_on(make_model: MakeModel) -> None:
    model = make_model(seed=4)
    whole = decode_all(model, [[3, 1]], SamplingParams(max_new_tokens=14, denoising_steps=1, ignore_eos=True), [0])[0]
    assert len(whole.text_ids) == 14
    stop = whole.ids[4]
    place = whole.ids.index(stop)
    cut = decode_all(
        model,
        [[3, 1]],
        SamplingParams(max_new_tokens=14, denoising_steps=1, ignore_eos=True, stop_token_ids=(stop,)),
        [0],
    )[0]
    assert cut.text_ids == whole.ids[:place]
    assert len(cut.ids) == (place + 2) // B * B + B - 2  # to the end of its block


@torch.no_grad()
@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 3), (0.6, 0), (0.7, 4)])
def test_top_k_and_top_p_keep_what_they_say(model: SDAR, top_p: float, top_k: int) -> None:
    """2000 draws of one position: the frequencies of the kept tokens within 4.5 standard errors, no other token."""
    prompt, n, temperature = [5, 3, 5], 2000, 1.5
    params = SamplingParams(max_new_tokens=1, denoising_steps=1, temperature=temperature, top_p=top_p, top_k=top_k)
    drawn = [g.ids[0] for g in decode_all(model, [prompt] * n, params, range(n))]
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    hidden = model.hidden(torch.tensor([[*prompt, MASK]]), torch.arange(4)[None], mask)[0, 3]
    probs = torch.softmax(model.log_mu(hidden) / temperature, -1).double().numpy()
    order = np.argsort(-probs)[: top_k or None]
    share = np.cumsum(probs[order]) / probs[order].sum()
    kept = order[: int(np.searchsorted(share, top_p)) + 1]
    expected = np.zeros(VOCAB)
    expected[kept] = probs[kept] / probs[kept].sum()
    frequency = np.bincount(drawn, minlength=VOCAB) / n
    assert (np.abs(frequency - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / n) + 1e-9).all()


@pytest.mark.parametrize("fields", [{"top_p": 5e-324}, {"temperature": 1e-39}, {"temperature": 5e-324}], ids=str)
def test_the_smallest_numbers_are_greedy(model: SDAR, fields: dict[str, float]) -> None:
    """Beside a row that is sampled in earnest; float32 knows neither of these numbers."""
    greedy = decode_all(model, [LONG], SamplingParams(max_new_tokens=12, denoising_steps=2), [0])[0]
    crowd = [
        SamplingParams(max_new_tokens=12, denoising_steps=2, **{"temperature": 1.0, **fields}),
        SamplingParams(max_new_tokens=12, denoising_steps=2, temperature=1.0, top_p=0.9),
    ]  # type: ignore[arg-type]
    decoder = Decoder(model, 2, 99)
    for key, params in enumerate(crowd):
        decoder.admit(key, LONG, params, key)
    made = run(decoder)
    assert same(made[0], greedy)
    assert same(made[1], decode_all(model, [LONG], crowd[1], [1])[0])


# --- families: a shifted model, and one with full attention, decoded again without a cache ---


class Shifted(SDAR):
    """Block attention, states predict the next token: Fast-dLLM v2's shape."""

    facts = replace(SDAR.facts, shift=1)


class Full(SDAR):
    """Full attention, blocks from the response on: LLaDA's shape."""

    facts = replace(SDAR.facts, attention="full", block_origin="response")


class FullShifted(Full):
    """Dream's shape."""

    facts = replace(Full.facts, shift=1)


def build(kind: type[SDAR], config: dict[str, Any]) -> SDAR:
    torch.manual_seed(6)
    model = kind(dict(config)).eval().requires_grad_(False)
    model.eos_id = VOCAB
    return model


@torch.no_grad()
def naive(model: SDAR, prompt: list[int], params: SamplingParams) -> Generation:
    """Greedy, fixed steps, one row, the whole canvas in every forward."""
    n, size = len(prompt), params.block_length or model.block_size
    origin = n if model.block_origin == "response" else 0
    end = origin + math.ceil((n - origin + params.max_new_tokens) / size) * size
    ids, steps, logps, forwards = [*prompt, *[MASK] * (end - n)], [GIVEN] * end, [0.0] * end, 0
    block = torch.arange(end) // size
    mask = (block[None, :] <= block[:, None]) | torch.tensor(model.attention == "full")

    def log_mu() -> torch.Tensor:
        hidden = model.hidden(torch.tensor([ids]), torch.arange(end)[None], mask[None, None])[0]
        return model.log_mu(hidden.roll(model.shift, 0))

    for first in range(origin + (n - origin) // size * size, end, size):
        if model.shift and model.attention == "block" and first >= n:
            logp, token = log_mu()[first].max(-1)
            ids[first], logps[first] = int(token), float(logp)
        budget, small = params.denoising_steps, params.small_block_size or size
        while places := [p for p in range(max(first, n), first + size) if ids[p] == MASK]:
            logp, token = log_mu().max(-1)
            count = math.ceil(len(places) / max(budget, 1))
            places = [p for p in places if (p - first) // small == (places[0] - first) // small]
            places = sorted(places, key=lambda p: -logp[p].item())[:count]
            for p in places:
                ids[p], logps[p], steps[p] = int(token[p]), float(logp[p]), forwards
            forwards, budget = forwards + 1, budget - 1
    return Generation(ids[n:], steps[n:], logps[n:], forwards, ids[n : n + params.max_new_tokens])


@pytest.mark.parametrize("kind", [Shifted, Full, FullShifted])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_other_families_are_their_naive_decoder(kind: type[SDAR], tiny_config: dict[str, Any], steps: int) -> None:
    model = build(kind, tiny_config)
    prompts = [[1], [5, 9, 2, 6], [5, 3, 5, 8, 9], LONG[:8], LONG]
    params = SamplingParams(max_new_tokens=10, denoising_steps=steps)
    decoder = Decoder(model, 9, 99)
    for key, prompt in enumerate([*prompts, *prompts[:3]]):
        decoder.admit(key, prompt, params, 0)
        decoder.step()
    made = run(decoder)
    for key in made:
        prompt = prompts[int(str(key)) % 5]
        assert same(made[key], naive(model, prompt, params))
    given = [s for g in made.values() for s in g.steps].count(GIVEN)
    assert (given > 0) == (kind is Shifted)


@pytest.mark.parametrize("kind", [SDAR, Shifted, Full, FullShifted])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_sub_blocks_are_unmasked_in_turn(kind: type[SDAR], tiny_config: dict[str, Any], steps: int) -> None:
    """Beside a row that decodes whole blocks; the order across sub-blocks, and one step at least in each."""
    model = build(kind, tiny_config | {"block_size": 8})
    prompts = [[1], [5, 9, 2, 6], LONG[:8], LONG]
    params = SamplingParams(max_new_tokens=16, denoising_steps=steps, small_block_size=2)
    decoder = Decoder(model, 9, 99)
    for key, prompt in enumerate(prompts):
        decoder.admit(key, prompt, params, 0)
    decoder.admit(4, LONG, params.model_copy(update={"small_block_size": 8}), 0)
    made = run(decoder)
    for key, prompt in enumerate(prompts):
        assert same(made[key], naive(model, prompt, params))
        origin = len(prompt) if model.block_origin == "response" else 0
        grid = [(len(prompt) - origin + place) // 2 for place in range(len(made[key].ids))]
        chosen = [(cell, step) for cell, step in zip(grid, made[key].steps, strict=True) if step != GIVEN]
        assert all(a < b for cell, a in chosen for later, b in chosen if cell < later)
        assert made[key].num_forwards >= len({cell for cell, _ in chosen})
    assert same(made[4], naive(model, LONG, SamplingParams(max_new_tokens=16, denoising_steps=steps)))


def test_sub_blocks_are_the_models_own_unless_asked_otherwise(tiny_config: dict[str, Any]) -> None:
    """A family that decodes by sub-blocks, as its config.json names them."""
    model = build(Shifted, tiny_config | {"block_size": 8, "small_block_size": 4})
    asked, own, whole = (
        SamplingParams(max_new_tokens=16, denoising_steps=2, small_block_size=size) for size in (4, None, 8)
    )
    by_fours, by_default, by_blocks = (decode_all(model, [LONG], params, [0])[0] for params in (asked, own, whole))
    assert by_default == by_fours != by_blocks
    with pytest.raises(DataError, match="small_block_size = 3 does not divide the block of 8 tokens"):
        decode_all(model, [LONG], own.model_copy(update={"small_block_size": 3}), [0])


def test_a_threshold_and_a_bound_stay_within_the_sub_block(tiny_config: dict[str, Any]) -> None:
    """What would take the whole block at once takes a sub-block a step."""
    model = build(SDAR, tiny_config | {"block_size": 8})
    for params in (
        SamplingParams(max_new_tokens=16, denoising_steps=1, threshold=1e-9),
        SamplingParams(max_new_tokens=16, denoising_steps=1, remasking="entropy_bounded", entropy_bound=1e9),
        SamplingParams(max_new_tokens=16, denoising_steps=1, remasking="low_confidence_top_k", tokens_per_step=8),
        SamplingParams(max_new_tokens=16, denoising_steps=1, remasking="sequential"),
    ):
        assert decode_all(model, [LONG[:8]], params, [0])[0].steps == [0] * 8 + [1] * 8
        got = decode_all(model, [LONG[:8]], params.model_copy(update={"small_block_size": 2}), [0])[0]
        assert got.steps == [step for step in range(8) for _ in range(2)]


def test_a_full_attention_model_takes_any_block_length(tiny_config: dict[str, Any]) -> None:
    model = build(Full, tiny_config)
    decoder = Decoder(model, 9, 0)
    for length in (2, 5, 8):
        decoder.admit(length, [5, 3, 5], SamplingParams(max_new_tokens=10, denoising_steps=2, block_length=length), 0)
    for length, got in run(decoder).items():
        assert same(
            got,
            naive(
                model, [5, 3, 5], SamplingParams(max_new_tokens=10, denoising_steps=2, block_length=int(str(length)))
            ),
        )


def test_a_first_token_is_greedy_at_any_temperature(tiny_config: dict[str, Any]) -> None:
    model = build(Shifted, tiny_config)
    firsts = {
        g.ids[0]
        for g in decode_all(
            model, [LONG[:8]] * 20, SamplingParams(max_new_tokens=4, denoising_steps=2, temperature=3.0), range(20)
        )
    }
    assert len(firsts) == 1


def test_an_empty_prompt_has_nothing_to_shift_from(tiny_config: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="at least one token"):
        Decoder(build(Shifted, tiny_config), 1, 9).admit(0, [], SamplingParams(max_new_tokens=4, denoising_steps=1), 0)


def test_every_policy_is_named_in_the_type() -> None:
    assert set(POLICIES) == set(Remasking.__args__)  # type: ignore[attr-defined]
