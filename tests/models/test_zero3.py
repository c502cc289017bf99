"""ZeRO-3: two processes load a checkpoint in parts, compute what the whole model computes, train, and save it whole."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dtrpo_ray.models.registry import load_model

WORKER = Path(__file__).with_name("zero3_worker.py")
pytest.importorskip("deepspeed", reason="the ZeRO-3 tests need the extra `deepspeed`")


def run(folder: Path, out: Path, lora: str = "") -> list[dict[str, Any]]:
    out.mkdir()
    paths = {"PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", str(folder), str(out), lora],
            env=os.environ | paths,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        logs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def logps(folder: Path) -> list[float]:
    ids, at = torch.arange(16)[None] % 80, torch.arange(4)
    inputs = (ids, torch.arange(16)[None], torch.ones(1, 1, 16, 16, dtype=torch.bool), at * 0, at, at + 1)
    with torch.no_grad():
        return load_model(folder).eval()(*inputs).tolist()


@pytest.mark.parametrize(("model_type", "lora"), [("llada2_moe", ""), ("Fast_dLLM_Qwen", "lora")])
def test_a_sharded_load_is_the_whole_model(
    write_upstream: Callable[..., Path], tmp_path: Path, model_type: str, lora: str
) -> None:
    folder, out = write_upstream(model_type), tmp_path / "out"
    ranks = run(folder, out, lora)
    for rank in ranks:
        assert rank["held"] < 0.55 * rank["whole"]  # parts are padded to equal lengths
        assert rank["first"] == pytest.approx(logps(folder), abs=1e-5)
        assert rank["losses"][-1] < rank["losses"][0] - 0.01
        assert rank["step"] == 4
        assert rank["resumed"] == pytest.approx(rank["trained"], abs=1e-6)
        for reference in rank["reference"]:  # the base, whatever the adapters have learnt
            assert reference == pytest.approx(rank["first"], abs=1e-6)
    assert logps(out) == pytest.approx(ranks[0]["trained"], abs=1e-4)
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert {n for n in before if before[n].shape != after[n].shape} == set()
    if lora:
        embedding = "model.embed_tokens.weight"
        assert torch.equal(before[embedding], after[embedding])
        assert (out / "adapter_config.json").is_file()
