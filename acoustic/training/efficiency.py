"""Did pretraining help, and how many labels is it worth: the same learning from few labels, from several starts.

Two ways to learn: a probe on the frozen encoder, and fine-tuning. Each learning rate is chosen on the evaluation
split, for each start and budget alike; test splits are only reported. A budget of transcripts is in minutes, one of
classes in clips of each.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from acoustic.console import Interrupted, UserError, say
from acoustic.data.rows import IndexedRows
from acoustic.tasks import TASKS, make_task
from acoustic.tasks.embeddings import load_encoder
from acoustic.tasks.log_mel import LogMel
from acoustic.training.checkpoint import checksum
from acoustic.training.probing import Scores, make_probing
from acoustic.training.setup import keep_memory, open_labeled
from acoustic.training.worth import ALL, Unit, curve, number, worth

FILE = "label_efficiency.json"
RANDOM, FLOOR = "random", "log_mel"
FROZEN, FINE_TUNED = "frozen", "fine_tuned"  # `adaptation`
# Factors on the recipe's learning rate that fine-tuning tries.
FACTORS = (0.3, 1.0, 3.0)
SHORT = {"wer": "WER", "cer": "CER", "map": "mAP"}
# Options that no score depends on, or that have a place of their own among the results.
WITHOUT_EFFECT = {
    *("label_budgets", "initializations", "num_draws", "adaptation", "model_name_or_path", "model_revision"),
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "run_name", "project", "report_to"),
    *("disable_tqdm", "log_level", "line_seconds", "logging_steps", "logging_first_step", "dataloader_num_workers"),
    *("use_cpu", "eval_steps", "save_steps", "save_total_limit", "eval_strategy", "save_strategy"),
}
# By the kind of label.
UNITS = {"text": Unit("minute of labels", "minutes of labels"), "label": Unit("label per class", "labels per class")}


@dataclass(frozen=True)
class Start:
    """name: as it is shown; path: of the checkpoint, None for log-mel bands; revision: of the Hub."""

    name: str
    path: str | None
    random: bool = False
    revision: str | None = None

    @property
    def fingerprint(self) -> str:
        """Of what it starts from: another one where a checkpoint was trained further."""
        if self.path is None or not Path(self.path).is_dir():
            return f"{self.path or ''}@{self.revision or ''}"
        names = ("config.json",) if self.random else ("config.json", "model.safetensors")
        paths = [path for name in names if (path := Path(self.path, name)).is_file()]
        return " ".join(f"{path.stat().st_size}:{checksum(path):x}" for path in paths)


def name_starts(initializations: list[str], ours: str, revision: str | None = None) -> list[Start]:
    """`random` is the architecture of `ours` without its weights; `log_mel` needs none; the rest are checkpoints.

    revision: of `ours`.

    Raises:
        UserError: a start is named twice.
    """
    starts = []
    for given in initializations or [RANDOM, FLOOR, ours]:
        if given == RANDOM:
            starts.append(Start("random weights", ours, True, revision))
        elif given == FLOOR:
            starts.append(Start("log-mel bands", None))
        else:
            starts.append(Start(given.rstrip("/"), given, revision=revision if given == ours else None))
    if len({start.name for start in starts}) < len(starts):
        raise UserError(f"initializations: one is named twice: {' '.join(initializations)}")
    return starts


def read_budgets(texts: list[str], unit: Unit, whole_numbers: bool) -> list[float | None]:
    """Amounts of labels, ascending; None is all of them.

    Raises:
        UserError: neither a number nor `all`.
    """
    amounts = set()
    for text in texts:
        try:
            amount = None if text == ALL else int(text) if whole_numbers else float(text)
        except ValueError:
            amount = -1
        if amount is not None and not 0 < amount < float("inf"):
            raise UserError(f"label_budgets: {unit.many}, or 'all', not {text!r}")
        amounts.add(amount)
    return sorted(amounts, key=lambda amount: number(name_of(amount)))


def name_of(budget: float | None) -> str:
    return ALL if budget is None else f"{budget:g}"


class Results:
    """Rows {"way", "start", "budget", "draw", "learning_rate", split: score}, kept in a file as they come.

    Args:
        settings: all that scores depend on, but for the starts.
        starts: name -> fingerprint.

    Raises:
        UserError: the file was made with others, or is none of ours.
    """

    def __init__(self, path: Path, settings: dict, starts: dict[str, str]):
        self.path, self.settings, self.starts, self.rows = path, settings, starts, []
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            old, known, self.rows = found["settings"], found["starts"], found["rows"]
            changed = [name for name in {**settings, **old} if old.get(name) != settings.get(name)]
            changed += [f"start {name}" for name in starts if known.get(name, starts[name]) != starts[name]]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"output_dir: {path} can't be read as results; delete it, or give another one") from None
        if changed:
            raise UserError(
                f"output_dir: {path} was made with another {changed[0]}; choose another output_dir, or delete it"
            )
        self.starts = {**known, **starts}

    def find(self, **key) -> dict | None:
        return next((row for row in self.rows if all(row[name] == value for name, value in key.items())), None)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.write()

    def write(self, **more) -> None:
        text = json.dumps({"settings": self.settings, "starts": self.starts, **more, "rows": self.rows}, indent=1)
        part = self.path.with_suffix(".part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(self.path)


def prove(model_args, data_args, args, finetune: Callable) -> dict:
    """All of it; returns what the file holds. `finetune(model_args, data_args, args)` gives the results of one run.

    Raises:
        UserError: a budget that the recordings don't suffice for, or a start that can't be loaded.
    """
    if args.world_size > 1:
        raise UserError("label_budgets: runs in one process; start it with python, not with accelerate launch")
    starts = name_starts(args.initializations, model_args.model_name_or_path, model_args.model_revision)
    kind = TASKS[args.task].label_kind
    unit, budgets = UNITS[kind], read_budgets(args.label_budgets, UNITS[kind], whole_numbers=kind == "label")
    splits = (data_args.eval_split_name, *data_args.test_split_name)  # the first one chooses
    rows = {split: open_labeled(data_args, args, split) for split in (data_args.train_split_name, *splits)}
    draws = Draws(args.task, rows[data_args.train_split_name], data_args, args.seed)
    for budget in budgets:
        draws.of(budget, 0)  # too many asked for: say so before anything is computed
    if args.device.type == "cpu":
        keep_memory()
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    fingerprints = {start.name: start.fingerprint for start in starts}
    results = Results(Path(args.output_dir, FILE), settings_of(args, data_args, splits), fingerprints)
    wanted = [(budget, draw) for budget in budgets for draw in range(1 if budget is None else args.num_draws)]
    probing = make_probing(draws.task, data_args)
    for start in starts if FROZEN in args.adaptation else []:
        missing = [key for key in wanted if not results.find(**key_of(FROZEN, start, *key))]
        if missing:
            probe_start(start, missing, draws, rows, splits, probing, results, args)
    for start in starts if FINE_TUNED in args.adaptation else []:
        missing = [key for key in wanted if not results.find(**key_of(FINE_TUNED, start, *key))]
        if start.path is not None:
            Finetuning(model_args, data_args, args, finetune, splits, probing.scores, results).compare(
                start, missing, draws
            )
    said = [
        line
        for way in args.adaptation
        for metric in probing.scores.metrics
        if (line := sentence(results.rows, way, starts, splits[-1], metric, probing.scores, unit))
    ]
    results.write(says=said)
    return {
        "says": said,
        "starts": [start.name for start in starts],
        "splits": list(splits[1:]),
        "metrics": list(probing.scores.metrics),
        "columns": {
            f"{split} {metric}": probing.scores.column(split, metric)
            for split in splits[1:]
            for metric in probing.scores.metrics
        },
        "unit": unit.many,
        "greater_is_better": probing.scores.greater_is_better,
        "rows": results.rows,
    }


def settings_of(args, data_args, splits: tuple[str, ...]) -> dict:
    """What the scores depend on, as it goes into JSON."""
    settings = {"task": args.task, "data": data_args.dataset_name, "splits": list(splits), "seed": args.seed}
    settings |= {"max_steps": args.max_steps, "learning_rate": args.learning_rate}
    known = {*settings, *WITHOUT_EFFECT, "dataset_name", "eval_split_name", "test_split_name"}
    settings |= {name: value for name, value in args.given.items() if name not in known}
    return json.loads(json.dumps(settings, default=str))


class Draws:
    """The same recordings for every start: drawn by the seed, a smaller budget's among a larger's."""

    def __init__(self, task: str, rows: IndexedRows, data_args, seed: int):
        self.name, self.all, self.data_args, self.seed = task, rows, data_args, seed
        self.task = make_task(task, rows, data_args)
        self.drawn: dict[tuple, set[str]] = {}

    def of(self, budget: float | None, draw: int) -> set[str]:
        """Names of the recordings."""
        if (budget, draw) not in self.drawn:
            task = make_task(self.name, self.all, self.data_args)  # it remembers what was drawn
            rows = task.subset(self.all, budget, self.seed + draw)
            self.drawn[budget, draw] = {rows[index]["name"] for index in range(len(rows))}
        return self.drawn[budget, draw]


def key_of(way: str, start: Start, budget: float | None, draw: int) -> dict:
    return {"way": way, "start": start.name, "budget": name_of(budget), "draw": draw}


def probe_start(start: Start, wanted, draws: Draws, rows: dict, splits, probing, results: Results, args) -> None:
    """The probe on one start's frozen layers, for each (budget, draw) that is wanted."""
    torch.manual_seed(draws.seed)  # of random weights
    encoder = LogMel() if start.path is None else load_encoder(start.path, start.revision, start.random, args.device)
    train_split, names = draws.data_args.train_split_name, set().union(*(draws.of(*key) for key in wanted))
    rows = {**rows, train_split: rows[train_split].select(lambda row: row["name"] in names)}
    quiet = args.disable_tqdm
    heard = {split: probing.hear(encoder, some, f"{start.name}: {split}", quiet) for split, some in rows.items()}
    train = heard[train_split]
    for budget, draw in tqdm(wanted, f"{start.name}: probes", leave=False, disable=quiet or None):
        drawn = draws.of(budget, draw)
        chosen = [index for index, name in enumerate(train.names) if name in drawn]
        probe, rate = probing.fit_best(train.part(chosen), heard[splits[0]], draws.seed + draw)
        scores = {}
        for split in splits:
            scores |= probing.scores.columns(split, probing.score(probe, heard[split]))
        results.add({**key_of(FROZEN, start, budget, draw), "learning_rate": rate, **scores})


