"""A finished model, or a training checkpoint -> a folder to share: published layout, tokenizer, card."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jinja2 import StrictUndefined, Template
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
from dtrpo_ray.stages import Json, Stage
from dtrpo_ray.train import checkpoint

HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")  # what a card may name as base_model
HUB_CACHE = re.compile(r"(?:^|/)models--([^/]+)/snapshots/")


def _card(base: str | None, adapter: bool, settings: Mapping[str, Json], **facts: Json) -> str:
    """Return the README.md of `facts`: name, objective, origin, title of the settings, rows and metrics.

    Rows are stage, inputs, outputs and summary; metrics the last line of each stage.
    """
    hub_id = base if base and HUB_ID.fullmatch(base) and not Path(base).exists() else None
    text = Path(__file__).with_name("card.md.jinja").read_text()
    template = Template(text, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    shown = json.dumps(settings, indent=2)
    return template.render(base=base, hub_id=hub_id, adapter=adapter, settings=shown, **facts)


def job_card(
    job: Job,
    lineage: Sequence[Stage],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    base: str | None,
    adapter: bool = False,
) -> str:
    """Return the README.md of a job's aligned model."""
    return _card(
        base,
        adapter,
        settings=job.model_dump(mode="json"),
        name=job.name,
        objective=job.last_stage.objective.type,
        origin=f"on the {'files of `[sft]`' if job.only_sft else f'task `{job.task.type}`'}, seed {job.seed}",
        rows=[(s.name, s.key[:12], f"{len(s.outputs)} files", json.dumps(s.summary)) for s in lineage],
        metrics={name: lines[-1] for name, lines in curves.items() if lines},
        title="The job",
    )


def _checkpoint_card(facts: checkpoint.SealedFacts, base: str, adapter: bool) -> str:
    label, step = facts["label"], facts["step"]
    inputs = ", ".join(f"{name} {digest[:12]}" for name, digest in facts["identity"].items())
    return _card(
        base,
        adapter,
        settings=facts["config"],
        name=f"{label}-step-{step}",
        objective=facts["config"]["objective"]["type"],
        origin=f"up to step {step} of the training stage `{label}`, seed {facts['seed']}",
        rows=[(f"{label}, step {step}", inputs, f"rank files of {facts['num_workers']} worker(s)", "not finished")],
        metrics={label: facts["metrics"]},
        title="The stage",
    )


def base_name(path: Path) -> str:
    """Return the name by which others find a base model: its hub id, or the path as given.

    The hub's cache names its folders `models--ORG--NAME`.
    """
    cached = HUB_CACHE.search(f"{path}/")
    return cached[1].replace("--", "/") if cached else str(path)


def export_model(
    model: Path, out: Path, card: str, dtype: str | None = None, denoising_steps: int | None = None
) -> None:
    """Write `model` to `out`, which must not exist, with `card` as README.md; complete or absent, never half.

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


def export_adapter(adapter: Path, out: Path, card: str, base: str | None, dtype: str | None = None) -> None:
    """Write a LoRA run's PEFT adapter to `out` as `export_model` does; it names `base` as its base model."""
    with whole_folder(out) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        file = folder / ADAPTER_CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}, indent=2))
        if dtype is not None:
            rounded = {n: t.to(getattr(torch, dtype)) for n, t in load_file(folder / ADAPTER_FILE).items()}
            save_file(rounded, folder / ADAPTER_FILE, metadata={"format": "pt"})
        _finish(folder, card)


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
    model, base = _checkpoint_model(source, base_folder, config), base or base_name(base_folder)
    if config.lora and merged:
        merge_adapters(model)
    model = model.to(getattr(torch, dtype)) if dtype else model
    with whole_folder(out) as folder:
        if config.lora and not merged:
            save_adapter(model, config.lora, base, folder)
        else:
            copy_companions(base_folder, folder)
            save_model(model, folder)
        _finish(folder, _checkpoint_card(facts, base, adapter=config.lora is not None and not merged))
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


def _finish(folder: Path, card: str, denoising_steps: int | None = None) -> None:
    """Write the card and, where a model brought none, generation defaults."""
    file = folder / "generation_config.json"
    if (folder / "config.json").exists() and not file.exists():
        file.write_text(json.dumps(_generation_defaults(folder, denoising_steps), indent=2) + "\n")
    (folder / "README.md").write_text(card)


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
