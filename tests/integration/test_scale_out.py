"""Beyond one machine's processes: FSDP2, two machines, killed processes, Slurm. On the CPU, over gloo and loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sharded import accumulate
from test_objectives import SIZES
from test_two_processes import make_batches, words
from two_processes import train_on

from acoustic.models import build_for_pretraining
from acoustic.models.wav2vec2 import Wav2Vec2ForPreTraining
from acoustic.report.record import read_json

ROOT = Path(__file__).parents[2]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
WITHIN_SECONDS = 60
# Of each kind one, in the order in which they are trained: the codes of vq_wav2vec are code_bert's.
OTHERS = {objective: SIZES[objective] for objective in ("audio_albert", "cpc", "vq_wav2vec", "code_bert")}


@pytest.fixture(scope="module")
def unlabeled(tmp_path_factory, audio_file) -> Path:
    folder = tmp_path_factory.mktemp("unlabeled")
    for index in range(20):
        audio_file(folder / f"{index:02d}.wav", 1.0 + 0.1 * index, seed=index)
    return folder


def free_port() -> int:
    """Below those that the system gives to others, and where slurm.sh looks for one."""
    for port in range(20000 + os.getpid() % 5000, 30000):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")


def history(output_dir: Path, upto: float = float("inf")) -> dict[int, dict]:
    entries = read_json(output_dir / "trainer_state.json")["log_history"]
    return {entry["step"]: entry for entry in entries if "loss" in entry and entry["step"] <= upto}


# ---- FSDP2


def save_quantizer(folder: Path) -> Path:
    for part in build_for_pretraining("vq_wav2vec", None, None, OTHERS["vq_wav2vec"])[:2]:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, unlabeled, tiny_config, group_norm_checkpoint) -> Path:
    """recipes/accelerate/fsdp.yaml with two processes; what they saw, see sharded.py."""
    folder = tmp_path_factory.mktemp("sharded")
    apart, together = make_batches(group_norm_checkpoint)
    torch.save({"batches": apart, "checkpoint": group_norm_checkpoint}, folder / "batches.pt")
    torch.save(together, folder / "together.pt")
    # As XLS-R, with half of the layers left out.
    architecture = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True, "layerdrop": 0.5}
    shared = {
        "dataset_name": unlabeled,
        "config_overrides": json.dumps({**tiny_config, **architecture}),
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "eval_steps": 3,
        "save_steps": 4,
        "validation_split_percentage": 20,
    }
    less_memory = {"gradient_checkpointing": True, "recompute_convs": True}
    runs = {
        "sharded": {},
        "resumed": {"resume_from_checkpoint": folder / "sharded" / "checkpoint-4"},
        "sharded_bf16": {"bf16": True, **less_memory},
        "copied": {},
        "copied_bf16": {"bf16": True},
    }
    argv = {run: words(**shared, **options, output_dir=folder / run) for run, options in runs.items()}
    for objective, sizes in OTHERS.items():
        options = {"objective": objective, "config_overrides": json.dumps(sizes), "max_steps": 2, "save_steps": 2}
        if objective == "code_bert":
            options["quantizer_name_or_path"] = save_quantizer(folder / "codes")
        for how in ("sharded", "copied"):
            run = f"{how}_{objective}"
            argv[run] = words(**{**shared, **options}, output_dir=folder / run)
    (folder / "argv.json").write_text(json.dumps(argv))
    options = ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", str(free_port())]
    done = subprocess.run(
        [
            *ACCELERATE,
            "--config_file",
            "recipes/accelerate/fsdp.yaml",
            *options,
            "tests/integration/sharded.py",
            folder,
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


def saw(folder: Path, run: str) -> list[dict]:
    return [torch.load(folder / f"{run}_{rank}.pt") for rank in range(2)]


def test_each_process_holds_half_of_every_layer(sharded):
    for run in saw(sharded, "sharded"):
        assert run["units"] == ["", "wav2vec2.encoder.layers.0", "wav2vec2.encoder.layers.1"]
        assert 0.4 < run["held"] < 0.6
    assert saw(sharded, "copied")[0]["held"] == 1 and not saw(sharded, "copied")[0]["units"]


def test_sharded_processes_compute_the_update_of_one(sharded, group_norm_checkpoint, tmp_path):
    one = train_on(torch.load(sharded / "together.pt"), group_norm_checkpoint, str(tmp_path))
    start = Wav2Vec2ForPreTraining.from_pretrained(group_norm_checkpoint).state_dict()
    moved = sum((one["weights"][name] - start[name]).square().sum() for name in start) ** 0.5
    for two in saw(sharded, "given"):
        for expected, entry in zip(one["history"][:-1], two["history"][:-1], strict=True):
            for name in ("loss", "contrastive_loss", "accuracy", "masked_fraction", "grad_norm"):
                assert entry[name] == pytest.approx(expected[name], rel=1e-4), name
        apart = sum((one["weights"][name] - two["weights"][name]).square().sum() for name in start) ** 0.5
        assert apart < 1e-4 * moved


def test_accumulated_on_two_processes_equals_all_on_one(sharded, group_norm_checkpoint, tmp_path):
    """2 x 2 micro-batches of very different numbers of masked frames against 1 x 4; the evaluation is over all."""
    batches = torch.load(sharded / "batches.pt")["batches"]
    updates = [[0, 1], [2, 0], [1, 2]]
    dealt = [process[index] for update in updates for process in batches for index in update]
    one = accumulate(dealt, group_norm_checkpoint, str(tmp_path), steps=4)
    for two in saw(sharded, "accumulated"):
        entries = [[entry for entry in run["history"] if "loss" in entry] for run in (one, two)]
        assert len(entries[0]) == len(entries[1]) == 3
        for expected, entry in zip(*entries):
            for name in ("loss", "contrastive_loss", "accuracy", "masked_fraction", "grad_norm"):
                assert entry[name] == pytest.approx(expected[name], rel=1e-4), name
        for name in ("eval_loss", "eval_accuracy", "eval_code_perplexity", "eval_masked_fraction"):
            assert two["results"][name] == pytest.approx(one["results"][name], rel=1e-4), name


@pytest.mark.parametrize("precision", ["", "_bf16"])
def test_sharded_training_equals_that_of_copies(sharded, precision):
    """Layers left out, accumulation, evaluation; with bfloat16 the sharded run also recomputes its activations."""
    ours, theirs = history(sharded / f"sharded{precision}"), history(sharded / f"copied{precision}")
    assert list(ours) == list(theirs) == [1, 2, 3, 4, 5, 6]
    for step, expected in theirs.items():
        for name in ("loss", "contrastive_loss", "accuracy", "grad_norm"):
            assert ours[step][name] == pytest.approx(expected[name], rel=1e-5), (step, name)
    assert precision == "" or ours[6]["loss"] != history(sharded / "sharded")[6]["loss"]
    results, expected = (saw(sharded, f"{run}{precision}")[1]["results"] for run in ("sharded", "copied"))
    for name in ("eval_loss", "eval_accuracy", "eval_code_perplexity"):
        assert results[name] == pytest.approx(expected[name], rel=1e-5)
    weights = load_file(sharded / f"sharded{precision}" / "model.safetensors")
    for name, value in load_file(sharded / f"copied{precision}" / "model.safetensors").items():
        assert torch.allclose(weights[name], value, rtol=0, atol=1e-5), name


@pytest.mark.parametrize("objective", OTHERS)
def test_every_kind_of_objective_can_be_sharded(sharded, objective):
    ours, theirs = history(sharded / f"sharded_{objective}"), history(sharded / f"copied_{objective}")
    for step in (1, 2):
        for name in ("loss", "grad_norm"):
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-4), (step, name)
    for run in saw(sharded, f"sharded_{objective}"):
        assert len(run["units"]) > 1 and run["held"] < 0.75
    weights = load_file(sharded / f"sharded_{objective}" / "model.safetensors")
    for name, value in load_file(sharded / f"copied_{objective}" / "model.safetensors").items():
        assert torch.allclose(weights[name], value, rtol=0, atol=1e-4), name


def test_a_resumed_sharded_run_equals_the_uninterrupted_one(sharded):
    whole, resumed = history(sharded / "sharded"), history(sharded / "resumed")
    for step in (5, 6):
        for name in ("loss", "accuracy", "grad_norm", "hours_seen", "epoch"):
            assert resumed[step][name] == whole[step][name], name
    weights = load_file(sharded / "resumed" / "model.safetensors")
    for name, value in load_file(sharded / "sharded" / "model.safetensors").items():
        assert torch.equal(weights[name], value), name


def test_a_sharded_model_is_saved_whole(sharded):
    for folder in (sharded / "sharded", sharded / "sharded" / "checkpoint-4"):
        model, info = transformers.Wav2Vec2ForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
    final = load_file(sharded / "sharded" / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == final.keys() and all(state[name].shape == final[name].shape for name in final)


# ---- machines, and processes that are killed


class Machines:
    """`accelerate launch` for each of several machines, all of them this one."""

    def __init__(self, count: int, output_dir: Path, argv: list[str]):
        port = str(free_port())
        self.output_dir = output_dir
        self.logs = [output_dir.with_name(f"{output_dir.name}_{machine}.log") for machine in range(count)]
        self.launchers = []
        for machine, log in enumerate(self.logs):
            options = ["--main_process_port", port]
            if count > 1:
                options += ["--num_machines", str(count), "--machine_rank", str(machine)]
                options += ["--main_process_ip", "127.0.0.1", "--num_processes", str(count)]
            config = ["--config_file", "recipes/accelerate/two_cpu_processes.yaml"]
            command = [*ACCELERATE, *config, *options, "run_pretrain.py", *argv, "--output_dir", str(output_dir)]
            self.launchers.append(
                subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=log.open("w"), stderr=subprocess.STDOUT)
            )

    def wait_for(self, checkpoint: str) -> None:
        deadline = time.monotonic() + 150
        while not (self.output_dir / checkpoint).is_dir():
            assert all(launcher.poll() is None for launcher in self.launchers), self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.1)
        self.workers = [child for launcher in self.launchers for child in children(launcher.pid)]

    def seconds_until_all_ended(self, limit: float) -> float:
        started = time.monotonic()
        while any(launcher.poll() is None for launcher in self.launchers) or any(map(is_running, self.workers)):
            if time.monotonic() - started > limit:
                return float("inf")
            time.sleep(0.1)
        return time.monotonic() - started

    def tail(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in self.logs)

    def end(self) -> None:
        for launcher in self.launchers:
            for child in children(launcher.pid):
                os.kill(child, signal.SIGKILL)
            launcher.kill()
            launcher.wait()


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def killed(tmp_path_factory, unlabeled, tiny_config):
    """run(machines) -> (checkpoint, seconds, log): after it the last process is killed, and all end within seconds."""
    folder, done = tmp_path_factory.mktemp("killed"), {}
    argv = words(
        dataset_name=unlabeled,
        config_overrides=json.dumps(tiny_config),
        max_steps=100_000,
        save_steps=4,
        save_total_limit=1000,
        eval_strategy="no",
    )

    def run(count: int) -> tuple[Path, float, str]:
        if count not in done:
            machines = Machines(count, folder / f"on_{count}", argv)
            try:
                machines.wait_for("checkpoint-4")
                assert len(machines.workers) == 2
                os.kill(machines.workers[-1], signal.SIGKILL)
                seconds = machines.seconds_until_all_ended(WITHIN_SECONDS)
                done[count] = folder / f"on_{count}" / "checkpoint-4", seconds, machines.logs[0].read_text()
            finally:
                machines.end()
        return done[count]

    if not Path("/proc/self/task").is_dir():
        pytest.skip("finds the workers in /proc")
    return run


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_process_ends_all_others(killed, count):
    """torchrun ends those on its machine; those on others notice in the sums that they exchange at every update."""
    _, seconds, log = killed(count)
    assert seconds < WITHIN_SECONDS
    assert "Traceback" not in log.partition("torch/distributed/elastic")[0], log[-3000:]


def test_two_machines_compute_what_one_does(killed):
    one, two = (history(killed(count)[0], upto=4) for count in (1, 2))
    assert list(one) == list(two) == [1, 2, 3, 4]
    for step, expected in one.items():
        for name in ("loss", "contrastive_loss", "accuracy", "grad_norm", "hours_seen"):
            assert two[step][name] == pytest.approx(expected[name], rel=1e-6), (step, name)


# ---- Slurm

SRUN = """#!/usr/bin/env bash
# Two tasks on this machine.
while [[ $1 == -* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2
tasks=()
trap 'kill -TERM "${tasks[@]}"' TERM
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & tasks+=($!); done
echo $$ > "$FAKE/srun.pid"
highest=0
for task in "${tasks[@]}"; do
    wait "$task"; code=$?
    while kill -0 "$task" 2> /dev/null; do wait "$task"; code=$?; done  # the signal interrupted the wait
    ((code > highest)) && highest=$code
done
exit $highest
"""

SCONTROL = """#!/usr/bin/env bash
case $1 in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >> "$FAKE/requeued" ;;
esac
"""

# Notes what it was given, saves or not, and ends as it is told.
STAND_IN = """#!/usr/bin/env bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > "$FAKE/task_$RANK"
if [ "$SAVES" = 1 ]; then mkdir -p "$FAKE/out/checkpoint-4" && touch "$FAKE/out/checkpoint-4/complete.json"; fi
exit "$CODE"
"""


@pytest.fixture
def slurm(tmp_path):
    """start(argv, **environment): slurm.sh as a job with srun and scontrol that are not Slurm's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("stand_in", STAND_IN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = str(free_port() - 20000)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FAKE": str(tmp_path),
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }

    def start(argv: list[str], log: str = "job.log", **more) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", ROOT / "recipes/accelerate/slurm.sh", str(tmp_path / "out"), *argv],
            env={**environment, **more},
            stdout=(tmp_path / log).open("w"),
            stderr=subprocess.STDOUT,
        )

    start.job = job
    return start


