"""A user's own model by where its factory is: `package.module:factory` or `path/to/file.py:factory`."""

from torch import nn

from robustav.classifier import Classifier
from robustav.user_code import imported


def from_factory(name: str) -> Classifier:
    """What the factory returns, a `Classifier`; raises `ValueError` with what went wrong."""
    factory = imported(name, "model")
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
