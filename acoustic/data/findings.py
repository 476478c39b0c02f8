"""What the numbers of a data set mean: one line for each thing that is wrong, with what to do about it."""

from collections.abc import Iterator

import numpy as np

from acoustic.data.overview import Overview
from acoustic.data.sound import NOTHING_DB, SILENCE_DB

# The rate of wav2vec 2.0 and of most checkpoints: what lies above half of it, training does not hear.
MODEL_RATE = 16_000
# A window counts as clipped from this share of its samples on.
CLIPPED_SHARE = 0.001
# run_pretrain.py's default, which a test compares.
MAX_SKIPPED_FRACTION = 0.1


def findings(overview: Overview) -> list[str]:
    """Nothing where nothing is wrong."""
    return [line for rule in RULES for line in rule(overview)]


def percent(share: float) -> str:
    value = 100 * share
    return f"{value:.0f} %" if value >= 1 or value == 0 else f"{value:.1f} %" if value >= 0.1 else "under 0.1 %"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def find_unreadable(overview: Overview) -> Iterator[str]:
    share = overview.unreadable / overview.total
    if share > MAX_SKIPPED_FRACTION:
        reasons = (reason for reason in overview.skipped_by_reason if not reason.startswith("shorter than"))
        yield (
            f"warning: {overview.about}{plural(overview.unreadable, 'recording')} ({percent(share)}) can't be read, "
            f"and a run ends at {percent(MAX_SKIPPED_FRACTION)} (--max_skipped_fraction); mostly: {next(reasons)}. "
            "Repair or remove them first"
        )


def find_short(overview: Overview) -> Iterator[str]:
    count, would_use = overview.too_short["recordings"], overview.too_short["would_use"]
    share = count / overview.total
    if share > 0.01 and would_use:
        # The highest limit that gets most of them: what is very short teaches little.
        limit = next((limit for limit, used in would_use.items() if used >= 0.8 * count), min(would_use))
        given = overview.settings["min_duration_in_seconds"]
        what = f"{overview.about}{plural(count, 'recording')} ({percent(share)}) " + ("is" if count == 1 else "are")
        advice = f"--min_duration_in_seconds {limit:g} would use {would_use[limit]:,} of them"
        yield f"{what} shorter than {given:g} s and would be skipped: {advice}"


def find_copied(overview: Overview) -> Iterator[str]:
    count = overview.copies.recordings
    if count:
        first, second = map(short_name, overview.copies.groups[0][:2])
        what = plural(count, "recording") + (" is a copy" if count == 1 else " are copies")
        among = f" among {overview.looked_at:,}" if overview.about else ""
        yield (
            f"{what} of others{among}, byte for byte ({first} = {second}, ...): they are heard more often, and leak "
            "between train and held-out: remove them (groups in data.json)"
        )


def find_channel_trouble(overview: Overview) -> Iterator[str]:
    lines = {
        "cancelling": "have channels of opposite sign, which cancel when they are averaged to mono: "
        "flip the sign of one, or keep one channel",
        "one silent": "have a silent channel, and averaging halves the other one's level: keep the channel with sound",
        "alike": "have the same sound in all channels: nothing is lost, but a mono copy would be read faster and "
        "take less disk",
    }
    for kind, line in lines.items():
        share = overview.sample.share(lambda sound, kind=kind: sound.channels == kind and sound.bandwidth is not None)
        if share > 0.05:
            yield f"{percent(share)} of the windows {line}"


def find_narrow_band(overview: Overview) -> Iterator[str]:
    for rate in overview.rates:
        edges = [sound.edge for sound in overview.sample.sounds if sound.rate == rate and sound.edge is not None]
        narrow = [edge for edge in edges if edge < 0.6 * min(rate, MODEL_RATE) / 2]
        if len(edges) >= 5 and len(narrow) > 0.2 * len(edges):
            end = float(np.percentile(narrow, 90))
            share = percent(len(narrow) / len(edges))
            yield (
                f"{share} of the windows at {kilohertz(rate)} have sound only below {kilohertz(round(end, -2))}, as "
                f"if upsampled from {kilohertz(likely_rate(end))}: look for the originals, and do not mix them with "
                "full-band audio"
            )
    low = [rate for rate in overview.rates if rate < MODEL_RATE]
    share = sum(overview.rates[rate]["hours"] for rate in low) * 3600 / overview.seconds
    if share > 0.05:
        upper = kilohertz(round(max(low) / 2, -2))
        yield (
            f"{percent(share)} of the audio is at {' and '.join(map(kilohertz, sorted(low)[:3]))}: at "
            f"{kilohertz(MODEL_RATE)} nothing is above {upper}; use the model on audio of that kind"
        )


def likely_rate(edge: float) -> int:
    """The usual rate in Hz whose half is the next one above the edge; filters reach a little over it."""
    return next((rate for rate in (8_000, 11_025, 16_000, 22_050, 32_000, 44_100) if edge <= 0.57 * rate), 48_000)


def find_level_trouble(overview: Overview) -> Iterator[str]:
    sample = overview.sample
    if not sample.sounds:
        return
    nothing = sample.share(lambda sound: sound.level <= NOTHING_DB)
    if nothing > 0.05:
        yield f"{percent(nothing)} of the windows are digital silence, from which nothing is learned: cut it out"
    silent = sum(sound.silent for sound in sample.sounds) / len(sample.sounds)
    if silent - nothing > 0.4:
        yield (
            f"{percent(silent)} of the time is below {SILENCE_DB:g} dBFS: cut out long pauses (a voice activity "
            "detector), or raise the gain if it is quiet rather than silent"
        )
    median = sample.percentile("level", 50)
    if NOTHING_DB < median < -45:
        yield f"half of the windows are below {median:.0f} dBFS: very quiet; look at the recorder's gain"
    clipped = sample.share(lambda sound: sound.clipped > CLIPPED_SHARE)
    if clipped > 0.05:
        yield f"{percent(clipped)} of the windows are clipped: take the originals, or record with less gain"
    offset = sample.share(lambda sound: sound.offset > 0.02)
    if offset > 0.05:
        yield (
            f"{percent(offset)} of the windows have a DC offset of more than 2 % of full scale: high-pass them "
            "(20 Hz) before training"
        )


def find_undecodable(overview: Overview) -> Iterator[str]:
    failed, tried = len(overview.sample.failed), len(overview.sample.failed) + len(overview.sample.sounds)
    if failed:
        name, reason = next(iter(overview.sample.failed.items()))
        yield (
            f"{failed} of {tried} sampled windows can't be decoded, though their headers are good "
            f"({short_name(name)}: {reason}): training skips them; repair or remove them"
        )


def find_one_giant(overview: Overview) -> Iterator[str]:
    name, seconds = overview.longest
    if overview.scale == 1 and overview.total > 1 and seconds > 0.3 * overview.seconds:
        yield (
            f"one recording ({short_name(name)}) holds {percent(seconds / overview.seconds)} of the audio, and a "
            "recording is either trained on or held out: cut it into several files"
        )


RULES = (
    find_unreadable,
    find_undecodable,
    find_short,
    find_copied,
    find_channel_trouble,
    find_narrow_band,
    find_level_trouble,
    find_one_giant,
)


def kilohertz(hertz: float) -> str:
    return f"{hertz / 1000:.5g} kHz"


def short_name(name: str, length: int = 40) -> str:
    """A long name without its middle."""
    return name if len(name) <= length else f"{name[: length // 3]}...{name[len(name) + 3 + length // 3 - length :]}"
