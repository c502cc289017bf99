"""A finished model, or a training checkpoint -> a folder to share: published layout, tokenizer, card."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dtrpo_ray.config.job import Job
from dtrpo_ray.config.serve import ServeConfig
from dtrpo_ray.config.train import TrainConfig
from dtrpo_ray.errors import CheckpointError
from dtrpo_ray.files import whole_folder
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.lora import ADAPTER_CONFIG, ADAPTER_FILE, add_adapters, merge_adapters, save_adapter
from dtrpo_ray.models.registry import copy_companions, load_model, save_model, skeleton_of
from dtrpo_ray.models.tokenizer import load_tokenizer, turn_end_id
from dtrpo_ray.stages import Json, StageRow
from dtrpo_ray.train import checkpoint

CARD = """---
library_name: {library}
{base_model}tags: [diffusion-language-model, dtrpo]
---
# {name}

{what} trained with `{objective}` by dtrpo_ray (dTRPO: arXiv 2603.18806) {origin}.
{base}
## Lineage

| stage | inputs | outputs | summary |
|---|---|---|---|
{rows}

## Metrics

The last line of each training stage.

| stage | {columns} |
|---|{rules}|
{metrics}

## {title}, as resolved

```json
{settings}
```
"""
METRICS = ("step", "loss", "margin", "reward_accuracy", "grad_norm")
HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")  # what a card may name as base_model
HUB_CACHE = re.compile(r"(?:^|/)models--([^/]+)/snapshots/")


@dataclass(frozen=True, slots=True)
class Card:
    """The facts of a README.md: `rows` are stage, inputs, outputs and summary, `metrics` the last line of a stage."""

    name: str
    objective: str
    origin: str
    base: str | None
    adapter: bool
    rows: list[tuple[str, str, str, str]]
    metrics: Mapping[str, Mapping[str, float]]
    title: str
    settings: Mapping[str, Json]

    def text(self) -> str:
        """Return the README.md."""
        named = self.base if self.base and HUB_ID.fullmatch(self.base) and not Path(self.base).exists() else None
        base_model = f"base_model: {named}\n" if named else ""
        return CARD.format(
            library="peft" if self.adapter else "dtrpo_ray",
            base_model=base_model + ("base_model_relation: adapter\n" if self.adapter and named else ""),
            name=self.name,
            what="A LoRA adapter" if self.adapter else "A diffusion language model",
            objective=self.objective,
            origin=self.origin,
            base=f"\nBase model: `{self.base}`.\n" if self.base else "",
            rows="\n".join(f"| {' | '.join(row)} |" for row in self.rows),
            columns=" | ".join(METRICS),
            rules="|".join("---" for _ in METRICS),
            metrics="\n".join(
                f"| {stage} | " + " | ".join(_number(line.get(metric)) for metric in METRICS) + " |"
                for stage, line in self.metrics.items()
            ),
            title=self.title,
            settings=json.dumps(self.settings, indent=2),
        )


def job_card(
    job: Job,
    lineage: Sequence[StageRow],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    base: str | None,
    adapter: bool = False,
) -> Card:
    """Describe a job's aligned model."""
    rows = [(s["stage"], s["key"][:12], f"{len(s['outputs'])} files", json.dumps(s["summary"])) for s in lineage]
    return Card(
        name=job.name,
        objective=job.train.objective.type,
        origin=f"on the task `{job.task.type}`, seed {job.seed}",
        base=base,
        adapter=adapter,
        rows=rows,
        metrics={name: lines[-1] for name, lines in curves.items() if lines},
        title="The job",
        settings=job.model_dump(mode="json"),
    )


