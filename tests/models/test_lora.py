"""lora: off is the base to the bit, on is what the adapters say, merged is on, and the PEFT files say the same."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT, SHARED
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.plain import PlainBackend
from dtrpo_ray.config.train import LoraConfig, Objective, TrainConfig
from dtrpo_ray.errors import ConfigError, ModelError
from dtrpo_ray.method.batch import ModelLayout, build_batch
from dtrpo_ray.method.step import training_step
from dtrpo_ray.models.base import DiffusionLM
from dtrpo_ray.models.lora import (
    ADAPTER_CONFIG,
    BaseReference,
    _require_plain,
    add_adapters,
    merge_adapters,
    save_adapter,
    target_modules,
    with_adapter,
)
from dtrpo_ray.models.registry import FAMILIES, build_model, load_model, save_model, skeleton

CONFIGS = json.loads((ROOT / "tests" / "models" / "tiny_configs.json").read_text())
CPU = torch.device("cpu")
LORA = LoraConfig(rank=4, alpha=6)


def targets(model_type: str) -> str:
    return "attention" if model_type == "sdar_moe" else "attention+mlp"


def inputs(model: DiffusionLM) -> tuple[Tensor, ...]:
    ids, at = torch.arange(12)[None] * 5 % 80, torch.arange(4)
    return ids, torch.arange(12)[None], torch.ones(1, 1, 12, 12, dtype=torch.bool), at * 0, at, at + 1


def trained(model: DiffusionLM) -> DiffusionLM:
    """Adapters as training leaves them: B away from zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(params=sorted(FAMILIES))
def adapted(request: pytest.FixtureRequest) -> tuple[DiffusionLM, LoraConfig]:
    model = build_model(CONFIGS[request.param], seed=1).eval()
    config = LoraConfig(rank=4, alpha=6, targets=targets(request.param))  # type: ignore[arg-type]
    add_adapters(model, config, seed=2)
    return model, config


@torch.no_grad()
def test_new_adapters_change_nothing_and_off_is_the_base(adapted: tuple[DiffusionLM, LoraConfig]) -> None:
    model, _ = adapted
    base = build_model(model.config, seed=1).eval()(*inputs(model))
    assert torch.equal(model(*inputs(model)), base)
    trained(model)
    reference = BaseReference(model, model)
    assert (model(*inputs(model)) - base).abs().max() > 0.01
    assert torch.equal(reference(*inputs(model)), base)
    assert (model(*inputs(model)) - base).abs().max() > 0.01  # and on again
    for name in ("mask_id", "eos_id", "block_size", "vocab_size", "attention", "block_origin", "shift"):
        assert getattr(reference, name) == getattr(model, name)


def test_only_adapters_learn(adapted: tuple[DiffusionLM, LoraConfig]) -> None:
    model, _ = adapted
    trained(model)(*inputs(model)).sum().backward()
    learning = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert learning == {n for n, p in model.named_parameters() if ".lora_" in n}
    modules = {n.rpartition(".lora_")[0].rpartition(".")[2] for n in learning}
    assert modules <= {*model.lora.attention, *model.lora.mlp}
    assert set(model.lora.attention) <= modules


