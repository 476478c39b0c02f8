"""Short fine-tuning runs of the whole script on tones, and rows without files."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

RATE = 16_000


@pytest.fixture
def sound():
    """sound(pitches, seconds, seed) -> waveform of the pitches (Hz) one after the other, with a little noise."""

    def make(pitches, seconds: float, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        frequency = np.repeat(pitches, int(seconds * RATE / len(pitches)))
        phase = 2 * np.pi * np.cumsum(frequency) / RATE + generator.uniform(0, 2 * np.pi)
        return (0.3 * np.sin(phase) + 0.01 * generator.standard_normal(len(phase))).astype(np.float32)

    return make


@pytest.fixture
def labeled_folder(tmp_path):
    """write({name: waveform}, metadata=None) -> folder; `metadata` gives the other columns of metadata.csv by name."""

    def write(clips: dict[str, np.ndarray], metadata: dict[str, dict] | None = None, root="clips"):
        folder = tmp_path / root
        for name, waveform in clips.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / name, waveform, RATE)
        if metadata:
            with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, ["file_name", *next(iter(metadata.values()))])
                writer.writeheader()
                writer.writerows({"file_name": name, **columns} for name, columns in metadata.items())
        return folder

    return write


@pytest.fixture
def finetune_args(group_norm_checkpoint, tmp_path):
    """args(task, folder, **options) -> argv of run_finetune.py."""

    def args(task: str, folder, **changed) -> list[str]:
        options = {
            "task": task,
            "model_name_or_path": group_norm_checkpoint,
            "dataset_name": folder,
            "output_dir": tmp_path / "out",
            "max_duration_in_seconds": 2,
            "batch_seconds": 8,
            "max_steps": 2,
            "logging_steps": 20,
            "dataloader_num_workers": 0,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **changed,
        }
        options = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in options.items()}
        return [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]

    return args


@pytest.fixture
def rows_of():
    """rows_of("text", [...]) -> rows with one column, no audio behind them."""

    def make(column: str, values: list):
        assert column in ("text", "label")
        return SimpleNamespace(
            columns=lambda wanted: iter(values if wanted == column else []), description="some rows"
        )

    return make
