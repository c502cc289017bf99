"""A model directory -> a `DiffusionLM`, and back. Safetensors only; no code from the directory is ever run."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import DiffusionLM

FAMILIES = {"sdar": "dtrpo_ray.models.sdar:SDAR"}  # config.json model_type -> module:class, imported on demand


def build_model(config: dict[str, Any], seed: int = 0) -> DiffusionLM:
    """A randomly initialised model of a `config.json`; the same seed gives the same weights."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        raise ModelError(f"config.json: model_type = {config.get('model_type')!r} is not supported; known: {known}")
    module, name = family.split(":")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: DiffusionLM = getattr(importlib.import_module(module), name)(config)
    return model


def load_model(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> DiffusionLM:
    """Load `config.json` and `model.safetensors` of a directory.

    Raises ModelError for a missing file, pickled weights, and missing, surplus or misshapen tensors, by name.
    """
    model = build_model(read_config(path))
    weights = path / "model.safetensors"
    if not weights.is_file():
        pickled = ", ".join(sorted(p.name for p in path.glob("*.bin")))
        hint = f"found {pickled}: convert it to safetensors first" if pickled else "run `dtrpo export` to write one"
        raise ModelError(f"{path}: no model.safetensors; {hint}")
    try:
        tensors = load_file(weights, device=device)
    except SafetensorError as error:
        raise ModelError(f"{weights}: not a readable safetensors file ({error})") from None
    own = {name.removeprefix("lm."): value for name, value in model.state_dict().items()}
    tied = {"lm_head.weight"} if model.config.get("tie_word_embeddings") else set()
    missing, surplus = sorted(own.keys() - tensors.keys() - tied), sorted(tensors.keys() - own.keys())
    shapes = sorted(n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape)
    for problem, names in (("missing", missing), ("surplus", surplus), ("misshapen", shapes)):
        if names:
            raise ModelError(f"{weights}: {len(names)} {problem} tensor(s), first {names[0]}; is config.json its own?")
    model.load_state_dict({f"lm.{name}": value for name, value in tensors.items()}, strict=not tied)
    return model.to(device=device, dtype=dtype)


def save_model(model: DiffusionLM, path: Path) -> None:
    """Write `config.json` and `model.safetensors` in the family's upstream layout into an existing directory."""
    state = {n.removeprefix("lm."): t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    if model.config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")


def read_config(path: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model directory."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: not a model directory (no config.json)") from None
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"{file}: not a JSON object; a model's config is one")
    return config
