"""export: the folder holds the weights to the bit, what stood beside them, defaults, and a card with its lineage."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT
from peft import LoraConfig as PeftConfig
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dtrpo_ray import cli
from dtrpo_ray.config.job import Job
from dtrpo_ray.config.load import load_job
from dtrpo_ray.config.train import LoraConfig, TrainConfig
from dtrpo_ray.errors import CheckpointError
from dtrpo_ray.models.lora import add_adapters, merge_adapters
from dtrpo_ray.models.registry import load_model, save_model
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.models.tokenizer import character_tokenizer, load_tokenizer
from dtrpo_ray.pipeline import ModelRef
from dtrpo_ray.stages import Stage
from dtrpo_ray.train import checkpoint
from dtrpo_ray.train.backend import TAG
from dtrpo_ray.train.export import base_name, export_adapter, export_checkpoint, export_model, job_card

MakeModel = Callable[..., SDAR]
LINEAGE = [Stage("train-1", "0123456789abcdef", Path("train-1"), 0.0, False, {"model/config.json": "x"}, {"loss": 0.5})]
CURVES = {"train-1": [{"step": 1, "loss": 0.7}, {"step": 40, "loss": 0.512345678, "margin": 0.25}], "empty": []}


@pytest.fixture
def job() -> Job:
    return load_job(ROOT / "jobs" / "sudoku.toml")


@pytest.fixture
def card(job: Job) -> str:
    return job_card(job, LINEAGE, CURVES, None)


@pytest.fixture
def trained(make_model: MakeModel, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(make_model(seed=4, torch_dtype="float32"), folder)
    character_tokenizer("abcdefghijklmnopqrstu").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_the_folder_is_the_model_and_what_it_came_with(trained: Path, tmp_path: Path, card: str) -> None:
    out = tmp_path / "out"
    export_model(trained, out, card, denoising_steps=3)
    before, after = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert {f.name for f in trained.iterdir()} | {"README.md", "generation_config.json"} == {
        f.name for f in out.iterdir()
    }
    assert load_tokenizer(out).encode("abc") == [0, 1, 2]
    defaults = json.loads((out / "generation_config.json").read_text())
    assert defaults == {"eos_token_id": 21, "pad_token_id": 21, "mask_token_id": 22, "block_length": 4} | {
        "denoising_steps": 3
    }


def test_generation_defaults_end_a_chat_where_its_template_does(trained: Path, tmp_path: Path, card: str) -> None:
    (trained / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<|MASK|>{% endfor %}")
    export_model(trained, tmp_path / "out", card)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [21, 22]


def test_the_card_has_lineage_metrics_and_the_job(trained: Path, tmp_path: Path, job: Job, card: str) -> None:
    export_model(trained, tmp_path / "out", card)
    assert (tmp_path / "out" / "README.md").read_text() == card
    assert card.startswith("---\nlibrary_name: dtrpo_ray\ntags:")
    assert '| train-1 | 0123456789ab | 1 files | {"loss": 0.5} |' in card
    assert "| train-1 | 40 | 0.512346 | 0.25 |  |  |" in card
    resolved = json.loads(card.split("```json\n")[1].split("```")[0])
    assert Job.model_validate(resolved) == job


def test_a_releases_own_generation_defaults_stay(trained: Path, tmp_path: Path, card: str) -> None:
    (trained / "generation_config.json").write_text('{"temperature": 0.7}')
    export_model(trained, tmp_path / "out", card)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.7}


def test_another_dtype_rounds_and_says_so(trained: Path, tmp_path: Path, card: str) -> None:
    out = tmp_path / "out"
    export_model(trained, out, card, "bfloat16")
    before, after = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[n].bfloat16(), after[n]) for n in before)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert {p.dtype for p in load_model(out, torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("JetLM/SDAR-4B-Chat", "JetLM/SDAR-4B-Chat"),
        ("/models/SDAR-4B-Chat", "/models/SDAR-4B-Chat"),
        ("/root/.cache/huggingface/hub/models--JetLM--SDAR-4B-Chat/snapshots/0a1b2c", "JetLM/SDAR-4B-Chat"),
        ("models--gpt2/snapshots/0a1b2c", "gpt2"),
        ("/data/models--of-mine", "/data/models--of-mine"),
    ],
)
def test_a_base_is_called_by_its_hub_id_or_as_the_user_called_it(path: str, name: str) -> None:
    assert base_name(Path(path)) == name


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_an_adapter_is_exported_with_its_base_named(tmp_path: Path, job: Job, dtype: str | None) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    PeftConfig(base_model_name_or_path="/stages/base-0123/model", r=3).save_pretrained(str(adapter))
    save_file({"a": torch.rand(3, 2)}, adapter / "adapter_model.safetensors")
    base = "JetLM/SDAR-4B-Chat"
    export_adapter(adapter, tmp_path / "out", job_card(job, LINEAGE, CURVES, base, adapter=True), base, dtype)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in adapter.iterdir()} | {"README.md"}
    config = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.base_model_name_or_path, config.r) == ("JetLM/SDAR-4B-Chat", 3)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: peft\nbase_model: JetLM/SDAR-4B-Chat\nbase_model_relation: adapter\n")
    before, after = (load_file(d / "adapter_model.safetensors")["a"] for d in (adapter, tmp_path / "out"))
    assert torch.equal(after, before.to(getattr(torch, dtype or "float32")))


def test_a_path_of_this_machine_is_told_in_the_card_and_is_no_hub_id(job: Job) -> None:
    text = job_card(job, LINEAGE, CURVES, "/stages/base-0123/model", adapter=True)
    assert "base_model:" not in text
    assert "Base model: `/stages/base-0123/model`." in text


# --- a training checkpoint, as rank 0 of a run without ZeRO writes it ---

LORA = LoraConfig(rank=2, alpha=6)
FACTS = {"step": 40, "num_workers": 1, "zero_stage": 0, "label": "train-1", "seed": 1} | {
    "identity": {"base": "b" * 64, "table": "7" * 64},
    "metrics": {"step": 40, "loss": 0.51, "margin": 0.25},
    "plan": {"digest": "a plan", "consumed": [40]},
    "precision": "fp32",
}


@pytest.fixture
def write_checkpoint(tmp_path: Path, trained: Path) -> Callable[..., tuple[Path, SDAR]]:
    """A checkpoint of the trained model, or of adapters on it, and the model it was written from."""

    def write(lora: LoraConfig | None = None, **facts: Any) -> tuple[Path, SDAR]:
        model = load_model(trained)
        if lora:
            add_adapters(model, lora, seed=3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        local = tmp_path / "local" / TAG
        local.mkdir(parents=True)
        torch.save({"module": model.state_dict()}, local / "mp_rank_00_model_states.pt")
        filesystem, path = checkpoint.open_storage(str(tmp_path / "step-00000040"))
        config = TrainConfig(lora=lora).model_dump(mode="json")
        checkpoint.write(local.parent, filesystem, path, 0, {**FACTS, "base": str(trained), "config": config} | facts)
        assert isinstance(model, SDAR)
        return Path(path), model

    return write


@pytest.fixture
def no_random_weights(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, where the trained model lies on disk."""
    del trained
    for init in ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_"):
        real = getattr(torch.nn.init, init)

        def only_on_meta(tensor: torch.Tensor, *args: Any, real: Any = real, **kwargs: Any) -> torch.Tensor:
            assert tensor.device.type == "meta"
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.nn.init, init, only_on_meta)


