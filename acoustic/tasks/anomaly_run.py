"""One run of task anomaly: which clips are normal, detectors fitted on them, test splits scored and measured."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import hmean
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm

from acoustic.console import UserError, say
from acoustic.data.rows import Rows
from acoustic.data.sources import open_rows
from acoustic.data.tally import Tally, refuse_too_many
from acoustic.tasks.anomaly import AnomalyDetector, Part, Scored, Settings, choose_members, fit_detector
from acoustic.tasks.base import name_some
from acoustic.tasks.embeddings import BATCH_SECONDS, listen, load_encoder
from acoustic.tasks.log_mel import LogMel

# As DCASE's task 2 has it (Koizumi et al. 2020): the mean of the curve up to this rate of false alarms, which
# scikit-learn standardises as McClish (1989), so that guessing gives 0.5.
MAX_FALSE_ALARMS = 0.1
ALARM_PERCENTILE = 95
EXAMPLES, EXAMPLES_OF_A_KIND = 6, 2


@dataclass
class Clip:
    """A recording of a test split: of its worst window the scores, each member's too, and its worst segment."""

    name: str
    machine: str | None
    label: str | None
    window: Part
    members: np.ndarray
    segment: Part

    def readable(self) -> dict:
        keys = ("name", "machine", "label")
        score, percentile = self.window.score, self.window.percentile
        worst = {"start": self.segment.start, "stop": self.segment.stop, "percentile": self.segment.percentile}
        return {**{key: getattr(self, key) for key in keys}, "score": score, "percentile": percentile, "worst": worst}


@dataclass
class Split:
    """A scored test split: `clips` the most anomalous first, `examples` of them to be drawn."""

    clips: list[Clip]
    tally: Tally
    seconds: float
    results: dict = field(default_factory=dict)
    examples: list[dict] = field(default_factory=list)


@dataclass
class AnomalyRun:
    """What a run found; `notes` one line each."""

    detector: AnomalyDetector
    notes: list[str]
    splits: dict[str, Split]
    description: str
    tally: Tally
    seconds: float


def run_anomaly(model_args, data_args, args) -> AnomalyRun:
    """Fit on the training split's normal clips, score the test splits, and write the detector to output_dir.

    Raises:
        UserError: no normal clip, too few of them, more than one process, or what any task refuses.
    """
    if args.world_size > 1:
        raise UserError("task anomaly runs in one process: start it with python, not with accelerate launch")
    others = [*Path(args.output_dir).glob("checkpoint-*"), *Path(args.output_dir).glob("trainer_state.json")]
    if others or is_same(args.output_dir, model_args.model_name_or_path):
        raise UserError(f"output_dir: {args.output_dir!r} holds another run's model; give a folder of its own")
    tests = {split: open_split(data_args, split) for split in data_args.test_split_name}
    rows, notes = choose_normal(open_training(data_args, bool(tests)), data_args.normal_label)
    encoder, about = open_encoder(model_args, args)
    members = choose_members(args.detector, args.embedding_layer, encoder.num_layers)
    settings = Settings(args.features, members, data_args.min_duration_in_seconds, normal_label=data_args.normal_label)
    by_machine = data_args.machine_column_name is not None
    seconds = data_args.batch_seconds if isinstance(data_args.batch_seconds, float) else BATCH_SECONDS
    options = {
        "batch_seconds": seconds,
        "workers": args.dataloader_num_workers,
        "show_progress": not args.disable_tqdm and sys.stderr.isatty(),
    }
    tally = Tally()
    detector, heard = fit_detector(
        encoder,
        rows,
        settings,
        tally,
        max_seconds=data_args.max_duration_in_seconds,
        by_machine=by_machine,
        sweep=any(label not in (None, "") for some in tests.values() for label in some.columns("label")),
        **options,
    )
    check_tally(tally, data_args, rows.description)
    notes += [about, *describe(detector, heard)]
    for note in notes:
        say(note)
    detector.save_pretrained(args.output_dir)
    run = AnomalyRun(detector, notes, {}, rows.description, tally, heard)
    swept = next(iter(detector.windows.values())).members
    for split, test_rows in tests.items():
        run.splits[split] = score_split(detector, test_rows, by_machine, **options)
        check_tally(run.splits[split].tally, data_args, test_rows.description)
        run.splits[split].results, more = measure(run.splits[split].clips, data_args.normal_label, swept)
        run.notes += [f"{split}: {note}" for note in more]
        for note in more:
            say(f"{split}: {note}")
    return run


