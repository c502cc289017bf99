"""The `dtrpo` command from a working directory: `ray job submit ... -- python jobs/run.py VERB jobs/NAME.toml`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the uploaded working directory need not be installed

from dtrpo_ray.cli import main

if __name__ == "__main__":
    main()
