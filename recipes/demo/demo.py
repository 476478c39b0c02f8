"""The main job, end to end, on sounds that it synthesises: `make demo`.

synthesise -> pretrain -> for each draw of labels: fine-tune the pretrained and the random weights -> one table.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))


import run_finetune  # noqa: E402
import run_pretrain  # noqa: E402
from acoustic.console import one_line_errors, say  # noqa: E402
from acoustic.report.figures import compare_starts  # noqa: E402
from acoustic.report.record import commit, hardware, write_json  # noqa: E402

DATA, OUTPUT = "data/demo", "outputs/demo"
SPLITS = ("test", "shifted")
STARTS = {"pretrained": [], "random weights": ["--random_weights", "true"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=3, help="draws of the labeled clips (and of all random weights)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[5], help="labeled clips of each class")
    parser.add_argument("--hours", type=float, default=1.0, help="unlabeled audio to synthesise, in hours")
    parser.add_argument("--max_steps", type=int, help="updates of pretraining; default: the recipe's")
    args = parser.parse_args()
    started = time.perf_counter()

    say("\n== 1 of 3: synthesise the sound world")
    # A process of its own: its workers would import torch with this one.
    command = [sys.executable, str(HERE / "synthesize.py"), "--output_dir", DATA, "--hours", str(args.hours)]
    subprocess.run(command, check=True)
    say("\n== 2 of 3: pretrain on the unlabeled recordings")
    pretrained = f"{OUTPUT}/pretrain"
    options = ["--output_dir", pretrained, "--overwrite_output_dir", "true"]
    options += ["--max_steps", str(args.max_steps)] if args.max_steps else []
    run_pretrain.main(["recipes/demo/pretrain.yaml", *options])
    say("\n== 3 of 3: fine-tune on few labels, from the pretrained and from random weights")
    rows = [row for budget in args.budgets for row in compare(pretrained, budget, args.draws)]
    report(rows, args, time.perf_counter() - started)


def compare(pretrained: str, budget: int, draws: int) -> list[dict]:
    """One row for each start and draw: {"start", "budget", "draw", "test", "shifted"}, accuracies."""
    rows = []
    for draw in range(draws):
        floor = log_mel_floor(budget, draw)
        rows.append({"start": "log-mel statistics", "budget": budget, "draw": draw, **floor})
        for start, options in STARTS.items():
            output = f"{OUTPUT}/{start.split()[0]}_{budget}_{draw}"
            argv = ["recipes/demo/classification.yaml", "--model_name_or_path", pretrained, "--output_dir", output]
            argv += ["--labels_per_class", str(budget), "--seed", str(draw), "--disable_tqdm", "true", *options]
            with contextlib.redirect_stdout(io.StringIO()):
                results = run_finetune.main(argv)
            rows.append(
                {"start": start, "budget": budget, "draw": draw, **{s: results[f"{s}_accuracy"] for s in SPLITS}}
            )
        say(
            f"{budget} labels per class, draw {draw}: " + ", ".join(f"{r['start']} {r['test']:.0%}" for r in rows[-3:])
        )
    return rows


def log_mel_floor(budget: int, draw: int) -> dict[str, float]:
    """What no learned representation at all would do: mean and deviation of log-mel bands, logistic regression."""
    train, labels = log_mel_statistics("train")
    generator = np.random.default_rng(draw)
    chosen = np.concatenate([generator.permutation(np.flatnonzero(labels == c))[:budget] for c in np.unique(labels)])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(
        train[chosen], labels[chosen]
    )
    return {split: float(model.score(*log_mel_statistics(split))) for split in SPLITS}


def log_mel_statistics(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(clips, 128) features and (clips,) class names of one split."""
    mel = torchaudio.transforms.MelSpectrogram(16_000, n_fft=400, hop_length=160, n_mels=64)
    features, labels = [], []
    for path in sorted(Path(DATA, split).rglob("*.flac")):
        bands = torch.log(mel(torch.from_numpy(soundfile.read(path, dtype="float32")[0])) + 1e-6)
        features.append(torch.cat([bands.mean(1), bands.std(1)]).numpy())
        labels.append(path.parent.name)
    return np.stack(features), np.array(labels)


def report(rows: list[dict], args, seconds: float) -> None:
    """The table on the screen and in outputs/demo/README.md, its numbers in results.json, and one figure."""
    lines = ["| labels per class | start | test | shifted |", "|---|---|---|---|"]
    for budget in args.budgets:
        for start in ("log-mel statistics", *reversed(STARTS)):
            cells = [
                spread([r[split] for r in rows if (r["start"], r["budget"]) == (start, budget)]) for split in SPLITS
            ]
            lines.append(f"| {budget} | {start} | {' | '.join(cells)} |")
    figure = compare_starts(OUTPUT, rows, SPLITS, chance=1 / 6)
    results = {
        "rows": rows,
        "seconds": round(seconds),
        "settings": vars(args),
        "commit": commit(),
        "hardware": hardware(),
    }
    write_json(Path(OUTPUT, "results.json"), results)
    text = "\n".join(
        [
            f"Accuracy on held-out clips of six components, mean (range) of {args.draws} draws; chance is 1/6.",
            "`test` is the world of the unlabeled recordings, `shifted` has other speeds and more noise.",
            "",
            *lines,
        ]
    )
    Path(OUTPUT, "README.md").write_text(f"# The demo's result\n\n{text}\n\n![]({figure.relative_to(OUTPUT)})\n")
    say(f"\n{text}\n\n{seconds / 60:.1f} minutes. Report: {OUTPUT}/README.md\nFigures: {figure}, {OUTPUT}/*/figures")
    say(f"What the world sounds like: {DATA}/figures/sound_world.png")


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.0%} ({min(values):.0%} to {max(values):.0%})"


if __name__ == "__main__":
    with one_line_errors():
        main()
