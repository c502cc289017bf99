"""Metrics rows -> TensorBoard, Weights & Biases, MLflow: by name, imported only here and only if named.

The JSON lines of `metrics` are always written; a tracker that fails is dropped with a warning, a run never is.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from dtrpo_ray.errors import ConfigError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """Takes the numbers of an optimizer step."""

    def write(self, step: int, numbers: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, run: str, folder: Path, config: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", str(config))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class _WandB:
    """Project and entity come from WANDB_PROJECT and WANDB_ENTITY; the same stage is the same run after a resume."""

    def __init__(self, run: str, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "dtrpo")
        self.run = wandb.init(id=run, name=run, project=project, resume="allow", dir=str(folder), config=config)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(numbers, step=step)

    def close(self) -> None:
        self.run.finish()


class _MLflow:
    """The server comes from MLFLOW_TRACKING_URI, else a folder in the stage's; the run is found again by its name."""

    def __init__(self, run: str, folder: Path, config: dict[str, Any]) -> None:
        import mlflow

        self.mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri((folder / "mlflow").resolve().as_uri())
        found = mlflow.search_runs(filter_string=f"attributes.run_name = '{run}'", output_format="list")
        mlflow.start_run(run_id=found[0].info.run_id if found else None, run_name=run)
        if not found:
            mlflow.log_params({name: str(value)[:500] for name, value in config.items()})

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self.mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


_KINDS: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow}


class Trackers:
    """All trackers of a run; `warn` is called once for each that fails."""

    def __init__(
        self, names: Sequence[str], run: str, folder: Path, config: dict[str, Any], warn: Callable[[str], None]
    ) -> None:
        require(names)
        self.warn, self.open = warn, dict[str, Tracker]()
        for name in names:
            with self._drop_on_failure(name, "from the start"):
                self.open[name] = _KINDS[name](run, folder, config)

    def write(self, row: dict[str, float]) -> None:
        """Hand the numbers of a metrics row to every tracker."""
        step = int(row["step"])
        numbers = {name: float(value) for name, value in row.items() if name != "step"}
        for name, tracker in list(self.open.items()):
            with self._drop_on_failure(name, f"from step {step} on"):
                tracker.write(step, numbers)

    def close(self) -> None:
        """Flush every tracker."""
        for name, tracker in list(self.open.items()):
            with self._drop_on_failure(name, "at the end"):
                tracker.close()

    @contextmanager
    def _drop_on_failure(self, name: str, when: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.warn(f"tracker {name} failed and is off {when}: {error}")
            self.open.pop(name, None)


def require(names: Sequence[str]) -> None:
    """Raise ConfigError, before anything runs, for a tracker whose package is missing."""
    from importlib.util import find_spec

    for name in names:
        if PACKAGES[name] not in sys.modules and find_spec(PACKAGES[name]) is None:
            raise ConfigError(f"cluster.trackers: {name} is not installed; pip install {PACKAGES[name]}")