@pytest.mark.usefixtures("no_random_weights")
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_checkpoint_is_exported_whole(
    write_checkpoint: Callable[..., tuple[Path, SDAR]], tmp_path: Path, dtype: str | None
) -> None:
    source, model = write_checkpoint()
    assert export_checkpoint(source, tmp_path / "out", dtype=dtype, base="JetLM/SDAR-4B-Chat")["step"] == 40
    kind = getattr(torch, dtype or "float32")
    exported = load_model(tmp_path / "out", kind)
    for (name, ours), theirs in zip(model.named_parameters(), exported.parameters(), strict=True):
        assert torch.equal(ours.to(kind), theirs), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(kind).removeprefix("torch.")
    assert load_tokenizer(tmp_path / "out").encode("abc") == [0, 1, 2]
    defaults = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (defaults["eos_token_id"], defaults["denoising_steps"]) == (21, 4)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: JetLM/SDAR-4B-Chat" in text
    assert "up to step 40 of the training stage `train-1`, seed 1" in text
    assert (
        f"| train-1, step 40 | base {'b' * 12}, table {'7' * 12} | rank files of 1 worker(s) | not finished |" in text
    )
    assert "| train-1 | 40 | 0.51 | 0.25 |  |  |" in text
    resolved = json.loads(text.split("```json\n")[1].split("```")[0])
    assert TrainConfig.model_validate(resolved) == TrainConfig()


def test_a_lora_checkpoint_is_its_adapter_or_merged_the_model(
    write_checkpoint: Callable[..., tuple[Path, SDAR]], trained: Path, tmp_path: Path
) -> None:
    source, model = write_checkpoint(LORA)
    export_checkpoint(source, tmp_path / "adapter")
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (2, 6, str(trained))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    ours = model.lm.model.layers[0].self_attn.q_proj
    assert torch.equal(adapter[f"base_model.model.{module}.lora_A.weight"], ours.lora_A.default.weight)
    assert torch.equal(adapter[f"base_model.model.{module}.lora_B.weight"], ours.lora_B.default.weight)
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()
    export_checkpoint(source, tmp_path / "merged", merged=True)
    merge_adapters(model)
    merged = load_model(tmp_path / "merged")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), merged.parameters(), strict=True))
    assert (tmp_path / "merged" / "generation_config.json").is_file()
    assert not torch.equal(merged.lm.model.layers[0].self_attn.q_proj.weight, _q_proj(trained))


