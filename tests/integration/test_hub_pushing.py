"""Checkpoints to a Hub and back, with the real client over real HTTP; the Hub dies in the middle."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub

from benchmarks.survival import TINY

ROOT = Path(__file__).parents[2]
TIMED = ("audio_seconds_per_second", "data_wait_fraction", "hours_seen")


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    """run(words, token) -> the finished process, in this Hub's world."""

    def run(*words: str, token: str | None = "hf_writer", cwd: Path = ROOT) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_DISABLE_XET": "1", **({"HF_TOKEN": token} if token else {})}
        return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)

    return run


def losses(folder: Path) -> dict[int, dict]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        entry["step"]: {name: value for name, value in entry.items() if name not in TIMED}
        for entry in history
        if "grad_norm" in entry
    }


def test_a_hub_that_dies_costs_a_warning_and_another_machine_goes_on_from_it(
    hub, run, audio_folder, audio_file, tmp_path
):
    options = ["--dataset_name", str(audio_folder(10)), "--config_overrides", json.dumps(TINY), "--max_steps", "8"]
    options += ["--save_steps", "2", "--logging_steps", "1", "--batch_seconds", "2", "--dataloader_num_workers", "0"]
    options += ["--min_duration_in_seconds", "0.2", "--max_duration_in_seconds", "1", "--eval_strategy", "no"]
    options += ["--use_cpu", "true", "--disable_tqdm", "true", "--push_to_hub", "true", "--hub_model_id", "user/model"]
    options += ["--hub_strategy", "checkpoint", "--hub_private_repo", "true"]
    pretrain = [sys.executable, "run_pretrain.py", *options, "--output_dir"]

    # Every save finds the Hub ready for it, but the second one is the last that it takes.
    hub.after_commit = 2
    first = run(*pretrain, str(tmp_path / "first"), "--logging_steps", "1")
    assert first.returncode == 0, first.stderr[-2000:]
    warnings = [line for line in first.stdout.splitlines() if line.startswith("warning: ")]
    assert warnings and all("503" in line for line in warnings) and "Traceback" not in first.stdout + first.stderr
    repo = hub.repos["model", "user/model"]
    assert repo.private and len(repo.refs["main"]) == 3
    update = int(repo.refs["main"][-1].title.removeprefix("update "))
    assert 2 < update < 8
    pushed = repo.refs["main"][-1].files
    assert {"config.json", "model.safetensors", "last-checkpoint/optimizer.pt"} <= set(pushed)

    assert os.listdir(tmp_path / "first" / "_hub") == ["final"]

    # It is back: the line that was printed completes the push.
    hub.after_commit = None
    command = shlex.split(re.search(r"this completes it: (hf upload .*)", first.stdout)[1])
    completed = run(str(Path(sys.executable).with_name("hf")), *command[1:])
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert {"README.md", "figures/pretraining.png", "all_results.json"} <= set(repo.at("main").files)

    # Another machine, which has nothing but the Hub.
    again = run(*pretrain, str(tmp_path / "again"), "--resume_from_checkpoint", "hub")
    assert again.returncode == 0, again.stderr[-2000:]
    assert losses(tmp_path / "again") == losses(tmp_path / "first")
    assert f"checkpoint-{update}" in again.stdout and "pushed: " in again.stdout
    assert repo.refs["main"][-1].title == "trained" and not (tmp_path / "again" / "_hub").exists()

    # What the card says, in a plain transformers.
    snippet = re.search(r"```python\n(.*?)```", repo.at("main").files["README.md"].decode(), re.DOTALL)[1]
    audio_file(tmp_path / "recording.wav", 1.0)
    loaded = run(sys.executable, "-c", snippet, cwd=tmp_path)
    assert '"user/model"' in snippet and "acoustic" not in snippet
    assert re.fullmatch(r"torch.Size\(\[1, \d+, 32\]\)\n", loaded.stdout), loaded.stderr[-2000:]
    said = first.stdout + first.stderr + again.stdout + again.stderr
    assert "Upload" not in said and "%|" not in said  # the client's progress bars
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "home" not in path.parts]
    for text in [said.encode(), *repo.at("main").files.values(), *(path.read_bytes() for path in written)]:
        assert b"hf_writer" not in text
    for name, body in repo.at("main").files.items():
        assert str(tmp_path).encode() not in body, name


ASK = """
import os, sys
from types import SimpleNamespace
from acoustic.console import UserError
from acoustic.training import pushing
from acoustic.training.pushing import fetch, open_repo
pushing.PATIENCE = (10, 1, 10, 10)
for words in sys.argv[1:]:
    token, name = words.split(":")
    os.environ["HF_TOKEN"] = token
    try:
        print(open_repo(SimpleNamespace(hub_model_id=name, output_dir="outputs/mine", hub_private_repo=None)))
    except UserError as error:
        print(error)
try:
    fetch("user/empty", "outputs/mine")
except UserError as error:
    print(error)
"""


def test_what_can_not_be_pushed_to_is_said_before_training(hub, run):
    hub.add("model", "user/empty", {"README.md": b"nothing"})
    hub.fail("user/broken/auth-check")
    hub.fail("user/silent/auth-check", status=None, seconds=20)
    names = ["user/new", "a/b/c", "other/model", "mine", "user/broken", "user/silent"]
    asked = [*(f"hf_writer:{name}" for name in names), "hf_reader:user/new", "hf_reader:user/more", "hf_old:x", ":x"]
    found = run(sys.executable, "-c", ASK, *asked, token=None)
    new, wrong, foreign, own, broken, silent, reader, nor_new, unknown, without, empty = found.stdout.splitlines()
    assert (new, own) == ("user/new", "user/mine")
    assert wrong.startswith("hub_model_id: 'a/b/c' is no name of a repository: ")
    assert foreign.startswith("push_to_hub: the token may not write to 'other/model' (403: ")
    assert "can't be asked whether this token may write there (503: " in broken
    assert "can't be asked" in silent and "timed out" in silent
    assert "may not write to 'user/new' (403: " in reader and "may not write to 'user/more' (403: " in nor_new
    assert "(401: " in unknown and without.startswith("push_to_hub: there is no token")
    assert "has no last-checkpoint/ on the Hub" in empty


def test_names_on_the_hub_can_not_lead_out_of_the_folder(hub, run, tmp_path):
    name = "last-checkpoint/a/../../../outside.json"
    hub.add("model", "user/model", {"last-checkpoint/complete.json": b"{}", name: b"{}"})
    fetch = f"from acoustic.training.pushing import fetch; fetch('user/model', {str(tmp_path / 'a' / 'b' / 'out')!r})"
    done = run(sys.executable, "-c", fetch)
    assert done.returncode != 0 and "UserError: resume_from_checkpoint: 'user/model'" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.name == "outside.json"]
