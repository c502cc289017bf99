"""The loop's laws, without Ray and DeepSpeed: splitting a batch changes nothing, resume is exact, NaN stops the run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from benchmarks.plain import PlainBackend
from dtrpo_ray.config.train import Objective, TrainConfig
from dtrpo_ray.errors import TrainError
from dtrpo_ray.method.batch import ModelLayout, build_batch, packed_tokens, padded_tokens
from dtrpo_ray.method.step import checkpoint_layers, scored_logps, sum_by_side, training_step
from dtrpo_ray.metrics import TERM_METRICS
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.lora import add_adapters
from dtrpo_ray.train import loop
from dtrpo_ray.train.backend import deepspeed_config

CPU = torch.device("cpu")


def rows(count: int, start: int = 0, weight: float = 1.0) -> list[dict[str, Any]]:
    """Pairs of random tokens with recorded steps."""
    generator = torch.Generator().manual_seed(start)
    made = []
    for i in range(count):
        ids = [torch.randint(0, 20, (8,), generator=generator).tolist() for _ in range(3)]
        row = {
            "row_id": f"row-{start + i}",
            "epoch": 0,
            "prompt_ids": ids[0],
            "row_weight": weight,
            "batch_weight": count,
        }
        for side, response in (("chosen", ids[1]), ("rejected", ids[2])):
            row |= {f"{side}_ids": response, f"{side}_steps": [0, 1, 0, 1, 2, 2, 3, 3]}
        made.append(row)
    return made


def train(
    model: DiffusionLM, config: TrainConfig, batches: list[Any], reference: DiffusionLM | None = None, **more: Any
) -> tuple[PlainBackend, list[dict[str, Any]]]:
    backend = more.pop("backend", None) or PlainBackend(model, config, more.pop("total", len(batches)), CPU)
    log: list[dict[str, Any]] = []
    start = more.pop("start", 0)
    end = more.pop("end", start + len(batches))
    to_batch = loop.collate(config, model, seed=0)
    loop.run(config, backend, reference, batches, to_batch, start, end, log.append, lambda step: None)
    return backend, log


def weights(model: DiffusionLM) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def config(**changes: Any) -> TrainConfig:
    objective = changes.pop("objective", Objective(beta=0.5, rpo_alpha=0.1))
    return TrainConfig(lr=1e-3, global_batch=4, micro_batch=4, warmup_ratio=0.0, objective=objective, **changes)


def test_one_by_eight_two_by_four_and_eight_by_one_are_one_number(make_model: Any) -> None:
    """The loss is normalised over the global batch, so micro-batches change neither it nor the update."""
    after, losses = [], []
    for micro in (8, 4, 1):
        model, cfg = make_model(exact=True), config().model_copy(update={"global_batch": 8, "micro_batch": micro})
        batch = rows(8)
        batch[3]["row_weight"], batch[5]["row_weight"] = 0.0, 0.25  # rows need not weigh the same
        _, log = train(model, cfg, [[{**row, "batch_weight": 6.25} for row in batch]], make_model(seed=9, exact=True))
        after.append(weights(model))
        losses.append(log[0]["loss"])
    for other in (1, 2):
        torch.testing.assert_close(after[0], after[other], rtol=0, atol=1e-9)
        assert losses[0] == pytest.approx(losses[other], rel=1e-6)


def test_nll_by_place_is_the_mean_over_the_hidden_tokens_of_the_global_batch(make_model: Any) -> None:
    """However it is split, and without the rows of weight 0; a place that no token was hidden at has no number."""
    objective = Objective(type="sft")
    batch = [{**row, "batch_weight": 6} for row in rows(8)]
    batch[3]["row_weight"] = batch[5]["row_weight"] = 0.0
    logs = []
    for micro in (8, 3, 1):
        cfg = config(objective=objective).model_copy(update={"global_batch": 8, "micro_batch": micro})
        logs.append(train(make_model(exact=True), cfg, [batch], None)[1][0])
    model, real = make_model(exact=True), [row for row in batch if row["row_weight"]]
    made = build_batch(real, objective, ModelLayout.of(model), seed=0)
    logps = scored_logps(model, made)
    for place in range(4):
        expected = -logps[made.place == place].mean().item()
        for log in logs:
            assert log[f"nll_place_{place + 1}"] == pytest.approx(expected, rel=1e-6)
    short = [{**rows(1)[0], "prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7], "batch_weight": 1}]
    log = train(make_model(), config(objective=Objective(type="sft", num_draws=20)), [short], None)[1][0]
    assert [name for name in log if "place" in name] == ["nll_place_1", "nll_place_2", "nll_place_3"]


def test_the_rows_held_out_are_measured_in_the_elbo_however_they_are_split_and_change_no_weight(
    make_model: Any,
) -> None:
    """At the same draws each time, in evaluation mode; rows that fill a rank have weight 0."""
    objective, held = Objective(type="sft", complementary_masks=True), rows(5, start=90)
    held = [{**row, "batch_weight": 4.0, "row_weight": float(at < 4)} for at, row in enumerate(held)]
    model, cfg = make_model(exact=True), config(objective=objective, held_out=0.5)
    elbo = cfg.model_copy(update={"objective": cfg.held_out_objective})
    batch = build_batch(held[:4], Objective(type="sft"), ModelLayout.of(model), seed=0)
    expected = training_step(model, None, batch, Objective(type="sft")).loss_P.mean().item()
    for micro in (5, 2, 1):
        split = cfg.model_copy(update={"micro_batch": micro})
        backend, modes = PlainBackend(model, split, 1, CPU), []
        hook = model.register_forward_pre_hook(lambda module, _, modes=modes: modes.append(module.training))
        before, to_batch = weights(model), loop.collate(elbo, model, seed=0)
        found = [loop.held_out_metrics(split, backend, None, held, to_batch) for _ in range(2)]
        hook.remove()
        assert found[0] == found[1]
        assert found[0]["held_out_loss"] == found[0]["held_out_nll"] == pytest.approx(expected, rel=1e-9)
        assert "held_out_nll_place_1" in found[0]
        assert not any(modes)
        assert model.training
        assert torch.equal(weights(model), before)


def test_the_rows_held_out_are_logged_with_each_checkpoint_and_before_it(make_model: Any) -> None:
    model, cfg, told = make_model(), config(log_every=2, save_every=3), list[Any]()
    backend, log = PlainBackend(model, cfg, 7, CPU), list[dict[str, Any]]()
    hooks = loop.Hooks(held_out=lambda: told.append("held") or {"held_out_loss": 1.0})  # type: ignore[func-returns-value]
    to_batch = loop.collate(cfg, model, 0)
    loop.run(cfg, backend, make_model(), [rows(4)] * 7, to_batch, 0, 7, log.append, told.append, hooks)
    assert told == ["held", 3, "held", 6, "held", 7]
    assert [(row["step"], "held_out_loss" in row) for row in log] == [
        (2, False), (3, True), (4, False), (6, True), (7, True)
    ]  # fmt: skip


def test_rows_of_weight_zero_change_nothing(make_model: Any) -> None:
    full, padded = make_model(exact=True), make_model(exact=True)
    reference = make_model(seed=9, exact=True)
    train(full, config(), [rows(3)], reference)
    filler = [{**row, "batch_weight": 3} for row in rows(2, start=50, weight=0.0)]
    train(padded, config(), [rows(3) + filler], reference)
    torch.testing.assert_close(weights(full), weights(padded), rtol=0, atol=1e-9)


def test_the_first_step_of_dtrpo_has_loss_log_2(make_model: Any) -> None:
    _, log = train(make_model(), config(objective=Objective(beta=0.5)), [rows(4)], make_model())
    assert log[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert log[0]["margin"] == pytest.approx(0.0, abs=1e-5)


def test_the_share_of_clipped_steps_is_logged(make_model: Any) -> None:
    cfg = config(objective=Objective(beta=0.5))
    norms = [row["grad_norm"] for row in train(make_model(), cfg, [rows(4)] * 6, make_model())[1]]
    middle = sorted(norms)[3]
    _, log = train(
        make_model(), cfg.model_copy(update={"max_grad_norm": middle, "lr": 1e-12}), [rows(4)] * 6, make_model()
    )
    assert [row["clipped"] for row in log] == [float(row["grad_norm"] > middle) for row in log]


def two_passes(
    policy: DiffusionLM, reference: DiffusionLM, cfg: TrainConfig, batch: list[dict[str, Any]]
) -> dict[str, float]:
    """The norms and the cosine of the two terms, each from a backward pass of its own over the global batch."""
    made = loop.collate(cfg, policy, 0, reference)(batch)
    alone = cfg.objective.model_copy(update={"rpo_alpha": 0.0})
    weighed = sum_by_side(made.nll_weight * scored_logps(policy, made), made.slot, len(batch), 2)
    losses = (
        training_step(policy, reference, made, alone).loss_P,
        -cfg.objective.rpo_alpha * weighed[:, 0] / made.tokens[:, 0],
    )
    share = made.row_weight / batch[0]["batch_weight"]
    parameters = [p for p in policy.parameters() if p.requires_grad]
    preference, nll = (
        torch.cat([g.flatten().double() for g in torch.autograd.grad((loss * share).sum(), parameters)])
        for loss in losses
    )
    cosine = torch.cosine_similarity(preference, nll, dim=0)
    values = (float(preference.norm()), float(nll.norm()), float(cosine))
    return dict(zip(TERM_METRICS, values, strict=True))


@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"rpo_alpha": 8.0, "beta": 0.05},
        {"num_draws": 2, "nll_tokens": "unmasked"},
        {"loss_type": "ipo", "num_draws": "all"},
        {"schedule": "confidence", "tokens_per_step": 2},
        {"type": "elbo_dpo", "num_draws": 2},
    ],
    ids=str,
)
def test_the_gradients_of_the_terms_are_those_of_two_backward_passes_however_the_batch_is_cut(
    make_model: Any, objective: dict[str, Any]
) -> None:
    batch = [{**row, "batch_weight": 6.25} for row in uneven(8)]
    batch[3]["row_weight"], batch[5]["row_weight"] = 0.0, 0.25
    reference = make_model(seed=9, exact=True)
    cuts = [{"micro_batch": 8}, {"micro_batch": 3}, {"micro_batch": 1}, {"micro_batch": 8, "micro_tokens": 80}]
    for cut in [*cuts, {"micro_batch": 8, "row_tokens": 200}]:
        model = make_model(exact=True)
        cfg = TrainConfig.model_validate({"objective": {"beta": 0.5, "rpo_alpha": 0.5} | objective, "lr": 1e-3} | cut)
        wanted = two_passes(model, reference, cfg, batch)
        log: list[dict[str, Any]] = []
        backend, made = PlainBackend(model, cfg, 1, CPU), loop.collate(cfg, model, 0, reference)
        loop.run(cfg, backend, reference, [batch], made, 0, 1, log.append, lambda step: None)
        assert {name: log[0][name] for name in TERM_METRICS} == pytest.approx(wanted, rel=1e-5), cut
        preference, nll, cosine = (log[0][name] for name in TERM_METRICS)
        whole = preference**2 + nll**2 + 2 * preference * nll * cosine
        assert log[0]["grad_norm"] ** 2 == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 2}}], ids=str)
def test_measuring_the_terms_changes_no_bit_of_the_training(make_model: Any, changes: dict[str, Any]) -> None:
    """With dropout, which draws random numbers in each forward."""
    ends, logs = [], []
    for every in (0, 1):
        cfg = TrainConfig.model_validate(
            {"objective": {"beta": 0.5, "rpo_alpha": 0.1}, "micro_batch": 2, "log_terms_every": every, **changes}
        )
        model = make_model(attention_dropout=0.2)
        if cfg.lora:
            add_adapters(model, cfg.lora, 0)
        if cfg.gradient_checkpointing:
            checkpoint_layers(model)
        torch.manual_seed(0)
        logs.append(train(model, cfg, [rows(4, start=10 * i) for i in range(3)], make_model(seed=9).eval())[1])
        ends.append(weights(model))
    assert torch.equal(*ends)
    assert all(row["grad_norm_nll"] > 0 for row in logs[1])
    varying = {"seconds", "step_seconds", "data_seconds", "tokens_per_second", *TERM_METRICS}
    assert [{k: v for k, v in row.items() if k not in varying} for row in logs[1]] == [
        {k: v for k, v in row.items() if k not in varying} for row in logs[0]
    ]


@pytest.mark.parametrize(
    ("changes", "measured"),
    [
        ({"log_terms_every": 3}, [1, 4, 7]),
        ({"log_every": 2, "log_terms_every": 2}, [2, 6]),
        ({"log_terms_every": 0}, []),
        ({"objective": Objective(beta=0.5)}, []),
        ({"objective": Objective(type="imitation", rpo_alpha=1.0)}, []),
        ({"zero_stage": 3}, []),
        ({}, [1]),
    ],
    ids=str,
)
def test_the_terms_are_measured_at_the_first_line_and_at_some_after_it(
    make_model: Any, changes: dict[str, Any], measured: list[int]
) -> None:
    _, log = train(make_model(), config(**changes), [rows(2)] * 8, make_model(seed=9))
    assert [row["step"] for row in log if TERM_METRICS[0] in row] == measured
    assert all(row.keys().isdisjoint(TERM_METRICS) or row.keys() >= set(TERM_METRICS) for row in log)


def test_training_lowers_the_loss(make_model: Any) -> None:
    for objective in (Objective(type="sft"), Objective(beta=0.5), Objective(type="elbo_dpo", beta=0.5)):
        _, log = train(make_model(), config(objective=objective), [rows(4)] * 30, make_model())
        first, last = (sum(r["loss"] for r in part) / 5 for part in (log[:5], log[-5:]))
        assert last < 0.7 * first, objective.type


def test_resume_equals_no_interruption(make_model: Any, tmp_path: Path) -> None:
    batches = [rows(4, start=10 * i) for i in range(6)]
    straight = make_model()
    train(straight, config(), batches, make_model(seed=9), total=6)
    first = make_model()
    backend, _ = train(first, config(), batches[:3], make_model(seed=9), total=6)
    backend.save(tmp_path, 3)
    second = make_model(seed=5)
    resumed = PlainBackend(second, config(), 6, CPU)
    assert resumed.load(tmp_path) == 3
    train(second, config(), batches[3:], make_model(seed=9), backend=resumed, start=3)
    assert torch.equal(weights(straight), weights(second))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_rows(make_model: Any) -> None:
    model = make_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainError, match=r"not finite.*row-0"):
        train(model, config(), [rows(4)], make_model())


def test_log_and_save_come_at_their_steps(make_model: Any) -> None:
    model, saved = make_model(), []
    cfg = config(log_every=2, save_every=3)
    backend = PlainBackend(model, cfg, 7, CPU)
    log: list[dict[str, Any]] = []
    loop.run(cfg, backend, make_model(), [rows(4)] * 7, loop.collate(cfg, model, 0), 0, 7, log.append, saved.append)
    assert ([row["step"] for row in log], saved) == ([2, 4, 6, 7], [3, 6, 7])


def uneven(count: int) -> list[dict[str, Any]]:
    """Pairs of 8 and 4 tokens a side in turn."""
    short = {f"{side}_{what}": 4 for side in ("chosen", "rejected") for what in ("ids", "steps")}
    return [
        {name: value[: short[name]] if name in short and i % 2 else value for name, value in row.items()}
        for i, row in enumerate(rows(count))
    ]


def test_a_token_budget_cuts_an_optimizer_step_and_changes_no_gradient(make_model: Any) -> None:
    """A long pair takes 8 + 2 * 2 * 8 = 40 tokens, a short one 24: two long ones or three short ones in 80."""
    cfg = config().model_copy(update={"micro_batch": 8, "micro_tokens": 80})
    parts = loop.micro_batches(uneven(8), cfg, "block", lambda count: count)
    assert [[row["row_id"] for row in part] for part in parts] == [
        ["row-0", "row-2"], ["row-4", "row-6"], ["row-1", "row-3", "row-5"], ["row-7"]
    ]  # fmt: skip
    for part in parts:
        batch = loop.collate(cfg, make_model(), 0)(part)
        assert batch.ids.numel() <= 80
    ends = []
    for budget in (None, 80, 1):
        model = make_model()
        train(model, cfg.model_copy(update={"micro_tokens": budget}), [uneven(8)] * 2, make_model(seed=9))
        ends.append(weights(model))
    assert torch.allclose(ends[0], ends[1], atol=1e-6)
    assert torch.allclose(ends[0], ends[2], atol=1e-6)


def test_a_rank_of_fewer_micro_batches_is_filled_with_rows_of_weight_0(make_model: Any) -> None:
    cfg = config().model_copy(update={"micro_tokens": 80})
    parts = loop.micro_batches(uneven(2), cfg, "block", lambda count: 3)
    assert [[row["row_weight"] for row in part] for part in parts] == [[1.0, 1.0], [0.0], [0.0]]


def test_the_last_micro_batch_alone_is_the_last(make_model: Any) -> None:
    """However many of a rank's are fillers; DeepSpeed reduces and updates at it."""
    model, told = make_model(), []

    class Other(PlainBackend):
        def most(self, count: int) -> int:
            return 4

        def backward(self, loss: torch.Tensor, last: bool = True) -> None:
            told.append(last)
            super().backward(loss, last)

    cfg = config().model_copy(update={"micro_tokens": 80})
    train(model, cfg, [uneven(2)], make_model(seed=9), backend=Other(model, cfg, 1, CPU))
    assert told == [False, False, False, True]


