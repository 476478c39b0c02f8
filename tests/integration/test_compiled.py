"""What compiles code for minutes: `make proofs`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from acoustic.report.record import read_json

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_two_processes_with_layerdrop(audio_folder, tiny_config, tmp_path, compiled):
    """Through `accelerate launch` and torch's own compiler, on windows of several lengths."""
    folder = audio_folder(16, seconds=[1.0 + 0.2 * index for index in range(16)])
    options = {
        "dataset_name": folder,
        "output_dir": tmp_path / "out",
        "config_overrides": json.dumps({**tiny_config, "num_hidden_layers": 4, "layerdrop": 0.1}),
        "min_duration_in_seconds": 0.5,
        "max_duration_in_seconds": 4,
        "batch_seconds": 8,
        "max_steps": 12,
        "logging_steps": 1,
        "eval_strategy": "no",
        "dataloader_num_workers": 0,
        "report_to": "none",
        "torch_compile": compiled,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    done = subprocess.run(
        [*launch, "recipes/accelerate/two_cpu_processes.yaml", "run_pretrain.py", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = [entry for entry in read_json(tmp_path / "out" / "trainer_state.json")["log_history"] if "loss" in entry]
    assert len(log) == 12
    assert log[-1]["loss"] < log[0]["loss"]
    assert ("compiled_graphs" in log[-1]) == (compiled == "true")
    if compiled == "true":
        assert 2 <= log[-1]["compiled_graphs"] <= 8
