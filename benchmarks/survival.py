"""A run survives: what kills, faults and new beginnings cost it, measured on real processes.

    python benchmarks/survival.py [--part kills faults resume cost] [--quick] [--data FOLDER] [--output FILE.json]

Toy runs of run_pretrain.py are killed at moments of all kinds, continued by the same command, and compared with a run
that nothing happened to: every logged value and the weights must be the same to the last bit. Every part prints a
table and puts it, with what it ran on, under its name into the JSON file. About 20 minutes on two cores.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from acoustic.training import checkpoint as files  # noqa: E402

SEED, UPDATES, SAVE_STEPS, LOGGING_STEPS = 0, 60, 5, 3
HERE, SCRIPT = str(Path(__file__).resolve()), str(ROOT / "run_pretrain.py")
TWO_PROCESSES = str(ROOT / "recipes/accelerate/two_cpu_processes.yaml")
ONE_PROCESS = str(ROOT / "recipes/accelerate/cpu.yaml")
# How a line begins that tells of training.
LOGGED = re.compile(r"update ([\d,]+) of ")
# Of a log entry, what tells of the clock and not of the run.
TIMED = ("audio_seconds_per_second", "data_wait_fraction")
# No toy run takes so long; one that does hangs.
PATIENCE = 240

# wav2vec 2.0's seven conv layers and 20 ms frames, in about 35,000 weights.
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": [24] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_codevectors_per_group": 16,
    "codevector_dim": 32,
    "proj_codevector_dim": 32,
    "num_negatives": 10,
    "layerdrop": 0.1,
}


# --- A run in processes of its own ----------------------------------------------------------------------------------


class Run:
    """A command that runs, and its lines with the seconds since its start."""

    def __init__(self, command: list[str], **environment: str):
        self.started, self.lines = time.monotonic(), []
        offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **offline, "SURVIVAL_STARTED": str(self.started), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic() - self.started, line.rstrip("\n")))

    def tree(self) -> list[psutil.Process]:
        """The process and all that it started; a launcher gives its processes sessions of their own."""
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self, known: list[psutil.Process] | None = None) -> None:
        """SIGKILL to all of them, as when the machine goes; `known`: looked up before, as that takes some ms."""
        for process in known or self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.end()

    def end(self) -> int:
        """Its exit code."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            code = None
            self.kill()
        self.reader.join(10)
        return code if code is None or code >= 0 else 128 - code

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    def find(self, *words: str) -> str:
        """The last line with one of these words."""
        return next((line for _, line in reversed(self.lines) if any(word in line for word in words)), "")

    @property
    def resumed_from(self) -> int:
        line = self.find("resuming from")
        return int(line.rsplit("-", 1)[1]) if line else 0

    @property
    def logs(self) -> list[float]:
        """Seconds at which training was logged."""
        return [seconds for seconds, line in self.lines if LOGGED.match(line)]

    @property
    def logged_update(self) -> int:
        found = [logged for _, line in self.lines if (logged := LOGGED.match(line))]
        return int(found[-1][1].replace(",", "")) if found else self.resumed_from

    @property
    def tail(self) -> str:
        return "\n".join(line for _, line in self.lines[-15:])


def wait_until(condition: Callable[[], bool], run: Run, every: float = 0.002) -> bool:
    """Whether it came true before the run's end."""
    while not condition():
        if run.is_over or time.monotonic() - run.started > PATIENCE:
            return condition()
        time.sleep(every)
    return True


