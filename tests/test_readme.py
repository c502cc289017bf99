"""The README's map is the tree, its commands exist, and no page names a file that is not there."""

import re
import subprocess
import sys
from pathlib import Path

from paths import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "cluster" / "README.md", *(ROOT / "docs").glob("*.md")]
PAGES += (ROOT / "benchmarks" / "results").glob("*.md")


def folders(parent: Path) -> set[str]:
    return {f"{p.name}/" for p in parent.iterdir() if p.is_dir() and p.name != "__pycache__"}


def test_the_map_has_every_folder() -> None:
    block = README.split("```text\ndtrpo_ray/")[1].split("```")[0]
    assert set(re.findall(r"^  (\w+/) ", block, flags=re.MULTILINE)) == folders(ROOT / "dtrpo_ray")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] + "/" for line in tracked.splitlines() if "/" in line and not line.startswith(".")}
    assert {"dtrpo_ray/", *re.findall(r"^(\w+/) ", block, flags=re.MULTILINE)} == top


def test_pages_name_modules_and_functions_that_exist() -> None:
    """`trajectory.py` and `models/base.py:DiffusionLM` are files of the repository and names in them."""
    tops = ("dtrpo_ray", "tests", "jobs", "docs", "benchmarks", "cluster")
    modules = {str(p.relative_to(ROOT)): p.read_text() for top in tops for p in (ROOT / top).rglob("*.py")}
    for page in PAGES:
        if page.name == "upstream.md":  # it names files of other repositories
            continue
        for name, symbol in re.findall(r"`([a-z_/0-9]+\.py)(?::(?:\w+\.)?(\w+))?", page.read_text()):
            texts = [text for path, text in modules.items() if f"/{path}".endswith(f"/{name}")]
            assert texts, f"{page.name}: {name}"
            known = rf"(def |class |^ *){symbol}\b"
            found = not symbol or any(re.search(known, text, re.MULTILINE) for text in texts)
            assert found, f"{page.name}: {name}:{symbol}"


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_links_to_files_hold() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_job_reference_is_what_the_types_say() -> None:
    words = [sys.executable, str(ROOT / "docs" / "jobs.py"), "--print"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said == (ROOT / "docs" / "jobs.md").read_text(), "run `python docs/jobs.py`"


def test_every_init_is_empty() -> None:
    assert all(not path.read_text() for path in (ROOT / "dtrpo_ray").rglob("__init__.py"))
