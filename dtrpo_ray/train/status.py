"""The folder of a training stage -> how it stands: running, cut off or finished; checkpoints; what went wrong so far.

Reads files only, so it works while the run is live, after it, and where neither Ray nor torch is installed.
"""

import json
import time
from pathlib import Path
from typing import Any

from dtrpo_ray.errors import CheckpointError, DataError
from dtrpo_ray.metrics import EVENTS, METRICS, RUN, read_metrics
from dtrpo_ray.stages import MANIFEST
from dtrpo_ray.train import checkpoint

QUIET_SECONDS = 300  # a run that has written nothing for so long, or for three of its own metric lines, is cut off
SHOWN_EVENTS = 10


def status(run: Path, check: bool = False) -> dict[str, Any]:
    """A JSON-able description; `check` reads every byte of every checkpoint instead of its COMPLETE alone.

    Raises DataError where the folder is no training stage.
    """
    try:
        record = json.loads((run / RUN).read_text())
        label, where = record["label"], record["checkpoints"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{run}: not a training stage (no readable {RUN}); they lie in STORAGE/stages") from None
    rows, events = read_metrics(run / METRICS), read_metrics(run / EVENTS)
    begun = [event for event in events if event["event"] in ("start", "resume")]
    quiet = time.time() - max((f.stat().st_mtime for f in (run / METRICS, run / EVENTS) if f.exists()), default=0)
    finished = (run / MANIFEST).exists()
    kinds = [event["event"] for event in events]
    return {
        "run": str(run),
        "label": label,
        "state": "finished" if finished else "running" if quiet < _quiet_limit(rows) else "cut off",
        "quiet_seconds": round(quiet, 1),
        "step": rows[-1]["step"] if rows else 0,
        "num_steps": begun[-1].get("num_steps") if begun else None,
        "num_workers": begun[-1].get("num_workers") if begun else None,
        "attempts": len(begun),
        "counts": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "metrics": rows[-1] if rows else {},
        "checkpoints": _checkpoints(checkpoint.root_of(run, where), check),
        "events": events[-SHOWN_EVENTS:],
    }


def _quiet_limit(rows: list[dict[str, Any]]) -> float:
    if len(rows) < 2:
        return QUIET_SECONDS
    return max(QUIET_SECONDS, 3 * (rows[-1]["step"] - rows[-2]["step"]) * rows[-1].get("step_seconds", 0))


def _checkpoints(root: str, check: bool) -> list[dict[str, Any]]:
    filesystem, path = checkpoint.open_storage(root)
    found = []
    for place in checkpoint.places(filesystem, path):
        try:
            facts = (checkpoint.verify if check else checkpoint.facts_of)(filesystem, place)
            workers, problem = facts["num_workers"], None
        except (CheckpointError, OSError) as error:
            workers, problem = None, str(error)
        measured = checkpoint.validation_of(filesystem, place) or {}
        row = {"path": place.path, "step": place.step, "num_workers": workers, "problem": problem}
        found.append({**row, "validation": measured})
    return found


def status_text(value: dict[str, Any]) -> str:
    """The description for people."""
    of = f" of {value['num_steps']}" if value["num_steps"] else ""
    lines = [f"{value['label']}: {value['state']}, step {value['step']}{of}, {value['attempts']} attempt(s)"]
    lines[0] += f", last sign of life {value['quiet_seconds']:.0f} s ago" if value["state"] != "finished" else ""
    shown = [f"{name} {number:.4g}" for name, number in value["metrics"].items() if name not in ("step", "seconds")]
    lines.append("  " + "  ".join(shown))
    for item in value["checkpoints"]:
        told = item["problem"] or f"whole, written by {item['num_workers']} worker(s)"
        told += "".join(f", {name} {number:.4g}" for name, number in item["validation"].items())
        lines.append(f"  checkpoint {Path(item['path']).name}: {told}")
    for event in value["events"]:
        lines.append(f"  {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event['time']))}  {event['message']}")
    return "\n".join(lines)
