"""Data by name or path, cut to what a model reads."""

from pathlib import Path

from robustav.classifier import AtFeatures, Classifier
from robustav.data.audioset import MACHINE_IDS
from robustav.data.av_events import SPLITS, AvEvents
from robustav.data.clips import Clips
from robustav.data.featured import Featured
from robustav.data.manifest import read_manifest
from robustav.data.samples import Progress, Samples

DATA: dict[str, str] = {
    "av-events": "synthetic audio-visual scenes, 10 classes, multi-label; generated on first use, no download",
}
QUICK_LOOK = 100  # clips of av-events unless a limit is given: half-width of a Wilson interval at most 9.6 points


def load_samples(source: str | None, model: Classifier, progress: Progress | None = None) -> tuple[Samples, int | None]:
    """The clips that `source` names, and how many of them a first look takes (None: all).

    `source` is `av-events` (or `av-events/train`, `/validation`), a manifest (CSV or JSON lines), a folder of clips or
    one clip; None is av-events, for models that were made for it. Raises `ValueError` naming what would have fitted.
    """
    name, _, split = (source or "av-events").partition("/")
    path = Path(source or "")
    if source is None or (name in DATA and not path.exists()):
        if split and split not in SPLITS:
            raise ValueError(f"av-events has the splits {', '.join(SPLITS)}, got {split!r}")
        if isinstance(model, AtFeatures):
            samples, quick_look = load_samples(source, model.model, progress)
            return Featured(samples, model), quick_look
        samples = AvEvents(split or "test", progress=progress)
        if samples.classes != tuple(model.classes):
            raise ValueError(
                f"this model has {len(model.classes)} classes ({', '.join(model.classes[:3])} ...), not those of av-events: "
                "name its data with --data MANIFEST"
            )
        for modality, spec in model.specs.items():
            if samples.specs.get(modality) != spec:
                raise ValueError(
                    f"this model reads {modality} as {spec}, which is not how av-events has it: "
                    "name its data with --data MANIFEST"
                )
        return samples, QUICK_LOOK
    if not path.exists():
        raise ValueError(
            f"no data {source!r}: give {', '.join(DATA)}, a manifest (CSV or JSON lines), a folder or a clip"
        )
    return read_clips(path, model), None


def read_clips(path: Path, model: Classifier) -> Samples:
    """The clips of a manifest, a folder or one clip. AudioSet's machine ids are understood beside its names.

    A model that is attacked at its features reads them through its own front ends, or from files if the manifest names
    any: a clip without is then skipped.
    """
    entries = read_manifest(path)
    named = any(entry.features(m) is not None for entry in entries for m in model.specs)
    if isinstance(model, AtFeatures) and not named:
        return Featured(read_clips(path, model.model), model)
    return Clips(entries, model.specs, model.classes, model.label_kind, name=path.name, aliases=MACHINE_IDS)
