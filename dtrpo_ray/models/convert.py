"""Convert an autoregressive checkpoint into a block-diffusion checkpoint of a family that exists here.

The weights stay what they are: under a causal mask the new model computes the source's logits. New are the mask token
with its row of the embedding, and the block size. Training then teaches the model to fill in masked tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from dtrpo_ray.errors import ModelError, first_line
from dtrpo_ray.files import whole_folder
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.config_json import ConfigJson
from dtrpo_ray.models.registry import family, save_model, skeleton
from dtrpo_ray.models.tokenizer import MASK, MASK_SPELLINGS

TOLERANCE = 1e-5  # of logits between the source and the converted model, relative to the largest, in float32
COARSE_TOLERANCE = 0.05  # the same in bfloat16 and float16, whose kernels round in another order
PROBE_TOKENS = 32
# model_type of the source -> of the result. Llama is Qwen2 whose query, key and value have biases of zero
TARGETS = {"llama": "Fast_dLLM_Qwen", "qwen2": "Fast_dLLM_Qwen", "qwen3": "sdar"}
COPIED_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "initializer_range",
    "attention_dropout", "use_sliding_window", "layer_types",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Converted:
    """The result of a conversion: `difference` is the largest one of logits to the source (`causal_difference`)."""

    model_type: str
    mask_id: int
    block_size: int
    parameters: int
    difference: float


def convert(source: str, out: Path, block_size: int, revision: str | None = None, dtype: str = "auto") -> Converted:
    """Write the converted model, its tokenizer and its generation defaults to a new folder `out`.

    `source` is a directory with safetensors, a GGUF file, or a hub id, of which `revision` is a branch, tag or commit.
    The mask token's row is the mean of all rows. Raises ModelError for a source that cannot be read or whose
    architecture has no family here, and if the logits of the two models differ under a causal mask.
    """
    if out.exists():
        raise ModelError(f"{out} exists already; name a folder that does not")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ModelError(f"dtype {dtype}: auto (as stored), float32 or bfloat16")
    if block_size < 2:
        raise ModelError(f"block size {block_size}: a block of diffusion has at least 2 tokens")
    model, tokenizer = _load(source, revision, dtype)
    keys = model.config.to_dict()
    mask_id = _add_mask(tokenizer, source)
    rows = max(model.config.vocab_size, mask_id + 1)
    config = _config(keys, model, tokenizer, {"mask_token_id": mask_id, "vocab_size": rows}, block_size)
    made = skeleton(config)
    made.lm.load_state_dict(_tensors(model, made, rows, mask_id), strict=True, assign=True)
    made.eval().finish("cpu")
    difference = causal_difference(model, made)
    if not difference <= (TOLERANCE if model.dtype == torch.float32 else COARSE_TOLERANCE):
        raise ModelError(
            f"{source}: the converted model's logits differ by {difference:.2g} from the source's; not written"
        )
    with whole_folder(out) as partial:
        save_model(made, partial)
        tokenizer.save_pretrained(partial)
        ends = model.generation_config.eos_token_id if model.generation_config else None
        others = ConfigJson({"eos_token_id": ends}).integers("eos_token_id", made.eos_id)
        GenerationConfig(eos_token_id=sorted({*others, made.eos_id})).save_pretrained(partial)
    count = sum(p.numel() for p in made.parameters())
    return Converted(made.facts.model_type, mask_id, block_size, count, difference)


def _load(source: str, revision: str | None, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    path, file = Path(source), {}
    if path.suffix == ".gguf":
        path, file = path.parent, {"gguf_file": path.name}
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False, **file}
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        _require_convertible(AutoConfig.from_pretrained(str(path), **options).to_dict(), source)
        tokenizer = AutoTokenizer.from_pretrained(str(path), **options)
        weights = {} if file else {"use_safetensors": True}
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, **options, **weights)
    except ModelError:
        raise
    except Exception as error:  # broken files raise anything from struct.error to the safetensors library's own
        raise ModelError(f"{source}: no autoregressive model that transformers loads ({first_line(error)})") from None
    finally:
        hf_logging.set_verbosity(verbosity)
        hf_logging.enable_progress_bar()
    return model.eval(), tokenizer


def _require_convertible(keys: Mapping[str, Any], source: str) -> None:
    """Raise ModelError for an architecture without a family here, before its weights are fetched."""
    if keys["model_type"] not in TARGETS:
        raise ModelError(f"{source}: model_type = {keys['model_type']!r}; {', '.join(TARGETS)} can be converted")
    if keys.get("mlp_bias") or (keys["model_type"] != "qwen2" and keys.get("attention_bias")):
        raise ModelError(f"{source}: mlp_bias or attention_bias = true, which no family here has")


def _add_mask(tokenizer: PreTrainedTokenizerBase, source: str) -> int:
    """Add the mask token to a tokenizer and return its id. Raises ModelError if there is one already."""
    known = [spelling for spelling in MASK_SPELLINGS if spelling in tokenizer.get_vocab()]
    if known or tokenizer.mask_token_id is not None:
        raise ModelError(f"{source}: the tokenizer has a mask token already; is this a diffusion model?")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{source}: the tokenizer has no end-of-sequence token; name one in tokenizer_config.json")
    tokenizer.add_special_tokens({"mask_token": MASK})
    assert isinstance(tokenizer.mask_token_id, int)
    return tokenizer.mask_token_id


def _config(
    keys: Mapping[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Mapping[str, int],
    block: int,
) -> dict[str, Any]:
    """Return the config.json of the result, in the keys of its family's releases."""
    facts = family(TARGETS[keys["model_type"]]).facts
    rope = dict(keys.get("rope_parameters") or keys.get("rope_scaling") or {"rope_type": "default"})
    theta = rope.pop("rope_theta", keys.get("rope_theta"))
    copied = {key: keys[key] for key in COPIED_KEYS if keys.get(key) is not None}
    return {
        "architectures": [facts.architectures[0]],
        "model_type": facts.model_type,
        **copied,
        **ids,
        facts.block_key: block,
        # the family's sub-block where it divides the block, else the whole block
        **({"small_block_size": block} if block % (facts.small_block_size or 1) else {}),
        "rope_theta": theta,
        # not as rope_scaling, on which transformers' tokenizer loader fails where it does not know the model_type
        **({} if rope.get("rope_type", "default") == "default" else {"rope_parameters": {**rope, "rope_theta": theta}}),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }


def _tensors(source: PreTrainedModel, made: DiffusionLM, rows: int, mask_id: int) -> dict[str, Tensor]:
    """Return the trunk's tensors: the source's, zeros for biases that it lacks, and rows for new tokens."""
    given = source.state_dict()
    # a bias of Qwen2 that Llama has not is zero
    tensors = {
        n: given[n] if n in given else torch.zeros(t.shape, dtype=source.dtype) for n, t in made.lm.state_dict().items()
    }
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    tensors[embedding] = _extend(tensors[embedding], rows, mask_id)
    tied = made.lm.config.tie_word_embeddings
    tensors[head] = tensors[embedding] if tied else _extend(tensors[head], rows, mask_id)
    return tensors


def _extend(rows_VH: Tensor, rows: int, mask_id: int) -> Tensor:
    """Return a copy with `rows` rows, new ones and the mask token's at the mean of the given rows."""
    mean = rows_VH.float().mean(0, keepdim=True).to(rows_VH.dtype)
    made = torch.cat([rows_VH, mean.expand(rows - len(rows_VH), -1)])
    made[mask_id] = mean[0]
    return made


@torch.no_grad()
def causal_difference(source: PreTrainedModel, made: DiffusionLM) -> float:
    """Return the largest difference of the two models' logits, relative to the largest logit, under a causal mask.

    The tokens are some of the source's vocabulary; the mask token, new in the result, is left out of the comparison.
    """
    size = source.config.vocab_size
    ids = torch.randint(size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    ids[ids == made.mask_id] = 0
    causal = torch.ones(PROBE_TOKENS, PROBE_TOKENS, dtype=torch.bool).tril()[None, None]
    wanted = source(ids, use_cache=False).logits.float()
    found = made.head(made.hidden(ids, torch.arange(PROBE_TOKENS)[None], causal)).float()[..., :size]
    change = (found - wanted).abs()
    if made.mask_id < size:
        change[..., made.mask_id] = 0
    return float(change.max() / wanted.abs().max().clamp(min=1))