@pytest.mark.parametrize("attention", ["block", "full"])
@pytest.mark.parametrize(
    "objective",
    [
        {},
        {"type": "sft"},
        {"type": "sft", "complementary_masks": True},
        {"type": "sft", "complementary_masks": True, "num_draws": 2},
        {"type": "imitation"},
        {"num_draws": 3},
        {"num_draws": "all"},
        {"num_draws": "all", "schedule": "random"},
        {"type": "elbo_dpo", "num_draws": 2},
    ],
)
def test_no_pair_takes_more_tokens_than_it_is_counted_with(attention: Any, objective: dict[str, Any]) -> None:
    asked = Objective.model_validate(objective)
    for row in uneven(4):
        batch = build_batch([row], asked, ModelLayout(4, 22, attention), seed=0)
        assert batch.ids.numel() <= packed_tokens(row, asked, attention)


def test_a_budget_counts_packed_rows_with_their_padding() -> None:
    assert [padded_tokens([40, 24, 24], row_tokens) for row_tokens in (None, 64, 100)] == [120, 128, 88]


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("constant", lambda done: 1.0),
        ("linear", lambda done: 1.0 - done),
        ("cosine", lambda done: 0.5 * (1.0 + math.cos(math.pi * done))),
    ],
)
def test_the_rate_rises_to_its_peak_and_follows_its_schedule(make_model: Any, name: str, after: Any) -> None:
    """Ten steps, two of warmup; the eleventh, which is never made, is where linear and cosine reach 0."""
    cfg = TrainConfig.model_validate({"lr": 0.5, "warmup_ratio": 0.2, "lr_schedule": name})
    backend = PlainBackend(make_model(), cfg, 10, CPU)
    rates = [backend.step()[1] for _ in range(10)]
    like = "constant_with_warmup" if name == "constant" else name
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    theirs = get_scheduler(like, optimizer, num_warmup_steps=2, num_training_steps=11)
    assert rates[0] == theirs.get_last_lr()[0]
    for rate in rates[1:]:
        optimizer.step()
        theirs.step()
        assert rate == theirs.get_last_lr()[0]
    wanted = [0.0, 0.5 / 2] + [0.5 * after((step - 2) / 9) for step in range(2, 10)]
    assert rates == pytest.approx(wanted)