def _checkpoint_card(facts: checkpoint.SealedFacts, base: str, adapter: bool) -> Card:
    label, step = facts["label"], facts["step"]
    inputs = ", ".join(f"{name} {digest[:12]}" for name, digest in facts["identity"].items())
    row = (f"{label}, step {step}", inputs, f"rank files of {facts['num_workers']} worker(s)", "not finished")
    return Card(
        name=f"{label}-step-{step}",
        objective=facts["config"]["objective"]["type"],
        origin=f"up to step {step} of the training stage `{label}`, seed {facts['seed']}",
        base=base,
        adapter=adapter,
        rows=[row],
        metrics={label: facts["metrics"]},
        title="The stage",
        settings=facts["config"],
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def base_name(path: Path) -> str:
    """Return the name by which others find a base model: its hub id, or the path as given.

    The hub's cache names its folders `models--ORG--NAME`.
    """
    cached = HUB_CACHE.search(f"{path}/")
    return cached[1].replace("--", "/") if cached else str(path)


def export_model(
    model: Path, out: Path, card: Card, dtype: str | None = None, denoising_steps: int | None = None
) -> None:
    """Write `model` to `out`, which must not exist, with README.md; complete or absent, never half.

    Without `dtype` the weights are copied as they are; with it ("float32", "bfloat16") they are rounded to it. A model
    that lacks generation defaults gets some, with `denoising_steps` a block.
    """
    with whole_folder(out) as folder:
        if dtype is None:
            shutil.copytree(model, folder, dirs_exist_ok=True)
        else:
            copy_companions(model, folder)
            save_model(load_model(model, getattr(torch, dtype)), folder)
        _finish(folder, card, denoising_steps)


def export_adapter(adapter: Path, out: Path, card: Card, dtype: str | None = None) -> None:
    """Write a LoRA run's PEFT adapter to `out`, which must not exist, with README.md; the base's name is the card's."""
    with whole_folder(out) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        file = folder / ADAPTER_CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": card.base}, indent=2))
        if dtype is not None:
            rounded = {n: t.to(getattr(torch, dtype)) for n, t in load_file(folder / ADAPTER_FILE).items()}
            save_file(rounded, folder / ADAPTER_FILE, metadata={"format": "pt"})
        (folder / "README.md").write_text(card.text())


def export_checkpoint(
    source: Path, out: Path, merged: bool = False, dtype: str | None = None, base: str | None = None
) -> checkpoint.SealedFacts:
    """Export a verified training checkpoint of any ZeRO stage and number of workers; returns its facts.

    Writes what `export_model` does, or with LoRA and without `merged` what `export_adapter` does. `base` is the name
    to give the base model. Tokenizer and config.json come from the base that the checkpoint names. Raises
    CheckpointError where the checkpoint is not whole or its base is gone.
    """
    filesystem, path = checkpoint.open_storage(str(source))
    facts = checkpoint.verify(filesystem, checkpoint.Place(0, 0, path))
    base_folder = Path(facts["base"])
    if not base_folder.is_dir():
        raise CheckpointError(f"{source}: its base model {base_folder} is gone; export needs its tokenizer")
    config = TrainConfig.model_validate(facts["config"])
    model = _checkpoint_model(source, base_folder, config)
    adapter = config.lora is not None and not merged
    card = _checkpoint_card(facts, base or base_name(base_folder), adapter)
    if config.lora and merged:
        merge_adapters(model)
    model = model.to(getattr(torch, dtype)) if dtype else model
    with whole_folder(out) as folder:
        if config.lora and adapter:
            assert card.base is not None
            save_adapter(model, config.lora, card.base, folder)
            (folder / "README.md").write_text(card.text())
        else:
            copy_companions(base_folder, folder)
            save_model(model, folder)
            _finish(folder, card, None)
    return facts


def _checkpoint_model(source: Path, base: Path, config: TrainConfig) -> DiffusionLM:
    """Load a checkpoint's model in float32, adapters on it: its tensors are the file's, nothing is initialised."""
    from dtrpo_ray.train.backend import checkpoint_weights

    model = skeleton_of(base)
    if config.lora:
        add_adapters(model, config.lora, seed=0)
    model.load_state_dict(checkpoint_weights(source), assign=True)
    model.finish("cpu")
    return model


def _finish(folder: Path, card: Card, denoising_steps: int | None) -> None:
    """Write generation defaults, where the model brought none, and the card."""
    file = folder / "generation_config.json"
    if not file.exists():
        file.write_text(json.dumps(_generation_defaults(folder, denoising_steps), indent=2) + "\n")
    (folder / "README.md").write_text(card.text())


def _generation_defaults(model: Path, denoising_steps: int | None) -> dict[str, int | list[int]]:
    lm, turn_end = skeleton_of(model), turn_end_id(load_tokenizer(model))
    ends = lm.stop_ids if turn_end is None else lm.stop_ids | {turn_end}
    ids: dict[str, int | list[int]] = {
        "eos_token_id": lm.eos_id if len(ends) == 1 else [lm.eos_id, *sorted(ends - {lm.eos_id})]
    }
    ids |= {"pad_token_id": lm.eos_id, "mask_token_id": lm.mask_id}
    steps = denoising_steps or min(ServeConfig().denoising_steps, lm.block_size)
    sub_blocks = {} if lm.small_block_size == lm.block_size else {"small_block_size": lm.small_block_size}
    return {**ids, "block_length": lm.block_size, **sub_blocks, "denoising_steps": steps}
