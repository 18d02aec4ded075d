"""Models by name: embedded with their weights, published, a user's own."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from robustav.classifier import AtFeatures, Classifier, Wrapped
from robustav.data.av_events import AvEventsConfig
from robustav.models import published, small
from robustav.models.asked import Asked, parse_model, task_of
from robustav.models.body_and_head import BodyAndHead
from robustav.models.checkpoints import digest_of_file, load_into, read_card, read_checkpoint
from robustav.models.entry import Entry, Published, Task
from robustav.models.factory import from_factory
from robustav.models.fit import classes_in, resampled_tables, weightless

BOTH = ("audio", "visual")
OF_TIMM = ("frames", "size", "classes", "label_kind")  # settings


def _embedded(build: Callable[..., Classifier], summary: str, name: str, *modalities: str) -> Entry:
    """A network for the default av-events, of the modalities named, with the weights that ship."""
    config = AvEventsConfig()
    task = Task(config.class_names, "multilabel", config.seconds, config.frames, config.frame_size)
    return Entry(
        lambda task: build({m: config.specs[m] for m in modalities}, task.classes),
        summary,
        "robustav, trained on av-events",
        weights=f"{name}.safetensors",
        task=task,
    )


EMBEDDED: dict[str, Entry] = {
    "audio-cnn": _embedded(small.late, "log-mel CNN, hears only", "audio-cnn", "audio"),
    "visual-cnn": _embedded(small.late, "CNN over frames, sees only", "visual-cnn", "visual"),
    "av-early": _embedded(small.EarlyFusion, "maps of both on one grid, one CNN", "av-early", *BOTH),
    "av-mid": _embedded(small.MidFusion, "CNN each, then a joint transformer", "av-mid", *BOTH),
    "av-fusion": _embedded(small.late, "late fusion: CNN each, one head", "av-fusion", *BOTH),
}
MODELS: dict[str, Entry] = {**EMBEDDED, **published.MODELS}


def load_model(
    name: str, checkpoint: Path | str | None = None, *, trust_pickle: bool = False
) -> tuple[Classifier, dict[str, Any]]:
    """A model in eval mode, and what a report should say of it.

    `name` is a key of `MODELS`; `trained:FOLDER`, where `robustav train` left one; `hf:FOLDER`, a local folder of Hugging
    Face's; `timm:NAME`; or `package.module:factory` or `path/to/file.py:factory` for a user's own: a callable without
    arguments that returns a `Classifier`. Settings stand behind it in brackets (`robustav.models.asked`). `checkpoint`
    replaces the weights; published models have none without it. Raises `ValueError` naming what was expected and what came.
    """
    asked = parse_model(name)
    about: dict[str, Any] = {"model": name}
    kind, _, rest = asked.name.partition(":")
    if asked.name in MODELS:
        model = _from_table(asked, checkpoint, trust_pickle, about)
    elif kind == "hf" and rest:
        from robustav.models.hugging_face import architecture_of, from_directory, weight_file

        if checkpoint is not None:
            raise ValueError(f"{asked.name} has its own weights: leave --checkpoint out, or name another folder")
        model = from_directory(rest, **_known(asked, "seconds", "frames", "classes", "label_kind"))
        weights = weight_file(rest)
        about |= {"summary": architecture_of(rest), "checkpoint": weights.name}
        about["checkpoint_sha256"] = digest_of_file(weights)
    elif kind == "timm" and rest:
        if checkpoint is None:
            raise ValueError(f"{asked.name} comes without weights: give your own with --checkpoint FILE")
        model = _from_timm(asked, rest)
    elif kind == "trained" and rest:
        from robustav.training.trained import WEIGHTS, load_trained, read_trained

        if checkpoint is not None:
            raise ValueError(f"{asked.name} has its own weights: leave --checkpoint out, or name another folder")
        _known(asked)
        card = read_trained(rest)
        model = load_trained(rest)
        about |= {"summary": f"{card['recipe']['model']}, {card['method']}", "training": card}
        about |= {"checkpoint": WEIGHTS, "checkpoint_sha256": card["sha256"]}
    elif ":" in asked.name and rest:
        _known(asked)
        model = from_factory(asked.name)
    else:
        near = get_close_matches(asked.name.lower(), MODELS, n=3)
        hint = f"did you mean {', '.join(near)}? There are" if near else "give one of"
        raise ValueError(
            f"no model {asked.name!r}: {hint} {', '.join(EMBEDDED)}, a published one (robustav models), or your own "
            "as trained:FOLDER, hf:FOLDER, timm:NAME, package.module:factory or file.py:factory"
        )
    if checkpoint is not None:
        if asked.name not in MODELS:
            # A user's own weights were saved from the network, before it was wrapped.
            network = model.network if isinstance(model, Wrapped | BodyAndHead) else model
            load_into(network, read_checkpoint(checkpoint, trust_pickle=trust_pickle), str(checkpoint))
        about |= {"checkpoint": Path(checkpoint).name, "checkpoint_sha256": digest_of_file(checkpoint)}
    return (AtFeatures(model) if asked.at_features else model).eval(), about


def _known(asked: Asked, *known: str) -> Mapping[str, Any]:
    """The settings asked for, if the model takes them all."""
    if unknown := [key for key in asked.task if key not in known]:
        raise ValueError(f"{asked.name} takes the settings {', '.join([*known, 'at'])}, got {unknown[0]!r}")
    return asked.task


def _from_timm(asked: Asked, name: str) -> Classifier:
    from robustav.models.timm_models import from_timm

    return from_timm(name, **_known(asked, *OF_TIMM))


def build_model(name: str) -> Classifier:
    """A model to train, with random weights from the global generators; a folder's or a factory's comes as it is."""
    asked = parse_model(name)
    kind, _, rest = asked.name.partition(":")
    if asked.name in MODELS:
        entry = MODELS[asked.name]
        model = _checked(entry.build(task_of(entry.task, asked.task)), asked.name)
    elif kind == "timm" and rest:
        model = _from_timm(asked, rest)
    else:
        return load_model(name)[0]
    return AtFeatures(model) if asked.at_features else model


def inputs_of(name: str) -> Classifier:
    """A model for what it reads and which classes it knows: of one in `MODELS` the weights are not needed, nor there."""
    asked = parse_model(name)
    kind, _, rest = asked.name.partition(":")
    if asked.name in MODELS:
        entry = MODELS[asked.name]
        task = task_of(entry.task, asked.task)
        if asked.at_features:
            return AtFeatures(_checked(entry.build(task), asked.name)).eval()
        return _checked(weightless(entry, task), asked.name)
    if kind == "timm" and rest:
        return _from_timm(asked, rest)
    return load_model(name)[0]


def _from_table(asked: Asked, checkpoint: Path | str | None, trust_pickle: bool, about: dict[str, Any]) -> Classifier:
    """A row's model with its own weights, or those of a checkpoint."""
    entry = MODELS[asked.name]
    task = task_of(entry.task, asked.task)
    _checked(weightless(entry, task), asked.name)
    about |= {"summary": entry.summary, "source": entry.source}
    about |= {key: getattr(entry, key) for key in ("paper", "licence") if getattr(entry, key)}
    if checkpoint is None:
        if not entry.weights:
            where = f"; official ones are at {entry.published}" if entry.published else ""
            raise ValueError(f"{asked.name} comes without weights: give a checkpoint with --checkpoint FILE{where}")
        model = _checked(entry.build(task), asked.name)
        about["card"] = read_card(entry.path)
        load_into(model, read_checkpoint(entry.path), entry.weights)
        return model
    state = read_checkpoint(checkpoint, trust_pickle=trust_pickle)
    count = classes_in(state, entry)
    if count not in (None, len(task.classes)) and "classes" in entry.takes:
        raise ValueError(
            f"{checkpoint} tells {count} classes apart, and {asked.name} is asked for {len(task.classes)}: name them with "
            f"--model '{asked.name}(classes=FILE)', a name a line in the order of its outputs"
        )
    model = _checked(entry.build(task), asked.name)
    adapted = model.adapted(state) if isinstance(model, Published) else state
    try:
        load_into(model, adapted, str(checkpoint))
    except ValueError as error:
        raise ValueError(f"{error}. Which model it fits: robustav models check {checkpoint}") from None
    if tables := resampled_tables(state, adapted):
        about["resampled"] = list(tables)
    return model


def _checked(model: nn.Module, name: str) -> Classifier:
    if isinstance(model, Classifier):
        return model
    family = name.partition("-pretrain")[0]
    tuned = [other for other in MODELS if other.startswith(family) and "pretrain" not in other]
    raise ValueError(f"{name} is a pre-training model, without classes to attack; fine-tuned: {', '.join(tuned[:4])}")
