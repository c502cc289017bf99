"""The section `[model]`: the base model."""

from pathlib import Path

from pydantic import Field, model_validator

from dtrpo_ray.config.section import Section


class ModelInit(Section):
    """A randomly initialised model in the SDAR layout (Qwen3 trunk)."""

    hidden_size: int = Field(128, ge=8)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    intermediate_size: int = Field(256, ge=8)
    block_size: int = Field(4, ge=1)
    """Tokens of a block, on the global grid."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelInit":
        size, rest = divmod(self.hidden_size, self.num_heads)
        if rest or size % 2:
            raise ValueError(
                f"hidden_size = {self.hidden_size} gives {self.num_heads} heads {self.hidden_size / self.num_heads:g} "
                "units each; it must be an even whole number"
            )
        return self

    def sizes(self) -> dict[str, int]:
        """Return the sizes by their names in config.json."""
        return {
            **self.model_dump(include={"hidden_size", "intermediate_size", "block_size"}),
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_heads,
            "head_dim": self.hidden_size // self.num_heads,
        }


class ModelConfig(Section):
    """The source of the base model: a directory, or a random initialisation that [sft] trains."""

    path: Path | None = None
    """A model directory (config.json, model.safetensors, tokenizer)."""
    init: ModelInit | None = None
    """Sizes of a new model."""
    tokenizer: Path | None = None
    """A tokenizer directory for `init`; a puzzle task makes its own if absent."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of model.path and model.init")
        if self.path is not None and self.tokenizer is not None:
            raise ValueError("model.tokenizer goes with model.init; model.path brings its own tokenizer")
        return self
