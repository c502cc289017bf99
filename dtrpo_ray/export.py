"""A finished model, or a training checkpoint -> a folder to share: published layout, tokenizer, card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dtrpo_ray import checkpoint
from dtrpo_ray.config import Job
from dtrpo_ray.errors import CheckpointError
from dtrpo_ray.models.registry import build_model, copy_companions, load_model, read_config, save_model, skeleton
from dtrpo_ray.stages import whole_folder

CARD = """---
library_name: {library}
{base}tags: [diffusion-language-model, dtrpo]
---
# {name}

{what} aligned with `{objective}` (dTRPO, arXiv 2603.18806) by dtrpo_ray on the task `{task}`, seed {seed}.

## Lineage

| stage | inputs | outputs | summary |
|---|---|---|---|
{rows}

## Metrics

The last line of each training stage.

| stage | {columns} |
|---|{rules}|
{metrics}

## The job, as resolved

```json
{job}
```
"""
METRICS = ("step", "loss", "margin", "reward_accuracy", "grad_norm")


def export_model(
    model: Path,
    out: Path,
    job: Job,
    lineage: list[dict[str, Any]],
    curves: Mapping[str, list[dict[str, Any]]],
    dtype: str | None = None,
) -> None:
    """Write `model` to `out`, which must not exist, with README.md; complete or absent, never half.

    Without `dtype` the weights are copied as they are; with it ("float32", "bfloat16") they are rounded to it. A model
    without generation defaults of its own gets those of the job's [serve] section.
    """
    with whole_folder(out) as folder:
        if dtype is None:
            shutil.copytree(model, folder, dirs_exist_ok=True)
        else:
            copy_companions(model, folder)
            save_model(load_model(model, getattr(torch, dtype)), folder)
        if not (folder / "generation_config.json").exists():
            defaults = _generation_defaults(model, job)
            (folder / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n")
        (folder / "README.md").write_text(_card(job, lineage, curves, adapter=False))


def export_adapter(
    adapter: Path, out: Path, job: Job, lineage: list[dict[str, Any]], curves: Mapping[str, list[dict[str, Any]]]
) -> None:
    """Write a LoRA run's PEFT adapter to `out`, which must not exist, with README.md."""
    with whole_folder(out) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        (folder / "README.md").write_text(_card(job, lineage, curves, adapter=True))


def _generation_defaults(model: Path, job: Job) -> dict[str, Any]:
    lm = skeleton(read_config(model))
    ids = {"eos_token_id": lm.eos_id, "pad_token_id": lm.eos_id, "mask_token_id": lm.mask_id}
    return {**ids, "block_length": lm.block_size, "denoising_steps": job.serve.denoising_steps}


def _card(job: Job, lineage: list[dict[str, Any]], curves: Mapping[str, list[dict[str, Any]]], adapter: bool) -> str:
    rows = [
        f"| {s['stage']} | {s['key'][:12]} | {len(s['outputs'])} files | {json.dumps(s['summary'])} |" for s in lineage
    ]
    last = {name: lines[-1] for name, lines in curves.items() if lines}
    base = f"base_model: {job.model.path.name}\n" if job.model.path else ""
    return CARD.format(
        library="peft" if adapter else "dtrpo_ray",
        base=base + ("base_model_relation: adapter\n" if adapter and base else ""),
        what="A LoRA adapter" if adapter else "A diffusion language model",
        name=job.name,
        objective=job.train.objective.type,
        task=job.task.type,
        seed=job.seed,
        rows="\n".join(rows),
        columns=" | ".join(METRICS),
        rules="|".join("---" for _ in METRICS),
        metrics="\n".join(
            f"| {name} | " + " | ".join(_number(line.get(metric)) for metric in METRICS) + " |"
            for name, line in last.items()
        ),
        job=json.dumps(job.model_dump(mode="json"), indent=2),
    )


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.6g}"


def export_checkpoint(source: Path, out: Path) -> dict[str, Any]:
    """A verified training checkpoint of any ZeRO stage and number of workers -> safetensors in `out`.

    Tokenizer and config.json come from the base model that the checkpoint names. Returns what its COMPLETE says.
    Raises CheckpointError where the checkpoint is not whole or its base is gone.
    """
    from dtrpo_ray.backend import checkpoint_weights

    filesystem, path = checkpoint.open_storage(str(source))
    facts = checkpoint.verify(filesystem, checkpoint.Place(0, 0, path))
    base = Path(facts["base"])
    if not base.is_dir():
        raise CheckpointError(f"{source}: its base model {base} is gone; its tokenizer and config.json are needed")
    model = build_model(read_config(base))
    model.load_state_dict(checkpoint_weights(source))
    with whole_folder(out) as folder:
        copy_companions(base, folder)
        save_model(model, folder)
    return facts
