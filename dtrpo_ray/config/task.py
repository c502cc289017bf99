"""`[task]`: the source of the training data, a puzzle generator or files."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dtrpo_ray.config.section import Section


class TaskBase(Section):
    """The properties by which code tells tasks apart."""

    type: str
    brings_pairs: ClassVar[bool] = False
    brings_responses: ClassVar[bool] = False
    answer_tokens: ClassVar[int] = 1
    """Fewest tokens that hold an answer."""


class PuzzleTask(TaskBase):
    """A task that generates its prompts and verifies answers."""

    in_words: ClassVar[bool] = False
    """Needs a model's tokenizer, and is asked through its chat template where there is one."""
    public_tests: tuple[Path, ...] = ()
    """Public test files (JSONL with input and output); files that do not exist are skipped."""

    def options(self) -> dict[str, Any]:
        """Return the arguments of the puzzle's generator."""
        return self.model_dump(exclude={"type", "public_tests"})


class SudokuTask(PuzzleTask):
    """4x4 Sudoku puzzles, generated; 30 % of the grids are held out by hash."""

    answer_tokens: ClassVar[int] = 16
    type: Literal["sudoku"]
    blanks: tuple[int, int] = (4, 12)
    """Fewest and most blank cells of a generated puzzle."""

    @model_validator(mode="after")
    def _range(self) -> "SudokuTask":
        if not 1 <= self.blanks[0] <= self.blanks[1] <= 16:
            raise ValueError(
                f"blanks = {list(self.blanks)} must be [fewest, most], two rising numbers between 1 and 16"
            )
        return self


class CountdownTask(PuzzleTask):
    """Countdown: reach a target from numbers, each used once; generated, with variable-length answers."""

    type: Literal["countdown"]
    numbers: int = Field(3, ge=2, le=4)
    """How many numbers a puzzle gives."""


class ReviewsTask(PuzzleTask):
    """Opinions of some things, generated, with a reward for favourable ones; 30 % of sets of things are held out."""

    answer_tokens: ClassVar[int] = 3
    type: Literal["reviews"]
    things: int = Field(6, ge=1, le=8)
    """How many things a prompt names."""


class WordProblemsTask(PuzzleTask):
    """Word problems from templates, with answers in GSM8K's format; names, numbers and pairs of templates held out."""

    answer_tokens: ClassVar[int] = 8
    in_words: ClassVar[bool] = True
    type: Literal["word_problems"]
    steps: tuple[int, int] = (1, 2)
    """Fewest and most steps of a problem: [1, 1], [1, 2] or [2, 2]."""
    largest: int = Field(99, ge=12, le=999)
    """Largest number, given or computed, of a problem; the smallest is 2."""

    @model_validator(mode="after")
    def _range(self) -> "WordProblemsTask":
        if not 1 <= self.steps[0] <= self.steps[1] <= 2:
            raise ValueError(f"steps = {list(self.steps)} must be [1, 1], [1, 2] or [2, 2]")
        return self


class NoTask(TaskBase):
    """Nothing to align on: the job only trains [sft] on its own files. The same as no section [task]."""

    type: Literal["none"] = "none"


class Files(Section):
    """Files that a section reads, and what is taken of them."""

    files: tuple[str, ...] = Field(min_length=1)
    """Paths or URIs (s3://, gs://) of files or folders; the format is recognised by the columns (docs/data.md)."""
    max_prompt_tokens: int = Field(512, ge=1)
    """Longer prompts lose their oldest turns, or as text their beginning; they are counted."""
    max_response_tokens: int = Field(512, ge=1)
    """Rows with a longer response go to the quarantine file."""
    max_rows: int | None = Field(None, ge=1)
    """Read no more rows than this."""
    weights: tuple[float, ...] = ()
    """A mixture: a number for each of `files`; as many of their first rows are read as these proportions allow."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of columns: our name to the file's, as `{prompt = "question"}`."""
    ignore_columns: tuple[str, ...] = ()
    """Columns that are not part of a row's text, beside those that docs/data.md lists."""
    strict: bool = False
    """Stop at the first row that would go to the quarantine file."""

    @model_validator(mode="after")
    def _weigh_each(self) -> Self:
        if self.weights and len(self.weights) != len(self.files):
            raise ValueError(
                f"weights has {len(self.weights)} numbers for {len(self.files)} of files; give one for each"
            )
        if self.weights and min(self.weights) <= 0:
            raise ValueError(f"weights = {list(self.weights)} must be above 0; leave out a file that is not to be read")
        return self


class FilesTaskBase(TaskBase, Files):
    """A task that brings its data."""


class PreferencesTask(FilesTaskBase):
    """Preference pairs from files: no generator and no verifier, so no rollout, pairing or accuracy."""

    brings_pairs: ClassVar[bool] = True
    type: Literal["preferences"]


class TrajectoriesTask(FilesTaskBase):
    """Responses from files, with or without step maps: scored and paired here, no rollout and no accuracy."""

    brings_responses: ClassVar[bool] = True
    type: Literal["trajectories"]


class PromptsTask(FilesTaskBase):
    """Prompts from files, answered by the model itself ([rollout]) or by an ordinary one ([drafts]): no accuracy."""

    type: Literal["prompts"]


FilesTask = PreferencesTask | TrajectoriesTask | PromptsTask
Puzzle = SudokuTask | CountdownTask | ReviewsTask | WordProblemsTask
Task = Annotated[Puzzle | FilesTask | NoTask, Field(discriminator="type")]
