"""Does this sound wrong, and when? Detectors on a frozen encoder's embeddings, fitted on normal sounds alone.

detector = AnomalyDetector.from_pretrained("outputs/demo_anomaly")
verdict = detector.score("recording.wav", machine="fan")
print(verdict.percentile, verdict.worst_segment)
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm
from transformers.utils import cached_file

from acoustic.console import UserError
from acoustic.data.headers import Header, Skip, read_header
from acoustic.data.resample import resample
from acoustic.data.rows import IndexedRows, Rows
from acoustic.data.sources import open_rows
from acoustic.data.tally import Tally
from acoustic.data.windows import Plan, slide
from acoustic.tasks.base import name_some
from acoustic.tasks.detectors import KINDS, Detector, count_fits, layers_of
from acoustic.tasks.embeddings import BATCH_SECONDS, Moments, listen, load_encoder
from acoustic.tasks.log_mel import LogMel

FILE = "anomaly_detector"  # .json and .safetensors
FEATURES = ("encoder", "log_mel")
# "When" is told in steps of this; of each the mean and the deviation over the encoder's frames.
SEGMENT_SECONDS = 0.5
# Of each machine's normal segments so many are fitted on, drawn among all; a covariance needs no more.
MAX_SEGMENTS = 2000
MIN_NORMAL = 10  # windows; a percentile of fewer says nothing
# Windows whose distances are computed together.
TOGETHER = 64


class Piece(NamedTuple):
    """A window's embeddings: of all of it, (layers, 2 * width), and of its segments, (segments, layers, 2 * width)."""

    name: str
    label: str | None
    machine: str | None
    start: float
    seconds: float
    window: np.ndarray
    segments: np.ndarray


class Part(NamedTuple):
    """A stretch of a recording, in seconds; see `Detector` for score and percentile."""

    start: float
    stop: float
    score: float
    percentile: float


class Scored(NamedTuple):
    """A window with its scores: its own, each distance's, (members,), and its segments'."""

    piece: Piece
    part: Part
    members: np.ndarray
    segments: list[Part]


@dataclass
class Verdict:
    """On a recording: its windows, and its segments of half a second, in the order of time.

    `score` and `percentile` are the worst window's: of a recording of one window, like those that were fitted on, the
    percentile says how rare that is in normal sound. Of n windows one in n lies above 100 - 100 / n, normal or not.
    """

    windows: list[Part] = field(default_factory=list)
    segments: list[Part] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # why some of it could not be read

    @property
    def score(self) -> float:
        return self.worst_window.score

    @property
    def percentile(self) -> float:
        return self.worst_window.percentile

    @property
    def worst_window(self) -> Part:
        return max(self.windows, key=lambda part: part.score)

    @property
    def worst_segment(self) -> Part:
        return max(self.segments, key=lambda part: part.score)


@dataclass(frozen=True)
class Settings:
    """
    features: "encoder", or "log_mel" for the bands that need none.
    members: (layer, kind) of each distance that is averaged; layer 0 is the input of the first one.
    window_seconds: the longest window that was fitted on; longer recordings are scored in windows of this length.
    """

    features: str
    members: list[tuple[int, str]]
    min_seconds: float
    window_seconds: float = 0.0
    segment_seconds: float = SEGMENT_SECONDS
    normal_label: str = "normal"