# --- Variants of the toy run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When to kill.

    Args:
        when: "start" (since the process began), "training" (since this life's first logged update), "save" and
            "deletion" (since the next of them began), "end" (since the last checkpoint has its name), "report" (since
            all_results.json is there).
        seconds: after that.
        file: of the checkpoint being written: not before it appears.
        nth: save of this life.
    """

    when: str
    seconds: float = 0.0
    file: str | None = None
    nth: int = 2

    def __str__(self) -> str:
        return f"{self.when} {f'with {self.file}' if self.file else f'+ {1000 * self.seconds:.0f} ms'}"


@dataclass(frozen=True)
class Variant:
    """A way to run, and the lives it is killed in: each a list of kills between its beginning and its end."""

    name: str
    lives: tuple[tuple[Moment, ...], ...] = ()
    audio: str = "audio"
    options: dict = field(default_factory=dict)
    launcher: tuple[str, ...] = (sys.executable,)

    def command(self, work: Path, output_dir: Path, child: str | None = None, **more) -> list[str]:
        options = {
            "dataset_name": work / self.audio,
            "output_dir": output_dir,
            "config_overrides": json.dumps(TINY),
            "min_duration_in_seconds": 0.5,
            "max_duration_in_seconds": 1.5,
            "batch_seconds": 4,
            "max_steps": UPDATES,
            "logging_steps": LOGGING_STEPS,
            "line_seconds": 0,
            "save_steps": SAVE_STEPS,
            "dataloader_num_workers": 0,
            "eval_strategy": "no",
            "warmup_steps": 5,
            "learning_rate": 1e-3,
            "seed": SEED,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            **self.options,
            **more,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        return [*self.launcher, *([HERE, "--child", child] if child else [SCRIPT]), *words]


ACCELERATE = ("-m", "accelerate.commands.launch", "--config_file", TWO_PROCESSES, "--main_process_port", "0")
ONE = Variant("one process")
WORKERS = Variant("two data workers", options={"dataloader_num_workers": 2})
PROCESSES = Variant(
    "two processes, a data worker each",
    options={"dataloader_num_workers": 1, "batch_seconds": 2},
    launcher=(sys.executable, *ACCELERATE),
)
LAUNCHED = Variant("accelerate launch", launcher=(sys.executable, *ACCELERATE[:2], "--config_file", ONE_PROCESS))
SHARDS = Variant("tar shards, two data workers", audio="shards", options={"dataloader_num_workers": 2})
ACCUMULATED = Variant("three batches accumulated", options={"gradient_accumulation_steps": 3, "batch_seconds": 2})
EPOCHS = Variant("ten epochs of audio", audio="few")


def variants(seed: int, quick: bool) -> list[Variant]:
    """Each with its kills: 30 in all, 12 aimed at a save; `quick`: 3."""
    draw = random.Random(seed)

    def start():
        return Moment("start", draw.uniform(0.2, 6))

    def training():
        return Moment("training", draw.uniform(0, 1))

    def save(file=None, most=0.01):
        return Moment("save", 0.0 if file else draw.uniform(0, most), file, draw.choice((1, 2, 3)))

    deletion, end, at_once = Moment("deletion"), Moment("end", draw.uniform(0, 0.05)), Moment("save")
    if quick:
        return [dataclasses.replace(ONE, lives=((training(), at_once, end),))]
    one = (
        (start(), training(), at_once, save("model.safetensors"), end),
        (save(), training(), deletion, save("complete.json"), Moment("report")),
    )
    lives = (
        (ONE, one),
        (WORKERS, ((start(), training(), save("optimizer.pt"), save(), deletion),)),
        (PROCESSES, ((training(), save("optimizer.pt"), start(), save("stream_1.json"), end),)),
        (SHARDS, ((training(), save("trainer_state.json"), deletion, training()),)),
        (ACCUMULATED, ((save("stream_0.json"), training(), save()),)),
        (EPOCHS, ((training(), save("rng_state.pth"), deletion),)),
    )
    return [dataclasses.replace(variant, lives=plan) for variant, plan in lives]


def make_audio(work: Path, data: Path | None) -> None:
    """Three small corpora: 24 recordings of 1.1 to 3.4 s, the same in two tars, and four for many epochs."""
    import numpy as np
    import soundfile

    folder = work / "audio"
    folder.mkdir(parents=True)
    if data:
        found = sorted(path for path in data.rglob("*.wav") if 1 < soundfile.info(path).duration < 6)
        for number, path in enumerate(random.Random(SEED).sample(found, 24)):
            shutil.copy(path, folder / f"{number:02d}.wav")
    for number in range(0 if data else 24):
        generator = np.random.default_rng(number)
        clock = np.arange(int((1.1 + 0.1 * number) * 16_000)) / 16_000
        tone = 0.3 * np.sin(2 * np.pi * generator.uniform(150, 1500) * clock)
        soundfile.write(folder / f"{number:02d}.wav", tone + 0.05 * generator.standard_normal(len(tone)), 16_000)
    (work / "few").mkdir()
    (work / "shards").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        if number % 3 == 0:
            shutil.copy(path, work / "few")
        with tarfile.open(work / "shards" / f"{number % 2:02d}.tar", "a") as shard:
            shard.add(path, path.name)


# --- Comparing with the run that nothing happened to ----------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What must be the same: every logged value but the clock's, and the weights."""

    log: tuple[str, ...]
    weights: str

    @classmethod
    def of(cls, folder: Path) -> "Outcome":
        return cls(log_of(folder), digest(folder / "model.safetensors"))


def log_of(folder: Path) -> tuple[str, ...]:
    """Python writes a float so that reading it gives the same bits."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    entries = [entry for entry in history if "loss" in entry]
    return tuple(json.dumps({key: value for key, value in entry.items() if key not in TIMED}) for entry in entries)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Bench:
    """A working folder, and the undisturbed run of each variant, made when it is first asked for."""

    def __init__(self, work: Path, data: Path | None = None):
        self.work, self.known, self.numbers, self.lock = work, {}, itertools.count(1), threading.Lock()
        make_audio(work, data)

    def fresh(self) -> Path:
        return self.work / f"run_{next(self.numbers)}"

    def start(self, variant: Variant, output_dir: Path, child: str | None = None, **more) -> Run:
        """Begun or continued: it is the same command."""
        return Run(variant.command(self.work, output_dir, child, resume_from_checkpoint="auto", **more))

    def finish(self, variant: Variant, output_dir: Path, child: str | None = None, **more) -> Run:
        """
        Raises:
            RuntimeError: the run failed.
        """
        run = self.start(variant, output_dir, child, **more)
        code = run.end()
        if code != 0:
            raise RuntimeError(f"{variant.name}: exit code {code}\n{run.tail}")
        return run

    def reference(self, variant: Variant, child: str | None = None, **more) -> Outcome:
        key = (variant.name, child, *more.items())
        with self.lock:  # whoever asks second waits for the one run
            if key not in self.known:
                show_progress(f"{variant.name}: the run that nothing happens to")
                output_dir = self.fresh()
                run = self.finish(variant, output_dir, child, **more)
                self.known[key] = Outcome.of(output_dir)
                seen = f"{len(self.known[key].log)} log entries in {time.monotonic() - run.started:.0f} s"
                show_progress(f"{variant.name}: {seen}")
                shutil.rmtree(output_dir)
        return self.known[key]

    def is_exact(self, variant: Variant, output_dir: Path, child: str | None = None, **more) -> bool:
        there = all((output_dir / name).exists() for name in ("trainer_state.json", "model.safetensors"))
        return there and Outcome.of(output_dir) == self.reference(variant, child, **more)


def show_progress(text: str) -> None:
    print(f"  [{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


# --- Kills ----------------------------------------------------------------------------------------------------------


def saving_and_saved(output_dir: Path) -> tuple[int | None, int]:
    """(the update whose folder is being written or deleted, the newest that has its name or 0)."""
    try:
        names = os.listdir(output_dir)
    except FileNotFoundError:
        return None, 0
    numbers = {name: int(name.rsplit("-", 1)[1]) for name in names if "checkpoint-" in name}
    # By hand, as a save lasts milliseconds.
    staged = [number for name, number in numbers.items() if name.startswith(files.INCOMPLETE)]
    saved = [number for name, number in numbers.items() if name.startswith("checkpoint-")]
    return (staged[0] if staged else None), max(saved, default=0)


def kill_at(moment: Moment, run: Run, output_dir: Path) -> bool:
    """Whether the moment came before the run's end, and with it the run's."""
    known, first = None, saving_and_saved(output_dir)[1] + SAVE_STEPS
    if moment.when != "start":
        wait_until(lambda: bool(run.logs) or saving_and_saved(output_dir)[1] == UPDATES, run)
        known = run.tree()
    if not wait_for(moment, run, output_dir, first):
        return False
    run.kill(known)
    return True


def wait_for(moment: Moment, run: Run, output_dir: Path, first: int) -> bool:
    """Whether the moment came before the run's end; `first`: the update of this life's first save."""

    def has_come() -> bool:
        if moment.when == "start":
            return True
        if moment.when == "training":
            return bool(run.logs)
        if moment.when == "report":
            return (output_dir / "all_results.json").exists()
        staged, saved = saving_and_saved(output_dir)
        if moment.when == "end":
            return saved == UPDATES
        if not run.logs or staged is None or (staged > saved) != (moment.when == "save"):
            return False  # before the first update, what lies there is of the life before
        if moment.when == "save" and staged < first + SAVE_STEPS * (moment.nth - 1):
            return False
        return moment.file is None or (output_dir / f"_incomplete-checkpoint-{staged}" / moment.file).exists()

    came = wait_until(has_come, run, every=0.0 if moment.when == "deletion" else 0.0005)
    if came and moment.seconds:
        time.sleep(moment.seconds)
    return came and not run.is_over


@dataclass
class Life:
    """What was seen of one run from its beginning, over its kills, to its end."""

    kills: list[str] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    first_updates: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    exact: bool = False


def leftovers(output_dir: Path) -> set[tuple[str, int]]:
    """Of killed saves and deletions; with their inodes, as a later one can have the same name."""
    return {(path.name, path.stat().st_ino) for path in output_dir.glob(f"{files.INCOMPLETE}*")}


def where_killed(output_dir: Path, before: set) -> str:
    """By what lies there, not by when it was meant."""
    saved = max(map(files.update_of, files.checkpoints(output_dir)), default=0)
    for name, _ in leftovers(output_dir) - before:
        return "during a save" if int(name.rsplit("-", 1)[1]) > saved else "during a deletion"
    if saved == UPDATES:
        return "before the report" if not is_reported(output_dir) else "after all"
    return "between saves" if saved else "before any checkpoint"


def live(bench: Bench, variant: Variant, moments: tuple[Moment, ...], life: Life | None = None) -> Life:
    """Kill and continue, again and again, then let it end and compare."""
    life, output_dir = life or Life(), bench.fresh()
    for moment in moments:
        before = leftovers(output_dir)
        run = bench.start(variant, output_dir)
        if not kill_at(moment, run, output_dir):
            life.problems.append(f"no {moment.when} to kill in (exit code {run.end()}: {run.find('error')})")
            break
        where = where_killed(output_dir, before)
        life.kills.append(where)
        look_at_killed(bench, variant, output_dir, run, life)
        show_progress(f"{variant.name}: killed at {moment}: {where}, after update {run.logged_update}")
    try:
        if not is_reported(output_dir):
            note_first_update(bench.finish(variant, output_dir), life)
    except RuntimeError as error:
        life.problems.append(str(error).splitlines()[-1].replace(str(output_dir), "output_dir"))
    life.exact = bench.is_exact(variant, output_dir)
    show_progress(f"{variant.name}: ended, {'the same to the last bit' if life.exact else 'NOT THE SAME'}")
    if life.problems:
        show_progress(f"{variant.name}: {life.problems}")
    shutil.rmtree(output_dir)
    return life


def is_reported(output_dir: Path) -> bool:
    """The model card is written last."""
    return (output_dir / "README.md").exists()


def newest_update(output_dir: Path) -> int:
    newest, _ = files.newest_whole(str(output_dir))
    return files.update_of(newest) if newest else 0


def look_at_killed(bench: Bench, variant: Variant, output_dir: Path, run: Run, life: Life) -> None:
    """What has a checkpoint's name is whole, tells of the same run, and is no further back than save_steps."""
    note_first_update(run, life)
    newest, wrong = files.newest_whole(str(output_dir))
    life.problems += [f"{path.name} after a kill: {problem}" for path, problem in wrong.items()]
    done = max(run.logged_update, saving_and_saved(output_dir)[0] or 0)
    life.again.append(max(done - newest_update(output_dir), 0))
    if life.again[-1] > SAVE_STEPS:
        life.problems.append(f"{life.again[-1]} updates to do again")
    if newest:
        log = log_of(newest)
        if log != bench.reference(variant).log[: len(log)]:
            life.problems.append(f"{newest.name} is not of the same run")


def note_first_update(run: Run, life: Life) -> None:
    if run.resumed_from and run.logs:
        life.first_updates.append(run.logs[0])


def kills(bench: Bench, quick: bool) -> list[dict]:
    """SIGKILL to all processes at once, and the same command again; compared with the run that nothing happened to."""
    rows = []
    for variant in variants(SEED, quick):
        bench.reference(variant)
        seen = [live(bench, variant, moments) for moments in variant.lives]
        rows.append(kill_row(variant.name, seen))
    total = {"run": "all"}
    for name in ("kills", "during a save", "during a deletion", "before a checkpoint", "before the report", "exact"):
        total[name] = sum(row[name] for row in rows)
    total["updates again"] = max(row["updates again"] for row in rows)
    return [*rows, total, *terminations(bench, quick)]


def kill_row(name: str, seen: list[Life]) -> dict:
    where = [place for life in seen for place in life.kills]
    first = [seconds for life in seen for seconds in life.first_updates]
    return {
        "run": name,
        "kills": len(where),
        "during a save": where.count("during a save"),
        "during a deletion": where.count("during a deletion"),
        "before a checkpoint": where.count("before any checkpoint"),
        "before the report": where.count("before the report"),
        "exact": sum(len(life.kills) for life in seen if life.exact),
        "updates again": max((count for life in seen for count in life.again), default=0),
        "s to first update": round(statistics.median(first), 1) if first else None,
        "note": "; ".join(problem for life in seen for problem in life.problems),
    }


def terminations(bench: Bench, quick: bool) -> list[dict]:
    """SIGTERM, as schedulers send it: saved, exit code 143, nothing done again."""
    through = ("timeout", "--preserve-status", "-s", "TERM", "600")
    rows = [term_row(bench, ONE, ())]
    if not quick:
        rows += [term_row(bench, WORKERS, ()), term_row(bench, PROCESSES, ())]
        rows += [term_row(bench, LAUNCHED, through), term_row(bench, PROCESSES, through)]
    return rows


def term_row(bench: Bench, variant: Variant, through: tuple[str, ...]) -> dict:
    bench.reference(variant)
    name = f"SIGTERM: {variant.name}{', through timeout' if through else ''}"
    show_progress(name)
    life, output_dir = Life(), bench.fresh()
    command = variant.command(bench.work, output_dir, "slow:20", resume_from_checkpoint="auto")
    run = Run([*through, *command])
    wait_until(lambda: run.find("update 20 is slow"), run)
    run.process.send_signal(signal.SIGTERM)
    code, stopped = run.end(), newest_update(output_dir)
    if not run.find("stopped by SIGTERM") or stopped != 21:
        life.problems.append(f"no checkpoint: {run.tail}")
    note_first_update(bench.finish(variant, output_dir), life)
    exact = {"exact": int(bench.is_exact(variant, output_dir)), "updates again": 21 - stopped}
    first = {"s to first update": round(life.first_updates[0], 1) if life.first_updates else None}
    note = "; ".join([f"exit code {code}, saved at update {stopped}", *life.problems])
    return {"run": name, **exact, **first, "note": note}


# --- Faults ---------------------------------------------------------------------------------------------------------


def faults(bench: Bench, quick: bool) -> list[dict]:
    """One fault after the other: what happened, what was lost, what was said."""
    rows = []
    for fault in FAULTS[:2] if quick else FAULTS:
        show_progress(f"fault: {' '.join(fault.__doc__.split())}")
        start = time.perf_counter()
        found = fault(bench)
        took = round(time.perf_counter() - start)
        rows.append({"fault": " ".join(fault.__doc__.split()).rstrip("."), **found, "s": took})
        show_progress(f"  {found['outcome']}; the same: {found['exact']}; {found['said']}")
    return rows


def row(outcome: str, exact: bool | None, said: str) -> dict:
    """`exact`: whether the continued run equals the one that nothing (else) happened to."""
    return {"outcome": outcome, "exact": exact, "said": said.strip().replace("|", "/")}


def full_disk(bench: Bench) -> dict:
    """The disk is full from update 12 to 32."""
    # A file system of its own that nobody else sees, and that goes with the process.
    bench.reference(ONE)
    output_dir, mounted = bench.fresh(), bench.fresh()
    mounted.mkdir()
    inner = ONE.command(bench.work, mounted / "out", "full_disk:12,32")
    shell = 'mount -t tmpfs -o size=8m tmpfs "$0" && { "$@"; code=$?; cp -r "$0/out" "$1_"; exit $code; }'
    can_mount = subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
    if not can_mount:
        return full_disk_by_limit(bench)
    shell = shell.replace('"$1_"', f'"{output_dir}"')
    run = Run(["unshare", "-rm", "sh", "-c", shell, str(mounted), *inner])
    code, said = run.end(), run.find("could not be saved")
    tries = sum("could not be saved" in line for _, line in run.lines)
    exact = code == 0 and bench.is_exact(ONE, output_dir)
    return row(f"a real tmpfs; {tries} tries failed, exit code {code}", exact, said or run.tail)


def full_disk_by_limit(bench: Bench) -> dict:
    output_dir = bench.fresh()
    run = bench.start(ONE, output_dir, "file_limit:12,32")
    code = run.end()
    exact = code == 0 and bench.is_exact(ONE, output_dir)
    return row(f"no mounts here: RLIMIT_FSIZE; exit code {code}", exact, run.find("could not be saved"))


def killed_and_resumed(bench: Bench, child: str, *words: str) -> dict:
    """A run with a fault, beside one with the same fault that is killed after it and resumed."""
    reference = bench.reference(ONE, child)
    output_dir = bench.fresh()
    run = bench.start(ONE, output_dir, child)
    wait_until(lambda: saving_and_saved(output_dir)[1] >= 15, run)
    run.kill()
    said = run.find(*words)
    bench.finish(ONE, output_dir, child)
    return row("the run goes on; killed later, continued", Outcome.of(output_dir) == reference, said)


def nonfinite(bench: Bench) -> dict:
    """The gradients of updates 11 and 12 are not finite."""
    return killed_and_resumed(bench, "nonfinite:10,11", "left out, their gradients")


def out_of_memory(bench: Bench) -> dict:
    """One batch does not fit in memory."""
    return killed_and_resumed(bench, "out_of_memory:11", "out of memory at update")


def stops_itself(bench: Bench, child: str, word: str, **more) -> tuple[Path, int, str]:
    """(its folder, exit code, what it said); and it can be continued to its end."""
    output_dir = bench.fresh()
    run = bench.start(ONE, output_dir, child, save_total_limit=9, **more)
    return output_dir, run.end(), run.find(word)


def too_many_nonfinite(bench: Bench) -> dict:
    """The gradients are not finite from update 11 on."""
    updates = ",".join(map(str, range(10, 60)))
    output_dir, code, said = stops_itself(bench, f"nonfinite:{updates}", "error:", max_nonfinite_updates=5)
    stopped = newest_update(output_dir)
    weights = [digest(output_dir / f"checkpoint-{update}" / "model.safetensors") for update in (10, stopped)]
    bench.finish(ONE, output_dir)
    kept = "the weights saved are those from before" if weights[0] == weights[1] else "THE WEIGHTS ARE NOT THE LAST"
    return row(f"exit code {code} at update {stopped}, {kept}; continued to its end", weights[0] == weights[1], said)


def out_of_memory_again(bench: Bench) -> dict:
    """Batches do not fit in memory, three times."""
    output_dir, code, said = stops_itself(bench, "out_of_memory:11,12,14", "error:")
    stopped = newest_update(output_dir)
    bench.finish(ONE, output_dir)
    return row(f"exit code {code}, saved at update {stopped}; continued to its end", None, said)


def data_workers(run: Run) -> list[psutil.Process]:
    """Forked, so they have the command line of the process that decodes through them."""
    tree = {process.pid: process for process in run.tree()}
    return [
        process for process in tree.values() if process.ppid() in tree and process.cmdline() == cmdline(process.ppid())
    ]


def cmdline(pid: int) -> list[str]:
    return psutil.Process(pid).cmdline()


def killed_worker(bench: Bench) -> dict:
    """A data worker is killed from outside."""
    output_dir = bench.fresh()
    bench.reference(WORKERS)
    run = bench.start(WORKERS, output_dir)
    wait_until(lambda: run.logs, run)
    data_workers(run)[0].kill()
    code, said = run.end(), run.find("data workers start anew")
    return row(f"the run goes on, exit code {code}", bench.is_exact(WORKERS, output_dir), said)


def killed_main(bench: Bench) -> dict:
    """The process is killed, its data workers are left."""
    output_dir = bench.fresh()
    run = bench.start(WORKERS, output_dir)
    wait_until(lambda: saving_and_saved(output_dir)[1] >= 10, run)
    orphans = run.tree()[1:]
    run.process.kill()
    seconds = seconds_until_gone(orphans)
    bench.finish(WORKERS, output_dir)
    return row(
        f"{len(orphans)} workers gone after {seconds:.1f} s; continued", bench.is_exact(WORKERS, output_dir), ""
    )


def killed_process(bench: Bench) -> dict:
    """One process of two is killed."""
    output_dir = bench.fresh()
    bench.reference(PROCESSES)
    run = bench.start(PROCESSES, output_dir)
    wait_until(lambda: saving_and_saved(output_dir)[1] >= 10, run)
    everyone = run.tree()
    second = next(process for process in everyone[1:] if environment(process).get("RANK") == "1")
    second.kill()
    seconds = seconds_until_gone(everyone)
    code, said = run.end(), run.find("error: another process")
    bench.finish(PROCESSES, output_dir)
    exact = bench.is_exact(PROCESSES, output_dir)
    return row(f"all gone after {seconds:.1f} s, exit code {code}; continued", exact, said or "(torchrun's report)")


def environment(process: psutil.Process) -> dict:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def seconds_until_gone(processes: list[psutil.Process]) -> float:
    """psutil's own wait would take the exit code from whoever started them."""
    start = time.monotonic()
    while any(map(is_alive, processes)) and time.monotonic() - start < PATIENCE:
        time.sleep(0.05)
    return time.monotonic() - start


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def damaged(bench: Bench, damage: Callable[[Path], None]) -> dict:
    """Kill a run that has two checkpoints, damage the newer one, continue."""
    output_dir = bench.fresh()
    bench.reference(ONE)
    run = bench.start(ONE, output_dir)
    wait_until(lambda: saving_and_saved(output_dir)[1] >= 15, run)
    run.kill()
    newest = newest_update(output_dir)
    damage(output_dir / f"checkpoint-{newest}")
    resumed = bench.finish(ONE, output_dir)
    outcome = f"checkpoint-{newest} passed over, continued from {resumed.resumed_from}"
    return row(outcome, bench.is_exact(ONE, output_dir), resumed.find("passed over"))


def truncated(bench: Bench) -> dict:
    """The newest checkpoint is cut short on the disk."""
    return damaged(bench, lambda checkpoint: os.truncate(checkpoint / "optimizer.pt", 1000))


def flipped(bench: Bench) -> dict:
    """A bit of the newest checkpoint's weights flips on the disk."""

    def flip(checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return damaged(bench, flip)


def started_twice(bench: Bench) -> dict:
    """The same command is started while the run is under way."""
    output_dir = bench.fresh()
    first = Run(ONE.command(bench.work, output_dir, "slow:20", resume_from_checkpoint="auto"), SURVIVAL_SECONDS="20")
    wait_until(lambda: first.find("update 20 is slow"), first)
    second = bench.start(ONE, output_dir)
    wait_until(lambda: first.is_over, second)
    codes, waited = (first.end(), second.end()), second.find("another run is working")
    exact = bench.is_exact(ONE, output_dir)
    said = waited.replace(str(output_dir), "output_dir")
    return row(f"exit codes {codes[0]} and {codes[1]}; the second waited: {bool(waited)}", exact, said)


def interrupted(bench: Bench, presses: int) -> dict:
    output_dir = bench.fresh()
    run = Run(ONE.command(bench.work, output_dir, "slow:22", resume_from_checkpoint="auto"), SURVIVAL_SECONDS="8")
    wait_until(lambda: run.find("update 22 is slow"), run)
    for press in range(presses):
        time.sleep(3.5 if press else 0)
        os.killpg(run.process.pid, signal.SIGINT)
        pressed = time.monotonic()
    code, seconds = run.end(), time.monotonic() - pressed
    saved = newest_update(output_dir)
    bench.finish(ONE, output_dir)
    outcome = f"exit code {code} after {seconds:.1f} s, newest checkpoint {saved}; continued"
    return row(outcome, bench.is_exact(ONE, output_dir), run.find("stopped by").replace(str(output_dir), "output_dir"))


def ctrl_c(bench: Bench) -> dict:
    """Ctrl-C in update 23, which takes 8 s."""
    return interrupted(bench, 1)


def two_ctrl_c(bench: Bench) -> dict:
    """Ctrl-C in update 23, and again 3.5 s later."""
    return interrupted(bench, 2)


FAULTS = (
    nonfinite,
    too_many_nonfinite,
    full_disk,
    out_of_memory,
    out_of_memory_again,
    killed_worker,
    killed_main,
    killed_process,
    truncated,
    flipped,
    started_twice,
    ctrl_c,
    two_ctrl_c,
)


# --- Faults from inside: python benchmarks/survival.py --child NAME:UPDATE,UPDATE [options of run_pretrain.py] ------


def child(what: str, argv: list[str]) -> None:
    """run_pretrain.py with something done to it."""
    import run_pretrain
    from acoustic.console import one_line_errors

    name, _, numbers = what.partition(":")
    CHILDREN[name](*map(int, filter(None, numbers.split(","))))
    with one_line_errors():
        run_pretrain.main(argv)


def before_forward(action: Callable, *updates: int) -> None:
    """Let `action(trainer, inputs)` give the batch that is computed on, at these updates (from 0)."""
    from acoustic.training.trainer import AcousticTrainer

    forward = AcousticTrainer.compute_loss

    def changed(trainer, model, inputs, **kwargs):
        if trainer.state.global_step in updates:
            inputs = action(trainer, inputs)
        return forward(trainer, model, inputs, **kwargs)

    AcousticTrainer.compute_loss = changed


def child_nonfinite(*updates: int) -> None:
    before_forward(lambda trainer, inputs: {**inputs, "input_values": inputs["input_values"] * float("nan")}, *updates)


def child_out_of_memory(*updates: int) -> None:
    """The process may not grow by more than 64 MB, and the batch is 1 GB larger: the allocator itself fails."""

    def grow(trainer, inputs):
        before = resource.getrlimit(resource.RLIMIT_AS)
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, before[1]))
        try:
            return {**inputs, "input_values": inputs["input_values"].repeat(4000, 1)}
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    before_forward(grow, *updates)


