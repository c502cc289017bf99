"""A conversion changes no logit under a causal mask, and its result is a checkpoint like any other of its family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.convert import causal_difference, convert
from dtrpo_ray.models.registry import load_model
from dtrpo_ray.models.tokenizer import MASK, load_tokenizer

WORDS = 40
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


def tokenizer(words: int = WORDS, **special: str) -> PreTrainedTokenizerFast:
    vocab = {"<unk>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, words)}}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>", **special)


def source(folder: Path, model: PreTrainedModel, **special: str) -> str:
    model.save_pretrained(folder)
    tokenizer(**special).save_pretrained(folder)
    return str(folder)


def seeded(cls: Any, config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()  # Qwen2 starts its biases at zero
    return model.eval()


MODELS = {
    "llama": lambda: seeded(LlamaForCausalLM, LlamaConfig(vocab_size=WORDS, tie_word_embeddings=True, **SIZES)),
    "llama untied, long": lambda: seeded(
        LlamaForCausalLM,
        LlamaConfig(
            vocab_size=WORDS,
            tie_word_embeddings=False,
            rope_parameters={
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64, "rope_theta": 500000.0,
            },
            **SIZES,
        ),
    ),
    "qwen2 with spare rows": lambda: seeded(Qwen2ForCausalLM, Qwen2Config(vocab_size=WORDS + 8, **SIZES)),
    "qwen3": lambda: seeded(Qwen3ForCausalLM, Qwen3Config(vocab_size=WORDS, head_dim=16, **SIZES)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_the_source(tmp_path: Path, name: str) -> None:
    """Loaded again from disk, on every row of a batch of texts, and to 1e-5; the mask is one token more."""
    model = MODELS[name]()
    made = convert(source(tmp_path / "ar", model), tmp_path / "dllm", block_size=4)
    loaded = load_model(tmp_path / "dllm")
    assert (loaded.mask_id, loaded.block_size) == (made.mask_id, 4)
    assert load_tokenizer(tmp_path / "dllm").get_vocab()[MASK] == made.mask_id >= WORDS
    assert made.model_type == ("sdar" if name == "qwen3" else "Fast_dLLM_Qwen")
    assert loaded.shift == (0 if name == "qwen3" else 1)
    ids = torch.randint(WORDS, (3, 50), generator=torch.Generator().manual_seed(1))
    causal = torch.ones(50, 50, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        wanted = model(ids).logits[..., :WORDS]
        found = loaded.head(loaded.hidden(ids, torch.arange(50)[None].expand(3, -1), causal))[..., :WORDS]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert made.difference < 1e-5
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(loaded.lm.model.embed_tokens.weight[made.mask_id], rows.mean(0))


def test_the_check_sees_one_changed_weight(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    convert(source(tmp_path / "ar", model), tmp_path / "dllm", block_size=4)
    loaded = load_model(tmp_path / "dllm")
    with torch.no_grad():
        loaded.lm.model.layers[1].mlp.down_proj.weight[0, 0] += 0.01
    assert causal_difference(model, loaded) > 1e-5


def test_the_result_decodes_and_keeps_template_and_end_tokens(tmp_path: Path) -> None:
    model = MODELS["llama"]()
    model.generation_config.eos_token_id = [1, 7]
    template = "{% for m in messages %}w2 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w3{% endif %}"
    folder = source(tmp_path / "ar", model, chat_template=template)
    convert(folder, tmp_path / "dllm", block_size=4)
    engine = Engine.load(tmp_path / "dllm")
    assert engine.model.stop_ids == {1, 7}
    assert engine.encode([{"role": "user", "content": "w9"}]) == [2, 9, 3]
    params = SamplingParams(max_new_tokens=10, denoising_steps=2)
    done = engine.generate([engine.encode("w4 w5 w6"), engine.encode("w7")], params, [0, 0])
    assert all(len(d.ids) >= 1 and WORDS not in d.ids for d in done)
    assert load_tokenizer(tmp_path / "dllm").convert_tokens_to_ids(MASK) == WORDS
    assert json.loads((tmp_path / "dllm" / "config.json").read_text())["bd_size"] == 4


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    model = MODELS["llama"]().to(torch.bfloat16)
    folder = source(tmp_path / "ar", model)
    convert(folder, tmp_path / "dllm", block_size=8)
    assert load_model(tmp_path / "dllm", torch.bfloat16).lm.model.embed_tokens.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "dllm" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    convert(folder, tmp_path / "wide", block_size=8, dtype="float32")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


def test_dropout_and_uneven_blocks_are_converted_too(tmp_path: Path) -> None:
    """The check runs without dropout; blocks that sub-blocks of 8 do not divide are decoded whole."""
    config = LlamaConfig(vocab_size=WORDS, attention_dropout=0.5, **SIZES)
    made = convert(source(tmp_path / "ar", seeded(LlamaForCausalLM, config)), tmp_path / "dllm", block_size=12)
    assert made.difference < 1e-5
    assert load_model(tmp_path / "dllm").small_block_size == 12


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    mistral = source(tmp_path / "m", seeded(MistralForCausalLM, MistralConfig(vocab_size=WORDS, head_dim=8, **SIZES)))
    with pytest.raises(ModelError, match="'mistral'; llama, qwen2, qwen3 can be converted"):
        convert(mistral, out, 4)
    biased = LlamaConfig(vocab_size=WORDS, attention_bias=True, **SIZES)
    with pytest.raises(ModelError, match="attention_bias = true"):
        convert(source(tmp_path / "b", seeded(LlamaForCausalLM, biased)), out, 4)
    biased_qwen = Qwen3Config(vocab_size=WORDS, head_dim=16, attention_bias=True, **SIZES)
    with pytest.raises(ModelError, match="attention_bias = true"):
        convert(source(tmp_path / "q", seeded(Qwen3ForCausalLM, biased_qwen)), out, 4)
    masked = source(tmp_path / "d", MODELS["llama"](), mask_token="<MASK>")
    with pytest.raises(ModelError, match="has a mask token already"):
        convert(masked, out, 4)
    with pytest.raises(ModelError, match="no autoregressive model that transformers loads"):
        convert(str(tmp_path / "nowhere"), out, 4)
    with pytest.raises(ModelError, match="at least 2 tokens"):
        convert(masked, out, 1)
    (tmp_path / "llama.gguf").write_bytes(b"GGUF is not this")
    with pytest.raises(ModelError, match=r"llama\.gguf"):
        convert(str(tmp_path / "llama.gguf"), out, 4)
    out.mkdir()
    with pytest.raises(ModelError, match="exists already"):
        convert(masked, out, 4)
    assert not any(out.iterdir())
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]
