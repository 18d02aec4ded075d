"""A user's own model by where its factory is: `package.module:factory` or `path/to/file.py:factory`."""

import importlib
import importlib.util
import sys
from pathlib import Path

from torch import nn

from robustav.classifier import Classifier


def from_factory(name: str) -> Classifier:
    """What the factory returns, a `Classifier`; raises `ValueError` with what went wrong."""
    where, _, attribute = name.rpartition(":")
    if where.endswith(".py"):
        path = Path(where)
        if not path.is_file():
            raise ValueError(f"model {name!r}: there is no file {str(path)!r}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Registered, so that the classes in it can be pickled; its folder on the path, so that it finds its neighbours.
        sys.modules.setdefault(path.stem, module)
        if (folder := str(path.parent.resolve())) not in sys.path:
            sys.path.insert(0, folder)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # a user's file may fail in any way, and the model cannot be had
            raise ValueError(f"model {name!r}: {path} failed with {type(error).__name__}: {error}") from error
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"model {name!r}: cannot import {error.name!r} (is it installed, or on PYTHONPATH?)"
            ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        public = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(f"model {name!r}: {where} has no callable {attribute!r}; it has {', '.join(public[:20])}")
    try:
        model = factory()
    except Exception as error:  # whatever a user's code raises, it is the model that cannot be had
        raise ValueError(f"model {name!r}: its factory failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, Classifier):
        kind = "an nn.Module" if isinstance(model, nn.Module) else f"a {type(model).__name__}"
        raise ValueError(
            f"model {name!r}: the factory must return a robustav Classifier, got {kind}. Wrap a network as "
            "robustav.classifier.Wrapped(network, specs={'audio': waveform(10.0)}, classes=(...), "
            "label_kind='multilabel')"
        )
    return model
