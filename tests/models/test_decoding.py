"""Every family decodes, and the training forward reads the very states that its decoder saw."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtrpo_ray.config.train import Objective
from dtrpo_ray.decode.decoder import Decoder, decode_all
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.method.batch import ModelLayout, build_batch
from dtrpo_ray.method.step import packed_inputs, scored_logps
from dtrpo_ray.method.trajectory import GIVEN
from dtrpo_ray.models.registry import FAMILIES, load_model


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize("prompt_len", [11, 16])
@pytest.mark.parametrize("small_block_size", [None, 2])
def test_the_training_forward_reads_what_the_decoder_saw(
    write_upstream: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    prompt_len: int,
    small_block_size: int | None,
) -> None:
    """Every logit of every newly unmasked token, and the log-probability that was recorded."""
    seen: dict[int, tuple[int, torch.Tensor]] = {}  # step -> first position of its block, log mu of the block
    denoise = Decoder._denoise

    def watched(self: Decoder, rows: list[Any], states: torch.Tensor) -> Any:
        (row,) = rows
        seen[row.forwards] = row.start, self.model.log_mu(states[0])
        return denoise(self, rows, states)

    monkeypatch.setattr(Decoder, "_denoise", watched)
    model = load_model(write_upstream(model_type)).eval()
    prompt = [5 + 3 * i % 60 for i in range(prompt_len)]
    params = SamplingParams(
        max_new_tokens=2 * model.block_size,
        denoising_steps=3,
        temperature=1.0,
        ignore_eos=True,
        small_block_size=small_block_size,
    )
    made = decode_all(model, [prompt], params, [7])[0]
    row = {"row_id": "r", "epoch": 0, "prompt_ids": prompt}
    row |= {f"{side}_{name}": values for side in ("chosen", "rejected") for name, values in
            (("ids", made.ids), ("steps", made.steps))}  # fmt: skip
    batch = build_batch([row], Objective(num_draws="all"), ModelLayout.of(model), seed=0)
    chosen = batch.slot == 0
    positions = batch.position[batch.scored_row, batch.scored_col][chosen] + model.shift - prompt_len
    read = dict(zip(positions.tolist(), scored_logps(model, batch)[chosen].tolist(), strict=True))
    recorded = {i: logp for i, (logp, step) in enumerate(zip(made.logps, made.steps, strict=True)) if step >= 0}
    assert read == pytest.approx(recorded, abs=1e-4)  # token by token
    states = model.hidden(*packed_inputs(batch))[batch.scored_row, batch.scored_col][chosen]
    for place, log_mu in zip(positions.tolist(), model.log_mu(states), strict=True):
        start, block = seen[made.steps[place]]
        assert torch.allclose(log_mu, block[prompt_len + place - start], rtol=0, atol=1e-4)
    assert (batch.weight[chosen] == 1).all()
    opens = model.attention == "block" and model.shift == 1
    assert (GIVEN in made.steps) == opens