@torch.no_grad()
def test_merged_is_on_and_saves_in_the_published_layout(
    adapted: tuple[DiffusionLM, LoraConfig], tmp_path: Path
) -> None:
    model, _ = adapted
    expected = trained(model)(*inputs(model))
    base = build_model(model.config, seed=1)
    merge_adapters(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    save_model(model, tmp_path)
    assert torch.allclose(load_model(tmp_path).eval()(*inputs(model)), expected, atol=1e-5)


@torch.no_grad()
def test_the_adapter_file_is_the_difference_of_the_published_tensors(
    adapted: tuple[DiffusionLM, LoraConfig], tmp_path: Path
) -> None:
    model, config = adapted
    trained(model)
    save_adapter(model, config, "a/base", tmp_path)
    adapter, record = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    assert (record["r"], record["lora_alpha"], record["peft_type"]) == (4, 6.0, "LORA")
    assert record["base_model_name_or_path"] == "a/base"
    for number, lm in enumerate((build_model(model.config, seed=1), model)):
        if number:
            merge_adapters(lm)
        (tmp_path / str(number)).mkdir()
        save_model(lm, tmp_path / str(number))
    before, after = (load_file(tmp_path / str(n) / "model.safetensors") for n in (0, 1))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    named = {n.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for n in adapter if ".lora_A." in n}
    assert named == {n.removesuffix(".weight") for n in changed} == set(record["target_modules"])
    for name in named:
        a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        ranks = [v for k, v in record["rank_pattern"].items() if name.endswith(k.rpartition(".")[2])]
        assert a.shape[0] == (ranks[0] if ranks else 4)
        assert torch.allclose(after[f"{name}.weight"] - before[f"{name}.weight"], 1.5 * b @ a, atol=1e-5)


@torch.no_grad()
def test_peft_loads_the_files_into_the_trunk_itself(tmp_path: Path) -> None:
    """SDAR's layout is Qwen3's, so peft can put the exported adapter on transformers' own class."""
    model = build_model(CONFIGS["sdar"], seed=1).eval()
    add_adapters(model, LORA, seed=2)
    save_adapter(trained(model), LORA, "base", tmp_path)
    plain = Qwen3ForCausalLM(Qwen3Config(**{k: v for k, v in model.lm.config.to_dict().items() if k != "model_type"}))
    plain.load_state_dict(build_model(CONFIGS["sdar"], seed=1).lm.state_dict())
    other: Any = PeftModel.from_pretrained(plain.eval(), str(tmp_path))
    ids, positions, mask = inputs(model)[:3]
    expected = model.head(model.hidden(ids, positions, mask))
    got = other(input_ids=ids, position_ids=positions, attention_mask={"full_attention": mask}).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert (expected - plain(input_ids=ids).logits).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("cut", ["adapter_model.safetensors"])
def test_peft_reads_the_joint_rank_of_a_fused_tensor(tmp_path: Path, cut: str) -> None:
    """A module tree with the published names, as LLaDA2's own code has them, takes the adapter as it is."""
    model = build_model(CONFIGS["llada2_moe"], seed=1).eval()
    add_adapters(model, LORA, seed=2)
    save_adapter(trained(model), LORA, "base", tmp_path)
    (tmp_path / "merged").mkdir()
    base, merged = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    save_model(build_model(CONFIGS["llada2_moe"], seed=1), base)
    merge_adapters(model)
    save_model(model, merged)
    weights, expected = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    tree = _tree({n: w for n, w in weights.items() if w.ndim == 2 and "gate.weight" not in n})
    other: Any = PeftModel.from_pretrained(tree, str(tmp_path)).merge_and_unload()
    for name, value in other.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-5), name
    assert not torch.equal(
        other.state_dict()["model.layers.0.attention.query_key_value.weight"],
        weights["model.layers.0.attention.query_key_value.weight"],
    )
    assert (tmp_path / cut).is_file()


def _tree(weights: dict[str, Tensor]) -> torch.nn.Module:
    """A module with linear layers of these names and weights."""
    root = torch.nn.Module()
    root.prepare_inputs_for_generation = None  # type: ignore[assignment]  # peft asks a causal model for it
    for name, weight in weights.items():
        *path, _ = name.split(".")
        at = root
        for part in path[:-1]:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data.copy_(weight)
        at.add_module(path[-1], linear)
    return root


