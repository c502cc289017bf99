"""A list of prompts -> their responses, decoded side by side: the batch front of `decoder.py`."""

from collections.abc import Hashable, Sequence

from dtrpo_ray.decode.decoder import Decoder, pages_needed
from dtrpo_ray.decode.types import Finished
from dtrpo_ray.decode.types import Generation as Generation
from dtrpo_ray.decode.types import SamplingParams as SamplingParams
from dtrpo_ray.models.base import DiffusionLM


def generate(
    model: DiffusionLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    num_tokens: int | None = None,
) -> list[Generation]:
    """Decode every prompt [list of ids] to a `Generation`; `seeds` has one integer per prompt.

    Rows of unequal length stand in one batch; a row that has finished leaves it. What prompts begin with in common is
    run once. `num_tokens` bounds the ids that are proposed, where the model's vocabulary is padded.
    """
    pages = sum(pages_needed(model, len(prompt), params.max_new_tokens) for prompt in prompts)
    decoder = Decoder(model, len(prompts), pages, num_tokens)
    for key, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        admitted = decoder.admit(key, prompt, params, seed)
        assert admitted
    made: dict[Hashable, Generation] = {}
    while decoder.num_running:
        made |= {key: event.generation for key, event in decoder.step() if isinstance(event, Finished)}
    return [made[key] for key in range(len(prompts))]
