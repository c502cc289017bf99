"""The wheel holds the package and the files it reads at run time, and nothing else of the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

from paths import ROOT

REPORT = ("page.html.jinja", "plots.mplstyle", "light.mplstyle", "dark.mplstyle")
TEMPLATES = ("config/judge.txt", "serve/playground.html", "train/card.md.jinja")
READ = ("py.typed", *TEMPLATES, *(f"report/{name}" for name in REPORT))
NOT_CODE = {f"dtrpo_ray/{name}" for name in READ}


def test_the_wheel_holds_the_package_whole_and_no_benchmarks(tmp_path: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "dtrpo_ray", "README.md", "LICENSE", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    source = tmp_path / "source"
    for name in tracked:  # a copy: building leaves folders behind
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*words, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == {name for name in tracked if name.endswith(".py")} | NOT_CODE