class AnomalyDetector:
    """
    Args:
        encoder: an `Encoder`, or a `LogMel`.
        settings: how it is used.
        windows, segments: a `Detector` for each machine, under None where there are no machines: one for windows, by
            the settings' members, and one for segments, by Mahalanobis distance in the members' layers.
    """

    def __init__(self, encoder, settings: Settings, windows: dict, segments: dict):
        self.encoder, self.settings, self.windows, self.segments = encoder, settings, windows, segments

    @property
    def machines(self) -> list[str]:
        return [name for name in self.windows if name is not None]

    def score(
        self, audio, rate: int | None = None, machine: str | None = None, show_progress: bool = False
    ) -> Verdict:
        """
        Args:
            audio: a path or URL of a recording of any length, which is read window by window; or a waveform,
                (samples,) or (samples, channels) float.
            rate: of a waveform, in Hz.
            machine: which one is heard, where the detector knows several.

        Raises:
            UserError: the recording can't be read or is too short, or the machine is not known.
        """
        machine = None if machine is None else str(machine)
        self.check_machine(machine)
        tally = Tally()
        if isinstance(audio, np.ndarray):
            heard = self.cut(audio, rate)
        else:
            heard = listen(self.encoder, open_rows(str(audio)), self.plan(), tally, self.batch_seconds())
        heard = tqdm(heard, unit=" windows", desc="listening", disable=not show_progress, leave=False)
        verdict = self.judge(heard, machine, tally)
        if not verdict.windows:
            name = "the waveform" if isinstance(audio, np.ndarray) else str(audio)
            raise UserError(f"{name}: {', '.join(verdict.skipped) or 'no audio'}")
        return verdict

    def check_machine(self, machine: str | None) -> None:
        """Raises `UserError` where there is no detector for it."""
        if machine not in self.windows:
            if machine is None:
                raise UserError(f"machine: which one is heard? This detector knows {name_some(self.machines, 20)}")
            known = f"machine: one of {name_some(self.machines, 20)}" if self.machines else "machine: there are none"
            raise UserError(f"{known}, not {machine!r}")

    def judge(self, heard: Iterable[tuple[dict, torch.Tensor]], machine: str | None, tally: Tally | None = None):
        """The `Verdict` on a recording's windows, as `listen` gives them; of none where all are too short."""
        verdict, tally = Verdict(), Tally() if tally is None else tally
        for scored in self.score_windows(heard, tally, lambda about: machine):
            verdict.windows.append(scored.part)
            verdict.segments += scored.segments
        verdict.skipped = list(tally.listed.values())
        verdict.windows.sort()
        verdict.segments = without_overlap(sorted(verdict.segments))
        return verdict

    def cut(self, waveform: np.ndarray, rate: int | None) -> Iterator[tuple[dict, torch.Tensor]]:
        """What `listen` gives, for a waveform."""
        if rate is None:
            raise UserError("rate: of a waveform, in Hz")
        waveform = (waveform.mean(1) if waveform.ndim == 2 else waveform).astype(np.float32)
        header = Header(len(waveform), rate, 1)
        about = {"name": "", "label": None, "machine": None}
        try:
            windows = list(slide(self.settings.min_seconds, self.settings.window_seconds, 0.0)({}, header, None))
        except Skip as reason:
            raise UserError(f"the waveform: {reason}") from None
        for window in windows:
            heard = resample(waveform[window.start : window.stop], rate, self.encoder.rate)
            (frames,) = self.encoder.layers([heard])
            yield {**about, "start": window.start / rate, "seconds": window.seconds}, frames

    def plan(self, by_machine: bool = False) -> Plan:
        """Windows of a recording that is to be scored; `by_machine`: of no machine but those that are known."""
        inner = slide(self.settings.min_seconds, self.settings.window_seconds, 0.0)

        def plan(row, header, generator):
            machine = row.get("machine")
            if by_machine and str(machine) not in self.windows:
                raise Skip(f"no normal clips of machine {machine!r} to compare with", fault=False)
            return inner(row, header, generator)

        return plan

    def batch_seconds(self, wanted: float = BATCH_SECONDS) -> float:
        return max(wanted, self.settings.window_seconds + 1)

    def score_windows(
        self, heard: Iterable[tuple[dict, torch.Tensor]], tally: Tally, machine_of: Callable[[dict], str | None]
    ) -> Iterator[Scored]:
        """
        Args:
            heard: what `listen` gives.
            tally: gets the windows that are too short for the encoder.
            machine_of: what `listen` says of a window -> its detector's name.
        """
        waiting = defaultdict(list)
        for piece in to_pieces(heard, self.settings, tally, machine_of):
            waiting[piece.machine].append(piece)
            if len(waiting[piece.machine]) == TOGETHER:
                yield from self.score_pieces(piece.machine, waiting.pop(piece.machine))
        for machine, pieces in waiting.items():
            yield from self.score_pieces(machine, pieces)

    def score_pieces(self, machine: str | None, pieces: list[Piece]) -> Iterator[Scored]:
        """Those of one machine."""
        windows, segments = self.windows[machine], self.segments[machine]
        members = windows.member_scores(np.stack([piece.window for piece in pieces]))
        own = windows.scores(members)
        inner = segments.scores(segments.member_scores(np.concatenate([piece.segments for piece in pieces])))
        own_percentiles, inner_percentiles = windows.percentiles(own), segments.percentiles(inner)
        first = 0
        for number, piece in enumerate(pieces):
            edges = piece.start + np.linspace(0, piece.seconds, len(piece.segments) + 1)
            last = first + len(piece.segments)
            numbers = (edges, edges[1:], inner[first:last], inner_percentiles[first:last])
            parts = [Part(*map(float, values)) for values in zip(*numbers)]
            part = Part(piece.start, piece.start + piece.seconds, float(own[number]), float(own_percentiles[number]))
            yield Scored(piece, part, members[number], parts)
            first = last

    def save_pretrained(self, folder: str | Path) -> None:
        """The encoder with its config and preprocessor, and the detectors: safetensors and JSON."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        if self.settings.features == "encoder":
            self.encoder.model.save_pretrained(folder)
            self.encoder.extractor.save_pretrained(folder)
        tensors = {}
        for number, machine in enumerate(self.windows):
            for level, detectors in (("windows", self.windows), ("segments", self.segments)):
                found = detectors[machine].only_averaged().tensors()
                tensors |= {f"{number}.{level}.{name}": np.ascontiguousarray(value) for name, value in found.items()}
        save_file(tensors, Path(folder, f"{FILE}.safetensors"))
        content = {**vars(self.settings), "machines": list(self.windows)}
        Path(folder, f"{FILE}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, device="cpu") -> "AnomalyDetector":
        """Of a folder, or a Hub id, that a run of task anomaly has written.

        Raises:
            UserError: there is no detector.
        """
        try:
            files = [cached_file(str(name_or_path), f"{FILE}.{suffix}") for suffix in ("json", "safetensors")]
        except OSError:
            raise UserError(
                f"{name_or_path}: no {FILE}.json and {FILE}.safetensors; run_finetune.py --task anomaly makes them"
            ) from None
        content = json.loads(Path(files[0]).read_text(encoding="utf-8"))
        machines = content.pop("machines")
        settings = Settings(**{**content, "members": [tuple(member) for member in content["members"]]})
        tensors = load_file(files[1])
        levels = {"windows": settings.members, "segments": segment_members(settings.members)}
        detectors = {level: {} for level in levels}
        for number, machine in enumerate(machines):
            for level, members in levels.items():
                start = f"{number}.{level}."
                own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
                detectors[level][machine] = Detector.from_tensors(members, own)
        encoder = LogMel() if settings.features == "log_mel" else load_encoder(str(name_or_path), device=device)
        return cls(encoder, settings, **detectors)


def choose_members(detector: str, embedding_layer: str, num_layers: int) -> list[tuple[int, str]]:
    """(layer, kind) of the distances to average; "auto" is all layers, or all kinds.

    By default it is the Mahalanobis distance in all layers: it weighs each direction by how much normal sounds vary in
    it, and a fault's first signs are small. Of the demo's faults neighbours and densities find fewer (AUC 0.65, 0.61
    against 0.69, in log-mel bands 0.71 and 0.62 against 0.86); where a machine has several ways to run they find more.

    Raises:
        UserError: no such layer.
    """
    if embedding_layer == "auto":
        layers = range(num_layers)
    elif embedding_layer.isdigit() and int(embedding_layer) < num_layers:
        layers = [int(embedding_layer)]
    else:
        raise UserError(
            f"embedding_layer: 'auto', or a layer from 0 (the input of the first one) to {num_layers - 1}, "
            f"not {embedding_layer!r}"
        )
    return [(layer, kind) for layer in layers for kind in (KINDS if detector == "auto" else [detector])]


def segment_members(members: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """There are many segments, so neighbours would be slow to look up and large to keep."""
    return [(layer, "mahalanobis") for layer in layers_of(members)]


def to_pieces(heard, settings: Settings, tally: Tally, machine_of: Callable[[dict], str | None]) -> Iterator[Piece]:
    """Windows as `listen` gives them -> embeddings in the members' layers; what makes no two frames is skipped."""
    layers = layers_of(settings.members)
    for about, frames in heard:
        if frames.shape[1] < 2:
            tally.add([(about["name"], f"{about['seconds']:.2f} s is too short for two frames", False, 0)])
            continue
        segments = divide_frames(frames[layers], about["seconds"] / settings.segment_seconds)
        yield Piece(
            about["name"],
            None if about["label"] in (None, "") else str(about["label"]),
            machine_of(about),
            about["start"],
            about["seconds"],
            pool(frames[layers]),
            np.stack([pool(segment) for segment in segments]),
        )


