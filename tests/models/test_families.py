"""Every family: the published layout both ways, bit-identical round trips, named refusals, the cache and the grid."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dtrpo_ray.decode.cache import PagedKeys
from dtrpo_ray.errors import ModelError
from dtrpo_ray.models.base import DiffusionLM, TensorPiece
from dtrpo_ray.models.registry import (
    FAMILIES,
    build_model,
    copy_companions,
    family,
    load_model,
    read_config,
    save_model,
    skeleton,
)
from dtrpo_ray.models.weights import INDEX, published_shapes

Json = dict[str, Any]
Write = Callable[..., Path]
LAYOUTS = {
    "fast_dllm_v2_7b": (151665, 151645, 32),
    "sdar_4b_chat": (151669, 151643, 4),
    "sdar_8b_chat": (151669, 151643, 4),
    "sdar_30b_a3b_chat": (151669, 151643, 4),
    "dream_v0_instruct_7b": (151666, 151643, 32),
    "llada_8b_instruct": (126336, 126081, 32),
    "llada2_0_mini": (156895, 156892, 32),
    "llada2_1_mini": (156895, 156892, 32),
}
every_family = pytest.mark.parametrize("model_type", sorted(FAMILIES))


def shapes_of(model: DiffusionLM) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}


def pieces_by_tensor(model: DiffusionLM) -> dict[str, list[TensorPiece]]:
    found: dict[str, list[TensorPiece]] = {}
    for piece in model.pieces():
        found.setdefault(piece.ours, []).append(piece)
    return found


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_the_published_index_maps_to_ours_and_back(shared_data: Path, layout: str) -> None:
    """Names, and every element: the bytes of the index's total, and each element of ours exactly once."""
    folder = shared_data / "upstream_layouts" / layout
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    model = skeleton(read_config(folder))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    own, pieces = shapes_of(model), pieces_by_tensor(model)
    published = published_shapes(model, own)
    assert published.keys() == index["weight_map"].keys()
    bytes_each = {n: 4 if layout == "llada2_1_mini" and n.endswith("expert_bias") else 2 for n in published}
    assert sum(math.prod(s) * bytes_each[n] for n, s in published.items()) == index["metadata"]["total_size"]
    persistent = {n for n in model.state_dict() if not (model.tied_tensors() and n == "lm.lm_head.weight")}
    assert pieces.keys() == persistent
    for name, parts in pieces.items():
        indices = [torch.empty(own[name], device="meta")[p.at].numel() for p in parts]
        assert sum(indices) == math.prod(own[name])
        assert len({str(p.at) for p in parts}) == len(parts)
    assert (model.mask_id, model.eos_id, model.block_size) == LAYOUTS[layout]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_the_tiny_configs_have_the_published_keys(shared_data: Path, upstream: Callable[..., Any], layout: str) -> None:
    folder = shared_data / "upstream_layouts" / layout
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    published = read_config(folder)
    tiny = upstream(published["model_type"])[0]
    assert published.keys() <= tiny.keys()
    assert tiny.keys() - published.keys() <= {"mask_token_id"}


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_survives_load_and_save_to_the_bit(
    write_upstream: Write, tmp_path: Path, model_type: str, dtype: torch.dtype
) -> None:
    folder = write_upstream(model_type, dtype=dtype)
    model = load_model(folder, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    out = tmp_path / "out"
    out.mkdir()
    save_model(model, out)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():  # a router's bias is kept wider than its file had it
        assert torch.equal(value, after[name].to(value.dtype)), name
    config = read_config(out)
    assert config.keys() == read_config(folder).keys()
    assert config.get("torch_dtype", config.get("dtype")) == str(dtype).removeprefix("torch.")
    again = load_model(out, dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@every_family
def test_shards_hold_the_same_tensors(write_upstream: Write, tmp_path: Path, model_type: str) -> None:
    folder = write_upstream(model_type)
    model = load_model(folder)
    save_model(model, tmp_path, max_shard_bytes=40_000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (tmp_path / "model.safetensors").exists()
    held = {name: file for file in files for name in load_file(tmp_path / file)}
    assert held == index["weight_map"]
    sizes = [sum(t.nbytes for t in load_file(tmp_path / f).values()) for f in files]
    assert sum(sizes) == index["metadata"]["total_size"]
    assert all(size <= 40_000 or len(load_file(tmp_path / f)) == 1 for size, f in zip(sizes, files, strict=True))
    again = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@every_family
def test_missing_surplus_and_misshapen_tensors_are_named_as_published(write_upstream: Write, model_type: str) -> None:
    folder = write_upstream(model_type)
    whole = load_file(folder / "model.safetensors")
    name = sorted(whole)[len(whole) // 2]
    for problem, tensors in (
        ("missing", {n: t for n, t in whole.items() if n != name}),
        ("surplus", {**whole, "model.extra.weight": torch.zeros(2)}),
        ("misshapen", {**whole, name: torch.zeros(3, *whole[name].shape[1:])}),
    ):
        save_file(tensors, folder / "model.safetensors")
        found = "model.extra.weight" if problem == "surplus" else name
        with pytest.raises(ModelError, match=rf"1 {problem} tensor\(s\), first {found}"):
            load_model(folder)


@every_family
def test_a_mask_or_end_token_outside_the_vocabulary_is_refused(upstream: Callable[..., Any], model_type: str) -> None:
    config = upstream(model_type)[0]
    for key, value in (("mask_token_id", 96), ("mask_token_id", -1), ("eos_token_id", 151645)):
        with pytest.raises(ModelError, match=rf"{key} = {value} lies outside the vocabulary of 96"):
            skeleton(config | {key: value})


@every_family
def test_another_architecture_under_the_same_name_is_refused(upstream: Callable[..., Any], model_type: str) -> None:
    config = upstream(model_type)[0] | {"architectures": ["LLaDAMoEModelLM"]}
    with pytest.raises(ModelError, match=r"architectures = \['LLaDAMoEModelLM'\] is another model"):
        skeleton(config)


def test_an_sdar_config_without_its_added_keys_says_what_to_add(upstream: Callable[..., Any]) -> None:
    config = upstream("sdar")[0] | {"vocab_size": 151936}
    assert skeleton({k: v for k, v in config.items() if k != "mask_token_id"}).mask_id == 151669
    with pytest.raises(ModelError, match=r'block_size = None; add "block_size": 4 for SDAR-Chat and TraDo'):
        skeleton({k: v for k, v in config.items() if k != "block_size"})


def test_a_broken_trunk_config_is_the_users_error(upstream: Callable[..., Any]) -> None:
    config = upstream("Fast_dLLM_Qwen")[0] | {"layer_types": ["full_attention"]}  # one of two
    with pytest.raises(ModelError, match=r"config\.json: not a config of the Qwen2 trunk"):
        skeleton(config)


def test_the_tokenizer_beside_the_weights_must_agree(write_upstream: Write) -> None:
    folder = write_upstream("Fast_dLLM_Qwen")
    (folder / "added_tokens.json").write_text(json.dumps({"|<MASK>|": 93, "<|im_end|>": 91}))
    with pytest.raises(ModelError, match=r"tokenizer's mask token is 93, and config\.json's mask_token_id is 92"):
        load_model(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"|<MASK>|": 92}))
    assert load_model(folder).mask_id == 92
    # where the config names none, as published, and the constant lies outside a small vocabulary, the tokenizer knows
    config = {k: v for k, v in read_config(folder).items() if k != "mask_token_id"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(folder).mask_id == 92
    (folder / "added_tokens.json").unlink()
    with pytest.raises(ModelError, match="mask_token_id = 151665 lies outside the vocabulary of 96"):
        load_model(folder)


@every_family
def test_a_tokenizer_of_another_model_is_refused(write_upstream: Write, model_type: str) -> None:
    """Its end of text is not the model's, or it has tokens that the model has no row for."""
    folder = write_upstream(model_type)
    model = load_model(folder)
    file = folder / "tokenizer_config.json"

    def tokenizer(eos: int, last: int = 95) -> None:
        tokens = {str(eos): {"content": "<|end|>"}, str(last): {"content": "<|last|>"}}
        file.write_text(json.dumps({"eos_token": "<|end|>", "added_tokens_decoder": tokens}))

    tokenizer(model.eos_id)
    assert load_model(folder).stop_ids == {model.eos_id}
    tokenizer(40)
    with pytest.raises(ModelError, match=rf"end-of-sequence token is 40, and eos_token_id of .* is {model.eos_id};"):
        load_model(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [40, model.eos_id]}))
    assert load_model(folder).stop_ids == {40, model.eos_id}
    tokenizer(model.eos_id, last=96)
    with pytest.raises(ModelError, match=r"'<\|last\|>' has the id 96, outside the model's vocabulary of 96"):
        load_model(folder)


@every_family
def test_a_list_of_end_tokens_is_taken_whole(upstream: Callable[..., Any], model_type: str) -> None:
    config = upstream(model_type)[0]
    model = skeleton(config | {"eos_token_id": [40, 41]})
    assert (model.eos_id, model.stop_ids) == (40, {40, 41})
    for value, complaint in (
        ([], r"eos_token_id = \[\]; a config of .* needs at least one id"),
        ([40, None], "eos_token_id = None; a config of .* needs an integer"),
        ([40, 96], "eos_token_id = 96 lies outside the vocabulary of 96"),
    ):
        with pytest.raises(ModelError, match=complaint):
            skeleton(config | {"eos_token_id": value})


@every_family
def test_no_default_stands_in_for_the_base_of_the_positions(upstream: Callable[..., Any], model_type: str) -> None:
    config = upstream(model_type)[0]
    theta = config.pop("rope_theta")
    for value in (None, 0, "1e6", True):
        with pytest.raises(
            ModelError, match=rf"rope_theta = {value!r}; a config of {model_type} needs a number above 0"
        ):
            skeleton(config | {"rope_theta": value})
    with pytest.raises(ModelError, match="rope_theta = None"):
        skeleton(config)
    nested = skeleton(config | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}})
    assert nested.lm.config.rope_parameters["rope_theta"] == theta


