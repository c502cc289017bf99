"""A finished model directory -> a folder to share: weights, tokenizer, and a card with the lineage."""

import json
import shutil
from pathlib import Path
from typing import Any

from dtrpo_ray.config import Job

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