def child_slow(*updates: int) -> None:
    def sleep(trainer, inputs):
        print(f"update {trainer.state.global_step} is slow", flush=True)
        time.sleep(float(os.environ.get("SURVIVAL_SECONDS", "2")))
        return inputs

    before_forward(sleep, *updates)


def child_full_disk(full: int, free: int) -> None:
    """Fill the disk that output_dir is on before one update, make room before another."""
    from acoustic.training import guard

    guard.RETRY_SECONDS = 0.1  # a minute, in a run that lasts longer

    def change(trainer, inputs):
        ballast = Path(trainer.args.output_dir, "ballast")
        if trainer.state.global_step == free:
            ballast.unlink()
        else:
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return inputs

    before_forward(change, full, free)


def child_file_limit(full: int, free: int) -> None:
    from acoustic.training import guard

    guard.RETRY_SECONDS = 0.1

    def change(trainer, inputs):
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        limit = most if trainer.state.global_step == free else 100_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        return inputs

    before_forward(change, full, free)


# --- Resuming in a large epoch --------------------------------------------------------------------------------------

FILES, DISTINCT, PLACES = 100_000, 1_000, (1, 50, 99)


def resume(bench: Bench, quick: bool) -> list[dict]:
    """Seconds to the first batch, wherever in the epoch the run is continued; no data workers, files in the cache."""
    count = 2_000 if quick else FILES
    folder = many_files(bench.work / "many", count)
    many = Variant(
        f"{count:,} files",
        options={"dataset_name": folder, "batch_seconds": 64, "max_duration_in_seconds": 15.6, "max_steps": 1},
    )
    output_dir, places = bench.fresh(), bench.work / "places"
    places.mkdir()
    show_progress(f"one update on {count:,} files, for its checkpoint")
    bench.finish(many, output_dir)
    show_progress("reading the epoch through, without decoding, for the places in it")
    Run(
        many.command(bench.work, bench.fresh(), f"places:{','.join(map(str, PLACES))}"), SURVIVAL_FOLDER=str(places)
    ).end()
    rows = [resume_row(bench, many, "a new run", None)]
    for percent in PLACES:
        checkpoint = moved(output_dir / "checkpoint-1", places / f"{percent}.json")
        rows.append(resume_row(bench, many, f"at {percent} % of the epoch", checkpoint))
        show_progress(str(rows[-1]))
    return rows


