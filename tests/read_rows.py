"""The rows of a file or folder and those refused, as an import reads them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dtrpo_ray.data.formats.base import Format, split_rejected
from dtrpo_ray.data.formats.examples import example_format
from dtrpo_ray.data.formats.files import data_files
from dtrpo_ray.data.formats.preferences import preference_format
from dtrpo_ray.data.formats.prompts import prompt_format
from dtrpo_ray.data.formats.responses import response_format
from dtrpo_ray.data.tables import Rejected


def read_rows(format_of: Callable[[str], Format[Any]], where: str | Path) -> tuple[list[Any], list[Rejected]]:
    forms = ((format_of(file), file) for file in data_files(str(where)))
    return split_rejected(row for form, file in forms for shard in form.shards(file) for row in form.read(shard))


read_preferences = partial(read_rows, preference_format)
read_responses = partial(read_rows, response_format)
read_examples = partial(read_rows, example_format)
read_prompts = partial(read_rows, prompt_format)
