"""decode_all: what the cached decoder does is what the definition says without a cache, and what training will see."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from packed import block_mask, noisy_starts
from torch import Tensor

from dtrpo_ray.decode.decoder import decode_all
from dtrpo_ray.decode.types import Generation, SamplingParams
from dtrpo_ray.method.attention import pack_row
from dtrpo_ray.method.trajectory import NEVER, block_slices, dense_steps
from dtrpo_ray.models.sdar import SDAR

B, VOCAB, EOS, MASK = 4, 23, 21, 22
MakeModel = Callable[..., SDAR]
PROMPTS = [
    [],
    [3],
    [1, 4, 1],
    [5, 9, 2, 6],
    [5, 3, 5, 8, 9],
    [7, 9, 3, 2, 3, 8, 4, 6],
    [2, 6, 4, 3, 3, 8, 3, 2, 7, 9, 5],
]
SEEDS = list(range(100, 100 + len(PROMPTS)))
SCHEDULES = {
    "one step": SamplingParams(max_new_tokens=14, denoising_steps=1),
    "two steps": SamplingParams(max_new_tokens=14, denoising_steps=2),
    "three steps": SamplingParams(max_new_tokens=14, denoising_steps=3),
    "one token a step": SamplingParams(max_new_tokens=14, denoising_steps=4),
    "more steps than tokens": SamplingParams(max_new_tokens=14, denoising_steps=9),
    "threshold": SamplingParams(max_new_tokens=14, denoising_steps=1, threshold=0.2),
}


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> SDAR:
    """It never ends a response by itself, so that every row decodes its whole length."""
    model = make_model(seed=4).requires_grad_(False)
    model.eos_id = VOCAB  # no such token
    return model


def sampled(model: SDAR, params: SamplingParams, temperature: float = 0.8) -> list[Generation]:
    return decode_all(model, PROMPTS, params.model_copy(update={"temperature": temperature}), SEEDS)


def blocks_of(prompt: Sequence[int], generation: Generation) -> list[slice]:
    return block_slices(len(prompt), len(generation.ids), B)


# --- the decoder written again, slowly: no cache, one row, the whole sequence in every forward ---


def log_mu_of_block(model: SDAR, seen: list[int], first: int) -> Tensor:
    block = torch.arange(len(seen)) // B
    mask = (block[None, :] <= block[:, None])[None, None]
    hidden = model.hidden(torch.tensor([seen]), torch.arange(len(seen))[None], mask)[0, first:]
    return model.log_mu(hidden)


def naive_greedy(model: SDAR, prompt: Sequence[int], params: SamplingParams) -> Generation:
    end = math.ceil((len(prompt) + params.max_new_tokens) / B) * B
    ids, steps, logps, forwards = list(prompt), [NEVER] * end, [0.0] * end, 0
    for first in range(len(prompt) // B * B, end, B):
        ids += [MASK] * (first + B - len(ids))
        budget = params.denoising_steps
        while MASK in ids[len(prompt) :]:
            best, tokens = log_mu_of_block(model, ids, first).max(-1)
            open_ = [i for i in range(first, first + B) if i >= len(prompt) and ids[i] == MASK]
            ranked = sorted(open_, key=lambda i: -best[i - first].item())
            if params.threshold is None:
                chosen = ranked[: math.ceil(len(open_) / budget)]
            else:
                sure = [i for i in open_ if math.exp(best[i - first].item()) > params.threshold]
                chosen = sorted({*sure, ranked[0]})
            for i in chosen:
                ids[i], logps[i], steps[i] = tokens[i - first].item(), best[i - first].item(), forwards
            forwards += 1
            budget -= 1
        if model.eos_id in ids[len(prompt) :]:
            break
    n, done = len(prompt), len(ids)
    text = list(itertools.takewhile(lambda v: v != model.eos_id, ids[n : n + params.max_new_tokens]))
    return Generation(ids[n:], steps[n:done], logps[n:done], forwards, text)


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ends", [False, True], ids=["whole length", "ends at eos"])
def test_greedy_is_the_naive_decoder(make_model: MakeModel, model: SDAR, schedule: str, ends: bool) -> None:
    """Ids, steps, forwards and text equal; all prompt lengths in one batch; rows leave the batch as they finish."""
    if ends:
        model = make_model(seed=4).requires_grad_(False)
        model.eos_id = 9
    params = SCHEDULES[schedule]
    together = decode_all(model, PROMPTS, params, SEEDS)
    for prompt, got in zip(PROMPTS, together, strict=True):
        expected = naive_greedy(model, prompt, params)
        assert replace(got, logps=[]) == replace(expected, logps=[])
        assert got.logps == pytest.approx(expected.logps, abs=1e-5)
    stopped = [len(g.ids) < 14 for g in together]
    assert any(stopped) == ends
    assert not all(stopped)


# --- the trainer sees what the decoder saw ---


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_recorded_logps_are_the_packed_training_forwards(model: SDAR, schedule: str) -> None:
    """For every recorded state: hide what came later, forward the packed row, read the newly unmasked tokens."""
    for prompt, generation in zip(PROMPTS, sampled(model, SCHEDULES[schedule]), strict=True):
        ids = np.array(generation.ids)
        steps = dense_steps(np.array(generation.steps), blocks_of(prompt, generation))
        states = range(int(steps.max()) + 1)
        noisy = [np.where(steps >= t, MASK, ids) for t in states]
        row = pack_row(np.array(prompt, dtype=np.int64), [(ids, noisy)], B)
        planes = [torch.from_numpy(v)[None] for v in (row.ids, row.position, row.side, row.stream)]
        log_mu = model.log_mu(model.hidden(planes[0], planes[1], block_mask(*planes[1:], B))[0])
        for t, start in zip(states, noisy_starts(row)[0], strict=True):
            new = np.flatnonzero(steps == t)
            at = torch.from_numpy(start + len(prompt) - row.first_position + new)
            read = log_mu[at, torch.from_numpy(ids[new])]
            assert read.tolist() == pytest.approx([generation.logps[i] for i in new], abs=1e-5)


# --- each row for itself ---


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_row_alone_is_the_row_in_a_crowd(model: SDAR, schedule: str) -> None:
    params = SCHEDULES[schedule].model_copy(update={"temperature": 0.8})
    crowd = decode_all(model, PROMPTS, params, SEEDS)
    backwards = decode_all(model, PROMPTS[::-1], params, SEEDS[::-1])[::-1]
    for prompt, seed, one, other in zip(PROMPTS, SEEDS, crowd, backwards, strict=True):
        (alone,) = decode_all(model, [prompt], params, [seed])
        for got in (one, other):
            assert replace(got, logps=[]) == replace(alone, logps=[])
            assert got.logps == pytest.approx(alone.logps, abs=1e-5)


def test_the_seed_decides(model: SDAR) -> None:
    params = SamplingParams(max_new_tokens=12, denoising_steps=2, temperature=1.0)
    once, again, other = (decode_all(model, [[5, 3]], params, [seed])[0].ids for seed in (7, 7, 8))
    assert once == again
    assert once != other


def test_the_callers_random_state_is_left_alone(model: SDAR) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sampled(model, SCHEDULES["two steps"])
    assert torch.equal(before, torch.get_rng_state())


# --- schedules ---


def sizes(generation: Generation, block: slice) -> list[int]:
    steps = generation.steps[block]
    return [steps.count(s) for s in sorted(set(steps))]


@pytest.mark.parametrize(
    ("steps", "full", "three", "one"),
    [
        (1, [4], [3], [1]),
        (2, [2, 2], [2, 1], [1]),
        (3, [2, 1, 1], [1, 1, 1], [1]),
        (4, [1, 1, 1, 1], [1, 1, 1], [1]),
        (9, [1, 1, 1, 1], [1, 1, 1], [1]),
    ],
)
def test_fixed_steps_share_a_block_evenly(
    model: SDAR, steps: int, full: list[int], three: list[int], one: list[int]
) -> None:
    """Each step takes ceil(masked / steps left), so a whole block of 4 takes min(K, 4) steps."""
    for prompt, generation in zip(
        PROMPTS, sampled(model, SamplingParams(max_new_tokens=14, denoising_steps=steps)), strict=True
    ):
        expected = {4: full, 3: three, 1: one}
        counts = [sizes(generation, block) for block in blocks_of(prompt, generation)]
        assert counts == [expected[block.stop - block.start] for block in blocks_of(prompt, generation)]
        assert generation.num_forwards == sum(len(c) for c in counts)


def test_threshold_extremes(model: SDAR) -> None:
    """Near 0: one step a block. Near 1: one token a step, as no probability exceeds it."""
    for threshold, per_step in ((1e-12, lambda n: [n]), (1 - 1e-12, lambda n: [1] * n)):
        params = SamplingParams(max_new_tokens=14, denoising_steps=3, threshold=threshold)
        for prompt, generation in zip(PROMPTS, sampled(model, params), strict=True):
            for block in blocks_of(prompt, generation):
                assert sizes(generation, block) == per_step(block.stop - block.start)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_token_has_a_step_and_the_grid_is_kept(model: SDAR, schedule: str) -> None:
    for prompt, g in zip(PROMPTS, sampled(model, SCHEDULES[schedule]), strict=True):
        assert len(g.ids) == len(g.steps) == len(g.logps)
        assert (len(prompt) + len(g.ids)) % B == 0
        assert 14 <= len(g.ids) < 14 + B
        assert g.text_ids == g.ids[:14]
        assert sorted(set(g.steps)) == list(range(g.num_forwards))
        per_block = [set(g.steps[block]) for block in blocks_of(prompt, g)]
        assert all(max(a) < min(b) for a, b in itertools.pairwise(per_block))
        assert all(logp < 0 for logp in g.logps)
        assert all(0 <= v < VOCAB for v in g.ids)


# --- tokens ---


class Biased(SDAR):
    """Adds a bias to the logits."""

    bias: Tensor

    def head(self, hidden: Tensor) -> Tensor:
        return super().head(hidden) + self.bias


def biased(tiny_config: dict[str, object], **bias: float) -> Biased:
    torch.manual_seed(0)
    model = Biased(dict(tiny_config)).eval().requires_grad_(False)
    model.bias = torch.zeros(VOCAB)
    for token, value in bias.items():
        model.bias[int(token.removeprefix("t"))] = value
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_the_mask_token_is_never_sampled(tiny_config: dict[str, object], temperature: float) -> None:
    model = biased(tiny_config, t22=1000.0)
    model.eos_id = VOCAB
    for generation in sampled(model, SamplingParams(max_new_tokens=14, denoising_steps=2), temperature):
        assert MASK not in generation.ids
        assert NEVER not in generation.steps
        assert all(math.isfinite(logp) for logp in generation.logps)


def test_an_eos_stops_the_row_at_the_end_of_its_block(tiny_config: dict[str, object]) -> None:
    model = biased(tiny_config, t21=1.0)
    prompts = [[EOS] * (i % 6) for i in range(60)]  # an EOS in the prompt ends nothing
    early = 0
    for prompt, g in zip(
        prompts,
        decode_all(model, prompts, SamplingParams(max_new_tokens=14, denoising_steps=2, temperature=1.0), range(60)),
        strict=True,
    ):
        blocks = blocks_of(prompt, g)
        assert EOS not in g.ids[: blocks[-1].start]
        whole = (len(prompt) + 14 + B - 1) // B * B - len(prompt)
        assert len(g.ids) == whole or EOS in g.ids[blocks[-1]]
        assert g.text_ids == (g.ids[: g.ids.index(EOS)] if EOS in g.ids[:14] else g.ids[:14])
        assert (len(prompt) + len(g.ids)) % B == 0
        early += len(g.ids) < whole
    assert 10 < early < 60


def test_all_eos_is_an_empty_text(tiny_config: dict[str, object]) -> None:
    (g,) = decode_all(
        biased(tiny_config, t21=100.0), [[1, 2, 3]], SamplingParams(max_new_tokens=9, denoising_steps=2), [0]
    )
    assert (g.ids, g.text_ids, g.steps, g.num_forwards) == ([EOS], [], [0], 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_mu_at_the_temperature(model: SDAR, temperature: float) -> None:
    """3000 one-step blocks: each token's frequency within 4.5 standard errors of softmax(log mu / T)."""
    n, prompt = 3000, [5, 3, 5, 8]
    with torch.no_grad():
        log_mu = log_mu_of_block(model, [*prompt, *[MASK] * B], len(prompt))
    expected = torch.softmax(log_mu / temperature, -1).numpy()
    drawn = np.array(
        [
            g.ids
            for g in decode_all(
                model,
                [prompt] * n,
                SamplingParams(max_new_tokens=B, denoising_steps=1, temperature=temperature),
                range(n),
            )
        ]
    )
    for i in range(B):
        frequency = np.bincount(drawn[:, i], minlength=VOCAB) / n
        error = np.sqrt(expected[i] * (1 - expected[i]) / n) + 1e-9
        assert (np.abs(frequency - expected[i]) / error).max() < 4.5


@torch.no_grad()
@pytest.mark.parametrize("prompt", [[5, 3, 5, 8, MASK, 9], [MASK, 5], [5, MASK, 5, 8, 1, MASK]], ids=str)
def test_a_mask_token_in_the_prompt_is_read_not_filled(model: SDAR, prompt: list[int]) -> None:
    (g,) = decode_all(model, [prompt], SamplingParams(max_new_tokens=6, denoising_steps=2), [0])
    assert replace(g, logps=[]) == replace(
        naive_greedy(model, prompt, SamplingParams(max_new_tokens=6, denoising_steps=2)), logps=[]
    )
    assert sorted(set(g.steps)) == list(range(g.num_forwards))