def many_files(folder: Path, count: int) -> Path:
    """Hard links to a thousand recordings of 1 to 3 s, in subfolders of 1,000."""
    from benchmarks.data_stream import make_corpus

    show_progress(f"{count:,} files")
    recordings = sorted(make_corpus(folder / "distinct", min(DISTINCT, count)).rglob("*.wav"))
    for number in range(count):
        file = folder / "audio" / f"{number // 1000:03d}" / f"{number:06d}.wav"
        if number % 1000 == 0:
            file.parent.mkdir(parents=True)
        os.link(recordings[number % len(recordings)], file)
    return folder / "audio"


def moved(checkpoint: Path, place: Path) -> Path:
    """A copy of a checkpoint that is at another place in the audio."""
    folder = files.staging_of(checkpoint.parent.with_name(f"moved_{place.stem}") / checkpoint.name)
    shutil.copytree(checkpoint, folder)
    (folder / files.MANIFEST).unlink()
    state = json.loads((folder / "stream_0.json").read_text())
    (folder / "stream_0.json").write_text(json.dumps({**state, "place": json.loads(place.read_text())}))
    target = folder.parent / checkpoint.name
    files.publish(target)
    return target


def resume_row(bench: Bench, many: Variant, name: str, checkpoint: Path | None) -> dict:
    more = {"max_steps": 9, **({"resume_from_checkpoint": checkpoint} if checkpoint else {})}
    found = []
    for _ in range(2):
        run = Run(many.command(bench.work, bench.fresh(), "first_batch", **more))
        run.end()
        found.append(json.loads(run.find('{"start"') or f'"{run.tail}"'))
    best = min(found, key=lambda times: times["train"])
    return {
        "run": name,
        "s from its start": round(best["start"], 2),
        "s from trainer.train": round(best["train"], 3),
        "headers read before training": best["surveyed"],
        "headers read": best["headers"],
        "windows decoded": best["windows"],
    }


