"""A growing metrics file -> a progress bar on a terminal, plain lines elsewhere."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dtrpo_ray.metrics import read_events, read_metrics

console = Console(stderr=True)
PLAIN_LINES = 10  # lines a stage prints where there is no terminal
_SHOWN = ("loss", "margin", "reward_accuracy", "nll", "nll_chosen", "held_out_loss")


def bar() -> Progress:
    """The one look of all progress bars; none where there is no terminal."""
    columns = (TextColumn("[bold]{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    note = TextColumn("{task.fields[note]}")
    return Progress(*columns, TimeRemainingColumn(), note, console=console, disable=not console.is_terminal)


@contextmanager
def watch(metrics: Path, label: str, total: int, events: Path) -> Iterator[None]:
    """Follow a metrics file, and print what is appended to an events file, from a thread until the block ends."""
    stop, known = threading.Event(), len(read_events(events))
    thread = threading.Thread(target=_follow, args=(metrics, label, total, stop, events, known), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _follow(metrics: Path, label: str, total: int, stop: threading.Event, events: Path, known: int) -> None:
    seen, printed = 0, 0
    with bar() as progress:
        task = progress.add_task(label, total=total, note="")
        while True:
            last = stop.wait(0.5)
            for event in read_events(events)[known:]:
                known += 1
                console.print(f"{label}: {event['message']}", markup=False, highlight=False, soft_wrap=True)
            for row in read_metrics(metrics):
                if row["step"] <= seen:
                    continue
                seen = int(row["step"])
                note = "  ".join(f"{name} {row[name]:.3f}" for name in _SHOWN if name in row)
                progress.update(task, completed=seen, note=note)
                if not console.is_terminal and seen * PLAIN_LINES // total > printed:
                    printed = seen * PLAIN_LINES // total
                    console.print(f"{label}: step {seen}/{total}  {note}", highlight=False, soft_wrap=True)
            if last:
                return
