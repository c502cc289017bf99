"""engine: a directory decodes as the sampler does, and a tokenizer of another model is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtrpo_ray.engine import Engine
from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.registry import save_model
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.sampler import SamplingParams, generate
from dtrpo_ray.tokenizer import character_tokenizer

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
    params = SamplingParams(9, 2, temperature=0.7)
    got, expected = engine.generate(prompts, params, [1, 2]), generate(tiny, prompts, params, [1, 2])
    if torch.cuda.is_available():  # bfloat16 there
        got, expected = ([len(g.ids) for g in gs] for gs in (got, expected))  # type: ignore[misc]
    assert got == expected
    assert not engine.model.training


def test_text_and_ids_are_each_others_inverse(folder: Path) -> None:
    engine = Engine.load(folder)
    assert engine.encode("abu") == [0, 1, 20]
    assert engine.decode([0, 1, 20, 21, 22]) == "abu"
    assert engine.decode([]) == ""


def test_a_tokenizer_with_another_mask_is_refused(tiny: SDAR) -> None:
    with pytest.raises(ModelError, match=r"tokenizer mask id 5 and config\.json mask_token_id 22 disagree"):
        Engine(tiny, character_tokenizer("abcd"))


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path, tiny: SDAR) -> None:
    save_model(tiny, tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        Engine.load(tmp_path)
