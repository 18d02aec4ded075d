"""Published models, one file per paper, each with a table `MODELS` of its named configurations."""

from robustav.models.entry import Entry
from robustav.models.published import (
    ast,
    audio_mae,
    audio_resnet,
    cav_mae,
    cav_mae_pretraining,
    mmt,
    msm_mae,
    psla,
    tal,
    video_resnet,
    vit,
)

PAPERS = (tal, audio_resnet, psla, ast, audio_mae, msm_mae, cav_mae, cav_mae_pretraining, mmt, video_resnet, vit)
MODELS: dict[str, Entry] = {name: entry for paper in PAPERS for name, entry in paper.MODELS.items()}
