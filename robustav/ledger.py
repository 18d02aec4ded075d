"""The ledger: one row per clip and condition in parquet parts, written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn, uint8

UNFINISHED = ".unfinished"  # ending of a file that is being written


def write_atomically(path: Path, content: bytes) -> None:
    """Put `content` at `path` so that a kill at any moment leaves either the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def schema(modalities: Iterable[str]) -> pa.Schema:
    """The columns of a row; four of them for each modality of the model."""
    columns = [
        ("sample", pa.string()),  # the clip's id
        ("condition", pa.string()),  # key of the record's `conditions`
        ("skipped", pa.string()),  # why the clip could not be used; then everything below is null
        ("labels", pa.list_(pa.int32())),  # indices of the clip's classes
        ("labelled", pa.bool_()),  # False: nobody labelled the clip, `labels` is the model's own clean prediction
        ("logits", pa.list_(pa.float32())),  # of the untouched model
        ("loss", pa.float32()),  # the goal's, larger is better for the adversary
        ("reached", pa.bool_()),  # the goal's success rule
        (
            "settled",
            pa.string(),
        ),  # key of the cheaper condition whose point this is, since it broke the clip; else empty
        ("gauge", pa.float64()),  # largest length / radius over the attacked modalities
        ("forwards", pa.int32()),  # passes of the attack itself, this clip among its batch
        ("backwards", pa.int32()),
        ("zero_gradients", pa.float32()),  # share of backward passes whose gradient was zero, in the worst modality
        ("late_gain", pa.float64()),  # share of the gain in loss that came in the attack's last looks; null: too few
        ("ever_reached", pa.bool_()),  # some point on the way reached the goal
        ("reached_source", pa.bool_()),  # of a transfer attack: it fools its source; null for others
        ("rescore_gap", pa.float32()),  # largest change of a logit when the returned input was scored again
        ("violation", pa.string()),  # what the audit found, empty if nothing
    ]
    for modality in sorted(modalities):
        columns += [(f"{name}_{modality}", pa.float64()) for name in ("max_abs", "length", "snr_db", "zero_gradients")]
    return pa.schema(columns)


