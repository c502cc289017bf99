"""Each policy on a block written by hand, and the two rules that hold for all of them."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrpo_ray.decode.policies import POLICIES, Candidates, apply_policy

ROOT = Path(__file__).parents[2]
PROBS = [0.5, 0.9, 0.2, 0.7, 0.95]  # the last is not masked
ENTROPY = [0.9, 0.2, 1.5, 0.4, 0.1]
MASKED = [True, True, True, True, False]


def taken(name: str, amount: float, left: int = 4) -> list[int]:
    masked = torch.tensor([MASKED])
    confidence = torch.tensor([PROBS]).log().masked_fill(~masked, -math.inf)
    entropy = torch.tensor([ENTROPY]).masked_fill(~masked, math.inf)
    candidates = Candidates(masked, confidence, entropy, torch.tensor([left]))
    take = apply_policy(POLICIES[name], candidates, torch.tensor([amount], dtype=torch.float64))
    return take[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("name", "amount", "expected"),
    [
        ("low_confidence_static", 1, [0, 1, 2, 3]),
        ("low_confidence_static", 2, [1, 3]),
        ("low_confidence_static", 3, [1, 3]),
        ("low_confidence_static", 9, [1]),
        ("low_confidence_dynamic", 0.6, [1, 3]),
        ("low_confidence_dynamic", 0.99, [1]),
        ("low_confidence_top_k", 1, [1]),
        ("low_confidence_top_k", 3, [0, 1, 3]),
        ("low_confidence_top_k", 99, [0, 1, 2, 3]),
        ("entropy_bounded", 0.0, [1]),
        ("entropy_bounded", 0.2, [1, 3]),  # 0.2 <= bound: the sum less the largest
        ("entropy_bounded", 0.61, [0, 1, 3]),
        ("entropy_bounded", 1.5, [0, 1, 2, 3]),
        ("sequential", 1, [0, 1, 2, 3]),
        ("sequential", 2, [0, 1]),
        ("sequential", 4, [0]),
    ],
)
def test_what_a_policy_takes(name: str, amount: float, expected: list[int]) -> None:
    assert taken(name, amount) == expected


@pytest.mark.parametrize("name", ["low_confidence_static", "sequential"])
def test_steps_are_shared_out_over_the_block_and_not_the_sub_block(name: str) -> None:
    """12 masks of which 4 may be taken: in 4 steps 3 each, in 6 two, in 2 all 4 of the 6 that would be due."""
    assert [len(taken(name, steps, left=12)) for steps in (4, 6, 2)] == [3, 2, 4]


@given(data=st.data(), name=st.sampled_from(sorted(POLICIES)), rows=st.integers(1, 3), size=st.integers(1, 6))
def test_only_masked_tokens_and_at_least_one(data: st.DataObject, name: str, rows: int, size: int) -> None:
    flags = data.draw(st.lists(st.lists(st.booleans(), min_size=size, max_size=size), min_size=rows, max_size=rows))
    levels = st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=size, max_size=size)
    masked = torch.tensor(flags)
    confidence = torch.tensor([data.draw(levels) for _ in range(rows)]).log().masked_fill(~masked, -math.inf)
    entropy = (-confidence).masked_fill(~masked, math.inf)
    amount = torch.tensor([data.draw(st.sampled_from([0.0, 0.3, 1.0, 2.0, 50.0]))] * rows, dtype=torch.float64)
    left = masked.sum(-1) + data.draw(st.integers(0, 9))
    take = apply_policy(POLICIES[name], Candidates(masked, confidence, entropy, left), amount)
    assert not (take & ~masked).any()
    assert torch.equal(take.any(1), masked.any(1))


NEW_POLICY = '''

def rightmost(candidates: Candidates, amount: Tensor) -> Tensor:
    """Unmask from right to left."""
    right = candidates.masked.flip(-1).cumsum(-1).flip(-1)
    return candidates.masked & (right <= _share(candidates, amount)[:, None])
'''
DECODE_WITH_IT = """
from pydantic import ValidationError
from dtrpo_ray.config.decode import RolloutConfig
from dtrpo_ray.decode.decoder import decode_all
from dtrpo_ray.models.sdar import SDAR
from dtrpo_ray.produce.rollout import sampling_params
from dtrpo_ray.serve.api import CompletionRequest
from dtrpo_ray.decode.types import to_params
from tests.serve.test_app import CONFIG

rollout = RolloutConfig(remasking="rightmost", denoising_steps=(4,), temperature=1.0, max_new_tokens=8)
request = CompletionRequest(prompt="0", remasking="rightmost", steps=4)
for params in (sampling_params(rollout), to_params(request, max_new_tokens=8, denoising_steps=request.steps)):
    (made,) = decode_all(SDAR(CONFIG).eval(), [[]], params.model_copy(update={"ignore_eos": True}), [0])
    assert made.steps == [3, 2, 1, 0, 7, 6, 5, 4], made.steps
assert "rightmost" in str(CompletionRequest.model_json_schema()["properties"]["remasking"])
try:
    CompletionRequest(prompt="0", remasking="rightmost", threshold=0.5)
except ValidationError as error:
    assert "threshold = 0.5 and remasking = rightmost exclude each other" in str(error)
else:
    raise AssertionError("two policies at once")
"""


def test_a_new_policy_is_one_function_and_one_line(tmp_path: Path) -> None:
    """A copy of the package with both: job files, the HTTP API and the decoder know the policy."""
    shutil.copytree(ROOT / "dtrpo_ray", tmp_path / "dtrpo_ray", ignore=shutil.ignore_patterns("__pycache__"))
    policies, config = (tmp_path / "dtrpo_ray" / name for name in ("decode/policies.py", "config/decode.py"))
    text = policies.read_text()
    policies.write_text(text.replace("\n\ndef _share(", f"{NEW_POLICY}\n\ndef _share("))
    line = '    "sequential": STEPS,\n'
    config.write_text(config.read_text().replace(line, f'{line}    "rightmost": STEPS,\n'))
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code = [sys.executable, "-P", "-c", DECODE_WITH_IT]
    done = subprocess.run(code, env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