@pytest.mark.parametrize(
    ("code", "saves", "requeued"), [(143, True, True), (143, False, False), (0, True, False), (1, True, False)]
)
def test_slurm_puts_back_what_was_stopped_and_saved(slurm, tmp_path, code, saves, requeued):
    stand_in = {"PYTHON": str(tmp_path / "bin/stand_in"), "CODE": str(code), "SAVES": str(int(saves))}
    assert slurm(["recipe.yaml", "--max_steps", "8"], **stand_in).wait(20) == code, (tmp_path / "job.log").read_text()
    assert (tmp_path / "requeued").is_file() == requeued
    options = f"run_pretrain.py recipe.yaml --max_steps 8 --output_dir {tmp_path}/out --resume_from_checkpoint auto"
    for rank in range(2):
        given = (tmp_path / f"task_{rank}").read_text().split(maxsplit=6)
        assert given[:5] == [str(rank), str(rank), "2", "2", "127.0.0.1"]
        assert int(given[5]) == 20000 + int(slurm.job) and given[6].strip() == options


@pytest.mark.slow
def test_slurm_stops_and_goes_on(slurm, tmp_path, unlabeled, tiny_config):
    argv = words(
        dataset_name=unlabeled,
        config_overrides=json.dumps(tiny_config),
        max_steps=100_000,
        save_steps=4,
        eval_strategy="no",
    )
    newest = 0
    for start in range(2):
        (tmp_path / "srun.pid").unlink(missing_ok=True)
        job = slurm(argv, log=f"{start}.log")
        log = tmp_path / f"{start}.log"
        deadline = time.monotonic() + 150
        while not any(update > newest for update in saved_updates(tmp_path / "out")):
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.1)
        os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
        assert job.wait(60) == 143, log.read_text()[-3000:]
        assert (tmp_path / "requeued").read_text().split() == [slurm.job] * (start + 1)
        began = f"resuming from {tmp_path}/out/checkpoint-{newest}\n" if start else "a new run"
        assert began in log.read_text()
        newest = max(saved_updates(tmp_path / "out"))
    steps = list(history(tmp_path / "out" / f"checkpoint-{newest}"))
    assert steps == list(range(1, newest + 1))  # none twice, none missing


def saved_updates(output_dir: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")]
