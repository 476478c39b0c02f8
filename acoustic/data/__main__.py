"""A look at a data set before training on it: what is in there, what would be skipped, what an epoch is.

    python -m acoustic.data FOLDER_OR_ID [--split train] [--key value ...]

parse -> measure -> print, draw, write
"""

import argparse
import dataclasses
import textwrap
import time
from pathlib import Path

from transformers.hf_argparser import string_to_bool

from acoustic.config import DataArguments
from acoustic.console import UserError, is_main_process, one_line_errors, say
from acoustic.data.findings import CLIPPED_SHARE, findings, kilohertz, percent, plural, short_name
from acoustic.data.overview import Overview, look
from acoustic.data.sound import NOTHING_DB, SILENCE_DB
from acoustic.data.sources import open_rows
from acoustic.data.windows import cover
from acoustic.report.data_page import draw_page
from acoustic.report.record import write_json

# Options that mean what they mean to run_pretrain.py, with its defaults.
SHARED = (
    "streaming",
    "audio_column_name",
    "dataset_config_name",
    "min_duration_in_seconds",
    "max_duration_in_seconds",
)
# The paper's, as run_pretrain.py takes it on a GPU.
BATCH_SECONDS = 87.5
WIDTH = 100
LABEL = 14


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; values are checked as run_pretrain.py checks them. Raises `UserError`."""
    parser = Parser("python -m acoustic.data", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("dataset_name", metavar="FOLDER_OR_ID", help="folder, glob, manifest or Hub id of the audio")
    parser.add_argument("--split", default="train", help="subfolder or manifest of the folder, or a Hub split")
    options = {option.name: option for option in dataclasses.fields(DataArguments)}
    for name in SHARED:
        default, help = options[name].default, f"{options[name].metadata['help']} (default: %(default)s)"
        if default is False:
            parser.add_argument(f"--{name}", type=string_to_bool, nargs="?", const=True, default=False, help=help)
        else:
            parser.add_argument(
                f"--{name}", type=str if default is None else type(default), default=default, help=help
            )
    help = "audio in an update, in seconds (default: %(default)s, the paper's on one GPU)"
    parser.add_argument("--batch_seconds", type=float, default=BATCH_SECONDS, help=help)
    parser.add_argument("--output_dir", default="outputs/look", help="where the page and the numbers go")
    args = parser.parse_args(argv)
    DataArguments(**{name: value for name, value in vars(args).items() if name in options})
    return args


def main(argv: list[str] | None = None) -> Overview:
    args = parse(argv)
    started = time.perf_counter()
    make_folder(args.output_dir)
    rows = open_rows(
        args.dataset_name,
        args.split,
        dataset_config_name=args.dataset_config_name,
        audio_column=args.audio_column_name,
        streaming=args.streaming,
    )
    plan = cover(args.min_duration_in_seconds, args.max_duration_in_seconds)
    names = ("min_duration_in_seconds", "max_duration_in_seconds", "batch_seconds")
    settings = {name: getattr(args, name) for name in names}
    overview, examples = look(rows, plan, settings, show_progress=is_main_process())
    overview.findings = findings(overview)
    for line in page(overview):
        say(line)
    numbers = dataclasses.asdict(overview)
    write_json(Path(args.output_dir, "data.json"), numbers)
    title = "/".join(Path(overview.source).parts[-2:])
    figure = draw_page(args.output_dir, numbers, examples, title, headline(overview))
    say(
        f"\ndrawn: {figure}    all numbers: {Path(args.output_dir, 'data.json')}    "
        f"{time.perf_counter() - started:.0f} s"
    )
    return overview


def make_folder(output_dir: str) -> None:
    try:
        Path(output_dir, "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: can't write to {output_dir!r}: {error.strerror}") from None


def headline(overview: Overview) -> str:
    facts = [
        f"{overview.about}{duration(overview.seconds)} of audio",
        plural(overview.total, "recording")
        if overview.recordings
        else f"the first {overview.looked_at:,} of a stream",
        *(f"{overview.about}{size(overview.bytes)}" for _ in [0] if overview.bytes),
        f"an epoch: {overview.about}{plural(overview.windows, 'window')}, {plural(overview.updates, 'update')}",
    ]
    return "   ·   ".join(facts)


def page(overview: Overview) -> list[str]:
    """What is printed: a label and a text on each line, at most WIDTH wide."""
    title = [overview.source, "-" * min(len(overview.source), WIDTH)]
    lines = [*describe_size(overview), *describe_sound(overview), *describe_use(overview)]
    body = [line for label, text in lines for line in fold(label, text)]
    found = [line for finding in overview.findings for line in fold("", finding, "- ", 0)]
    return [*title, *body, "", "findings" if found else "findings: none, nothing stands out", *found]


def fold(label: str, text: str, bullet: str = "", indent: int = LABEL) -> list[str]:
    """A text in the column right of its label; what it holds of line breaks stays."""
    result = []
    for number, line in enumerate(text.split("\n")):
        first = (label if number == 0 else "").ljust(indent) + bullet
        rest = " " * (len(first) + 10 * line.startswith(" "))
        wrapped = textwrap.wrap(line, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
        result += wrapped or [first.rstrip()]
    return result


def describe_size(overview: Overview) -> list[tuple[str, str]]:
    """Length, rates, channels and formats."""
    about = overview.about
    if overview.recordings is None:
        read = f"the first {overview.looked_at:,} rows of a stream; everything below is about these"
    elif about:
        read = f"estimated from the headers of {overview.looked_at:,}, drawn at random"
    else:
        read = "all headers were read"
    on_disk = f", {about}{size(overview.bytes)}" if overview.bytes else ""
    (shortest, least), (longest, most) = overview.shortest, overview.longest
    audio = f"{about}{duration(overview.seconds)} in {plural(overview.total, 'recording')}{on_disk} ({read})"
    length = (
        f"median {clock(overview.median_seconds)}; from {clock(least)} ({short_name(shortest)}) "
        f"to {clock(most)} ({short_name(longest)})"
    )
    channel_names = {1: "mono", 2: "stereo"}
    return [
        ("audio", audio),
        ("length", "\n".join([length, *length_table(overview)])),
        ("rates", kinds({kilohertz(rate): value for rate, value in overview.rates.items()})),
        ("channels", kinds({channel_names.get(n, f"{n} channels"): value for n, value in overview.channels.items()})),
        ("formats", kinds(overview.formats)),
    ]


def length_table(overview: Overview) -> list[str]:
    """Recordings and hours between 1, 2, 5, 10, ... seconds, as lines with bars."""
    classes: dict[float, list] = {}
    edges = overview.lengths["edges"]
    for edge, count, hours in zip(edges, overview.lengths["recordings"], overview.lengths["hours"]):
        # The edges are ten a decade: the last of 1, 2 and 5 that is not above this one.
        lower = max(round(10**k * m, 2) for k in range(-2, 6) for m in (1, 2, 5) if 10**k * m <= edge * 1.01)
        total = classes.setdefault(lower, [0, 0.0])
        total[0] += count
        total[1] += hours
    most = max(hours for _, hours in classes.values())
    lines = []
    for lower, (count, hours) in classes.items():
        if count == 0:
            continue
        upper = lower * (2.5 if str(lower).strip("0.")[:1] == "2" else 2)
        bar = "#" * round(30 * hours / most)
        lines.append(f"{f'{lower:g} to {upper:g} s':>16}{count:>9,} recordings {duration(hours * 3600):>9}  {bar}")
    return lines


def kinds(counts: dict) -> str:
    """The five most frequent values and their share of the recordings."""
    total = sum(value["recordings"] for value in counts.values())
    shown = [
        f"{name} {v['recordings']:,} ({percent(v['recordings'] / total)})" for name, v in list(counts.items())[:5]
    ]
    return ", ".join(shown) + (f", {plural(len(counts) - 5, 'other value')}" if len(counts) > 5 else "")


def describe_sound(overview: Overview) -> list[tuple[str, str]]:
    """What the sampled windows sound like."""
    sample = overview.sample
    if not sample.sounds:
        return [("sound", f"none of {len(sample.failed)} windows could be decoded")]
    sounds = sample.sounds
    encodings: dict[str, dict] = {}
    for sound in sounds:
        encodings.setdefault(sound.encoding, {"recordings": 0})["recordings"] += 1
    ordered = dict(sorted(encodings.items(), key=lambda item: -item[1]["recordings"]))
    nothing = sample.share(lambda sound: sound.level <= NOTHING_DB)
    silent = sum(sound.silent for sound in sounds) / len(sounds)
    clipped = sample.share(lambda sound: sound.clipped > CLIPPED_SHARE)
    low, median, high = (sample.percentile("level", percent) for percent in (10, 50, 90))
    failed = f"; {len(sample.failed)} more can't be decoded" if sample.failed else ""
    return [
        ("", f"\nfrom {len(sounds):,} windows drawn at random out of {sample.windows:,}{failed}:"),
        ("encodings", kinds(ordered)),
        ("level", f"RMS {median:.0f} dBFS (a tenth below {low:.0f}, a tenth above {high:.0f}); "
         f"highest peak {max(sound.peak for sound in sounds):.1f} dBFS"),
        ("silence", f"{percent(silent)} of the time is below {SILENCE_DB:g} dBFS; "
         f"{percent(nothing)} of the windows are digital silence"),
        ("clipping", f"{percent(clipped)} of the windows (more than {percent(CLIPPED_SHARE)} of their samples)"),
        ("DC offset", f"median {percent(sample.percentile('offset', 50))} of full scale, "
         f"most {percent(max(sound.offset for sound in sounds))}"),
        ("bandwidth", describe_bandwidth(overview)),
    ]  # fmt: skip


def describe_bandwidth(overview: Overview) -> str:
    """For the three most frequent rates: where the energy lies, and where sound ends."""
    parts = []
    for rate in list(overview.rates)[:3]:
        sounds = [s for s in overview.sample.sounds if s.rate == rate and s.bandwidth is not None]
        if sounds:
            inside = sorted(sound.bandwidth for sound in sounds)[len(sounds) // 2]
            end = sorted(sound.edge for sound in sounds)[len(sounds) // 2]
            parts.append(
                f"at {kilohertz(rate)}: 99 % of the energy below {inside / 1000:.1f} kHz, sound up to "
                f"{end / 1000:.1f} of {rate / 2000:.5g} kHz"
            )
    return "\n".join(parts) or "no sound"


def describe_use(overview: Overview) -> list[tuple[str, str]]:
    """Copies, what would be skipped, and what an epoch is."""
    copies = overview.copies
    checked = [f"{copies.checked:,} compared by length and size, those alike by content"]
    if copies.unchecked:
        checked.append(f"no time for {copies.unchecked:,}")
    if copies.not_local:
        checked.append(f"{copies.not_local:,} behind URLs not compared")
    groups = [
        f"{' = '.join(map(short_name, group[:3]))}{' = ...' if len(group) > 3 else ''}" for group in copies.groups
    ]
    count = "none" if not copies.recordings else f"{plural(copies.recordings, 'recording')} of others"
    skipped = [f"{overview.about}{overview.skipped:,} ({percent(overview.skipped / overview.total)})"]
    for reason, value in overview.skipped_by_reason.items():
        names = ", ".join(map(short_name, value["examples"][:3]))
        skipped.append(f"  {value['recordings']:>6,}  {reason}: {names}{', ...' if value['recordings'] > 3 else ''}")
    if len(skipped) > 11:
        skipped[11:] = [f"        and {len(skipped) - 11} more reasons, see data.json"]
    return [
        ("", ""),
        ("copies", "\n".join([f"{count} ({'; '.join(checked)})", *groups[:3]])),
        ("skipped", "\n".join(skipped)),
        ("an epoch", describe_epoch(overview)),
    ]


def describe_epoch(overview: Overview) -> str:
    """Windows and updates; what the amount is good for is a rule of thumb and says so."""
    settings, hours = overview.settings, overview.used_seconds / 3600
    whole = "" if overview.recordings else "of these rows: "
    counts = (
        f"{whole}{overview.about}{plural(overview.windows, 'window')} of {settings['min_duration_in_seconds']:g} to "
        f"{settings['max_duration_in_seconds']:g} s, {duration(overview.used_seconds)}: "
        f"{plural(overview.updates, 'update')} of {settings['batch_seconds']:g} s (one GPU, no accumulation)"
    )
    if overview.recordings is None:
        return counts
    passes = f"10,000 such updates hear all of it {plural(max(round(10_000 / overview.updates), 1), 'time')}"
    if hours < 10:
        advice = "little: as a rule of thumb, continue from a checkpoint (--model_name_or_path)"
    elif hours < 100:
        advice = "enough to continue from a checkpoint; from scratch only for sounds that no checkpoint knows"
    else:
        advice = "enough to start from scratch; the paper's smaller set is 960 h, heard some 600 times"
    return f"{counts}\n{passes}; {advice}"


def duration(seconds: float) -> str:
    """An amount of audio."""
    hours = seconds / 3600
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h" if hours >= 1 else f"{seconds / 60:.1f} min"


def clock(seconds: float) -> str:
    """The length of one recording."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def size(count: int) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


if __name__ == "__main__":
    with one_line_errors():
        main()