def is_same(folder: str, name_or_path: str | None) -> bool:
    return name_or_path is not None and Path(folder).resolve() == Path(name_or_path).resolve()


def open_split(data_args, split: str, **changed) -> Rows:
    return open_rows(
        data_args.dataset_name,
        split,
        dataset_config_name=data_args.dataset_config_name,
        audio_column=data_args.audio_column_name,
        streaming=data_args.streaming,
        indexed=not data_args.streaming,
        other_splits=tuple(data_args.test_split_name),
        **{
            "label_column": data_args.label_column_name,
            "machine_column": data_args.machine_column_name,
            **changed,
        },
    )


def open_training(data_args, tested: bool) -> Rows:
    """Where test splits have the column of labels, the training split need not have it: all of it is normal."""
    try:
        return open_split(data_args, data_args.train_split_name)
    except UserError as error:
        if not tested or not str(error).startswith("label_column_name"):
            raise
        return open_split(data_args, data_args.train_split_name, label_column=None)


def choose_normal(rows: Rows, normal_label: str) -> tuple[Rows, list[str]]:
    """(the rows to fit on, what was decided): all of them where none has a label, else those of the normal one.

    Raises:
        UserError: none has it.
    """
    counts = Counter("" if label is None else str(label) for label in rows.columns("label"))
    if not set(counts) - {""}:
        return rows, [f"normal: all of {rows.description}, which has no labels"]
    if not counts[normal_label]:
        found = ", ".join(f"{label or 'none'} {count}" for label, count in counts.most_common(8))
        raise UserError(
            f"normal_label: no clip of {rows.description} is labeled {normal_label!r} (it has: {found}); give the "
            "label that means normal, or leave the labels away where all of the clips are"
        )
    notes = [f"normal: {counts[normal_label]} clips labeled {normal_label!r}"]
    others = {label: count for label, count in counts.items() if label != normal_label}
    if others:
        named = ", ".join(f"{label or 'without a label'} {count}" for label, count in sorted(others.items())[:8])
        notes.append(f"left out of the fit: {sum(others.values())} clips that are not labeled normal ({named})")
    return rows.select(lambda row: str(row["label"]) == normal_label), notes


def open_encoder(model_args, args):
    """(what gives frames, a note that says what it is)."""
    if args.features == "log_mel":
        if args.random_weights:
            raise UserError("random_weights: log-mel bands have no weights; leave out features or random_weights")
        return LogMel(), "features: log-mel bands, the floor that needs no model"
    name = model_args.model_name_or_path
    encoder = load_encoder(name, model_args.model_revision, args.random_weights, args.device)
    kind = f"the architecture of {name} with random weights (the control)" if args.random_weights else name
    return encoder, f"features: frozen encoder, {kind}"


def describe(detector: AnomalyDetector, seconds: float) -> list[str]:
    members = detector.settings.members
    layers, kinds = sorted({layer for layer, _ in members}), list(dict.fromkeys(kind for _, kind in members))
    counts = {name: len(found.normal) for name, found in detector.windows.items()}
    of = "" if None in counts else f", a detector for each of {len(counts)} machines ({min(counts.values())} at least)"
    averaged = "" if len(members) == 1 else f", the mean of {len(members)} distances"
    return [
        f"fitted on {sum(counts.values())} normal windows, {seconds / 3600:.2f} h{of}",
        f"detector: {', '.join(kinds)} in layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}{averaged}",
    ]


def check_tally(tally: Tally, data_args, description: str) -> None:
    refuse_too_many(tally.faults, tally.rows, tally.fault_reasons, data_args.max_skipped_fraction, description)