def test_rows_that_end_early_are_no_end(make_model: Any) -> None:
    model, saved = make_model(), []
    backend, to_batch = PlainBackend(model, config(), 6, CPU), loop.collate(config(), model, 0)
    with pytest.raises(TrainError, match="the rows ended after optimizer step 3 of 6"):
        loop.run(config(), backend, make_model(), [rows(4)] * 3, to_batch, 0, 6, lambda row: None, saved.append)
    assert 6 not in saved
    loop.run(config(), backend, make_model(), [], to_batch, 6, 6, lambda row: None, saved.append)  # nothing left to do


def test_the_deepspeed_config_is_derived() -> None:
    made = deepspeed_config(TrainConfig(global_batch=64, micro_batch=8, zero_stage=3, max_grad_norm=0.5), 2, bf16=True)
    assert made["gradient_accumulation_steps"] == 4
    assert made["train_batch_size"] == 8
    assert made["zero_optimization"] == {"stage": 3}
    assert (made["gradient_clipping"], made["bf16"]) == (0.5, {"enabled": True})


@pytest.mark.parametrize("policy", ["skip", "stop"])
def test_a_dropped_step_changes_no_weight_and_names_its_rows(make_model: Any, policy: str) -> None:
    model, seen = make_model(), []
    batches = [rows(4, start=10 * i) for i in range(3)]
    batches[1][2]["row_weight"] = math.inf
    cfg, log, states = config(on_nonfinite=policy), [], []
    backend = PlainBackend(model, cfg, 3, CPU)
    hooks = loop.Hooks(begin=lambda step: states.append(weights(model)), skipped=lambda *told: seen.append(told))
    args = (
        cfg,
        backend,
        make_model(),
        batches,
        loop.collate(cfg, model, 0),
        0,
        3,
        log.append,
        lambda step: None,
        hooks,
    )
    if policy == "stop":
        with pytest.raises(TrainError, match=r"at optimizer step 2; rows of this rank: row-12; lower train.lr, look"):
            loop.run(*args)
        assert torch.equal(weights(model), states[1])
        return
    loop.run(*args)
    assert seen == [(2, ["row-12"])]
    assert torch.equal(states[1], states[2])
    assert not torch.equal(states[2], weights(model))
    assert [row.get("skipped") for row in log] == [None, 1.0, None]