def divide_frames(frames: torch.Tensor, parts: float) -> list[torch.Tensor]:
    """(layers, frames, width) in about so many equal parts, of two frames at least."""
    count = max(min(round(parts), frames.shape[1] // 2), 1)
    edges = [frames.shape[1] * number // count for number in range(count + 1)]
    return [frames[:, start:stop] for start, stop in zip(edges, edges[1:])]


def pool(frames: torch.Tensor) -> np.ndarray:
    """(layers, frames, width) -> (layers, 2 * width) float32: mean and deviation over time."""
    moments = Moments()
    moments.add(frames)
    return moments.pooled()


def without_overlap(parts: list[Part]) -> list[Part]:
    """In the order of time; the last window of a recording may begin within the one before it."""
    kept: list[Part] = []
    for part in parts:
        if not kept or (part.start + part.stop) / 2 >= kept[-1].stop:
            kept.append(part)
    return kept


class Sample:
    """So many of a stream of arrays, each as likely as any other (Vitter 1985, algorithm R)."""

    def __init__(self, size: int):
        self.size, self.met, self.kept, self.generator = size, 0, [], np.random.default_rng(0)

    def add(self, item) -> None:
        self.met += 1
        if len(self.kept) < self.size:
            self.kept.append(item)
        elif (place := int(self.generator.integers(self.met))) < self.size:
            self.kept[place] = item


class Normal:
    """What was heard of one machine: (name, start, embedding) of its windows, and of some of its segments."""

    def __init__(self):
        self.windows, self.segments, self.seconds = [], Sample(MAX_SEGMENTS), 0.0

    def add(self, piece: Piece) -> None:
        self.windows.append((piece.name, piece.start, piece.window))
        self.seconds += piece.seconds
        for number, segment in enumerate(piece.segments):
            self.segments.add((piece.name, piece.start + number * SEGMENT_SECONDS, segment))

    def count_fits(self) -> int:
        return sum(count_fits([name for name, _, _ in found]) for found in (self.windows, self.segments.kept))

    def fit(self, members: list[tuple[int, str]], beside: list[tuple[int, str]], step) -> tuple[Detector, Detector]:
        """For windows, and for segments."""
        levels = (self.windows, members, beside), (self.segments.kept, segment_members(members), ())
        detectors = []
        for found, which, others in levels:
            found = sorted(found, key=lambda item: item[:2])
            values = np.stack([value for _, _, value in found])
            detectors.append(Detector.fit(values, [name for name, _, _ in found], which, others, step))
        return tuple(detectors)


def fit_detector(
    encoder,
    rows: Rows,
    settings: Settings,
    tally: Tally,
    *,
    max_seconds: float,
    by_machine: bool = False,
    sweep: bool = False,
    batch_seconds: float = BATCH_SECONDS,
    workers: int = 0,
    show_progress: bool = False,
) -> tuple[AnomalyDetector, float]:
    """(detector, seconds heard) from normal recordings alone; those longer than `max_seconds` are cut into windows.

    sweep: fit every kind of distance in the members' layers, beside those that are averaged.

    Raises:
        UserError: too few can be read, of all or of one machine.
    """
    plan = normal_windows(settings.min_seconds, max_seconds, by_machine)
    if isinstance(rows, IndexedRows):
        refuse_few_rows(rows, plan, by_machine)
    heard = listen(encoder, rows, plan, tally, max(batch_seconds, max_seconds + 1), workers)
    normal, longest = defaultdict(Normal), 0.0
    with tqdm(desc="listening", unit=" windows", disable=not show_progress, leave=False) as bar:
        for piece in to_pieces(heard, settings, tally, lambda about: str(about["machine"]) if by_machine else None):
            normal[piece.machine].add(piece)
            longest = max(longest, piece.seconds)
            bar.update()
    refuse_few(normal, tally, rows.description)
    windows, segments = {}, {}
    beside = [(layer, kind) for layer in layers_of(settings.members) for kind in KINDS] if sweep else []
    total = sum(of_machine.count_fits() for of_machine in normal.values())
    with tqdm(total=total, desc="fitting", unit=" fits", disable=not show_progress, leave=False) as bar:
        for machine in sorted(normal, key=str):
            windows[machine], segments[machine] = normal[machine].fit(settings.members, beside, bar.update)
    settings = Settings(**{**vars(settings), "window_seconds": longest})
    return AnomalyDetector(encoder, settings, windows, segments), sum(found.seconds for found in normal.values())


def normal_windows(min_seconds: float, max_seconds: float, by_machine: bool) -> Plan:
    inner = slide(min_seconds, max_seconds, 0.0)

    def plan(row, header, generator):
        if by_machine and row.get("machine") in (None, ""):
            raise Skip("no machine")
        return inner(row, header, generator)

    return plan


def refuse_few_rows(rows: IndexedRows, plan: Plan, by_machine: bool) -> None:
    """Before anything is listened to: where a machine has few recordings their headers say how many windows."""
    machines = rows.columns("machine") if by_machine else ("" for _ in range(len(rows)))
    places = defaultdict(list)
    for place, machine in enumerate(machines):
        places[machine].append(place)
    for machine, few in places.items():
        if len(few) >= MIN_NORMAL or (by_machine and machine in (None, "")):
            continue
        count, why = 0, None
        for row in map(rows.__getitem__, few):
            try:
                count += sum(1 for _ in plan(row, read_header(row["audio"]), None))
            except Skip as skip:
                why = skip
        if count < MIN_NORMAL:
            raise UserError(too_few(count, rows.description, str(machine) if by_machine else None, why))


def too_few(count: int, description: str, machine: str | None, why) -> str:
    """`why`: of the last one that was skipped, if any was."""
    of = "" if machine is None else f" of machine {machine!r}"
    last = f"; the last skipped: {why}" if why else ""
    return (
        f"dataset_name: {description} has {count} normal clips{of} that can be used; what is normal takes "
        f"{MIN_NORMAL} at least{last}"
    )


def refuse_few(normal: dict, tally: Tally, description: str) -> None:
    few = {machine: len(found.windows) for machine, found in normal.items() if len(found.windows) < MIN_NORMAL}
    if few or not normal:
        machine, count = next(iter(few.items()), (None, 0))
        raise UserError(too_few(count, description, machine, next(reversed(tally.listed.values()), None)))
