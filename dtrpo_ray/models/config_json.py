"""Read the JSON files of a model directory, with errors that name the file or the key and its value."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrpo_ray.errors import ModelError


class ConfigJson(dict[str, Any]):
    """The keys of a `config.json`; an absent key and null mean the same to every reader."""

    def __init__(self, keys: Mapping[str, Any], family: str = "") -> None:
        super().__init__(keys)
        self.family = family  # not `model_type`: peft would read that attribute of a model's config

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer, or the family's constant if the key is absent."""
        value = default if self.get(key) is None else self[key]
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, "an integer", value)
        return value

    def integers(self, key: str, default: int | None = None) -> list[int]:
        """Return the integers of a key that holds one or a list."""
        value = self.get(key)
        if not isinstance(value, list):
            return [self.integer(key, default)]
        if not value:
            raise self.error(key, "at least one id", value)
        return [ConfigJson({key: each}, self.family).integer(key) for each in value]

    def number(self, key: str) -> float:
        """Return a positive number. It has no default: a model with a guessed number loads, and computes noise."""
        value = self.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.error(key, "a number above 0", value, "; copy it from the release's")
        return float(value)

    def rope_parameters(self) -> dict[str, Any]:
        """Return the rotary positions in the form of transformers 5; earlier `rope_theta` was a key of its own."""
        given = self.get("rope_scaling") or self.get("rope_parameters") or {"rope_type": "default"}
        theta = given.get("rope_theta") if self.get("rope_theta") is None else self["rope_theta"]
        return {**given, "rope_theta": ConfigJson({"rope_theta": theta}, self.family).number("rope_theta")}

    def refuse(self, **supported: tuple[Any, ...]) -> None:
        """Raise ModelError for a key whose value changes the architecture; an absent key means the first value."""
        for key, allowed in supported.items():
            value = self.get(key)
            if value is not None and value not in allowed:
                known = " or ".join(map(repr, allowed))
                raise ModelError(f"config.json: {key} = {value!r} is not supported for {self.family}; only {known} is")

    def error(self, key: str, needed: str, value: Any, remedy: str = "") -> ModelError:
        """Make the error of a value that this family cannot use."""
        return ModelError(f"config.json: {key} = {value!r}; a config of {self.family} needs {needed} here{remedy}")


def read_model_json(file: Path) -> Mapping[str, Any]:
    """Read a JSON object; {} if there is no such file. Raises ModelError naming the file."""
    try:
        value = json.loads(file.read_text()) if file.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: not a JSON object; fetch the file again")
    return value
