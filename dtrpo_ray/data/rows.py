"""The columns of trajectory/v1 that hold a response and how it was decoded, for rollouts and the server alike."""

import numpy as np

from dtrpo_ray.config.decode import POLICIES, STEPS
from dtrpo_ray.data.schemas import CONTRACT_VERSION, DIFFUSION, FIRST, TrajectoryRow
from dtrpo_ray.decode.types import DECODER_NAME, Generation, SamplingParams
from dtrpo_ray.method.trajectory import GIVEN, block_slices, dense_steps
from dtrpo_ray.models.base import DiffusionLM


def how_decoded(
    model: DiffusionLM, params: SamplingParams, prompt: list[int], made: Generation, seed: int
) -> TrajectoryRow:
    """Return these columns of a response to the prompt [ids]."""
    size = params.block_length or model.block_size
    blocks = block_slices(len(prompt), len(made.steps), size, model.block_origin)
    cut = params.temperature > 0 and (params.top_p < 1 or params.top_k > 0)
    return {
        "contract_version": CONTRACT_VERSION,
        "prompt_ids": prompt,
        "response_ids": made.ids,
        "steps": made.steps,
        "ranks": dense_steps(np.array(made.steps, dtype=np.int64), blocks).tolist(),
        "types": [FIRST if step == GIVEN else DIFFUSION for step in made.steps],  # our decoder forces no token
        "logps": made.logps,
        "num_forwards": made.num_forwards,
        "block_size": size,
        "block_origin": model.block_origin,
        "mask_id": model.mask_id,
        "shift": model.shift,
        "denoising_steps": params.denoising_steps if POLICIES[params.policy] == STEPS else None,
        "temperature": params.temperature,
        "sampler": {
            "remasking": params.policy,
            "threshold": params.threshold,
            "tokens_per_step": params.tokens_per_step or 1,
            "small_block_size": params.small_block_size,
            "entropy_bound": params.entropy_bound or 0.0,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_new_tokens": params.max_new_tokens,
        },
        "support": "truncated" if cut else "full",
        "seed": seed,
        "engine": DECODER_NAME,
    }