def score_split(
    detector: AnomalyDetector,
    rows: Rows,
    by_machine: bool,
    *,
    batch_seconds: float,
    workers: int = 0,
    show_progress: bool = False,
) -> Split:
    """Every recording that can be read, by its worst window."""
    tally, clips, seconds = Tally(), {}, 0.0
    longest, machine_of = detector.batch_seconds(batch_seconds), machine_or_none(by_machine)
    heard = listen(detector.encoder, rows, detector.plan(by_machine), tally, longest, workers)
    with tqdm(desc="scoring", unit=" windows", disable=not show_progress, leave=False) as bar:
        for scored in detector.score_windows(heard, tally, machine_of):
            seconds += scored.piece.seconds
            take(clips, scored)
            bar.update()
    ranked = sorted(clips.values(), key=lambda clip: (-clip.window.score, clip.name))
    split = Split(ranked, tally, seconds)
    split.examples = draw_examples(detector, rows, choose_examples(ranked), machine_of, batch_seconds)
    return split


def machine_or_none(by_machine: bool):
    return lambda about: str(about["machine"]) if by_machine else None


def take(clips: dict, scored: Scored) -> None:
    """The worst window of each recording, each member's worst, and the worst segment."""
    piece, worst = scored.piece, max(scored.segments, key=lambda part: part.score)
    key = (piece.name, piece.label, piece.machine)
    if key not in clips:
        clips[key] = Clip(piece.name, piece.machine, piece.label, scored.part, scored.members, worst)
        return
    clip = clips[key]
    clip.window = max(clip.window, scored.part, key=lambda part: part.score)
    clip.segment = max(clip.segment, worst, key=lambda part: part.score)
    clip.members = np.maximum(clip.members, scored.members)


def choose_examples(ranked: list[Clip]) -> list[Clip]:
    """The most anomalous ones, but few of each label: six times the same fault would show the less."""
    chosen, counts = [], Counter()
    for clip in ranked:
        counts[clip.label] += clip.label is not None
        if counts[clip.label] <= EXAMPLES_OF_A_KIND:
            chosen.append(clip)
    return chosen[:EXAMPLES]


def draw_examples(detector, rows: Rows, clips: list[Clip], machine_of, batch_seconds: float) -> list[dict]:
    """What a figure shows of some clips' worst windows: they are read again, in log-mel bands."""
    wanted = {clip.name: clip for clip in clips}
    plan = detector.plan()

    def worst_window(row, header, generator):
        start = wanted[row["name"]].window.start
        windows = [window for window in plan(row, header, generator) if abs(window.start / window.rate - start) < 1e-6]
        return windows[:1]

    chosen, seconds = rows.select(lambda row: row["name"] in wanted), detector.batch_seconds(batch_seconds)
    bands = {
        about["name"]: frames[0].T.numpy()
        for about, frames in listen(LogMel(), chosen, worst_window, Tally(), seconds)
    }
    heard = listen(detector.encoder, chosen, worst_window, Tally(), seconds)
    found = {}
    for scored in detector.score_windows(heard, Tally(), machine_of):
        clip, segments = wanted[scored.piece.name], detector.segments[scored.piece.machine]
        found[clip.name] = {
            **clip.readable(),
            "spectrogram": bands[clip.name],
            "edges": [scored.segments[0].start, *(part.stop for part in scored.segments)],
            "scores": [part.score for part in scored.segments],
            "alarm": float(np.percentile(segments.normal, ALARM_PERCENTILE)),
        }
    return [found[clip.name] for clip in clips if clip.name in found]


