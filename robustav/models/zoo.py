"""Models by name, and a user's own by where its factory is."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from robustav.classifier import Classifier, Wrapped
from robustav.data.av_events import AvEventsConfig
from robustav.models import small
from robustav.models.checkpoints import digest_of_file, load_into, read_card, read_checkpoint

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Entry:
    """A row of `MODELS`: how to build it, what it is, and where it comes from."""

    build: Callable[[], Classifier]
    summary: str
    source: str
    weights: str = ""  # file beside this one, if weights ship with the package

    @property
    def path(self) -> Path:
        return WEIGHTS / self.weights


def _embedded(build: Callable[..., Classifier], *modalities: str) -> Callable[[], Classifier]:
    """A network for the default av-events, of the modalities named."""
    config = AvEventsConfig()
    return lambda: build({m: config.specs[m] for m in modalities}, config.class_names)


BOTH = ("audio", "visual")
OURS = "robustav, trained on av-events"
MODELS: dict[str, Entry] = {
    "audio-cnn": Entry(_embedded(small.late, "audio"), "log-mel CNN, hears only", OURS, "audio-cnn.safetensors"),
    "visual-cnn": Entry(_embedded(small.late, "visual"), "CNN over frames, sees only", OURS, "visual-cnn.safetensors"),
    "av-early": Entry(
        _embedded(small.EarlyFusion, *BOTH), "maps of both on one grid, one CNN", OURS, "av-early.safetensors"
    ),
    "av-mid": Entry(
        _embedded(small.MidFusion, *BOTH), "CNN each, then a joint transformer", OURS, "av-mid.safetensors"
    ),
    "av-fusion": Entry(_embedded(small.late, *BOTH), "late fusion: CNN each, one head", OURS, "av-fusion.safetensors"),
}


def load_model(
    name: str, checkpoint: Path | str | None = None, *, trust_pickle: bool = False
) -> tuple[Classifier, dict[str, Any]]:
    """A model in eval mode, and what a report should say of it.

    `name` is a key of `MODELS`, or `package.module:factory` or `path/to/file.py:factory` for a user's own: a callable
    without arguments that returns a `Classifier`. `checkpoint` replaces the weights. Raises `ValueError` naming what
    was expected and what came.
    """
    about: dict[str, Any] = {"model": name}
    if name in MODELS:
        entry = MODELS[name]
        model = entry.build()
        about |= {"summary": entry.summary, "source": entry.source}
        if entry.weights and checkpoint is None:
            about["card"] = read_card(entry.path)
            load_into(model, read_checkpoint(entry.path), entry.weights)
    elif ":" in name:
        model = _from_factory(name)
    else:
        raise ValueError(
            f"no model {name!r}: give one of {', '.join(MODELS)}, or your own as package.module:factory or file.py:factory"
        )
    if checkpoint is not None:
        # A user's own weights were saved from the network, before it was wrapped.
        load_into(
            model.network if isinstance(model, Wrapped) else model,
            read_checkpoint(checkpoint, trust_pickle=trust_pickle),
            str(checkpoint),
        )
        about |= {"checkpoint": Path(checkpoint).name, "checkpoint_sha256": digest_of_file(checkpoint)}
    return model.eval(), about


def _from_factory(name: str) -> Classifier:
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
