"""Which objective for which sounds: each pretrained for the same time, probed and fine-tuned on the same few labels.

    python benchmarks/objectives.py [--world demo voice_prompts] [--minutes 4] [--seeds 0 1 2] [--quick]

Two parts. `speed`, on a machine that does nothing else: seconds of an update, audio-seconds per second, peak memory.
`quality`: so many updates as make `--minutes` by that, for each objective, seed and world; then, beside the same
architecture with random weights and log-mel bands,
    probe        logistic regression on mean and deviation over time of one layer, frozen; layer and penalty are chosen
                 by cross-validation on the labels
    fine-tuned   run_finetune.py with the world's recipe
Results go into the JSON file as they come, and what is there already is not measured again.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WORK = ROOT / "outputs/objectives_benchmark"
OBJECTIVES = ("wav2vec2", "wav2vec", "vq_wav2vec", "code_bert", "cpc", "mockingjay", "audio_albert")
CALIBRATION_UPDATES = 24
LOCK = threading.Lock()
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class World:
    """Audio without labels, and a question with a few of them."""

    recipe: str
    finetune: str
    data: str
    train: str
    tests: tuple[str, ...]
    label: str | None
    seconds: float  # clips are cut to it
    chance: float


WORLDS = {
    "demo": World(
        "recipes/demo/pretrain.yaml",
        "recipes/demo/classification.yaml",
        "data/demo",
        "train",
        ("test", "shifted"),
        None,
        4.0,
        1 / 6,
    ),
    "voice_prompts": World(
        "recipes/objectives/small.yaml",
        "recipes/voice_prompts/classification.yaml",
        "data/voice_prompts",
        "language_train",
        ("language_test",),
        "language",
        8.0,
        1 / 3,
    ),
}
LABELS_PER_CLASS = 20


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.job:
        print(json.dumps(JOBS[args.job[0]](*args.job[1:])))
        return {}
    for world in args.world:
        for objective in args.objectives:
            measure(args.output, ("speed", world, objective), lambda w=world, o=objective: run_job("speed", w, o))
    if "quality" in args.part:
        # One thread each: two at a time have what one would have alone on two cores.
        chains = []
        with ThreadPoolExecutor(args.jobs) as pool:
            for world in args.world:
                measure(args.output, ("quality", world, "log_mel"), lambda w=world: run_job("floor", w, *seeds(args)))
                chains += [pool.submit(chain, args, world, seed) for seed in args.seeds]
        for done in chains:
            done.result()  # raises what was raised there
    results = read(args.output)
    print(tables(results))
    return results


def seeds(args) -> list[str]:
    return [str(seed) for seed in args.seeds]


def chain(args, world: str, seed: int) -> None:
    """All objectives on one seed; code_bert after the quantizer that it reads."""
    with LOCK:
        speed = read(args.output)["speed"][world]
    for objective in args.objectives:
        updates = 3 if args.quick else round(60 * args.minutes / speed[objective]["seconds_per_update"])
        key = ("quality", world, objective, str(seed))
        measure(args.output, key, lambda o=objective, n=updates: run_job("quality", world, o, str(seed), str(n)))


def measure(output: Path, key: tuple[str, ...], action) -> None:
    """Do it and keep the result under its key, unless it is there; what fails is said and left out."""
    with LOCK:
        if look_up(read(output), key) is not None:
            return
    started = time.perf_counter()
    try:
        result = action()
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(key)}: failed: {error.stderr[-2000:]}", flush=True)
        return
    with LOCK:
        results = read(output)
        place = results
        for name in key[:-1]:
            place = place.setdefault(name, {})
        place[key[-1]] = {**result, **about(time.perf_counter() - started)}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{' '.join(key)}: {result}", flush=True)


def read(output: Path) -> dict:
    return json.loads(output.read_text()) if output.exists() else {}


def look_up(results: dict, key: tuple[str, ...]):
    for name in key:
        results = results.get(name)
        if results is None:
            return None
    return results


def about(seconds: float) -> dict:
    from acoustic.report.record import commit

    return {"wall_seconds": round(seconds, 1), "commit": commit(), "date": date.today().isoformat()}


def run_job(*job: str) -> dict:
    """In a fresh process with one thread, and its own peak of memory."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--job", *job]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ---- jobs


def folder(world: str, objective: str, seed: str) -> Path:
    return WORK / world / f"{objective}_{seed}"


