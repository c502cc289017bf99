"""`[serve]`: the HTTP endpoint."""

import os
from pathlib import Path

from pydantic import Field, model_validator

from dtrpo_ray.config.section import Section

KEY_VARIABLE = "DTRPO_API_KEY"  # environment variable: API keys separated by commas


class ServeConfig(Section):
    """The HTTP endpoint. It listens on loopback unless a host is given."""

    checkpoint: str = ""
    """A model directory; empty: the aligned model of this job."""
    model_name: str = "dtrpo"
    """The name clients ask for."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    other_models: dict[str, str] = Field({})
    """Further models of the endpoint by name: a model directory, or a LoRA adapter on `checkpoint`'s weights."""
    num_replicas: int = Field(1, ge=0)
    """Number of replicas; with max_replicas, the lower bound: at 0, the first request starts one."""
    max_replicas: int | None = Field(None, ge=1)
    """Upper bound of replicas; between the bounds their number follows the running requests."""
    max_batch: int = Field(64, ge=1)
    """Choices that one replica decodes side by side; others wait."""
    cache_tokens: int = Field(65536, ge=1)
    """Tokens whose keys and values a replica keeps, running requests included."""
    denoising_steps: int = Field(4, ge=1)
    """Denoising steps per block, unless a request sets `steps`."""
    max_new_tokens: int = Field(1024, ge=1)
    """Most tokens a request may ask for."""
    api_key_file: Path | None = None
    """A file of keys, one a line. Listening beyond loopback needs this or DTRPO_API_KEY."""

    @model_validator(mode="after")
    def _open_only_with_a_key(self) -> "ServeConfig":
        has_keys = self.api_key_file is not None or os.environ.get(KEY_VARIABLE, "").strip(" ,")
        if self.host not in ("127.0.0.1", "localhost", "::1") and not has_keys:
            raise ValueError(
                f"serve.host = {self.host!r} is open to the network: set serve.api_key_file or {KEY_VARIABLE} too"
            )
        most = self.max_replicas or self.num_replicas
        if self.num_replicas > most or not most:
            raise ValueError(
                f"serve.num_replicas = {self.num_replicas} needs serve.max_replicas >= {max(self.num_replicas, 1)}"
            )
        if self.model_name in self.other_models:
            raise ValueError(f"serve.other_models names {self.model_name!r} again; give each model its own name")
        return self
