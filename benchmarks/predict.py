"""How fast a trained model is heard through, and what that takes of memory: `acoustic.predict` on long recordings.

    python benchmarks/predict.py [--minutes 10] [--long 240] [--sizes demo base] [--output FILE.json]

For each size of model and each task a recording of so many minutes, in a process of its own with two threads; for
classification and CTC the same through transformers' pipeline, which is given the audio as an array. Then, with the
demo's size, a recording of a quarter of an hour and a long one: memory must not grow with it. Weights are random,
which changes neither. Prints a table. About 15 minutes on two cores.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import soundfile
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RATE, THREADS, SHORT_MINUTES = 16_000, 2, 15
HEADS = {
    "classification": "AutoModelForAudioClassification",
    "segmentation": "AutoModelForAudioFrameClassification",
    "ctc": "AutoModelForCTC",
}
TASKS = (*HEADS, "anomaly")
PIPELINES = {"classification": "audio-classification", "ctc": "automatic-speech-recognition"}
CLIP_SECONDS, CHUNK_SECONDS = 10, 30
REPEATS, MAX_SECONDS = 5, 40
# Of the recording, for a model that is some fifty times slower.
SHARE = {"demo": 1.0, "base": 0.2}


def main(argv: list[str] | None = None) -> dict:
    args = parse(argv)
    if args.job:
        print(json.dumps(JOBS[args.job[0]](*args.job[1:])))
        return {}
    from acoustic.report.record import commit

    results = {"commit": commit(), "date": date.today().isoformat(), "threads": THREADS, "speed": {}, "memory": {}}
    models = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in args.sizes:
            audio = synthesize(Path(scratch, f"{size}.wav"), args.minutes * SHARE[size])
            results["speed"][size] = {}
            for task in TASKS:
                model = run_job("make", size, task, str(Path(scratch, f"{size}_{task}")))["model"]
                models.setdefault(task, model)
                results["speed"][size][task] = {
                    way: run_job(way, model, task, audio)
                    for way in ("ours", *(["pipeline"] if task in PIPELINES else []))
                }
                print(f"{size} {task}: {results['speed'][size][task]}", flush=True)
        for minutes in (SHORT_MINUTES, args.long) if args.long else ():
            audio = synthesize(Path(scratch, "long.wav"), minutes)
            for task in TASKS:
                results["memory"].setdefault(task, {})[f"{minutes:g}"] = run_job("ours", models[task], task, audio)
                print(f"{minutes:g} min, {task}: {results['memory'][task][f'{minutes:g}']}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    return results


def run_job(*job: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--job", *job]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(job)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def synthesize(path: Path, minutes: float) -> str:
    """Noise whose loudness changes, a minute at a time."""
    generator = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", RATE, 1, subtype="PCM_16") as file:
        for seconds in (min(60.0, 60 * minutes - begun) for begun in range(0, int(60 * minutes), 60)):
            file.write(0.1 * generator.random() * generator.standard_normal(int(seconds * RATE)))
    return str(path)


# ---- jobs, each in a fresh process


def make(size: str, task: str, folder: str) -> dict:
    """A model of the demo's size, or of wav2vec 2.0 base, with random weights and the task's head."""
    import transformers

    recipe = yaml.safe_load((ROOT / "recipes/demo/pretrain.yaml").read_text())
    sizes = {"demo": recipe["objectives"]["wav2vec2"]["config_overrides"], "base": {}}
    config = transformers.Wav2Vec2Config(**sizes[size], num_labels=6, vocab_size=32)
    config.architectures = None
    auto_class = getattr(transformers, HEADS[task]) if task in HEADS else transformers.AutoModel
    auto_class.from_config(config).save_pretrained(folder)
    group_norm = config.feat_extract_norm == "group"
    transformers.Wav2Vec2FeatureExtractor(return_attention_mask=not group_norm).save_pretrained(folder)
    if task == "ctc":
        letters = ["[PAD]", "[UNK]", "|", *"abcdefghijklmnopqrstuvwxyz'", "-", "."]
        vocabulary = Path(folder, "vocab.json")
        vocabulary.write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
        transformers.Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
    return {"model": fit_detector(folder) if task == "anomaly" else folder}


def fit_detector(encoder: str) -> str:
    """A detector on thirty clips of noise, in the encoder's place."""
    import contextlib
    import io

    import run_finetune

    clips, generator = Path(encoder, "clips"), np.random.default_rng(1)
    clips.mkdir()
    for number in range(30):
        soundfile.write(clips / f"{number}.wav", 0.1 * generator.standard_normal(4 * RATE), RATE)
    words = ["--task", "anomaly", "--dataset_name", str(clips), "--model_name_or_path", encoder]
    with contextlib.redirect_stdout(io.StringIO()):
        run_finetune.main(
            [*words, "--output_dir", f"{encoder}/detector", "--use_cpu", "true", "--disable_tqdm", "true"]
        )
    return f"{encoder}/detector"


def ours(model: str, task: str, audio: str) -> dict:
    import acoustic  # noqa: F401
    from acoustic.data.headers import read_header
    from acoustic.predict.load import load_predictor

    predictor, source = load_predictor(model), {"path": audio}
    header = read_header(source)
    return measured(header.seconds, lambda: predictor.predict({"audio": source, "name": audio}, header))


def pipeline(model: str, task: str, audio: str) -> dict:
    """What a user writes without us: for classification a loop over clips."""
    import transformers

    judge = transformers.pipeline(PIPELINES[task], model, device="cpu")
    options = {"chunk_length_s": CHUNK_SECONDS, "stride_length_s": CHUNK_SECONDS / 8} if task == "ctc" else {}

    def hear() -> None:
        waveform, rate = soundfile.read(audio, dtype="float32")
        step = len(waveform) if task == "ctc" else CLIP_SECONDS * rate
        for start in range(0, len(waveform), step):
            judge({"raw": waveform[start : start + step], "sampling_rate": rate}, **options)

    return measured(soundfile.info(audio).duration, hear)


def measured(audio_seconds: float, hear: Callable[[], object]) -> dict:
    """The best of a few times, as a machine has other things to do as well; once where that takes long."""
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < MAX_SECONDS:
        started = time.perf_counter()
        hear()
        times.append(time.perf_counter() - started)
    seconds = min(times)
    return {
        "audio_seconds_per_second": round(audio_seconds / seconds, 1),
        "hours_per_minute": round(audio_seconds / seconds / 60, 3),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


JOBS = {"make": make, "ours": ours, "pipeline": pipeline}


def table(results: dict) -> str:
    """GitHub's Markdown."""
    lines = ["| model | task | hours of audio per minute | transformers' pipeline |", "|---|---|---|---|"]
    for size, tasks in results["speed"].items():
        for task, ways in tasks.items():
            stock = f"{ways['pipeline']['hours_per_minute']:.2f}" if "pipeline" in ways else ""
            lines.append(f"| {size} | {task} | {ways['ours']['hours_per_minute']:.2f} | {stock} |")
    for task, lengths in results["memory"].items():
        said = ", ".join(f"{minutes} min: {found['peak_memory_mb']} MB" for minutes, found in lengths.items())
        lines.append(f"\n{task}, peak memory: {said}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="of the recording whose speed is measured")
    parser.add_argument("--long", type=float, default=240, help="minutes of the long recording; 0: none")
    parser.add_argument("--sizes", nargs="+", choices=["demo", "base"], default=["demo", "base"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
