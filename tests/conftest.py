"""Settings that must hold before torch is imported, and the tiny models that the tests attack."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a busy machine ten times slower
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

CHECKED = [
    "audio",
    "classifier",
    "norms",
    "losses",
    "goals",
    "threat",
    "attacks",
    "audit",
    "prepare",
    "view",
    "models.small",
    "models.published",
    "metrics",
    "geometry",
    "ranking",
    "mel",
    "fbank",
    "published_log_mel",
    "resample",
    "image",
    "clap_log_mel",
    "training",
    "experiment",
]
install_import_hook([f"robustav.{name}" for name in CHECKED], "typecheck.checked")

import importlib.util  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from robustav.attacks import (  # noqa: E402
    APGD,
    ATTACKS,
    FAB,
    FGSM,
    FMN,
    MLALP,
    PGD,
    Aimed,
    Attack,
    MomentumFGSM,
    Noise,
    RayS,
    Square,
)
from robustav.classifier import Classifier, InputSpec, LateFusion, frames, waveform  # noqa: E402
from robustav.data.samples import Sample  # noqa: E402

torch.set_num_threads(1)  # tiny models: two processes on two cores are faster than two threads
SHARED = Path(__file__).resolve().parents[2] / "shared"
CLASSES = ("bell", "clap", "kick")


def few_steps() -> dict[str, Attack]:
    """Every attack of the table, at a length for tiny models."""
    made: dict[str, Attack] = {
        "noise": Noise(),
        "fgsm": FGSM(),
        "pgd": PGD(6),
        "momentum": MomentumFGSM(6),
        "apgd": APGD(8),
        "aimed": Aimed(APGD(6), 2),
        "mla-lp": MLALP(3),
        "fmn": FMN(10),
        "fab": FAB(5, aims=2),
        "square": Square(30),
        "rays": RayS(40),
    }
    assert list(made) == list(ATTACKS), "an attack of the table is missing here"
    return made


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    for marker in item.iter_markers("extra"):
        if importlib.util.find_spec(marker.args[0]) is None:
            if os.environ.get("ROBUSTAV_REQUIRE_EXTRAS"):
                pytest.fail(f"the extra {marker.args[0]} must be installed here")
            pytest.skip(f"the extra {marker.args[0]} is not installed; CI's second lane runs it")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Generated data goes where the test run's own temporary files go, unless a cache is given."""
    if "ROBUSTAV_CACHE" in os.environ:
        yield
        return
    os.environ["ROBUSTAV_CACHE"] = str(tmp_path_factory.getbasetemp().parent / "robustav-cache")
    yield
    del os.environ["ROBUSTAV_CACHE"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference material beside the checkout; CI has it, a user does not."""
    if not SHARED.is_dir():
        if os.environ.get("ROBUSTAV_REQUIRE_SHARED"):
            pytest.fail("the folder `shared` must be beside the checkout here")
        pytest.skip("the folder `shared` with reference clips is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def clips_folder(shared: Path) -> Path:
    """Real recordings: two videos and a waveform."""
    return shared / "clips"


class Linear(Classifier):
    """Logits are linear in the raw inputs: the best attack is known in closed form."""

    label_kind = "multilabel"

    def __init__(self, specs: dict[str, InputSpec], classes: int = 1) -> None:
        super().__init__()
        self.specs, self.classes = specs, tuple(f"class-{i}" for i in range(classes))
        generator = torch.Generator().manual_seed(1)
        self.weights = nn.ParameterDict(
            {m: torch.randn(classes, torch.Size(spec.shape).numel(), generator=generator) for m, spec in specs.items()}
        )

    def encode(self, modality: str, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weights[modality].T

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return sum(features.values())  # type: ignore[return-value]

    def classify(self, latent: Tensor) -> Tensor:
        return latent


def tiny_specs() -> dict[str, InputSpec]:
    return {"audio": waveform(0.004), "visual": frames(2, 4)}


@pytest.fixture
def linear() -> Linear:
    return Linear(tiny_specs()).eval()


def tiny_fusion(label_kind: str = "multilabel") -> LateFusion:
    """A late fusion with batch norm and a non-linearity, small enough for a thousand passes a second."""
    torch.manual_seed(3)
    specs = tiny_specs()
    encoders = {
        "audio": nn.Sequential(
            nn.Unflatten(1, (1, -1)), nn.Conv1d(1, 4, 8, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Flatten()
        ),
        "visual": nn.Sequential(nn.Flatten(1, 2), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten()),
    }
    model = LateFusion(
        encoders, nn.Linear(15 * 4 + 20, len(CLASSES)), specs=specs, classes=CLASSES, label_kind=label_kind
    )
    with torch.no_grad():  # batch norms with statistics of their own, so that folding them is a test
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.3, 2.0)
                module.weight.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture
def fusion() -> LateFusion:
    return tiny_fusion()


def batch_of(specs: dict[str, InputSpec], size: int = 6, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        m: spec.low + (spec.high - spec.low) * (0.25 + 0.5 * torch.rand(size, *spec.shape, generator=generator))
        for m, spec in specs.items()
    }


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return batch_of(tiny_specs())


class TinySamples:
    """Random clips for the tiny models; labels follow from the id. `broken` maps an id to a reason to skip it."""

    def __init__(self, count: int = 10, label_kind: str = "multilabel", broken: dict[str, str] | None = None) -> None:
        self.name, self.classes, self.label_kind, self.digest = "tiny", CLASSES, label_kind, f"{count}".rjust(64, "0")
        self.ids = tuple(f"clip {i}" for i in range(count))
        self.broken = broken or {}

    def load(self, index: int) -> Sample:
        from robustav.data.samples import SkippedError

        if self.ids[index] in self.broken:
            raise SkippedError(self.broken[self.ids[index]])
        inputs = {m: x[0] for m, x in batch_of(tiny_specs(), 1, seed=100 + index).items()}
        label = index % len(CLASSES)
        one_hot = torch.zeros(len(CLASSES)).index_fill(0, torch.tensor(label), 1.0)
        return Sample(self.ids[index], inputs, torch.tensor(label) if self.label_kind == "multiclass" else one_hot)
