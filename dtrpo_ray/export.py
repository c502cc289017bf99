"""A finished model directory, or a training checkpoint -> a folder to share: weights, tokenizer, a card."""

import json
import shutil
from pathlib import Path
from typing import Any

from dtrpo_ray import checkpoint
from dtrpo_ray.config import Job
from dtrpo_ray.errors import CheckpointError

CARD = """---
library_name: dtrpo_ray
tags: [diffusion-language-model, dtrpo]
---
# {name}

Aligned with `{objective}` (dTRPO, arXiv 2603.18806) by dtrpo_ray on the task `{task}`, seed {seed}.

| stage | inputs | outputs | summary |
|---|---|---|---|
{rows}

The job, as resolved:

```json
{job}
```
"""


def export_model(model: Path, out: Path, job: Job, lineage: list[dict[str, Any]]) -> None:
    """Copy `model` to `out`, which must not exist, with README.md; complete or absent, never half."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial)
    rows = "\n".join(
        f"| {s['stage']} | {s['key'][:12]} | {len(s['outputs'])} files | {json.dumps(s['summary'])} |" for s in lineage
    )
    card = CARD.format(
        name=job.name,
        objective=job.train.objective.type,
        task=job.task.type,
        seed=job.seed,
        rows=rows,
        job=json.dumps(job.model_dump(mode="json"), indent=2),
    )
    (partial / "README.md").write_text(card)
    partial.replace(out)


def export_checkpoint(source: Path, out: Path) -> dict[str, Any]:
    """A verified training checkpoint of any ZeRO stage and number of workers -> safetensors in `out`.

    Tokenizer and config.json come from the base model that the checkpoint names. Returns what its COMPLETE says.
    Raises CheckpointError where the checkpoint is not whole or its base is gone.
    """
    from dtrpo_ray.backend import checkpoint_weights
    from dtrpo_ray.models.registry import build_model, read_config, save_model

    filesystem, path = checkpoint.open_storage(str(source))
    facts = checkpoint.verify(filesystem, checkpoint.Place(0, 0, path))
    base = Path(facts["base"])
    if not base.is_dir():
        raise CheckpointError(f"{source}: its base model {base} is gone; its tokenizer and config.json are needed")
    model = build_model(read_config(base))
    model.load_state_dict(checkpoint_weights(source))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(base, partial, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_model(model, partial)
    partial.replace(out)
    return facts
