"""The decoding benchmark compares like with like: the naive decoder and ours give the same tokens, and count alike."""

import pytest

from benchmarks.decode import against_naive, as_markdown, bench_model, decode_benchmark, naive, serve_load
from dtrpo_ray.decode.types import SamplingParams

pytestmark = pytest.mark.extra


@pytest.mark.parametrize("steps", [1, 3])
def test_both_decoders_give_the_same_tokens(steps: int) -> None:
    model = bench_model(64, 2, 8)
    prompts = [[5, 3, 8, 13, 2], list(range(24))]
    params = SamplingParams(max_new_tokens=20, denoising_steps=steps, ignore_eos=True)
    expected = [naive(model, prompt, params) for prompt in prompts]
    row, answers = serve_load(model, prompts, params, 2)
    assert answers == [ids for ids, _ in expected]
    assert row["tokens_per_forward"] == 40 / sum(forwards for _, forwards in expected)
    assert against_naive(model, prompts[0], params, 1)["same_tokens"]


def test_the_report_has_a_row_for_every_crowd() -> None:
    result = decode_benchmark(8, 8, 4, 64, 1, 2, 1, 4)
    assert [load["concurrency"] for load in result["loads"]] == [1, 4]
    assert [load["requests"] for load in result["loads"]] == [4, 4]
    assert "Same tokens: yes" in as_markdown(result)
