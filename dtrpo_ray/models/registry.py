"""Load a `DiffusionLM` from a model directory, and save it. Safetensors only; code in the directory is never run."""

import json
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.config_json import ConfigJson, read_model_json
from dtrpo_ray.models.tokenizer import Declared, declared_ids
from dtrpo_ray.models.weights import MAX_SHARD_BYTES, Sharding, load_weights, save_weights

# config.json's model_type -> module:class, imported on demand; a new family is one class and one line here
FAMILIES = {
    "sdar": "dtrpo_ray.models.sdar:SDAR",
    "sdar_moe": "dtrpo_ray.models.sdar:SDARMoe",
    "Fast_dLLM_Qwen": "dtrpo_ray.models.qwen2:FastDLLM",
    "llada": "dtrpo_ray.models.llada:LLaDA",
    "llada2_moe": "dtrpo_ray.models.llada2:LLaDA2",
    "Dream": "dtrpo_ray.models.qwen2:Dream",
}


def family(model_type: str) -> type[DiffusionLM]:
    """Import the class of a family. Raises KeyError for an unknown one."""
    return pkgutil.resolve_name(FAMILIES[model_type])


def detect(config: Mapping[str, Any]) -> type[DiffusionLM]:
    """Return the family of a `config.json`. Raises ModelError for an unknown or contradictory one."""
    model_type, known = config.get("model_type"), f"known: {', '.join(FAMILIES)} (`dtrpo models`)"
    if str(model_type) not in FAMILIES:
        raise ModelError(f"config.json: model_type = {model_type!r} is not supported; {known}")
    cls = family(str(model_type))
    named, ours = config.get("architectures"), cls.facts.architectures
    if named and not set(named) & set(ours):
        raise ModelError(
            f"config.json: architectures = {named} is another model than model_type = {model_type!r}, which is "
            f"{', '.join(ours)} here; {known}"
        )
    return cls


def build_model(config: Mapping[str, Any], seed: int = 0) -> DiffusionLM:
    """Build a randomly initialised model of a `config.json`; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return detect(config)(config)


def skeleton(config: Mapping[str, Any]) -> DiffusionLM:
    """Build the model of a `config.json` without weights, on the meta device."""
    with torch.device("meta"):
        return detect(config)(config)


def load_model(
    path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", sharding: Sharding | None = None
) -> DiffusionLM:
    """Load `config.json` and the safetensors of a directory straight into `dtype` on `device`.

    With `sharding` (ZeRO-3) every rank keeps only its part. Raises ModelError for a missing file, pickled weights,
    missing, surplus or misshapen tensors, and a tokenizer that belongs to another model.
    """
    model = skeleton_of(path, sharding)
    load_weights(model, path, dtype, device, sharding)
    model.finish(device)
    return model


def skeleton_of(path: Path, sharding: Sharding | None = None) -> DiffusionLM:
    """Build the model of a directory without its weights (on the meta device, or as `sharding` builds it).

    Raises ModelError if config.json, the tokenizer files and generation_config.json are not of one model.
    """
    config = read_config(path)
    cls = detect(config)
    declared = declared_ids(path)
    if config.get("mask_token_id") is None and (cls.facts.mask_id or 0) >= config.get("vocab_size", 0):
        # the config names no mask token, and the vocabulary is smaller than the release's: ask the tokenizer
        config["mask_token_id"] = declared.mask
    with sharding.build() if sharding else torch.device("meta"):
        model = cls(config)
    file = path / "generation_config.json"
    ends = read_model_json(file).get("eos_token_id")
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(token) is int and 0 <= token < model.vocab_size for token in ids):
        raise ModelError(
            f"{file}: eos_token_id = {ends!r}; give an id, or a list of ids, in the vocabulary of {model.vocab_size}"
        )
    model.other_ends |= frozenset(ids)
    _require_own_tokenizer(path, declared, model)
    return model


def _require_own_tokenizer(path: Path, declared: Declared, model: DiffusionLM) -> None:
    token, highest = max(declared.added.items(), key=lambda item: item[1], default=("", -1))
    if highest >= model.vocab_size:
        raise ModelError(
            f"{path}: the tokenizer's {token!r} has the id {highest}, outside the model's vocabulary of "
            f"{model.vocab_size}; put the model's own tokenizer there"
        )
    if declared.mask not in (None, model.mask_id):
        raise ModelError(
            f"{path}: the tokenizer's mask token is {declared.mask}, and config.json's mask_token_id is "
            f"{model.mask_id}; one of them belongs to another model"
        )
    if declared.eos is not None and declared.eos not in model.stop_ids:
        raise ModelError(
            f"{path}: the tokenizer's end-of-sequence token is {declared.eos}, and eos_token_id of config.json and "
            f"generation_config.json is {', '.join(map(str, sorted(model.stop_ids)))}; one of them belongs to another "
            "model, or add the token to the list in generation_config.json"
        )


def save_model(model: DiffusionLM, path: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `config.json` and the weights in the family's upstream names and keys into an existing directory."""
    save_weights(model, path, max_shard_bytes)
    config = dict(model.config)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config |= {key: dtype for key in ("torch_dtype", "dtype") if key in config}  # other loaders read the weights in it
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_companions(source: Path, out: Path) -> None:
    """Copy tokenizer, chat template, generation defaults and the release's own code (never run here) to `out`.

    Weights of any format, their index, `config.json`, folders and the model card stay behind.
    """
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in ("config.json", "README.md"):
            (out / file.name).write_bytes(file.read_bytes())


def read_config(path: Path) -> ConfigJson:
    """Read the `config.json` of a model directory."""
    if not (path / "config.json").exists():
        hub = f"; if it is a hub id: hf download {path} --local-dir models/{path.name}" if len(path.parts) == 2 else ""
        raise ModelError(f"{path}: not a model directory (no config.json){'' if path.exists() else hub}")
    return ConfigJson(read_model_json(path / "config.json"))
