"""The main job, end to end, on sounds that it synthesises: `make demo`.

synthesise -> pretrain -> for each draw of labels: fine-tune the pretrained and the random weights -> one table.
"""

import argparse
import contextlib
import functools
import io
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig, AutoModel

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))


import run_finetune  # noqa: E402
import run_pretrain  # noqa: E402
from acoustic.console import one_line_errors, say  # noqa: E402
from acoustic.report.figures import compare_starts  # noqa: E402
from acoustic.report.record import commit, hardware, write_json  # noqa: E402

DATA, OUTPUT = "data/demo", "outputs/demo"
SPLITS = ("test", "shifted")
FINE_TUNED = {"random weights, fine-tuned": ["--random_weights", "true"], "pretrained, fine-tuned": []}
# In the order of the table. The first three train a logistic regression on mean and deviation over time of ...
FROZEN = ("log-mel bands", "random weights, frozen", "pretrained, frozen")
STARTS = (*FROZEN, *FINE_TUNED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=3, help="draws of the labeled clips (and of all random weights)")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[5, 20, 40], help="labeled clips of each class, frozen"
    )
    parser.add_argument("--fine_tuned_budget", type=int, default=20, help="labeled clips of each class, fine-tuned")
    parser.add_argument("--hours", type=float, default=1.0, help="unlabeled audio to synthesise, in hours")
    parser.add_argument("--max_steps", type=int, help="updates of pretraining; default: the recipe's")
    args = parser.parse_args()
    started = time.perf_counter()

    say("\n== 1 of 3: synthesise the sound world")
    # A process of its own: its workers would import torch with this one.
    command = [sys.executable, str(HERE / "synthesize.py"), "--output_dir", DATA, "--parts", "components"]
    subprocess.run([*command, "--hours", str(args.hours)], check=True)
    say("\n== 2 of 3: pretrain on the unlabeled recordings")
    pretrained = f"{OUTPUT}/pretrain"
    options = ["--output_dir", pretrained, "--overwrite_output_dir", "true"]
    options += ["--max_steps", str(args.max_steps)] if args.max_steps else []
    run_pretrain.main(["recipes/demo/pretrain.yaml", *options])
    say("\n== 3 of 3: fine-tune on few labels, from the pretrained and from random weights")
    rows = compare(pretrained, args.budgets, args.fine_tuned_budget, args.draws)
    report(rows, args, time.perf_counter() - started)


def compare(pretrained: str, budgets: list[int], fine_tuned_budget: int, draws: int) -> list[dict]:
    """One row for each start, budget and draw: {"start", "budget", "draw", split: accuracy}."""
    features = {
        start: [clip_features(split, encoder) for split in ("train", *SPLITS)]
        for start, encoder in encoders(pretrained)
    }
    rows = []
    for budget in budgets:
        for draw in range(draws):
            for start in FROZEN:
                rows.append({"start": start, "budget": budget, "draw": draw, **frozen(features[start], budget, draw)})
    for draw in range(draws):
        for start in FINE_TUNED:
            scores = fine_tuned(pretrained, start, fine_tuned_budget, draw)
            rows.append({"start": start, "budget": fine_tuned_budget, "draw": draw, **scores})
            say(f"{start}, {fine_tuned_budget} labels per class, draw {draw}: {scores['test']:.0%} of the test clips")
    return rows


def fine_tuned(pretrained: str, start: str, budget: int, draw: int) -> dict[str, float]:
    """Accuracy on each split after run_finetune.py on `budget` training clips of each class."""
    output = f"{OUTPUT}/from_{start.split(',')[0].replace(' ', '_')}_{draw}"
    argv = ["recipes/demo/classification.yaml", "--model_name_or_path", pretrained, "--output_dir", output]
    argv += ["--labels_per_class", str(budget), "--seed", str(draw), *FINE_TUNED[start]]
    with contextlib.redirect_stdout(io.StringIO()):  # six times the same lines; run.json and the card keep them
        results = run_finetune.main(argv)
    return {split: results[f"{split}_accuracy"] for split in SPLITS}


def encoders(pretrained: str):
    """(start, clips -> frames) of what stays as it is: log-mel bands, a random encoder, the pretrained one."""
    mel = torchaudio.transforms.MelSpectrogram(16_000, n_fft=400, hop_length=160, n_mels=64)
    yield FROZEN[0], lambda waveforms: torch.log(mel(waveforms) + 1e-6).transpose(1, 2)
    transformers.logging.set_verbosity_error()  # the pretraining head is left out, as it should be
    torch.manual_seed(1)
    random = AutoModel.from_config(AutoConfig.from_pretrained(pretrained))
    for start, model in ((FROZEN[1], random), (FROZEN[2], AutoModel.from_pretrained(pretrained))):
        yield start, functools.partial(last_hidden_state, model.eval())


def last_hidden_state(model, waveforms: torch.Tensor) -> torch.Tensor:
    return model(waveforms).last_hidden_state


@torch.inference_mode()
def clip_features(split: str, encode) -> tuple[np.ndarray, np.ndarray]:
    """(clips, 2 x width) mean and deviation over the frames, and (clips,) class names, of one split."""
    paths = sorted(Path(DATA, split).rglob("*.flac"))
    waveforms = torch.stack([torch.from_numpy(soundfile.read(path, dtype="float32")[0]) for path in paths])
    waveforms = (waveforms - waveforms.mean(1, keepdim=True)) / waveforms.std(1, keepdim=True)
    frames = [encode(batch) for batch in waveforms.split(20)]
    features = torch.cat([torch.cat([batch.mean(1), batch.std(1)], dim=1) for batch in frames])
    return features.numpy(), np.array([path.parent.name for path in paths])


def frozen(features: list[tuple], budget: int, draw: int) -> dict[str, float]:
    """Accuracy on each split of a logistic regression on `budget` training clips of each class."""
    (train, labels), *others = features
    generator = np.random.default_rng(draw)
    chosen = np.concatenate([generator.permutation(np.flatnonzero(labels == c))[:budget] for c in np.unique(labels)])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=1000)).fit(
        train[chosen], labels[chosen]
    )
    return {split: float(model.score(*pair)) for split, pair in zip(SPLITS, others)}


def report(rows: list[dict], args, seconds: float) -> None:
    """The table on the screen and in outputs/demo/README.md, its numbers in results.json, and one figure."""
    lines = ["| labels per class | start | test | shifted |", "|---|---|---|---|"]
    for budget in sorted({row["budget"] for row in rows}):
        for start in STARTS:
            chosen = [row for row in rows if (row["start"], row["budget"]) == (start, budget)]
            if chosen:
                cells = [spread([row[split] for row in chosen]) for split in SPLITS]
                lines.append(f"| {budget} | {start} | {' | '.join(cells)} |")
    figure = compare_starts(OUTPUT, rows, STARTS, SPLITS, chance=1 / 6)
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
            "Frozen, and log-mel: logistic regression on mean and deviation over time.",
            "Fine-tuned: all of the model, with the same settings for both starts.",
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
