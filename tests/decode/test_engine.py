"""engine: a directory decodes as the decoder does, and a tokenizer of another model is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtrpo_ray.config.train import LoraConfig
from dtrpo_ray.decode.decoder import decode_all
from dtrpo_ray.decode.engine import Engine
from dtrpo_ray.decode.types import SamplingParams
from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.lora import add_adapters, merge_adapters, save_adapter
from dtrpo_ray.models.registry import load_model, save_model
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.models.tokenizer import character_tokenizer, load_tokenizer

MakeModel = Callable[..., SDAR]
ALPHABET = "abcdefghijklmnopqrstu"  # 21 characters, then end-of-sequence 21 and mask 22


@pytest.fixture
def folder(tmp_path: Path, tiny: SDAR) -> Path:
    save_model(tiny, tmp_path)
    character_tokenizer(ALPHABET).save_pretrained(tmp_path)
    return tmp_path


def test_a_loaded_directory_decodes_as_the_sampler_does(folder: Path, tiny: SDAR) -> None:
    engine = Engine.load(folder)
    prompts = [engine.encode("abc"), engine.encode("hello")]
    params = SamplingParams(max_new_tokens=9, denoising_steps=2, temperature=0.7)
    got, expected = engine.generate(prompts, params, [1, 2]), decode_all(tiny, prompts, params, [1, 2])
    if torch.cuda.is_available():  # bfloat16 there
        got, expected = ([len(g.ids) for g in gs] for gs in (got, expected))  # type: ignore[misc]
    assert got == expected
    assert not engine.model.training


@torch.no_grad()
def test_an_adapter_decodes_as_the_merged_model_and_the_base_as_before(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel
) -> None:
    engine, adapter = Engine.load(folder), tmp_path_factory.mktemp("adapter")
    trained, config = load_model(folder), LoraConfig(rank=2, alpha=8)
    add_adapters(trained, config, 0)
    for name, parameter in trained.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    save_adapter(trained, config, "a/base", adapter)
    merge_adapters(trained)
    prompts, params = (
        [engine.encode("abc"), engine.encode("hello")],
        SamplingParams(max_new_tokens=9, denoising_steps=2),
    )
    base = engine.generate(prompts, params, [0, 0])
    adapted = engine.load_adapter(adapter).generate(prompts, params, [0, 0])
    assert [g.ids for g in adapted] == [g.ids for g in decode_all(trained.eval(), prompts, params, [0, 0])]
    assert [g.ids for g in adapted] != [g.ids for g in base]
    assert engine.generate(prompts, params, [0, 0]) == base


def test_text_and_ids_are_each_others_inverse(folder: Path) -> None:
    engine = Engine.load(folder)
    assert engine.encode("abu") == [0, 1, 20]
    assert engine.decode([0, 1, 20, 21, 22]) == "abu"
    assert engine.decode([]) == ""


def test_a_tokenizer_with_another_mask_is_refused(tiny: SDAR) -> None:
    with pytest.raises(ModelError, match=r"tokenizer mask id 5 and config\.json mask_token_id 22 disagree"):
        Engine(tiny, character_tokenizer("abcd"))


def test_a_tokenizer_with_another_end_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(ModelError, match="end-of-sequence id 21 and the model's eos_token_id 3, 4 disagree"):
        Engine(make_model(eos_token_id=[4, 3]), character_tokenizer(ALPHABET))


def test_a_response_ends_at_any_end_that_the_model_its_defaults_or_its_template_name(
    folder: Path, make_model: MakeModel
) -> None:
    """eos 21 of config.json; 3 and 21 of generation_config.json; the template's end of turn, here the letter e."""
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 21]}')
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["e"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}e{% endfor %}"
    engine = Engine(load_model(folder), tokenizer)
    assert engine.model.stop_ids == {3, 4, 21}
    params = SamplingParams(max_new_tokens=40, denoising_steps=1, temperature=3.0)
    free = params.model_copy(update={"ignore_eos": True})
    prompt = engine.encode("abc")
    for seed in range(8):
        (whole,), (cut,) = engine.generate([prompt], free, [seed]), engine.generate([prompt], params, [seed])
        place = next((i for i, token in enumerate(whole.text_ids) if token in {3, 4, 21}), 40)
        assert cut.text_ids == whole.text_ids[:place]
        assert cut.ids == whole.ids[: len(cut.ids)]
        assert len(whole.text_ids) == 40


@pytest.mark.parametrize("value", ['"21"', "[21, null]", "23", "-1", "true", "[[21]]"])
def test_generation_defaults_that_name_no_token_are_refused(folder: Path, value: str) -> None:
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id = .*in the vocabulary of 23"):
        Engine.load(folder)


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path, tiny: SDAR) -> None:
    save_model(tiny, tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        Engine.load(tmp_path)
