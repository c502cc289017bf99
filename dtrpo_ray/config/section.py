"""The base of every section: frozen, no unknown field, no quoted number."""

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def changed_fields(self) -> set[str]:
        """Return the fields that were given another value than their default."""
        fields = type(self).model_fields
        given = {name: (getattr(self, name), fields[name].get_default(call_default_factory=True)) for name in fields}
        return {name for name, (value, default) in given.items() if value != default}

    @model_validator(mode="before")
    @classmethod
    def _as_written(cls, values: Any) -> Any:
        """pydantic would read true as 1, and "3" or "yes" as a number or a truth: here they are mistakes."""
        for name, value in values.items() if isinstance(values, dict) else ():
            plain = kinds(cls.model_fields[name].annotation) - {type(None)} if name in cls.model_fields else {object}
            quoted = isinstance(value, str) and (bool in plain or not value.isalpha())
            if plain <= {int, float, bool} and (quoted or (isinstance(value, bool) and bool not in plain)):
                wanted = "true or false" if bool in plain else "a number"
                raise ValueError(f"{name} = {value!r} must be {wanted}, written without quotes")
        return values


def kinds(annotation: Any) -> set[Any]:
    """Return the plain types and sections that an annotation allows."""
    parts = get_args(annotation)
    if not parts or get_origin(annotation) not in (Union, UnionType, Annotated):
        return {annotation}
    return set().union(*map(kinds, parts[:1] if get_origin(annotation) is Annotated else parts))