class Finetuning:
    """Whole runs of `run_finetune.py` without checkpoints; what they leave is removed, but for the scores."""

    def __init__(self, model_args, data_args, args, finetune: Callable, splits, scores: Scores, results: Results):
        self.results = results
        self.model_args, self.data_args, self.args = model_args, data_args, args
        self.finetune, self.splits, self.scores = finetune, splits, scores

    def compare(self, start: Start, wanted: list, draws: Draws) -> None:
        """The learning rate is chosen on the first draw of a budget."""
        for place, (budget, draw) in enumerate(wanted, 1):
            say(f"fine-tuning {place} of {len(wanted)} from {start.name}: budget {name_of(budget)}, draw {draw + 1}")
            first = self.results.find(**key_of(FINE_TUNED, start, budget, 0))
            rates = [first["learning_rate"]] if first else [factor * self.args.learning_rate for factor in FACTORS]
            runs = [(self.run(start, budget, draws.seed + draw, rate), rate) for rate in rates]
            scores, rate = max(runs, key=lambda run: self.scores.rank(run[0], self.splits[0]))
            self.results.add({**key_of(FINE_TUNED, start, budget, draw), "learning_rate": rate, **scores})

    def run(self, start: Start, budget: float | None, seed: int, learning_rate: float) -> dict[str, float]:
        """Column -> score."""
        model_args, data_args, args = copy.copy(self.model_args), copy.copy(self.data_args), copy.copy(self.args)
        model_args.model_name_or_path, model_args.model_revision = start.path, start.revision
        data_args.labels_per_class, data_args.eval_split_name = budget, None
        data_args.test_split_name = list(self.splits)
        args.output_dir = str(Path(self.args.output_dir, "run"))
        args.random_weights, args.learning_rate, args.seed = start.random, learning_rate, seed
        args.eval_strategy = args.save_strategy = "no"
        args.label_budgets, args.overwrite_output_dir, args.resume_from_checkpoint = [], True, None
        shutil.rmtree(args.output_dir, ignore_errors=True)  # of a comparison that was stopped
        try:
            results = self.finetune(model_args, data_args, args)
        except (Interrupted, KeyboardInterrupt):
            say(f"what was compared so far is in {self.results.path}; the same command goes on from there")
            raise
        shutil.rmtree(args.output_dir)
        columns = {}
        for split in self.splits:
            columns |= self.scores.columns(split, {name: results[f"{split}_{name}"] for name in self.scores.metrics})
        return columns


def sentence(
    rows: list[dict], way: str, starts: list[Start], split: str, metric: str, scores: Scores, unit: Unit
) -> str | None:
    """What the last start is worth beside each other one; None where it has nothing to be compared with this way."""
    column, greater = scores.column(split, metric), scores.greater_is_better
    ours = curve(rows, way, starts[-1].name, column)
    subject = starts[-1].name if starts[-1].random or starts[-1].path is None else "pretraining"
    parts = [
        worth(ours, curve(rows, way, start.name, column), start.name, unit, greater, subject) for start in starts[:-1]
    ]
    if not any(parts):
        return None
    how = "a probe on the frozen encoder" if way == FROZEN else "fine-tuned"
    draws = max(map(len, ours.values()))
    which = f"{SHORT.get(metric, metric)}, {how}" + (", a single draw" if draws == 1 else "")
    return f"{split}, {which}: " + "; ".join(filter(None, parts))
