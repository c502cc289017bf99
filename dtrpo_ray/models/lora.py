"""Train LoRA adapters through peft on any family; the same policy without them is the reference.

The adapters sit on the trunk's linear modules. Saved files name the modules of the published layout, so that peft
finds them in the release's own code. peft is imported on demand: that takes a second which others need not spend.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtrpo_ray.config.train import LoraConfig
from dtrpo_ray.errors import ConfigError, ModelError
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.config_json import read_model_json

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "default"  # peft's name of an only adapter
CAUSAL = {"AutoModelForCausalLM": ""}  # how a release without remote code loads


def target_modules(model: DiffusionLM, config: LoraConfig) -> list[str]:
    """Return the names of the linear modules that `config.targets` means in this family.

    Raises ConfigError if some of them take no adapters, rather than train fewer than were asked for.
    """
    if "mlp" in (config.targets or "") and not model.lora.mlp:
        raise ConfigError(
            f"lora.targets = {config.targets!r}: the MLPs of {model.facts.model_type} are routed experts alone, "
            "stacked tensors that take no adapters; set train.lora.targets = 'attention'"
        )
    if config.targets == "mlp+output" and model.tied_tensors():
        raise ConfigError(
            f"lora.targets = {config.targets!r}: this model's output head is its embedding (tied), and merging would "
            "change both; set train.lora.targets = 'mlp'"
        )
    return [name for part in (config.targets or "attention+mlp").split("+") for name in getattr(model.lora, part)]


def add_adapters(model: DiffusionLM, config: LoraConfig, seed: int) -> None:
    """Freeze the model and add trainable adapters, which change nothing before training (B is zero).

    The same seed gives the same adapters on every rank.
    """
    import peft

    adapters = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=target_modules(model, config))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # not into the trunk itself: peft rewrites the targets of a mixture of experts that it recognises
        peft.inject_adapter_in_model(adapters, model, NAME)


def _layers(model: DiffusionLM) -> Iterator[tuple[str, Any]]:
    """Iterate over peft's layers: linear modules with their adapters."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


class BaseReference:
    """The reference of a LoRA run: the policy with its adapters off, so that no second model is held.

    `policy` is what is called (the model, or the engine around it); attributes are the model's.
    """

    def __init__(self, policy: Callable[..., Tensor], model: DiffusionLM) -> None:
        self._policy, self._model = policy, model

    def __call__(self, *inputs: Tensor) -> Tensor:
        # peft's own switch also turns requires_grad off and on, which DeepSpeed's hooks read
        layers = [layer for _, layer in _layers(self._model)]
        for layer in layers:
            layer._disable_adapters = True
        try:
            return self._policy(*inputs)
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def merge_adapters(model: DiffusionLM) -> None:
    """Add each adapter to its weight and take it off; the model is an ordinary one again."""
    for name, layer in list(_layers(model)):
        layer.merge()
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.get_base_layer())


def is_adapter(path: Path) -> bool:
    """Return True if a directory holds a PEFT adapter instead of a model."""
    return (path / ADAPTER_CONFIG).is_file()


# keys of adapter_config.json that leave W + alpha / r * B A as it is, or that are read here
PLAIN_KEYS = frozenset({
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "lora_dropout"),
    *("layers_to_transform", "layers_pattern", "megatron_core", "megatron_config", "qalora_group_size"),
    *("inference_mode", "runtime_config"),
})  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian")  # init_lora_weights; PiSSA, OLoRA and others also change the base