def test_ten_dropped_steps_in_a_row_end_the_run(make_model: Any) -> None:
    batches = [rows(4, weight=math.inf)] * 12
    with pytest.raises(TrainError, match="not finite 10 times in a row"):
        train(make_model(), config(on_nonfinite="skip"), batches, make_model())


def test_a_drain_saves_at_once(make_model: Any) -> None:
    model, saved, asked = make_model(), [], []
    cfg = config(save_every=5)
    backend = PlainBackend(model, cfg, 6, CPU)
    due = iter([False, True, False, True, False, False])

    def leaving() -> bool:
        asked.append(len(asked))
        return len(asked) == 2

    hooks = loop.Hooks(due=lambda: next(due), leaving=leaving)
    to_batch = loop.collate(cfg, model, 0)
    loop.run(cfg, backend, make_model(), [rows(4)] * 6, to_batch, 0, 6, lambda row: None, saved.append, hooks)
    assert (len(asked), saved) == (2, [4, 5, 6])


def test_pairs_share_rows_of_the_jobs_budget(tiny: DiffusionLM) -> None:
    apart, together = (loop.collate(TrainConfig(row_tokens=n), tiny, 0)(rows(6)) for n in (None, 400))
    assert len(apart.ids) == 6
    assert len(together.ids) == 1
