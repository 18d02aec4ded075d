"""Code of the user's own by where it is: `package.module:name` or `path/to/file.py:name`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def imported(name: str, what: str) -> Callable[..., Any]:
    """The callable of that name; raises `ValueError` that speaks of `what` and says what went wrong."""
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise ValueError(f"{what} {name!r}: there is no file {str(path)!r}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Registered, so that the classes in it can be pickled; its folder on the path, so that it finds its neighbours.
        sys.modules.setdefault(path.stem, module)
        if (folder := str(path.parent.resolve())) not in sys.path:
            sys.path.insert(0, folder)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a user's file may fail in any way, and nothing of it can be had
            raise ValueError(f"{what} {name!r}: {path} failed with {type(error).__name__}: {error}") from error
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{what} {name!r}: cannot import {error.name!r} (is it installed, or on PYTHONPATH?)"
            ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        public = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(f"{what} {name!r}: {where} has no callable {attribute!r}; it has {', '.join(public[:20])}")
    return found


def file_of(name: str) -> Path:
    """The file that such a name is looked up in."""
    where = name.rpartition(":")[0]
    return Path(where if where.endswith(".py") else str(importlib.import_module(where).__file__))
