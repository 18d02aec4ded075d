"""The 527 classes of AudioSet [Gemmeke et al., 2017], in the order of the published models' outputs.

Names and machine ids are AudioSet's, by Google, under CC BY 4.0.
"""

import csv
from pathlib import Path

with (Path(__file__).parent / "audioset_classes.csv").open(encoding="utf-8", newline="") as _file:
    _rows = list(csv.DictReader(_file))

CLASSES: tuple[str, ...] = tuple(row["display_name"] for row in _rows)
MACHINE_IDS: dict[str, str] = {row["mid"]: row["display_name"] for row in _rows}  # "/m/09x0r" -> "Speech"