def _require_plain(path: Path) -> None:
    """Raise ModelError for an adapter whose configuration says more than plain LoRA does."""
    config = dict(read_model_json(path / ADAPTER_CONFIG))
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: only plain LoRA is supported, not {config.get('peft_type')!r}")
    start = config.pop("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        remedy = "save it with peft's path_initial_model_for_weight_conversion, which makes it plain LoRA"
        raise ModelError(f"{path}: init_lora_weights = {start!r} changed the base that it was trained on; {remedy}")
    told = {key: value for key, value in config.items() if key not in PLAIN_KEYS and value and value != "none"}
    if told:
        key, value = min(told.items())
        raise ModelError(f"{path}: only plain LoRA is supported, without {key} = {value!r}")


def with_adapter(base: DiffusionLM, copy: DiffusionLM, path: Path) -> None:
    """Make `copy`, a skeleton of the base, the base with the PEFT adapter of `path` on it.

    The two share the base's weights, so an adapted model costs only its adapter; the base is not changed.

    Raises ModelError for a missing file, for other methods than LoRA, and for tensors that do not fit the base.
    """
    import peft
    from peft.utils.other import get_pattern_key

    try:
        (path / peft.utils.CONFIG_NAME).stat()  # peft would look for an absent one on the hub
        config, tensors = peft.PeftConfig.from_pretrained(str(path)), load_file(path / ADAPTER_FILE)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: no readable PEFT adapter ({error})") from None
    _require_plain(path)
    if not tensors:
        raise ModelError(f"{path}: {ADAPTER_FILE} holds no tensors")
    if broken := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ModelError(f"{path}: {broken[0]} holds NaN or infinity; take another adapter")
    parts = {name.removesuffix(".weight"): pieces for name, pieces in base.checkpoint_tensors().items()}
    ranks, alphas, weights = dict[str, int](), dict[str, float](), dict[str, tuple[Tensor, Tensor]]()
    for module in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        upstream = module.removeprefix("base_model.model.")
        if upstream not in parts:
            raise ModelError(f"{path}: {upstream} is no module of this {base.facts.model_type} model")
        a, b = (tensors.pop(f"{module}.lora_{x}.weight", None) for x in "AB")
        if a is None or b is None or a.shape[0] != b.shape[1]:
            raise ModelError(f"{path}: the tensors of {upstream} are not a pair lora_A [r, in], lora_B [out, r]")
        alpha, rank = (
            pattern.get(get_pattern_key(list(pattern), upstream), default)
            for pattern, default in ((config.alpha_pattern, config.lora_alpha), (config.rank_pattern, config.r))
        )
        for piece in parts[upstream]:  # a fused module is several here: each takes its rows of B
            name, rows = piece.ours.removesuffix(".weight"), b[piece.start : piece.stop]
            linear: Any = base.get_submodule(name)
            if not isinstance(linear, torch.nn.Linear) or linear.weight.shape != (rows.shape[0], a.shape[1]):
                raise ModelError(f"{path}: {upstream} does not fit this base; the adapter is of another model")
            ranks[name], alphas[name], weights[name] = a.shape[0], alpha * a.shape[0] / rank, (a, rows)
    if tensors:
        raise ModelError(f"{path}: {', '.join(sorted(tensors)[:4])} is no LoRA tensor")
    copy.load_state_dict(base.state_dict(), assign=True)
    copy.finish(next(base.parameters()).device)
    adapters = peft.LoraConfig(
        target_modules=list(ranks),
        rank_pattern={re.escape(name): rank for name, rank in ranks.items()},
        alpha_pattern={re.escape(name): alpha for name, alpha in alphas.items()},
    )
    peft.inject_adapter_in_model(adapters, copy, NAME)
    for name, layer in _layers(copy):
        for side, value in zip((layer.lora_A, layer.lora_B), weights[name], strict=True):
            side[NAME].to(layer.weight.device, layer.weight.dtype).weight.data.copy_(value)
    copy.requires_grad_(False)


def save_adapter(model: DiffusionLM, config: LoraConfig, base: str, path: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`, which names `base`, into an existing folder.

    If the published layout fuses several of our modules (LLaDA2's q, k and v), their adapters become one of their
    joint rank with the same product: A stacked, B block-diagonal.
    """
    import peft

    layers = {f"{name}.weight": layer for name, layer in _layers(model)}
    tensors, ranks, modules = dict[str, Tensor](), dict[str, int](), list[str]()
    for upstream, parts in model.checkpoint_tensors().items():
        adapted = [layers[p.ours] for p in parts if p.ours in layers]
        if not adapted:
            continue
        if len(adapted) < len(parts):
            raise ModelError(f"{upstream}: PEFT cannot store adapters on a part of it; target all of its parts")
        module = upstream.removesuffix(".weight")
        a, b = ([getattr(layer, f"lora_{x}")[NAME].weight.detach().cpu() for layer in adapted] for x in "AB")
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.cat(a).contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.block_diag(*b).contiguous()
        modules.append(module)
        if len(adapted) > 1:
            ranks[rf".*\.{re.escape(module.rpartition('.')[2])}"] = config.rank * len(adapted)
    save_file(tensors, path / ADAPTER_FILE, metadata={"format": "pt"})
    adapters = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=modules,
        rank_pattern=ranks,
        alpha_pattern={name: config.alpha * (rank // config.rank) for name, rank in ranks.items()},
        base_model_name_or_path=base,
        # peft requires a generation method of a causal model; Dream's class, an AutoModel, has none
        task_type="CAUSAL_LM" if "AutoModelForCausalLM" in model.config.get("auto_map", CAUSAL) else None,
        inference_mode=True,
    )
    adapters.save_pretrained(str(path))
