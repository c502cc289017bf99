"""`[cluster]`: the machines and processes that do the work."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dtrpo_ray.config.section import Section

Workers = Annotated[int, Field(ge=1)]
NumWorkers = int | tuple[int, int]


class ClusterConfig(Section):
    """The machines and processes that do the work."""

    address: str = "local"
    """`local` starts Ray here; `auto` joins the cluster this job was submitted to."""
    num_workers: Workers | tuple[Workers, Workers] = 2
    """Ray Train workers; [fewest, most]: as many as the cluster has, changing when nodes come and go."""
    num_actors: int = Field(2, ge=1)
    """Actors that run prepare, rollout, drafts, score, pair, ref-logps and evaluation."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """auto: one GPU per worker if the cluster has any GPU now; yes: wait until the cluster has GPUs."""
    max_failures: int = Field(3, ge=0)
    """Restarts of a training stage from its last checkpoint; leaving a drained node is not counted."""
    hang_seconds: int = Field(1800, ge=5)
    """A worker that finishes no optimizer step or checkpoint for so long writes its stacks, exits and is restarted."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Trackers that receive the metrics of metrics.jsonl too; the package of each must be installed."""
    profile_steps: int = Field(0, ge=0)
    """Optimizer steps of rank 0 that torch's profiler traces, from the third of an attempt on."""
    checkpoints: str | None = None
    """Where training checkpoints go: a path or an s3:// or gs:// URI; absent: the stage's own folder."""

    @property
    def fewest_workers(self) -> int:
        """The number of workers, or the lower end of the range."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most_workers(self) -> int:
        """The number of workers, or the upper end of the range."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _rising(self) -> "ClusterConfig":
        if not isinstance(self.num_workers, int) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"num_workers = {list(self.num_workers)} must be [fewest, most]")
        return self