def counted(module, name: str, counts: dict, key: str) -> None:
    original = getattr(module, name)

    @functools.wraps(original)
    def counting(*args, **kwargs):
        counts[key] += 1
        return original(*args, **kwargs)

    setattr(module, name, counting)


def child_first_batch() -> None:
    """Print the times and counts up to the first batch, and leave."""
    from acoustic.data import batches, order, survey
    from acoustic.training.trainer import AcousticTrainer

    counts, times = defaultdict(int), {}
    counted(order, "read_header", counts, "headers")
    counted(survey, "read_header", counts, "surveyed")
    counted(batches, "read_window", counts, "windows")
    train, take = AcousticTrainer.train, AcousticTrainer.get_batch_samples

    def timed_train(trainer, **kwargs):
        times["train"] = time.monotonic()
        train(trainer, **kwargs)

    def timed_take(trainer, *args):
        take(trainer, *args)
        now = time.monotonic()
        seconds = {"start": now - float(os.environ["SURVIVAL_STARTED"]), "train": now - times["train"]}
        print(json.dumps({**seconds, **{key: counts[key] for key in ("surveyed", "headers", "windows")}}), flush=True)
        os._exit(0)

    AcousticTrainer.train, AcousticTrainer.get_batch_samples = timed_train, timed_take