@dataclass(frozen=True)
class Ledger:
    """A run's folder: `run.json` (the record), `ledger/CONDITION/PART.parquet`, and seconds beside them.

    Seconds are kept apart, because everything in the ledger itself is the same bytes whenever it is computed.
    """

    folder: Path

    def part(self, condition: str, part: int) -> Path:
        return self.folder / "ledger" / condition / f"{part:06d}.parquet"

    def has(self, condition: str, part: int) -> bool:
        return self.part(condition, part).exists()

    def write(self, condition: str, part: int, rows: Sequence[Mapping[str, Any]], columns: pa.Schema) -> None:
        table = pa.Table.from_pylist([{**row, "condition": condition} for row in rows], schema=columns)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        write_atomically(self.part(condition, part), sink.getvalue().to_pybytes())

    def write_seconds(self, condition: str, part: int, seconds: float) -> None:
        path = self.folder / "seconds" / condition / f"{part:06d}.json"
        write_atomically(path, json.dumps(seconds).encode())

    def read_part(self, condition: str, part: int) -> pd.DataFrame:
        return pq.read_table(self.part(condition, part)).to_pandas()

    def broken(self, condition: str, part: int) -> dict[str, dict[str, Any]]:
        """Sample -> its row, of the clips of a part that a condition broke, soundly."""
        rows = pq.read_table(self.part(condition, part)).to_pylist()
        return {
            row["sample"]: row for row in rows if row["skipped"] is None and row["reached"] and not row["violation"]
        }

    def read(self, condition: str) -> pd.DataFrame:
        """All rows of one condition, in the order of the parts."""
        parts = sorted((self.folder / "ledger" / condition).glob("*.parquet"))
        if not parts:
            raise FileNotFoundError(f"{self.folder} holds no rows of {condition!r}: the run has not come that far")
        return pa.concat_tables([pq.read_table(part) for part in parts]).to_pandas()

    def seconds(self, condition: str) -> float:
        """Wall time spent on one condition, all parts together."""
        return sum(json.loads(path.read_bytes()) for path in (self.folder / "seconds" / condition).glob("*.json"))

    def record(self) -> dict[str, Any]:
        """What was run: model, data, threat, seeds, versions. Raises `ValueError` if the run was found unsound."""
        path = self.folder / "run.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} is no run: it has no run.json (give the folder that a run wrote)")
        try:
            record = json.loads(path.read_bytes())
            found = record["identity"]["conditions"]
            record["identity"]["specs"], record["identity"]["label_kind"]
            for described in found.values():
                described["after"], described["brief"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is not the record of a run, or of one by an older robustav: choose another folder"
            ) from error
        assert isinstance(found, dict)
        unsound = self.folder / "unsound.txt"
        if unsound.exists():
            raise ValueError(
                f"{self.folder} cannot be trusted: {unsound.read_text(encoding='utf-8')}; delete the folder"
            )
        return record

    def write_flags(self, flags: Sequence[Sequence[str]]) -> None:
        """Keep what a look at the model gave reason to doubt."""
        write_atomically(self.folder / "flags.json", json.dumps([list(flag) for flag in flags], indent=1).encode())

    def has_flags(self) -> bool:
        """Whether the model was looked at."""
        return (self.folder / "flags.json").exists()

    def flags(self) -> list[list[str]]:
        """Name, sentence, advice, condition of every flag that was kept; none if the model was not looked at."""
        return json.loads((self.folder / "flags.json").read_bytes()) if self.has_flags() else []

    def declare_unsound(self, reason: str) -> None:
        """Mark the whole run, so that no report is ever made of it."""
        write_atomically(self.folder / "unsound.txt", reason.encode())

    def begin(self, record: Mapping[str, Any]) -> None:
        """Write the record, or check that the folder holds the same run; raises `ValueError` naming what differs."""
        path = self.folder / "run.json"
        if path.exists():
            before, now = self.record()["identity"], record["identity"]
            different = [key for key in now if before.get(key) != now[key]] + [k for k in before if k not in now]
            if different:
                first = different[0]
                raise ValueError(
                    f"{self.folder} holds another run; they differ in {', '.join(different)} "
                    f"({first}: {_short(before.get(first))} there, {_short(now.get(first))} now): choose another --out"
                )
            return
        whole = not self.folder.is_dir() or [f for f in self.folder.iterdir() if not f.name.endswith(UNFINISHED)]
        if self.folder.exists() and whole:  # what a run killed at its very first file left behind is no obstacle
            what = "holds other files" if self.folder.is_dir() else "is a file"
            raise ValueError(f"{self.folder} {what}: choose another --out, a new or an empty folder")
        write_atomically(path, json.dumps(record, indent=1).encode())

    def clear_debris(self) -> None:
        """Remove what killed processes were writing. Only for when no other process works on the run."""
        for debris in self.folder.rglob(f".*{UNFINISHED}"):
            debris.unlink(missing_ok=True)


def failures(ledger: Ledger) -> dict[str, list[str]]:
    """Condition -> what the audit found, a line a clip; conditions without a finding are left out."""
    found = {}
    for key in ledger.record()["identity"]["conditions"]:
        rows = ledger.read(key)
        bad = rows[rows["violation"].fillna("") != ""]
        if len(bad):
            found[key] = [f"{clip}: {words}" for clip, words in zip(bad["sample"], bad["violation"], strict=True)]
    return found


def skipped(ledger: Ledger, condition: str = "clean") -> dict[str, str]:
    """Clip -> why it could not be used."""
    rows = ledger.read(condition)
    rows = rows[rows["skipped"].notna()]
    return dict(zip(rows["sample"], rows["skipped"], strict=True))


def digest_of_model(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of every parameter and buffer, persistent or not."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        # NumPy has no bfloat16; a view as bytes serves every type.
        content = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(content.view(dtype=uint8).numpy().tobytes() if content.numel() else b"")
    return digest.hexdigest()


def digest_of(value: object) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
