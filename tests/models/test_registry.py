"""registry: a directory round trip keeps every bit, and a broken directory is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.registry import build_model, load_model, read_config, save_model
from dtrpo_ray.models.sdar import SDAR

MakeModel = Callable[..., SDAR]
Json = dict[str, Any]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def saved(tmp_path: Path, tiny: SDAR) -> Path:
    save_model(tiny, tmp_path)
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return bits(a).keys() == bits(b).keys() and all(torch.equal(v, bits(b)[k]) for k, v in bits(a).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(make_model: MakeModel, tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model(seed=9).to(dtype)
    save_model(model, tmp_path)
    again = load_model(tmp_path, dtype)
    assert equal(model, again)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert again.config == model.config
    (tmp_path / "twice").mkdir()
    save_model(again, tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_the_layout_is_upstreams(saved: Path) -> None:
    names = set(load_file(saved / "model.safetensors"))
    layer = [f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    layer += [f"mlp.{n}_proj" for n in ("gate", "up", "down")] + ["input_layernorm", "post_attention_layernorm"]
    expected = {f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in layer}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert json.loads((saved / "config.json").read_text())["model_type"] == "sdar"


def test_tied_embeddings_stay_one_tensor(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(seed=9, tie_word_embeddings=True)
    save_model(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert equal(model, again)
    assert again.lm.lm_head.weight is again.lm.model.embed_tokens.weight


def test_tied_weights_do_not_excuse_another_missing_tensor(make_model: MakeModel, tmp_path: Path) -> None:
    save_model(make_model(tie_word_embeddings=True), tmp_path)
    change(tmp_path, lambda t: t.pop(Q_PROJ))
    with pytest.raises(ModelError, match=f"1 missing tensor.*{Q_PROJ}"):
        load_model(tmp_path)


def test_missing_surplus_and_misshapen_tensors_are_named(saved: Path) -> None:
    whole = load_file(saved / "model.safetensors")
    for problem, tensors in (
        ("1 missing", {k: v for k, v in whole.items() if k != Q_PROJ}),
        ("1 surplus", whole | {"model.layers.7.extra.weight": torch.zeros(2)}),
        ("1 misshapen", whole | {Q_PROJ: whole[Q_PROJ][:5].clone()}),
    ):
        save_file(tensors, saved / "model.safetensors")
        name = "model.layers.7.extra.weight" if "surplus" in problem else Q_PROJ
        with pytest.raises(ModelError, match=rf"model.safetensors: {problem} tensor\(s\), first {name}"):
            load_model(saved)
    save_file({k: v for k, v in whole.items() if "norm" not in k}, saved / "model.safetensors")
    with pytest.raises(ModelError, match="9 missing"):
        load_model(saved)


def test_weights_that_are_no_plain_numbers_are_refused(saved: Path) -> None:
    """int8 beside a quantization_config, NaN from a run that diverged, and the names of a wrapper."""
    whole = load_file(saved / "model.safetensors")
    (saved / "config.json").write_text(
        json.dumps(json.loads((saved / "config.json").read_text()) | {"quantization_config": {"load_in_8bit": True}})
    )
    bad = whole[Q_PROJ].clone()
    for value, message in (
        (bad.to(torch.int8), rf"{Q_PROJ} is I8, as quantization_config of config.json says: quantised"),
        (bad.to(torch.float8_e4m3fn), rf"{Q_PROJ} is F8_E4M3"),
        (bad.index_fill(0, torch.tensor([1]), float("nan")), rf"{Q_PROJ} holds NaN or infinity"),
        (bad.index_fill(0, torch.tensor([1]), float("-inf")), rf"{Q_PROJ} holds NaN or infinity"),
    ):
        save_file(whole | {Q_PROJ: value}, saved / "model.safetensors")
        with pytest.raises(ModelError, match=rf"model.safetensors: {message}"):
            load_model(saved)
    save_file({f"module.{name}": tensor for name, tensor in whole.items()}, saved / "model.safetensors")
    with pytest.raises(ModelError, match=r"module\..* was saved from inside a wrapper"):
        load_model(saved)


def test_missing_weights_name_the_folder(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=f"{saved}: no model.safetensors"):
        load_model(saved)


def test_pickled_weights_are_never_opened(saved: Path) -> None:
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"found pytorch_model.bin: convert it to safetensors"):
        load_model(saved)


def test_broken_files_are_named(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ModelError, match=r"model.safetensors: not a readable safetensors file"):
        load_model(saved)
    for text, complaint in (("{", "not valid JSON"), ("[1]", "not a JSON object"), ("3", "not a JSON object")):
        (saved / "config.json").write_text(text)
        with pytest.raises(ModelError, match=rf"config.json: {complaint}"):
            read_config(saved)
    (saved / "config.json").unlink()
    with pytest.raises(ModelError, match="hf download JetLM/SDAR-4B-Chat --local-dir models/SDAR-4B-Chat"):
        load_model(Path("JetLM/SDAR-4B-Chat"))
    with pytest.raises(ModelError, match=f"{saved}: not a model directory"):
        load_model(saved)


@pytest.mark.parametrize("model_type", [None, "llama", "SDAR"])
def test_an_unknown_family_is_named_with_the_known_ones(tiny_config: Json, model_type: str | None) -> None:
    with pytest.raises(ModelError, match=rf"model_type = {model_type!r} is not supported; known: sdar"):
        build_model(tiny_config | {"model_type": model_type})


def test_the_seed_gives_the_weights_and_leaves_the_callers_state(tiny_config: Json) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = build_model(tiny_config, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(4)
    assert equal(first, build_model(tiny_config, seed=1))
    assert not equal(first, build_model(tiny_config, seed=2))
