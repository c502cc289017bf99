"""The README's map is the tree, its commands exist, and no page names a file that is not there."""

import re
import subprocess
import sys

from paths import ROOT

README = (ROOT / "README.md").read_text()


def test_the_map_is_the_package() -> None:
    block = README.split("```text\ndtrpo_ray/")[1].split("```")[0]
    mapped = set(re.findall(r"^  ([\w.]+(?:\.py|\.jinja|\.html|/)) ", block, flags=re.MULTILINE))
    package = ROOT / "dtrpo_ray"
    there = {
        p.name + ("/" if p.is_dir() else "")
        for p in package.iterdir()
        if not p.name.startswith("__") and p.name != "py.typed"
    }
    assert mapped == there - {"__pycache__/"}


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_links_to_files_hold() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_job_reference_is_what_the_types_say() -> None:
    words = [sys.executable, str(ROOT / "docs" / "jobs.py"), "--print"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said == (ROOT / "docs" / "jobs.md").read_text(), "run `python docs/jobs.py`"


def test_every_init_is_empty() -> None:
    assert all(not path.read_text() for path in (ROOT / "dtrpo_ray").rglob("__init__.py"))
