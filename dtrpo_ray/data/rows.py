"""The columns of trajectory/v1 that say how a response was decoded, for rollouts and the server alike."""

import numpy as np

from dtrpo_ray.data.schemas import DIFFUSION, FIRST, TrajectoryRow
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.method.trajectory import GIVEN, block_slices, dense_steps
from dtrpo_ray.models.base import DiffusionLM


def how_decoded(model: DiffusionLM, params: SamplingParams, prompt_len: int, steps: list[int]) -> TrajectoryRow:
    """Return these columns of a response with these `steps` (int [tokens])."""
    size = params.block_length or model.block_size
    blocks = block_slices(prompt_len, len(steps), size, model.block_origin)
    cut = params.temperature > 0 and (params.top_p < 1 or params.top_k > 0)
    return {
        "ranks": dense_steps(np.array(steps, dtype=np.int64), blocks).tolist(),
        "types": [FIRST if step == GIVEN else DIFFUSION for step in steps],  # our decoder forces no token
        "block_size": size,
        "block_origin": model.block_origin,
        "mask_id": model.mask_id,
        "shift": model.shift,
        "denoising_steps": params.denoising_steps,
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
    }
