"""bench forward: the ways that are compared compute the same numbers, and the counts are those of what runs."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import forward
from benchmarks.forward import VARIANTS, Shape, common_logps, two_stream_mask
from dtrpo_ray.errors import ConfigError, TrainError
from dtrpo_ray.method.batch import ModelLayout, build_batch
from dtrpo_ray.method.step import scored_logps

pytestmark = pytest.mark.extra

SMALL = Shape(prompt=8, response=12, block=4, steps=2, width=64, layers=2, vocab=64, pairs=2)


def test_the_common_mask_is_the_published_one() -> None:
    picture = "11...... 11...... ..1111.. ..1111.. ....11.. ....11.. ....1111 ....1111"
    assert two_stream_mask(4, 2)[0, 0].tolist() == [[c == "1" for c in line] for line in picture.split()]


@pytest.mark.parametrize("name", [n for n, (way, _) in VARIANTS.items() if way != "packed"])
@torch.no_grad()
def test_both_ways_read_the_same_log_probabilities(name: str) -> None:
    way, objective = VARIANTS[name]
    model, rows = SMALL.model(0), SMALL.rows()
    batch = build_batch(rows, objective, ModelLayout.of(model), seed=0)
    common = common_logps(model, rows, batch, way == "lean")
    assert torch.allclose(common, scored_logps(model, batch), rtol=0, atol=1e-4)


def test_every_block_takes_its_steps_evenly() -> None:
    for row in SMALL.rows():
        for side in ("chosen", "rejected"):
            for first in range(0, 12, 4):
                assert sorted(row[f"{side}_steps"][first : first + 4].tolist()) == [0, 0, 1, 1]


def test_gradients_and_counts_of_the_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both steps leave the same gradient; trunk tokens and head rows are what meets the trunk and the head."""
    gradients = []
    for name in (forward.OURS, forward.COMMON, "dtrpo lean"):
        setup, seen = forward._setup(name, SMALL), [0, 0]
        kind = type(setup.policy)
        hidden, head = kind.hidden, kind.head

        def counted_hidden(self: Any, ids: Any, *args: Any, hidden: Any = hidden, seen: Any = seen) -> Any:
            seen[0] += ids.numel()
            return hidden(self, ids, *args)

        def counted_head(self: Any, states: Any, head: Any = head, seen: Any = seen) -> Any:
            seen[1] += states.numel() // states.shape[-1]
            return head(self, states)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "hidden", counted_hidden)
            patch.setattr(kind, "head", counted_head)
            setup.step()
        assert seen == [setup.trunk_tokens, setup.head_rows]
        gradients.append(torch.cat([p.grad.flatten() for p in setup.policy.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, rtol=1e-3, atol=1e-5)


def test_ratios_and_bars_are_theirs_over_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Common practice 3 times as slow as ours and 2 times as large: the bars of time and memory are met and not met."""
    shape = Shape()
    keys = ("peak_bytes", "process_bytes", "trunk_tokens", "head_rows", "flops", "weight_bytes")

    def answer(job: str, name: str, shape: Shape, repeats: int) -> dict[str, Any]:
        slow, large = (3.0, 2) if name == forward.COMMON else (5.5, 2) if name == "vrpo n=4 common" else (1.0, 1)
        loss = {"loss": 0.5 if name != "all steps packed" else wrong}
        return {**loss, "seconds": slow, "cpu_seconds": slow} if job == "time" else dict.fromkeys(keys, 7 * large)

    monkeypatch.setattr(forward, "_in_process", answer)
    wrong = 0.5
    value = forward.compare(shape, rounds=2, repeats=1, say=lambda text: None)
    assert [(bar["measured"], bar["met"]) for bar in value["bars"]] == [(3.0, True), (2.0, False), (5.5, True)]
    assert value["variants"][0]["tokens_per_second"] == 2 * 512
    assert "| dtrpo common | 3.000 |" in forward.table(value)
    wrong = 0.6
    with pytest.raises(TrainError, match=r"all steps: losses differ: 0\.6 packed, 0\.5 common"):
        forward.compare(shape, rounds=1, repeats=1, say=lambda text: None)


def test_flops_of_attention_on_a_cpu_are_counted() -> None:
    queries, keys = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 12, 8)
    with FlopCounterMode(display=False, custom_mapping=forward.CPU_ATTENTION) as counter:
        torch.nn.functional.scaled_dot_product_attention(queries, keys, keys)
    assert counter.get_total_flops() == 2 * 3 * 2 * (2 * 10 * 12 * 8)  # scores, then values


def test_a_gpu_is_asked_for_by_name_and_missed_by_name() -> None:
    assert forward.named_shape("bars", "cpu") == Shape()
    for arguments, remedy in ((("7b", "cpu"), "use one of bars, 8b"), (("8b", "tpu"), "cpu or cuda")):
        with pytest.raises(ConfigError, match=remedy):
            forward.named_shape(*arguments)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="torch sees no GPU"):
            forward.named_shape("8b", "cuda")


@pytest.mark.parametrize("name", ["dtrpo packed", "dtrpo common"])
def test_bfloat16_gives_the_loss_of_float32(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    exact = forward._setup(name, SMALL).step()
    monkeypatch.setattr(Shape, "dtype", torch.bfloat16)
    rounded = forward._setup(name, SMALL)
    assert next(rounded.policy.parameters()).dtype == torch.bfloat16
    assert rounded.step() == pytest.approx(exact, rel=0.05)