def test_the_command_exports_a_checkpoint_and_tells_of_a_base_on_this_machine(
    write_checkpoint: Callable[..., tuple[Path, SDAR]], trained: Path, tmp_path: Path
) -> None:
    source, _ = write_checkpoint(LORA)
    done = CliRunner().invoke(cli.app, ["export", str(source), str(tmp_path / "a"), "--json"])
    assert json.loads(done.stdout) == {"verb": "export", "directory": str(tmp_path / "a"), "step": 40}
    assert f"names its base by a local path, {trained}; to share it, set --base-name" in done.stderr
    words = ["export", str(source), str(tmp_path / "b"), "--base-name", "JetLM/SDAR-4B-Chat", "--dtype", "bfloat16"]
    assert CliRunner().invoke(cli.app, words).stderr == ""
    assert PeftConfig.from_pretrained(str(tmp_path / "b")).base_model_name_or_path == "JetLM/SDAR-4B-Chat"
    assert {t.dtype for t in load_file(tmp_path / "b" / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("given", "option", "name"),
    [
        (None, [], "STAGE"),  # [sft] trained the base: its stage's folder, and never the model it began as
        ("tuned", [], "STAGE"),
        ("hub/SDAR-4B-Chat", [], "hub/SDAR-4B-Chat"),
        ("hub/SDAR-4B-Chat", ["--base-name", "JetLM/SDAR-4B-Chat"], "JetLM/SDAR-4B-Chat"),
        (None, ["--base-name", "me/base"], "me/base"),
    ],
)
def test_a_lora_jobs_adapter_names_its_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, option: list[str], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "stages" / "train-1-0123"
    (folder / "model").mkdir(parents=True)
    (folder / "adapter").mkdir()
    for path in filter(None, (given, "hub/SDAR-4B-Chat")):
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, "config.json").write_text("{}")
    PeftConfig(base_model_name_or_path=str(tmp_path / "elsewhere")).save_pretrained(str(folder / "adapter"))
    save_file({"a": torch.zeros(1)}, folder / "adapter" / "adapter_model.safetensors")
    base = tmp_path / "stages" / "base-4567" / "model"
    words = [f"model.path={given}", "train.lora.rank=4"] if given else ["train.lora.rank=4"]
    file = tmp_path / "job.toml"
    sections = (ROOT / "jobs" / "sudoku.toml").read_text()
    dropped = {None: [], "tuned": ["model.init"]}.get(given, ["model.init", "sft"])
    file.write_text(_without(sections, *dropped))
    pipeline = SimpleNamespace(lineage=lambda: LINEAGE, curves=lambda: CURVES)
    pipeline.aligned = lambda: ModelRef(folder / "model", "d" * 64)
    pipeline.base = lambda: ModelRef(base, "b" * 64)

    @contextmanager
    def open_pipeline(path: Path, overrides: list[str], *_: Any) -> Iterator[SimpleNamespace]:
        pipeline.job = load_job(path, overrides)
        yield pipeline

    monkeypatch.setattr(cli, "open_pipeline", open_pipeline)
    sets = [word for override in words for word in ("--set", override)]
    done = CliRunner().invoke(cli.app, ["export", str(file), "out", *option, *sets], catch_exceptions=False)
    assert done.exit_code == 0
    expected = str(base) if name == "STAGE" else name
    assert PeftConfig.from_pretrained("out").base_model_name_or_path == expected
    assert f"Base model: `{expected}`." in Path("out/README.md").read_text()


def _without(toml: str, *sections: str) -> str:
    """A job file less some of its sections."""
    parts = re.split(r"(?m)^(?=\[)", toml)
    return "".join(part for part in parts if part.partition("]")[0].removeprefix("[") not in sections)


def _q_proj(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]


def test_a_checkpoint_without_settings_or_base_is_refused(
    write_checkpoint: Callable[..., tuple[Path, SDAR]], trained: Path, tmp_path: Path
) -> None:
    source, _ = write_checkpoint()
    trained.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=f"its base model {trained} is gone"):
        export_checkpoint(source, tmp_path / "out")
    record = json.loads((source / checkpoint.COMPLETE).read_text())
    del record["config"]
    (source / checkpoint.COMPLETE).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"COMPLETE is damaged \(lacks config\)"):
        export_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_half_made_has_the_final_name(trained: Path, tmp_path: Path, card: str) -> None:
    (trained / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        export_model(trained, tmp_path / "out", card, "bfloat16")
    assert not (tmp_path / "out").exists()
