"""reference: what is read back is what a frozen reference computes in the step, and a mismatch is an error."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dtrpo_ray.config.train import Objective, TrainConfig
from dtrpo_ray.errors import ConfigError, DataError, TrainError
from dtrpo_ray.method.batch import ModelLayout, build_batch
from dtrpo_ray.method.step import training_step
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.train import loop
from dtrpo_ray.train.reference import ReferenceCache, reference_key, reference_values

MakeModel = Callable[..., SDAR]
Json = dict[str, Any]
CPU, SEED, HASH = torch.device("cpu"), 3, "a-hash"


def row(number: int, epoch: int = 0) -> Json:
    rng = np.random.default_rng(number)
    lens = {"prompt": 3 + number, "chosen": 6 + number, "rejected": 9 - number}
    ids = {f"{name}_ids": rng.integers(0, 22, n).tolist() for name, n in lens.items()}
    steps = {f"{side}_steps": rng.integers(0, 4, lens[side]).tolist() for side in ("chosen", "rejected")}
    return {"row_id": f"row-{number}", "epoch": epoch} | ids | steps


ROWS = [row(i, epoch) for epoch in (0, 1) for i in range(4)]
OBJECTIVE = Objective(beta=0.3, num_draws=2, rpo_alpha=0.5)


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(objective=changes.pop("objective", OBJECTIVE), **changes)


def write(path: Path, reference: SDAR, seed: int = SEED, rows: list[Json] = ROWS, **changes: Any) -> Path:
    to_batch = loop.collate(config(**changes), reference, seed)
    micro_batches = [rows[i : i + 3] for i in range(0, len(rows), 3)]
    file = path / "ref-logps.parquet"
    tables = [reference_values(reference, part, to_batch, seed, HASH) for part in micro_batches]
    pq.write_table(pa.concat_tables(tables), file)
    assert pq.read_metadata(file).num_rows == 2 * len(rows)
    return file


def test_the_loss_from_a_cache_is_the_loss_from_the_frozen_model(make_model: MakeModel, tmp_path: Path) -> None:
    """Written in micro-batches of 3, read in one of 8 in another order and another packing: equal to rounding."""
    policy, reference = make_model(seed=1), make_model(seed=2).requires_grad_(False)
    cache = ReferenceCache.load(write(tmp_path, reference), SEED, HASH)
    rows = ROWS[::-1]
    for row_tokens in (None, 100):
        to_batch = loop.collate(config(row_tokens=row_tokens), policy, SEED, fill=cache.fill)
        read = training_step(policy, None, to_batch(rows), OBJECTIVE)
        plain = build_batch(rows, OBJECTIVE, ModelLayout.of(policy), seed=SEED)
        computed = training_step(policy, reference, plain, OBJECTIVE)
        assert torch.allclose(read.loss_P, computed.loss_P, rtol=0, atol=1e-5)
        assert torch.allclose(read.metrics["margin"], computed.metrics["margin"], rtol=0, atol=1e-5)
        assert read.loss_P.requires_grad


def test_another_seed_reference_or_file_is_refused(tiny: SDAR, tmp_path: Path) -> None:
    file = write(tmp_path, tiny)
    with pytest.raises(DataError, match=r"seed = 3, this run has 4.*ref-logps"):
        ReferenceCache.load(file, 4, HASH)
    with pytest.raises(DataError, match="reference = a-hash, this run has other"):
        ReferenceCache.load(file, SEED, "other")
    with pytest.raises(DataError, match="no readable cache"):
        ReferenceCache.load(tmp_path / "none.parquet", SEED, HASH)
    cuda = torch.device("cuda")
    keys = [reference_key(HASH, precision, device) for precision in ("auto", "bf16") for device in (CPU, cuda)]
    assert keys == [f"{HASH} float32", *[f"{HASH} bfloat16"] * 3]
    (tmp_path / "text.parquet").write_text("not Parquet")
    with pytest.raises(DataError, match="no readable cache"):
        ReferenceCache.load(tmp_path / "text.parquet", SEED, HASH)


def test_rows_that_were_not_written_or_have_changed_are_refused(tiny: SDAR, tmp_path: Path) -> None:
    cache = ReferenceCache.load(write(tmp_path, tiny), SEED, HASH)

    def fill(rows: list[Json], **changes: Any) -> None:
        loop.collate(config(**changes), tiny, SEED, fill=cache.fill)(rows)

    fill(ROWS)
    with pytest.raises(DataError, match="row row-1, chosen, epoch 2: no reference log-probs"):
        fill([row(1, epoch=2)])
    with pytest.raises(DataError, match="row row-9, chosen, epoch 0: no reference"):
        fill([row(1) | {"row_id": "row-9"}])
    edited = row(1)
    edited["rejected_ids"][0] = (edited["rejected_ids"][0] + 1) % 20
    with pytest.raises(DataError, match=r"row row-1, rejected, epoch 0: written for draws .* has changed"):
        fill([edited])
    for objective in (Objective(num_draws=1, rpo_alpha=0.5), Objective(num_draws=2), Objective(schedule="random")):
        with pytest.raises(DataError, match="has changed"):
            fill(ROWS, objective=objective)


@pytest.mark.parametrize("name", ["ids", "stream", "scored_col", "target", "weight", "nll_weight"])
def test_the_digest_covers_all_that_a_value_depends_on(tiny: SDAR, tmp_path: Path, name: str) -> None:
    """One entry changed on one side of one pair is refused by that side's name."""
    cache = ReferenceCache.load(write(tmp_path, tiny), SEED, HASH)
    batch = loop.collate(config(), tiny, SEED)(ROWS)
    slot = 2 * 5 + 1  # row-1, rejected, epoch 1
    values = getattr(batch, name).clone()
    if values.dim() == 2:
        r, columns = batch.scored_row[batch.slot == slot][0], batch.scored_col[batch.slot == slot]
        values[r, columns[-1]] += 1
    else:
        values[torch.nonzero(batch.slot == slot)[-1, 0]] += 1
    with pytest.raises(DataError, match="row row-1, rejected, epoch 1: written for draws"):
        cache.fill(replace(batch, **{name: values}), ROWS)


def test_a_cache_needs_an_objective_with_a_reference_and_no_order_of_its_making() -> None:
    with pytest.raises(ValueError, match="has no reference"):
        config(reference="cache", objective=Objective(type="sft"))
    with pytest.raises(ValueError, match="confidence"):
        config(reference="cache", objective=Objective(schedule="confidence"))
    with pytest.raises(ValueError, match="num_draws"):
        Objective(type="elbo_dpo", num_draws="all")


def test_a_confidence_order_without_a_reference_is_refused(tiny: SDAR) -> None:
    objective = Objective(schedule="confidence")
    with pytest.raises(TrainError, match="orders by the reference"):
        loop.collate(config(objective=objective), tiny, SEED)(ROWS)
    batch = loop.collate(config(objective=objective), tiny, SEED, tiny, device=CPU)(ROWS)
    assert len(batch.target) > 0
    with pytest.raises(ConfigError, match="given_tokens"):
        loop.collate(config(objective=Objective(given_tokens="clean")), tiny, SEED)(ROWS)