def test_a_lora_step_is_ln_2_at_the_start_and_leaves_the_base(tmp_path: Path) -> None:
    rows = [
        {"row_id": "a", "epoch": 0, "prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6, 7, 8], "chosen_steps": None}
        | {"rejected_ids": [9, 10, 11, 12, 13], "rejected_steps": None}
    ]
    objective = Objective(schedule="random")
    model = build_model(CONFIGS["sdar"], seed=1)
    before = {n: p.clone() for n, p in model.lm.state_dict().items()}
    add_adapters(model, LORA, seed=2)
    config = TrainConfig(objective=objective, lora=LORA, lr=1e-2, lr_schedule="constant", warmup_ratio=0)
    backend = PlainBackend(model, config, 5, CPU)
    batch = build_batch(rows, objective, ModelLayout(model.block_size, model.mask_id), seed=0)
    losses = []
    for _ in range(5):
        loss = training_step(backend.policy, BaseReference(backend.policy, model), batch, objective).loss_P.sum()
        losses.append(float(loss.detach()))
        backend.backward(loss)
        backend.step()
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses[-1] < losses[0] - 0.05
    after = {n.replace(".base_layer", ""): p for n, p in model.lm.state_dict().items() if ".lora_" not in n}
    assert all(torch.equal(after[n], before[n]) for n in before)
    backend.save(tmp_path, 5)
    other = build_model(CONFIGS["sdar"], seed=1)
    add_adapters(other, LORA, seed=9)
    resumed = PlainBackend(other, config, 5, CPU)
    assert resumed.load(tmp_path) == 5
    with torch.no_grad():
        assert torch.equal(other(*inputs(other)), model(*inputs(model)))


def test_targets_are_the_familys_and_refused_where_they_mean_nothing() -> None:
    chosen = {}
    for targets_ in ("attention", "mlp", "attention+mlp", "mlp+output"):
        model = build_model(CONFIGS["llada"], seed=1)
        add_adapters(model, LoraConfig(rank=2, targets=targets_), seed=0)  # type: ignore[arg-type]
        chosen[targets_] = {
            n.split(".lora_A")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_A" in n
        }
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    assert chosen == {
        "attention": attention,
        "mlp": mlp,
        "attention+mlp": attention | mlp,
        "mlp+output": mlp | {"lm_head"},
    }
    for refused in ("attention+mlp", "mlp", "mlp+output"):
        with pytest.raises(ConfigError, match=r"the MLPs of sdar_moe are routed experts alone.*targets = 'attention'"):
            add_adapters(build_model(CONFIGS["sdar_moe"]), LoraConfig(targets=refused), seed=0)  # type: ignore[arg-type]
    assert target_modules(build_model(CONFIGS["sdar_moe"]), LoraConfig()) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert set(target_modules(build_model(CONFIGS["llada"]), LoraConfig())) == attention | mlp
    with pytest.raises(ConfigError, match=r"output head is its embedding \(tied\).*set train\.lora\.targets = 'mlp'"):
        add_adapters(build_model(CONFIGS["sdar"] | {"tie_word_embeddings": True}), LoraConfig(targets="mlp+output"), 0)


def test_output_adapters_save_under_the_published_head(tmp_path: Path) -> None:
    model = build_model(CONFIGS["llada"], seed=1)
    config = LoraConfig(rank=2, targets="mlp+output")
    add_adapters(model, config, seed=0)
    save_adapter(trained(model), config, "base", tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.model.transformer.ff_out.lora_A.weight" in names
    assert "base_model.model.model.transformer.blocks.1.ff_out.lora_B.weight" in names
    assert len(names) == 2 * (2 * 3 + 1)


def test_the_seed_gives_the_adapters() -> None:
    first, second, third = (build_model(CONFIGS["sdar"], seed=1) for _ in range(3))
    for model, seed in ((first, 4), (second, 4), (third, 5)):
        add_adapters(model, LORA, seed)
    a, b, c = ([p for n, p in m.named_parameters() if "lora_A" in n] for m in (first, second, third))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))


# --- adapters of a directory on a base that is shared ---


@torch.no_grad()
def test_an_adapter_directory_on_the_base_is_the_trained_model_and_shares_its_weights(
    adapted: tuple[DiffusionLM, LoraConfig], tmp_path: Path
) -> None:
    model, config = adapted
    expected = trained(model)(*inputs(model))
    save_adapter(model, config, "a/base", tmp_path)
    base, copy = build_model(model.config, seed=1).eval(), skeleton(model.config).eval()
    before = base(*inputs(base))
    with_adapter(base, copy, tmp_path)
    assert torch.allclose(copy(*inputs(copy)), expected, atol=1e-5)
    assert (copy(*inputs(copy)) - before).abs().max() > 0.01
    assert torch.equal(base(*inputs(base)), before)
    own = sum(p.numel() for n, p in copy.named_parameters() if ".lora_" in n)
    theirs = {p.data_ptr() for p in base.parameters()}
    assert sum(p.numel() for p in copy.parameters() if p.data_ptr() not in theirs) == own