def pretrain(world: str, objective: str, seed: str, updates: str, output: Path, *options: str) -> dict:
    """run_pretrain.py with the world's recipe; what it logged last."""
    import run_pretrain

    argv = [WORLDS[world].recipe, "--objective", objective, "--seed", seed, "--max_steps", updates]
    argv += ["--output_dir", str(output), "--overwrite_output_dir", "true", "--save_strategy", "no"]
    argv += ["--dataloader_num_workers", "0", "--use_cpu", "true", "--disable_tqdm", "true", *options]
    if objective == "code_bert":
        argv += ["--quantizer_name_or_path", str(output.with_name(output.name.replace("code_bert", "vq_wav2vec")))]
    with contextlib.redirect_stdout(io.StringIO()):
        return run_pretrain.main(argv)


def speed(world: str, objective: str) -> dict:
    """The median over logged updates after the first few."""
    output = folder(world, objective, "speed")
    options = ("--logging_steps", "4", "--eval_strategy", "no")
    pretrain(world, objective, "0", str(CALIBRATION_UPDATES), output, *options)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "audio_seconds_per_second" in entry][2:]
    rate = float(np.median([entry["audio_seconds_per_second"] for entry in logged]))
    hours = logged[-1]["hours_seen"] - logged[0]["hours_seen"]
    seconds = 3600 * hours / (logged[-1]["step"] - logged[0]["step"]) / rate
    return {
        "audio_seconds_per_second": round(rate, 1),
        "seconds_per_update": round(seconds, 4),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "encoder_parameters": count_encoder(output),
    }


def count_encoder(output: Path) -> int:
    from transformers import AutoModel

    import acoustic  # noqa: F401

    return sum(parameter.numel() for parameter in load(AutoModel.from_pretrained, output).parameters())


def load(make, *args, **kwargs):
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return make(*args, **kwargs)


def quality(world: str, objective: str, seed: str, updates: str) -> dict:
    output = folder(world, objective, seed)
    results = pretrain(world, objective, seed, updates, output)
    kept = {name: value for name, value in results.items() if name.startswith("eval_") and "accuracy_" not in name}
    return {
        "updates": int(updates),
        "hours_heard": round(results["hours_seen"], 2),
        "held_out": {name: round(value, 4) for name, value in kept.items() if "runtime" not in name},
        "probe": probe(world, output, seed, random=False),
        "probe_random": probe(world, output, seed, random=True),
        "fine_tuned": fine_tune(world, output, seed, random=False),
        "fine_tuned_random": fine_tune(world, output, seed, random=True),
    }


def fine_tune(world: str, pretrained: Path, seed: str, random: bool) -> dict:
    import run_finetune

    given = WORLDS[world]
    output = pretrained.parent / f"{pretrained.name}_fine_tuned{'_random' if random else ''}"
    argv = [given.finetune, "--model_name_or_path", str(pretrained), "--output_dir", str(output), "--seed", seed]
    argv += ["--labels_per_class", str(LABELS_PER_CLASS), "--random_weights", str(random).lower()]
    argv += ["--eval_strategy", "no", "--save_strategy", "no", "--overwrite_output_dir", "true"]
    argv += ["--dataloader_num_workers", "0", "--use_cpu", "true", "--disable_tqdm", "true"]
    with contextlib.redirect_stdout(io.StringIO()):
        results = run_finetune.main(argv)
    return {split: round(results[f"{split}_accuracy"], 4) for split in given.tests}


def probe(world: str, pretrained: Path, seed: str, random: bool) -> dict:
    """Accuracy on each test split, and the layer that was chosen, of the pretrained or of random weights."""
    import torch
    from transformers import AutoFeatureExtractor, AutoModel

    import acoustic  # noqa: F401

    extractor = AutoFeatureExtractor.from_pretrained(pretrained)
    model = load(AutoModel.from_pretrained, pretrained).eval()
    if random:
        from acoustic.tasks.base import with_random_weights

        torch.manual_seed(int(seed))
        model = load(with_random_weights, AutoModel, str(pretrained), None, model.config)[0].eval()

    @torch.inference_mode()
    def layers(waveform) -> list:
        inputs = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        return [state[0] for state in model(**inputs, output_hidden_states=True).hidden_states]

    return probe_layers(world, layers, seed)


def floor(world: str, *seeds: str) -> dict:
    """Log-mel bands in the place of layers."""
    import torch
    import torchaudio

    mel = torchaudio.transforms.MelSpectrogram(16_000, n_fft=400, hop_length=160, n_mels=64)

    def layers(waveform) -> list:
        scaled = torch.from_numpy((waveform - waveform.mean()) / (waveform.std() + 1e-7))
        return [torch.log(mel(scaled) + 1e-6).T]

    return {seed: probe_layers(world, layers, seed) for seed in seeds}


