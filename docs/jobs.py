"""Write docs/jobs.md, the reference of a job file, from the types in `dtrpo_ray/config` (`--print`: to stdout)."""

import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dtrpo_ray.config.job import Job

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# The job file, field by field

`python docs/jobs.py` writes this page from the types in [dtrpo_ray/config](../dtrpo_ray/config), and a test compares
them. A job is TOML. Every field can be overridden with `--set section.field=value`. An unknown field, a wrong type or
an impossible combination gives one message and exit code 2, before anything starts.
"""


def sections(model: type[BaseModel], path: str = "", variant: str = "") -> list[str]:
    """Markdown of one section's fields, then of the sections inside it."""
    title = f"## `[{path}]`" if path else "## The top of the file"
    title += f' with `type = "{variant}"`' if variant else ""
    lines = [title, "", (model.__doc__ or "").strip(), "", "| field | type | default | meaning |", "|---|---|---|---|"]
    inner: list[str] = []
    for name, field in model.model_fields.items():
        nested = [t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)]
        if nested:
            for section in nested:
                tag = get_args(section.model_fields["type"].annotation)[0] if len(nested) > 1 else ""
                inner += sections(section, f"{path}.{name}".lstrip("."), tag)
            continue
        meaning = (field.description or "").replace("\n", " ").replace("|", "\\|")
        default = field.get_default(call_default_factory=True)
        lines.append(f"| `{name}` | {_type(field.annotation)} | {_default(default)} | {meaning} |")
    return [*lines, "", *inner]


def _is_section(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def _type(annotation: Any) -> str:
    """A type as a reader of TOML thinks of it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{a!r}`".replace("'", '"') for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a) for a in args if a is not type(None))
    if origin is tuple:
        return "list of " + _type(args[0])
    if hasattr(annotation, "__metadata__"):
        return _type(args[0])
    return {"int": "integer", "float": "number", "str": "text", "bool": "true or false", "Path": "path"}.get(
        annotation.__name__, annotation.__name__
    )


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or value in ("", ()):
        return "-"
    if isinstance(value, str) and "\n" in value:
        return f"a text of {len(value.splitlines())} lines, in `dtrpo_ray/config`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *sections(Job)]).rstrip() + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(page())
    else:
        PAGE.write_text(page())
