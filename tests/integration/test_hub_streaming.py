"""Audio streamed from a Hub that fails, with two workers for each process: the real libraries over real HTTP."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import yaml
from hub_server import Hub

from benchmarks.survival import TINY, TWO_PROCESSES

ROOT = Path(__file__).parents[2]
SHARDS, CLIPS = 4, 8
TIMED = ("audio_seconds_per_second", "data_wait_fraction")


def wav(seed: int) -> bytes:
    file = io.BytesIO()
    noise = 0.1 * np.random.default_rng(seed).standard_normal(16_000 + 800 * (seed % 10))
    soundfile.write(file, noise, 16_000, format="WAV")
    return file.getvalue()


def parquet(shard: int) -> bytes:
    audio = [{"path": f"{shard}_{n}.wav", "bytes": wav(CLIPS * shard + n)} for n in range(CLIPS)]
    file = io.BytesIO()
    datasets.Dataset.from_dict({"audio": audio}, datasets.Features({"audio": datasets.Audio()})).to_parquet(file)
    return file.getvalue()


def tar(shard: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for n in range(CLIPS):
            content = wav(1000 + CLIPS * shard + n)
            member = tarfile.TarInfo(f"{shard}_{n}.wav")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        names = [f"data/train-{shard:05d}-of-{SHARDS:05d}" for shard in range(SHARDS)]
        hub.add("dataset", "user/rows", {f"{name}.parquet": parquet(n) for n, name in enumerate(names)}, private=True)
        hub.add("dataset", "user/shards", {f"{name}.tar": tar(n) for n, name in enumerate(names)})
        yield hub


def pretrain(
    hub: Hub, folder: Path, *words: str, processes: int = 1, token: str | None = "hf_reader"
) -> subprocess.CompletedProcess:
    recipe = {
        "dataset_name": [{"name": "user/rows", "weight": 1}, {"name": "user/shards", "weight": 1}],
        "streaming": True,
        "config_overrides": TINY,
        "batch_seconds": 4,
        "min_duration_in_seconds": 0.5,
        "max_duration_in_seconds": 1.5,
        "dataloader_num_workers": 2,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 1,
        "eval_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(folder / "run"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", TWO_PROCESSES, "run_pretrain.py"]
    start = launch if processes == 2 else [sys.executable, "run_pretrain.py"]
    command = [*start, str(folder / "recipe.yaml"), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def losses(folder: Path) -> dict[int, dict]:
    history = json.loads((folder / "run" / "trainer_state.json").read_text())["log_history"]
    return {
        entry["step"]: {name: value for name, value in entry.items() if name not in TIMED}
        for entry in history
        if "grad_norm" in entry
    }


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_goes_on_in_the_middle_of_the_shards_while_the_hub_fails(hub, tmp_path, processes):
    done = pretrain(hub, tmp_path / "whole", processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    (tmp_path / "again" / "run").mkdir(parents=True)
    shutil.copytree(tmp_path / "whole/run/checkpoint-4", tmp_path / "again/run/checkpoint-4")
    faults = [
        hub.fail(r"GET /api/datasets", times=2),
        hub.fail(r"GET /datasets/user/shards/resolve", times=3),
        hub.fail(r"GET /datasets/user/rows/resolve", times=3, after=2),
        hub.fail(r"GET /datasets/user/shards/resolve", times=2, after=2, status=None, drop_at=5000),
        hub.fail(r"GET /datasets/user/rows/resolve", times=2, after=3, status=None, drop_at=5000),
        hub.fail(r"GET /datasets/user/shards/resolve", status=429, retry_after=1, times=1, after=4),
    ]
    done = pretrain(hub, tmp_path / "again", "--resume_from_checkpoint", "true", processes=processes)
    hub.faults.clear()
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(fault.met for fault in faults), [fault.met for fault in faults]
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "again")
    assert sorted(whole) == sorted(again) == list(range(1, 9))
    assert whole == again
    report = json.loads((tmp_path / "again/run/data_report.json").read_text())
    assert not report["skipped"]


def test_a_private_data_set_without_a_token_is_one_line(hub, tmp_path):
    done = pretrain(hub, tmp_path, token=None)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "user/rows" in done.stderr.strip().splitlines()[-1]