def child_places(*percents: int) -> None:
    """Write the places in the audio at these parts of the epoch, and leave; nothing is decoded on the way."""
    from acoustic.data.batches import BatchStream
    from acoustic.training.trainer import AcousticTrainer

    def train(trainer, **kwargs):
        BatchStream.make = lambda *args: {"audio_seconds": 0.0}
        loader, wanted = trainer.get_train_dataloader(), list(percents)
        for batch in loader:
            while wanted and batch["epoch"] >= wanted[0] / 100:
                place = json.dumps(loader.state_dict())
                Path(os.environ["SURVIVAL_FOLDER"], f"{wanted.pop(0)}.json").write_text(place)
            if not wanted:
                os._exit(0)

    AcousticTrainer.train = train


# --- What the care costs --------------------------------------------------------------------------------------------

BASE_UPDATES, DEFAULT_SAVE_STEPS, DEFAULT_LOGGING_STEPS = 3, 500, 10


def cost(bench: Bench, quick: bool) -> list[dict]:
    """Seconds of the base-size model's update, and what watching and saving add to it at the default options."""
    measured = costs_of_a_run(bench, quick)
    agreement = costs_of_agreement(bench)
    step = statistics.median(measured["step"][1:])
    parts = {
        "writing a checkpoint": (measured["save"], 1 / DEFAULT_SAVE_STEPS),
        "of this flushing and checksums": (measured["publish"], 1 / DEFAULT_SAVE_STEPS),
        "check for gradients that are not finite": (measured["nonfinite"], 1),
        "health, per log entry": (health_seconds(), 1 / DEFAULT_LOGGING_STEPS),
        "agreement of two processes": ([2 * agreement], 1),
    }
    rows = [
        {"what": f"an update of {'a toy' if quick else 'the base'} model", "ms": 1000 * step, "% of an update": 100.0}
    ]
    total = 0.0
    for name, (seconds, per_update) in parts.items():
        share = 100 * statistics.median(seconds) * per_update / step
        total += 0 if name.startswith("of this") else share
        rows.append({"what": name, "ms": 1000 * statistics.median(seconds), "% of an update": share})
    return [*rows, {"what": "all together", "ms": None, "% of an update": total}]


