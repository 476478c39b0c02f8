"""The codes of a data set as parquet, a row for each window of at most half a minute, for whatever reads text.

    python -m acoustic.models.vq_wav2vec export MODEL AUDIO --output codes.parquet [--key value ...]

parse -> load -> read headers -> write -> tell
"""

import argparse
import dataclasses
import sys
import time

import torch
import transformers
from transformers.hf_argparser import string_to_bool

from acoustic.config import DataArguments, read_mix
from acoustic.console import UserError, one_line_errors, say
from acoustic.data.sources import open_rows
from acoustic.data.survey import Survey, survey
from acoustic.data.tally import Tally
from acoustic.export import (
    Export,
    Tokenizer,
    check_output,
    export_codes,
    frames_in_a_row,
    load_tokenizer,
    printable,
)

# Options that mean what they mean to run_pretrain.py, with its defaults.
SHARED = ("dataset_config_name", "audio_column_name", "streaming")
# On a GPU several windows of one length are heard together; at the paper's size a second takes some 20 MB.
MAX_SECONDS, GPU_BATCH_SECONDS = 30.0, 120.0
MAX_NAMED = 20


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises `UserError`."""
    parser = Parser("python -m acoustic.models.vq_wav2vec", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", metavar="export", required=True, parser_class=Parser)
    export = commands.add_parser("export", help=__doc__.splitlines()[0], allow_abbrev=False)
    add_options(export)
    args = parser.parse_args(argv)
    if len(read_mix(args.dataset_name)) > 1:
        raise UserError("dataset_name: one data set at a time; export each of them into a file of its own")
    if not args.max_duration_in_seconds >= 1:
        raise UserError("max_duration_in_seconds: at least 1 s, or frames would be heard out of context")
    if args.batch_seconds is not None and not args.batch_seconds >= args.max_duration_in_seconds:
        raise UserError(
            f"batch_seconds ({args.batch_seconds:g}) holds no window of max_duration_in_seconds "
            f"({args.max_duration_in_seconds:g}); raise the first or lower the second"
        )
    if args.dataloader_num_workers < 0:
        raise UserError("dataloader_num_workers: 0 or more")
    return args


def add_options(parser: argparse.ArgumentParser) -> None:
    def switch(name: str, help: str) -> None:
        parser.add_argument(f"--{name}", type=string_to_bool, nargs="?", const=True, default=False, help=help)

    parser.add_argument(
        "model_name_or_path", metavar="MODEL", help="folder or Hub id of a vq_wav2vec or code_bert checkpoint"
    )
    parser.add_argument("dataset_name", metavar="AUDIO", help="folder, glob, manifest, tar shards, URL or Hub id")
    parser.add_argument("--output", required=True, help="the .parquet file to write")
    switch("overwrite", "replace that file")
    parser.add_argument("--model_revision", default=None, help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--split", default="train", help="subfolder or manifest of the folder, or a Hub split")
    options = {option.name: option for option in dataclasses.fields(DataArguments)}
    for name in SHARED:
        default, help = options[name].default, options[name].metadata["help"]
        if default is False:
            switch(name, help)
        else:
            parser.add_argument(f"--{name}", default=default, help=f"{help} (default: %(default)s)")
    help = "longest window, in seconds (default: %(default)g); longer files are several rows"
    parser.add_argument("--max_duration_in_seconds", type=float, default=MAX_SECONDS, help=help)
    help = f"audio read at a time, in seconds; default: {GPU_BATCH_SECONDS:g} on a GPU, one longest window on a CPU"
    parser.add_argument("--batch_seconds", type=float, default=None, help=help)
    switch("collapse", "of frames with the same codes as the frame before, keep none")
    switch("use_cpu", "don't use a GPU")
    help = "processes that decode (default: %(default)s); with more than one, rows of different files alternate"
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help=help)


def main(argv: list[str] | None = None) -> Export:
    args = parse(argv)
    check_output(args.output, args.overwrite)
    show_progress = sys.stderr.isatty()
    if not show_progress:
        transformers.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    tokenizer = load_tokenizer(args.model_name_or_path, args.model_revision, device)
    rows = open_rows(
        args.dataset_name,
        args.split,
        dataset_config_name=args.dataset_config_name,
        audio_column=args.audio_column_name,
        streaming=args.streaming,
    )
    plan = frames_in_a_row(tokenizer.grid, args.max_duration_in_seconds)
    found = survey([(rows, 1.0)], plan, show_progress=show_progress)
    for line in describe(tokenizer, found):
        say(line)
    longest, began = args.max_duration_in_seconds, time.perf_counter()
    export = export_codes(
        tokenizer,
        rows,
        args.output,
        max_seconds=longest,
        batch_seconds=args.batch_seconds or (longest if device.type == "cpu" else max(GPU_BATCH_SECONDS, longest)),
        collapse=args.collapse,
        workers=args.dataloader_num_workers,
        total_seconds=found and found.seconds,
        show_progress=show_progress,
    )
    tell_skipped(export.skipped)
    say(f"done: {args.output}: {summary(export, time.perf_counter() - began)}")
    return export


def describe(tokenizer: Tokenizer, found: Survey | None) -> list[str]:
    """What goes in, and what makes codes of it."""
    device = tokenizer.device
    name = "the CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    rate = 1 / tokenizer.grid.seconds(1)
    return [
        f"audio: {found or 'a stream, whose length is not known'}",
        f"codes: {tokenizer.groups} x {tokenizer.entries}, {rate:g} frames/s, on {name}",
    ]


def tell_skipped(skipped: Tally) -> None:
    """By name, on stderr."""
    for name, reason in list(skipped.listed.items())[:MAX_NAMED]:
        print(printable(f"skipped: {name}: {reason}"), file=sys.stderr)
    if len(skipped.names) > MAX_NAMED:
        print(f"skipped: {len(skipped.names) - MAX_NAMED:,} more", file=sys.stderr)


def summary(export: Export, seconds: float) -> str:
    groups, entries = export.counts.shape
    used = f"{', '.join(map(str, export.used))} of {entries}{' in each group' if groups > 1 else ''}"
    return (
        f"{export.files:,} files, {export.seconds / 3600:.2f} h, {export.frames:,} frames; codes in use: {used}; "
        f"skipped: {len(export.skipped.names):,}; {export.seconds / seconds:,.0f} audio seconds per second"
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