def probe_layers(world: str, layers, seed: str) -> dict:
    """layers: waveform -> (frames, width) of each layer."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    given = WORLDS[world]
    (train, labels), *tests = (pooled(world, split, layers) for split in (given.train, *given.tests))
    generator = np.random.default_rng(int(seed))
    drawn = [generator.permutation(np.flatnonzero(labels == name))[:LABELS_PER_CLASS] for name in np.unique(labels)]
    chosen = np.concatenate(drawn)

    def classifier(penalty: float):
        return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))

    scores = {
        (layer, penalty): cross_val_score(classifier(penalty), features[chosen], labels[chosen], cv=5).mean()
        for layer, features in enumerate(train)
        for penalty in PENALTIES
    }
    layer, penalty = max(scores, key=scores.get)
    best = classifier(penalty).fit(train[layer][chosen], labels[chosen])
    accuracies = {split: best.score(test[layer], truth) for split, (test, truth) in zip(given.tests, tests)}
    return {**{split: round(float(value), 4) for split, value in accuracies.items()}, "layer": layer}


def pooled(world: str, split: str, layers) -> tuple[list[np.ndarray], np.ndarray]:
    """(clips, 2 x width) of each layer, mean and deviation over time, and (clips,) class names."""
    import torch

    from acoustic.data.decode import read_window
    from acoustic.data.headers import read_header
    from acoustic.data.sources import open_rows

    given = WORLDS[world]
    rows = open_rows(given.data, split, label_column=given.label, indexed=True)
    clips, labels = [], []
    for index in range(len(rows)):
        row = rows[index]
        header = read_header(row["audio"])
        stop = min(header.frames, int(given.seconds * header.rate))
        frames = layers(read_window(row["audio"], 0, stop, 16_000))
        clips.append([torch.cat([layer.mean(0), layer.std(0)]).numpy() for layer in frames])
        labels.append(str(row["label"]))
    return [np.stack(layer) for layer in zip(*clips)], np.array(labels)


JOBS = {"speed": speed, "quality": quality, "floor": floor}


# ---- the tables


def spread(values: list[float]) -> str:
    return f"{100 * np.mean(values):.0f} ({100 * min(values):.0f}-{100 * max(values):.0f})"


def tables(results: dict) -> str:
    return "\n\n".join(f"**{world}**\n\n{table(results, world)}" for world in results.get("speed", {}))


def table(results: dict, world: str) -> str:
    """GitHub's Markdown; accuracies in %, mean and range over the seeds, behind the slash from random weights."""
    given = WORLDS[world]
    columns = [(kind, split) for kind in ("probe", "fine_tuned") for split in given.tests]
    names = [f"{kind.replace('_', '-')}, {split}" for kind, split in columns]
    header = ["objective", "audio s/s", "MB", "M weights", "hours heard", *names]
    lines = [header, ["---"] * len(header)]
    measured = results.get("quality", {}).get(world, {})
    if "log_mel" in measured:
        scores = [score for name, score in measured["log_mel"].items() if name.isdigit()]
        cells = [spread([s[split] for s in scores]) if kind == "probe" else "" for kind, split in columns]
        lines.append(["log-mel bands", "", "", "", "", *cells])
    for objective, fast in results["speed"][world].items():
        runs = list(measured.get(objective, {}).values())
        cells = [
            " / ".join(spread([run[key][split] for run in runs]) for key in (kind, f"{kind}_random")) if runs else ""
            for kind, split in columns
        ]
        cost = f"{fast['audio_seconds_per_second']:.0f}", f"{fast['peak_memory_mb']}"
        size = f"{fast['encoder_parameters'] / 1e6:.1f}"
        hours = f"{np.mean([run['hours_heard'] for run in runs]):.1f}" if runs else ""
        lines.append([objective, *cost, size, hours, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--part", nargs="+", choices=["speed", "quality"], default=["speed", "quality"])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--minutes", type=float, default=4, help="of pretraining, on one of two cores")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="at a time, a thread each")
    parser.add_argument("--quick", action="store_true", help="three updates each, to see that it works")
    parser.add_argument("--output", type=Path, default=ROOT / "recipes/objectives/results/comparison.json")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.output = args.output.resolve()
    return args


if __name__ == "__main__":
    main()