def costs_of_a_run(bench: Bench, quick: bool) -> dict:
    """Seconds of each update, save and check of a run: {name: [seconds]}."""
    import numpy as np
    import soundfile

    from benchmarks.data_stream import noise

    folder = bench.work / "long"
    folder.mkdir()
    for number in range(8):
        soundfile.write(folder / f"{number}.wav", noise(40, 16_000, np.random.default_rng(number)), 16_000)
    options = {"batch_seconds": 31.2, "min_duration_in_seconds": 7.8, "max_duration_in_seconds": 15.6}
    sizes = {} if quick else {"config_overrides": '{"attention_dropout": 0.0}'}
    base = Variant("base", options={"dataset_name": folder, **options, **sizes, "save_steps": 1, "logging_steps": 1})
    output_dir = bench.fresh()
    command = base.command(bench.work, output_dir, "costs", max_steps=BASE_UPDATES)
    show_progress(f"{BASE_UPDATES} updates and saves of {'a toy' if quick else 'a base-size model: some minutes'}")
    run = Run(command, OMP_NUM_THREADS=str(os.cpu_count()))
    run.end()
    found = run.find('{"step"')
    shutil.rmtree(output_dir, ignore_errors=True)
    if not found:
        raise RuntimeError(run.tail)
    return json.loads(found)