def measure(clips: list[Clip], normal_label: str, members: list[tuple[int, str]]) -> tuple[dict, list[str]]:
    """Numbers for all_results.json, by their names without the split's, and what there is to say of them.

    members: (layer, kind) of the clips' `members`.

    By fault, its clips are compared with the normal ones of the machines that have it.
    """
    labeled = [clip for clip in clips if clip.label is not None]
    unlabeled = f"{len(clips) - len(labeled)} of {len(clips)} clips have no label" if len(labeled) < len(clips) else ""
    wrong = np.array([clip.label != normal_label for clip in labeled], bool)
    scores = np.array([clip.window.score for clip in labeled])
    total = areas(wrong, scores)
    if total is None:
        kind = "labeled" if not labeled else "anomalous" if wrong.all() else "normal"
        what = "no clip is labeled" if not labeled else f"all labeled clips are {kind}"
        return {}, [f"{what}, so there is no AUC; their scores are in the predictions"]
    results, alarms = dict(total), np.array([clip.window.percentile for clip in labeled]) > ALARM_PERCENTILE
    results |= {"false_alarm_rate": float(alarms[~wrong].mean()), "recall": float(alarms[wrong].mean())}
    machines = np.array([clip.machine or "" for clip in labeled])
    faults = np.array([clip.label for clip in labeled])
    by_machine = {
        name: areas(wrong[machines == name], scores[machines == name])
        for name in sorted(set(machines.tolist()) - {""})
    }
    results["by_machine"] = {name: found for name, found in by_machine.items() if found}
    results["by_fault"] = {}
    for fault in sorted(set(faults[wrong].tolist())):
        compared = (faults == fault) | ~wrong & np.isin(machines, machines[faults == fault])
        if found := areas(wrong[compared], scores[compared]):
            results["by_fault"][fault] = found
    for area in ("auc", "pauc"):
        if results["by_machine"]:
            values = [found[area] for found in results["by_machine"].values()]
            results[f"{area}_harmonic_mean"] = float(hmean(values))
    results["sweep"] = sweep(labeled, wrong, members)
    return results, [unlabeled] * bool(unlabeled) + comment(results, by_machine)


def areas(wrong: np.ndarray, scores: np.ndarray) -> dict | None:
    """Under the ROC curve, all of it and up to 0.1 false alarms; None of one kind of clips alone."""
    if not 0 < wrong.sum() < len(wrong):
        return None
    partial = roc_auc_score(wrong, scores, max_fpr=MAX_FALSE_ALARMS)
    counts = {"normal_clips": int((~wrong).sum()), "anomalous_clips": int(wrong.sum())}
    return {"auc": float(roc_auc_score(wrong, scores)), "pauc": float(partial), **counts}


def sweep(clips: list[Clip], wrong: np.ndarray, members: list[tuple[int, str]]) -> list[dict]:
    """Each distance in each layer alone, over all clips."""
    scores = np.stack([clip.members for clip in clips])
    areas_of = [areas(wrong, scores[:, place]) for place in range(len(members))]
    return [
        {"layer": layer, "detector": kind, "auc": found["auc"], "pauc": found["pauc"]}
        for (layer, kind), found in zip(members, areas_of)
    ]


def comment(results: dict, by_machine: dict) -> list[str]:
    notes = [
        f"at percentile {ALARM_PERCENTILE}: {results['recall']:.0%} of the anomalous clips above it, "
        f"{results['false_alarm_rate']:.0%} of the normal ones"
    ]
    if undefined := [name for name, found in by_machine.items() if found is None]:
        notes.append(f"normal or anomalous clips alone, so no AUC, of machine {name_some(undefined)}")
    if len(results["sweep"]) > 1:
        best = max(results["sweep"], key=lambda found: found["auc"])
        notes.append(
            f"the best single distance here, {best['detector']} in layer {best['layer']}, has AUC {best['auc']:.3f} "
            "(chosen on these very labels: an upper bound, too good to be true elsewhere)"
        )
    return notes


# What the command line and a recipe may say to task anomaly, which trains nothing.
OWN_OPTIONS = ("features", "detector", "embedding_layer", "machine_column_name", "normal_label")
OPTIONS = {
    *OWN_OPTIONS,
    *("task", "output_dir", "model_name_or_path", "model_revision", "random_weights", "seed", "use_cpu"),
    *("dataset_name", "dataset_config_name", "train_split_name", "test_split_name", "streaming", "audio_column_name"),
    *("label_column_name", "max_duration_in_seconds", "min_duration_in_seconds", "max_skipped_fraction"),
    *("batch_seconds", "dataloader_num_workers", "disable_tqdm", "log_level"),
}


def check_options(args, data_args) -> None:
    """
    Raises:
        UserError: an option that does nothing in this task.
    """
    if args.task != "anomaly":
        if foreign := [name for name in OWN_OPTIONS if name in args.given]:
            raise UserError(f"{foreign[0]}: only task anomaly has it")
        return
    if foreign := sorted(args.given.keys() - OPTIONS):
        raise UserError(f"{foreign[0]}: task anomaly trains nothing, so it would do nothing; leave it out")
    if data_args.batch_seconds == "auto":
        raise UserError("batch_seconds: 'auto' is for pretraining; give seconds")
