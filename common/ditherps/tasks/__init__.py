"""Tasks: what is trained, on which data. One built-in task a file; `load_task` finds one by name.

A user's own task is a subclass of `Task` anywhere on the Python path. It is named on the command line of each end, and
never by a message: nothing that arrives is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Final

from ditherps.errors import OptionError, UserError
from ditherps.tasks.base import Keys, ModelSpec, Recipe, Samples, Task, Transform
from ditherps.tasks.cifar10 import Cifar10
from ditherps.tasks.digits import Digits
from ditherps.tasks.features import Features
from ditherps.tasks.mnist import fashion_mnist, mnist

__all__ = ["Features", "Keys", "ModelSpec", "Recipe", "Samples", "Task", "Transform", "load_task", "task_names"]

_BUILT_IN: Final[dict[str, Callable[[], Task]]] = {
    "digits": Digits,
    "mnist": mnist,
    "fashion-mnist": fashion_mnist,
    "cifar10": Cifar10,
}


def task_names() -> list[str]:
    """Names of the built-in tasks."""
    return list(_BUILT_IN)


def load_task(spec: str) -> Task:
    """A task by its name, or by where it is in the user's code.

    Args:
        spec: a built-in name, or `module:attribute` where the attribute is a `Task`, or something that makes one when
            called without arguments, such as a subclass. The module is looked for on the Python path, then in the
            working directory.

    Raises:
        OptionError: there is no built-in task of this name.
        UserError: the user's module cannot be imported, or holds no task there.
    """
    if spec in _BUILT_IN:
        return _BUILT_IN[spec]()
    module_name, colon, attribute = spec.partition(":")
    if not (module_name and colon and attribute):
        raise OptionError("task", spec, [*_BUILT_IN, "or module:attribute for one of your own"])
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a file that happens to lie here never hides an installed package
    try:
        found: object = getattr(importlib.import_module(module_name), attribute)
        task = found if isinstance(found, Task) or not callable(found) else found()
    except Exception as error:  # a user's module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"task {spec!r} cannot be loaded: {reason}") from error
    if not isinstance(task, Task):
        raise UserError(f"task {spec!r} is of type {type(task).__name__}, not a ditherps.tasks.Task")
    missing = [name for name in ("name", "classes", "models") if not getattr(task, name, None)]
    if missing:
        raise UserError(f"task {spec!r} does not set {', '.join(missing)}")
    return task
