"""Private parts of Ray, DeepSpeed and torch are named in one file, and each of them is still there."""

import ast
import importlib
import logging
from pathlib import Path

from paths import ROOT

from dtrpo_ray import compat


def private_names(file: Path) -> list[str]:
    """Imports and string constants of a module that reach into a private part of Ray, DeepSpeed or torch."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            found.append(node.value)
    packages = ("ray.", "deepspeed.", "torch.")
    return [name for name in found if name.startswith(packages) and any(p[:1] == "_" for p in name.split("."))]


def test_no_other_module_names_a_private_part() -> None:
    files = sorted((ROOT / "dtrpo_ray").rglob("*.py"))
    assert [file.name for file in files if private_names(file)] == ["compat.py"]


def test_the_private_names_are_still_there() -> None:
    for name in private_names(ROOT / "dtrpo_ray" / "compat.py"):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
    progress = importlib.import_module(compat.RAY_DATA_PROGRESS_LOGGER)
    assert progress.logger is logging.getLogger(compat.RAY_DATA_PROGRESS_LOGGER)
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal import constants

    assert callable(TorchTrainer._create_default_callbacks)  # type: ignore[attr-defined]
    assert compat.RAY_TRAIN_SNAPSHOT == constants.CHECKPOINT_MANAGER_SNAPSHOT_FILENAME


def test_a_trainer_without_the_cleaner_keeps_its_other_callbacks() -> None:
    callbacks = importlib.import_module("ray.train.v2._internal.callbacks.placement_group_callback")
    cleaner = callbacks.PlacementGroupCleanerCallback()

    class Trainer:
        def _create_default_callbacks(self) -> list[object]:
            return ["first", cleaner, "last"]

    trainer = Trainer()
    compat.drop_placement_group_cleaner(trainer)
    assert trainer._create_default_callbacks() == ["first", "last"]
