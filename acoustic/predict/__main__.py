"""What a trained model says of any audio: a line of JSON for each recording, and label files for Audacity.

    python -m acoustic.predict MODEL AUDIO ... [--output answers.jsonl] [--audacity FOLDER] [--key value ...]

parse -> load -> hear -> write -> tell
"""

import argparse
import sys
import time

import torch
import transformers
from transformers.hf_argparser import string_to_bool

from acoustic.console import RunError, UserError, one_line_errors
from acoustic.data.tally import most_common
from acoustic.predict.audio import Listening, file_of, say_unread
from acoustic.predict.load import load_predictor
from acoustic.predict.opening import open_audio
from acoustic.predict.output import LabelFiles, lines


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("python -m acoustic.predict", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument

    def switch(name: str, help: str) -> None:
        add(f"--{name}", type=string_to_bool, nargs="?", const=True, default=False, help=help)

    add("model_name_or_path", metavar="MODEL", help="what run_finetune.py made, of any task: a folder or a Hub id")
    add(
        "audio", metavar="AUDIO", nargs="+", help="files, folders, globs, manifests, tar shards, URLs or Hub data sets"
    )
    add("--output", metavar="FILE", help="write the lines into this file instead of to the standard output")
    add("--audacity", metavar="FOLDER", help="write the times into a label file for each recording, in this folder")
    switch("overwrite", "replace that file, and label files in that folder")
    add("--split", help="subfolder or manifest of a folder, or a Hub split; default: all of a folder, train of others")
    add("--machine", help="which machine is heard, where an anomaly detector knows several")
    add("--machine_column_name", help="column of a manifest or data set that says which machine is heard")
    help = "longest window, in seconds; default: what the model was trained on, else 10, for CTC 30"
    add("--max_duration_in_seconds", type=float, help=help)
    help = "audio of a recording that is heard together, in seconds; default: 120 on a GPU, on a CPU one window"
    add("--batch_seconds", type=float, help=help)
    switch("use_cpu", "don't use a GPU")
    args = parser.parse_args(argv)
    for name in ("max_duration_in_seconds", "batch_seconds"):
        if (value := getattr(args, name)) is not None and not 0.1 <= value < float("inf"):
            raise UserError(f"{name}: at least 0.1 s")
    if args.machine and args.machine_column_name:
        raise UserError("machine: the same for all recordings, or machine_column_name; give one of the two")
    return args


def main(argv: list[str] | None = None) -> Listening:
    args, began = parse(argv), time.perf_counter()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    predictor = load_predictor(
        args.model_name_or_path,
        max_seconds=args.max_duration_in_seconds,
        batch_seconds=args.batch_seconds,
        machine=args.machine,
        machine_by_row=args.machine_column_name is not None,
        device="cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu",
    )
    if args.audacity and not predictor.has_times:
        raise UserError(f"audacity: what {args.model_name_or_path} says is about whole recordings, without times")
    labels = LabelFiles(args.audacity, args.overwrite) if args.audacity else None
    with lines(args.output, args.overwrite) as write:
        sources, failed = open_audio(args.audio, args.split, args.machine_column_name)
        listening, in_part = Listening(sources, predictor.predict), 0
        for name, reason in failed:
            listening.skip(name, reason)
        for row, _, answer in listening:
            write({"file": file_of(row), **answer})
            if labels:
                labels.write(row["name"], predictor.spans(answer))
            in_part += say_unread(row, answer.get("unread", []))
    if not listening.answered:
        raise RunError(f"nothing could be read: {most_common(listening.reasons) or 'there are no recordings'}")
    print(summary(listening, in_part, time.perf_counter() - began), file=sys.stderr)
    return listening


def summary(listening: Listening, in_part: int, seconds: float) -> str:
    heard = listening.seconds
    amount = f"{heard / 3600:.2f} h" if heard >= 3600 else f"{heard / 60:.1f} min"
    partly = f", {in_part:,} of them read in part" if in_part else ""
    why = f" ({most_common(listening.reasons)})" if listening.skipped else ""
    return (
        f"done: {listening.answered:,} recordings, {amount}{partly}; skipped: "
        f"{listening.skipped:,}{why}; {heard / seconds:,.0f} audio seconds per second"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