@pytest.mark.parametrize("model_type", ["Dream", "Fast_dLLM_Qwen", "sdar", "sdar_moe", "llada2_moe"])
def test_scaled_positions_are_saved_as_they_were_read(write_upstream: Write, tmp_path: Path, model_type: str) -> None:
    folder = write_upstream(model_type, rope_scaling={"type": "linear", "factor": 2.0})
    model = load_model(folder)
    assert model.lm.config.rope_parameters["rope_type"] == "linear"
    save_model(model, tmp_path)
    assert read_config(tmp_path)["rope_scaling"] == {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize("model_type", ["Dream", "Fast_dLLM_Qwen", "sdar", "sdar_moe"])
def test_a_sliding_window_is_refused(upstream: Callable[..., Any], model_type: str) -> None:
    config = upstream(model_type)[0]
    for change, complaint in (
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names 'sliding_attention'"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window = true is not supported"),
    ):
        with pytest.raises(ModelError, match=complaint):
            skeleton(config | change)


def test_a_broken_index_or_a_missing_shard_is_named(write_upstream: Write, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_model(load_model(write_upstream("sdar")), folder, max_shard_bytes=40_000)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.rename(folder / "away")
    with pytest.raises(ModelError, match=rf"1 shard\(s\) not there, first {shard.name}"):
        load_model(folder)
    for text, complaint in (("{}", "not a safetensors index"), ('{"weight_map": {"a": "../x.safetensors"}}', "names")):
        (folder / INDEX).write_text(text)
        with pytest.raises(ModelError, match=complaint):
            load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_never_opened(write_upstream: Write, name: str) -> None:
    folder = write_upstream("llada")
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=f"found {name}: convert it to safetensors first"):
        load_model(folder)