def test_an_adapter_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    model, base = build_model(CONFIGS["sdar"], seed=1), build_model(CONFIGS["sdar"], seed=1)
    add_adapters(model, LORA, seed=2)
    save_adapter(model, LORA, "a/base", tmp_path)
    file, record = tmp_path / "adapter_model.safetensors", json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    tensors = load_file(file)

    def refusal() -> str:
        with pytest.raises(ModelError) as error:
            with_adapter(base, skeleton(CONFIGS["sdar"]), tmp_path)
        return str(error.value)

    name = next(n for n in tensors if "q_proj.lora_A" in n)
    save_file({**tensors, name: torch.zeros(4, 7)}, file)
    assert "q_proj does not fit this base" in refusal()
    save_file({**tensors, name.replace("q_proj", "x_proj"): torch.zeros(4, 7)}, file)
    assert "x_proj is no module of this sdar model" in refusal()
    save_file({n: t for n, t in tensors.items() if n != name}, file)
    assert "are not a pair" in refusal()
    save_file({}, file)
    assert "holds no tensors" in refusal()
    save_file(tensors, file)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps({**record, "use_dora": True}))
    assert "only plain LoRA" in refusal()
    file.unlink()
    assert "no readable PEFT adapter" in refusal()


@pytest.mark.parametrize(
    ("auto_map", "task"),
    [({}, "CAUSAL_LM"), ({"AutoModelForCausalLM": "m.C"}, "CAUSAL_LM"), ({"AutoModel": "m.C"}, None)],
)
def test_an_adapter_is_a_causal_models_where_the_release_is(
    tmp_path: Path, auto_map: dict[str, str], task: str | None
) -> None:
    """peft asks a CAUSAL_LM base for `prepare_inputs_for_generation`; Dream's class, an AutoModel, has none."""
    config = {key: value for key, value in CONFIGS["Dream"].items() if key != "auto_map"}
    model = build_model(config | ({"auto_map": auto_map} if auto_map else {}))
    add_adapters(model, LORA, seed=0)
    save_adapter(model, LORA, "a/base", tmp_path)
    assert json.loads((tmp_path / ADAPTER_CONFIG).read_text())["task_type"] == task


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changed the base"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora' changed the base"),
        ({"use_rslora": True}, "without use_rslora = True"),
        ({"use_bdlora": {"nblocks": 2}}, "without use_bdlora"),
        ({"alora_invocation_tokens": [1]}, "without alora_invocation_tokens"),
        ({"a_key_of_tomorrow": 1}, "without a_key_of_tomorrow = 1"),
        ({"bias": "all"}, "without bias = 'all'"),
        ({"peft_type": "LOHA"}, "not 'LOHA'"),
    ],
)
def test_a_configuration_that_says_more_than_plain_lora_is_refused(
    tmp_path: Path, told: dict[str, Any], message: str
) -> None:
    plain = {"peft_type": "LORA", "r": 4, "bias": "none", "use_dora": False, "init_lora_weights": "gaussian"}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(plain))
    _require_plain(tmp_path)
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(plain | told))
    with pytest.raises(ModelError, match=re.escape(message)):
        _require_plain(tmp_path)


FIELD = SHARED.parent / "cases" / "adapters"


@pytest.mark.skipif(not FIELD.is_dir(), reason="the cases of the field are not beside this clone")
@pytest.mark.parametrize("name", ["adapter-pissa", "adapter-olora", "probe"])
def test_adapters_of_the_field_that_are_not_plain_are_refused(name: str) -> None:
    for plain in ("adapter-True", "adapter-gaussian"):
        _require_plain(FIELD / plain)
    with pytest.raises(ModelError, match=r"init_lora_weights|use_bdlora"):
        _require_plain(FIELD / name)
