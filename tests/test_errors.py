"""errors: the tree is as drawn, and every error crosses a process with its message."""

import inspect
import pickle

import pytest

from dtrpo_ray import errors

TREE = {
    "DtrpoError": Exception,
    "ConfigError": ValueError,
    "DataError": ValueError,
    "ModelError": ValueError,
    "CheckpointError": ValueError,
    "TrainError": RuntimeError,
    "ServeError": RuntimeError,
    "SessionError": RuntimeError,
}
CLASSES = {name: c for name, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__}


def test_the_tree_is_as_drawn() -> None:
    assert set(CLASSES) == set(TREE)
    for name, stdlib in TREE.items():
        assert issubclass(CLASSES[name], errors.DtrpoError)
        assert issubclass(CLASSES[name], stdlib)
    children = {c.__name__ for c in errors.DtrpoError.__subclasses__() if c.__module__ == errors.__name__}
    assert children == set(TREE) - {"DtrpoError"}
    drawn = {word for word in (errors.__doc__ or "").split() if word.endswith("Error")}
    assert drawn == set(TREE)


@pytest.mark.parametrize("name", TREE)
def test_pickle_keeps_class_and_message(name: str) -> None:
    error = CLASSES[name]("job.toml: train.lr = -1; give a positive number")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is CLASSES[name]
    assert str(back) == str(error) == "job.toml: train.lr = -1; give a positive number"
    assert back.args == error.args
    assert "__init__" not in vars(CLASSES[name])