def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding(write_upstream: Write) -> None:
    folder = write_upstream("Fast_dLLM_Qwen", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    assert load_model(folder).lm.lm_head.weight.equal(head)  # type: ignore[union-attr, operator]
    head[3] += 1
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(folder)


def test_what_stands_beside_the_weights_is_copied_and_weights_are_not(tmp_path: Path) -> None:
    source, out = tmp_path / "a", tmp_path / "b"
    for folder in (source, out, source / "folder"):
        folder.mkdir()
    kept = {"tokenizer.json", "chat_template.jinja", "generation_config.json", "modeling.py", "merges.txt"}
    weights = {"model-00001-of-00002.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json", "x.pth"}
    for name in kept | weights | {"config.json", "README.md"}:
        (source / name).write_text("x")
    copy_companions(source, out)
    assert {p.name for p in out.iterdir()} == kept


# --- the forward: the cache hook, the grid, the shift, the precision of positions ---


def full(model: DiffusionLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(positions [1, T], the mask of a whole sequence [1, 1, T, T]) of the family's kind of attention."""
    positions = torch.arange(ids.shape[1])[None]
    block = positions[0] // model.block_size
    seen = block[:, None] >= block if model.attention == "block" else torch.ones(ids.shape[1], ids.shape[1]).bool()
    return positions, seen[None, None]


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(t for t in FAMILIES if family(t).facts.attention == "block"))
def test_a_later_block_changes_no_earlier_state(write_upstream: Write, model_type: str) -> None:
    model = load_model(write_upstream(model_type)).double().eval()  # experts sum other rows in another order
    size = model.block_size
    ids = torch.arange(2 * size)[None] * 7 % 80
    positions, mask = full(model, ids)
    hidden = model.hidden(ids, positions, mask)
    ids[0, size] += 1
    changed = (model.hidden(ids, positions, mask) - hidden).abs().amax(-1)[0] > 1e-6
    assert not changed[:size].any()
    assert changed[size:].all()  # within its block every token sees it


@torch.no_grad()
@every_family
def test_the_cache_gives_the_states_of_the_whole_forward(write_upstream: Write, model_type: str) -> None:
    """A trunk hands its keys and values to our cache: block after block is the whole sequence at once."""
    model = load_model(write_upstream(model_type)).eval()
    size, length = 8, 24
    ids = torch.arange(length)[None] * 7 % 80
    positions = torch.arange(length)[None]
    mask = (positions[0, :, None] // size >= positions[0] // size)[None, None]
    expected = model.hidden(ids, positions, mask)
    cache = PagedKeys(length // size, size)
    pages = torch.arange(length // size)[None]
    for start in range(0, length, size):
        cache.aim(positions[0, start : start + size], pages)
        part = slice(start, start + size)
        got = model.hidden(ids[:, part], positions[:, part], mask[:, :, part], cache)
        assert torch.allclose(got, expected[:, part], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", sorted(t for t in FAMILIES if family(t).facts.shift))
def test_reading_at_position_minus_shift_is_the_published_shift(write_upstream: Write, model_type: str) -> None:
    """The releases shift their logits right by one and repeat the first: `cat([l[:, :1], l[:, :-1]])`."""
    model = load_model(write_upstream(model_type)).eval()
    ids = torch.arange(16)[None] * 7 % 80
    positions, mask = full(model, ids)
    hidden = model.hidden(ids, positions, mask)
    logits = model.head(hidden)
    published = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    at = torch.tensor([1, 5, 8, 15])
    assert torch.equal(model.head(hidden[0, at - model.shift]), published[0, at])


@torch.no_grad()
@every_family
def test_positions_stay_exact_in_bfloat16(write_upstream: Write, model_type: str) -> None:
    """Rounding the rotary frequencies to bfloat16 turns far positions by whole radians."""
    exact = load_model(write_upstream(model_type))
    for model in (load_model(write_upstream(model_type), torch.bfloat16), exact.to(torch.bfloat16)):
        rotary = model.lm.model.rotary_emb  # type: ignore[union-attr]
        assert rotary.inv_freq.dtype == torch.float32  # type: ignore[union-attr]
        reference = build_model(model.config).lm.model.rotary_emb  # type: ignore[union-attr]
        assert torch.equal(rotary.inv_freq, reference.inv_freq)  # type: ignore[union-attr, arg-type]
        assert torch.isfinite(model.hidden(*_inputs())).all()


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.arange(8)[None], torch.arange(8)[None], torch.ones(1, 1, 8, 8, dtype=torch.bool)


PEAK = """
import sys, threading, time, torch
from pathlib import Path
from dtrpo_ray.models.registry import load_model
pages = lambda: (lambda v: int(v[1]) - int(v[2]))(open("/proc/self/statm").read().split()) * 4096
load_model(Path(sys.argv[1]))  # imports and caches
before, peak, done = pages(), [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], pages())
        time.sleep(0.0005)
thread = threading.Thread(target=watch); thread.start()
model = load_model(Path(sys.argv[2]), getattr(torch, sys.argv[3]))
done.set(); thread.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
print(size, max(peak[0], pages()) - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
def test_loading_holds_one_copy(write_upstream: Write, tmp_path: Path, dtype: str) -> None:
    """Memory that is not the mapped file: the model in its target dtype, and less than a quarter beside it."""
    config = read_config(write_upstream("sdar")) | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 20_000}
    config |= {"num_hidden_layers": 6, "head_dim": 64}
    save_model(build_model(config), tmp_path)
    script = [sys.executable, "-c", PEAK, str(write_upstream("sdar")), str(tmp_path), dtype]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    size, peak = map(int, done.stdout.split())
    assert size > (80e6 if dtype == "float32" else 40e6)
    assert peak < 1.25 * size