def child_costs() -> None:
    """Time the parts of a run, print them at its end."""
    from acoustic.training.faults import NonFiniteUpdates
    from acoustic.training.trainer import AcousticTrainer

    seconds = defaultdict(list)

    def timed(owner, name: str, key: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def timing(*args, **kwargs):
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                seconds[key].append(time.perf_counter() - start)

        setattr(owner, name, timing)

    timed(AcousticTrainer, "training_step", "step")
    timed(AcousticTrainer, "save_whole", "save")
    timed(files, "publish", "publish")
    timed(NonFiniteUpdates, "leave_out", "nonfinite")
    train = AcousticTrainer.train

    def then_print(trainer, **kwargs):
        train(trainer, **kwargs)
        print(json.dumps(seconds), flush=True)
        os._exit(0)

    AcousticTrainer.train = then_print


def costs_of_agreement(bench: Bench) -> float:
    """Seconds of one sum over two processes, as each update makes two: targets, and whether to save or stop."""
    show_progress("agreement of two processes")
    run = Run([*PROCESSES.launcher, HERE, "--child", "agreement"])
    run.end()
    return float(run.find("seconds an agreement").split()[0])


def agree(times: int = 2000) -> None:
    from accelerate import PartialState

    from acoustic.training.exchange import Exchange

    state = PartialState(cpu=True)
    exchange = Exchange(state.num_processes)
    exchange.totals(0)
    start = time.perf_counter()
    for _ in range(times):
        exchange.totals(0, 0, 0)
    if state.is_main_process:
        print(f"{(time.perf_counter() - start) / times} seconds an agreement", flush=True)
    state.destroy_process_group()


def health_seconds(entries: int = 1000) -> list[float]:
    """Of each of so many log entries of a healthy run."""
    from acoustic.training.checks import WAV2VEC2
    from acoustic.training.health import Facts, HealthWatch

    watch = HealthWatch(Facts(100, 640, 2, 400_000, 32_000, 5e-4, 5760, 2, 2), WAV2VEC2)
    draw, seconds = random.Random(SEED), []
    for step in range(1, entries + 1):
        entry = {
            "step": 10 * step,
            "loss": 2 + draw.random(),
            "contrastive_loss": 2 + draw.random(),
            "diversity_loss": 0.1,
            "accuracy": 0.5,
            "code_perplexity": 300 + draw.random(),
            "lowest_group_perplexity": 150.0,
            "prob_perplexity": 300.0,
            "grad_norm": draw.random(),
            "learning_rate": 5e-4,
            "data_wait_fraction": 0.01,
        }
        start = time.perf_counter()
        watch.see(entry)
        seconds.append(time.perf_counter() - start)
    return seconds


CHILDREN = {
    "nonfinite": child_nonfinite,
    "out_of_memory": child_out_of_memory,
    "slow": child_slow,
    "full_disk": child_full_disk,
    "file_limit": child_file_limit,
    "first_batch": child_first_batch,
    "places": child_places,
    "costs": child_costs,
}


# --- Tables ---------------------------------------------------------------------------------------------------------

PARTS = {part.__name__: part for part in (kills, faults, resume, cost)}


def shown(value) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "NO", None: ""}[value]
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def table(rows: list[dict]) -> str:
    """GitHub's Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([shown(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=[*PARTS, "all"], default=["all"])
    parser.add_argument("--quick", action="store_true", help="little of each, to see that it works")
    parser.add_argument("--data", type=Path, help="a folder of wav files, in the place of tones")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/survival.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    from benchmarks.data_stream import QUICK, Sizes, about, write_results

    args, tables = parse(argv), {}
    names = list(PARTS) if "all" in args.part else args.part
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(Path(temporary), args.data)
        for name in names:
            start = time.perf_counter()
            tables[name] = PARTS[name](bench, args.quick)
            seconds = time.perf_counter() - start
            write_results(
                args.output, name, {**about(QUICK if args.quick else Sizes(), seconds), "rows": tables[name]}
            )
            print(
                f"\n{name} ({seconds:.0f} s): {' '.join(PARTS[name].__doc__.split())}\n\n{table(tables[name])}",
                flush=True,
            )
    return tables


if __name__ == "__main__":
    if sys.argv[1:3] == ["--child", "agreement"]:
        agree()
    elif sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
