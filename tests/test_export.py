"""export: the folder holds the weights to the bit, what stood beside them, defaults, and a card with its lineage."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dtrpo_ray.config import Job, load_job
from dtrpo_ray.export import export_adapter, export_model
from dtrpo_ray.models.registry import load_model, save_model
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.tokenizer import character_tokenizer, load_tokenizer

MakeModel = Callable[..., SDAR]
LINEAGE: list[dict[str, Any]] = [
    {"stage": "train-1", "key": "0123456789abcdef", "outputs": {"model/config.json": "x"}, "summary": {"loss": 0.5}}
]
CURVES = {"train-1": [{"step": 1, "loss": 0.7}, {"step": 40, "loss": 0.512345678, "margin": 0.25}], "empty": []}


@pytest.fixture
def job() -> Job:
    return load_job(Path(__file__).parents[1] / "jobs" / "demo.toml")


@pytest.fixture
def trained(make_model: MakeModel, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(make_model(seed=4, torch_dtype="float32"), folder)
    character_tokenizer("abcdefghijklmnopqrstu").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def test_the_folder_is_the_model_and_what_it_came_with(trained: Path, tmp_path: Path, job: Job) -> None:
    out = tmp_path / "out"
    export_model(trained, out, job, LINEAGE, CURVES)
    before, after = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert {f.name for f in trained.iterdir()} | {"README.md", "generation_config.json"} == {
        f.name for f in out.iterdir()
    }
    assert load_tokenizer(out).encode("abc") == [0, 1, 2]
    defaults = json.loads((out / "generation_config.json").read_text())
    assert defaults == {"eos_token_id": 21, "pad_token_id": 21, "mask_token_id": 22, "block_length": 4} | {
        "denoising_steps": job.serve.denoising_steps
    }


def test_the_card_has_lineage_metrics_and_the_job(trained: Path, tmp_path: Path, job: Job) -> None:
    export_model(trained, tmp_path / "out", job, LINEAGE, CURVES)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: dtrpo_ray\ntags:")
    assert '| train-1 | 0123456789ab | 1 files | {"loss": 0.5} |' in card
    assert "| train-1 | 40 | 0.512346 | 0.25 |  |  |" in card
    resolved = json.loads(card.split("```json\n")[1].split("```")[0])
    assert Job.model_validate(resolved) == job


def test_a_releases_own_generation_defaults_stay(trained: Path, tmp_path: Path, job: Job) -> None:
    (trained / "generation_config.json").write_text('{"temperature": 0.7}')
    export_model(trained, tmp_path / "out", job, [], {})
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.7}


def test_another_dtype_rounds_and_says_so(trained: Path, tmp_path: Path, job: Job) -> None:
    out = tmp_path / "out"
    export_model(trained, out, job, [], {}, "bfloat16")
    before, after = load_file(trained / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(before[n].bfloat16(), after[n]) for n in before)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert {p.dtype for p in load_model(out, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_an_adapter_is_exported_with_its_base_named(tmp_path: Path, job: Job) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    based = job.model_copy(update={"model": job.model.model_copy(update={"path": Path("hub/SDAR-4B-Chat")})})
    export_adapter(adapter, tmp_path / "out", based, LINEAGE, CURVES)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"adapter_config.json", "README.md"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: SDAR-4B-Chat\nbase_model_relation: adapter\n")


def test_nothing_half_made_has_the_final_name(trained: Path, tmp_path: Path, job: Job) -> None:
    (trained / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        export_model(trained, tmp_path / "out", job, [], {}, "bfloat16")
    assert not (tmp_path / "out").exists()
