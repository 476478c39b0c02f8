"""What a run leaves behind besides its weights: numbers, figures and a model card, all from what was measured."""

from pathlib import Path

from acoustic.console import say
from acoustic.report import figures
from acoustic.report.card import write_card
from acoustic.report.record import write_data_report, write_json, write_run

PRETRAINED_USE = """
from transformers import AutoFeatureExtractor, AutoModel

extractor, model = AutoFeatureExtractor.from_pretrained("."), AutoModel.from_pretrained(".")
hidden = model(**extractor(waveform, sampling_rate={rate}, return_tensors="pt")).last_hidden_state
"""
# A file name instead of the waveform would need the ffmpeg program.
PIPELINE_USE = """
import soundfile
from transformers import pipeline

waveform, rate = soundfile.read("recording.wav", dtype="float32")
print(pipeline("{pipeline}", model=".")({{"raw": waveform, "sampling_rate": rate}}))
"""
PIPELINES = {"classification": "audio-classification", "ctc": "automatic-speech-recognition"}


def report_pretraining(trainer, model_args, data_args, survey, notes, results, wall_seconds: float) -> dict:
    """Write everything that a pretraining run leaves beside its weights; returns all_results.json's content."""
    output_dir, history, config = trainer.args.output_dir, trainer.state.log_history, trainer.model.config
    tallies = collect_tallies(trainer, survey)
    results = {**last_training(history), **results, "hours_seen": trainer.hours_seen, "wall_seconds": wall_seconds}
    if not trainer.is_world_process_zero():
        return results
    write_common(trainer, notes, tallies, wall_seconds)
    curve = figures.pretraining_curves(
        output_dir,
        history,
        num_negatives=config.num_negatives,
        num_codes=config.num_codevector_groups * config.num_codevectors_per_group,
        verdicts=[(verdict.said, verdict.name) for verdict in trainer.health.said],
    )
    write_card(
        output_dir,
        kind=f"{trainer.args.objective} pretrained on {data_args.dataset_name}",
        metadata={"library_name": "transformers", "tags": ["audio", "pretraining", trainer.args.objective]},
        facts=[*notes, *training_facts(trainer, survey, tallies, wall_seconds)],
        results=numbers(results, ("eval_contrastive_loss", "eval_accuracy", "eval_code_perplexity", "hours_seen")),
        figures=[curve],
        usage=PRETRAINED_USE.format(rate=trainer.train_dataset.rate),
        health=verdict_lines(trainer) or [f"the watch ({len(trainer.health.checks)} checks) had nothing to say"],
    )
    write_results(output_dir, results)
    say_where(output_dir, results, ("eval_contrastive_loss", "eval_accuracy", "eval_code_perplexity"))
    return results


def report_finetuning(
    trainer, task, model_args, data_args, survey, notes, results, tested: dict[str, list], wall_seconds: float
) -> dict:
    """The same for fine-tuning: predictions_{split}.json and the task's figures as well."""
    output_dir, history = trainer.args.output_dir, trainer.state.log_history
    tallies = collect_tallies(trainer, survey)
    results = {**last_training(history), **results, "wall_seconds": wall_seconds}
    if not trainer.is_world_process_zero():
        return results
    write_common(trainer, notes, tallies, wall_seconds)
    drawn = [figures.finetuning_curves(output_dir, history, task.best_metric)]
    for split, collected in tested.items():
        write_json(Path(output_dir, f"predictions_{split}.json"), {"predictions": task.readable(collected)})
        drawn += task.figures(output_dir, split, collected, figures)
    name = trainer.args.task
    write_card(
        output_dir,
        kind=f"{name} fine-tuned from {model_args.model_name_or_path}",
        metadata={"library_name": "transformers", "pipeline_tag": PIPELINES[name], "tags": ["audio"]},
        facts=[*task.notes(), *notes, *training_facts(trainer, survey, tallies, wall_seconds)],
        results=numbers(results, tuple(f"{split}_{metric}" for split in tested for metric in task.shown_metrics)),
        figures=drawn,
        usage=PIPELINE_USE.format(pipeline=PIPELINES[name]),
    )
    write_results(output_dir, results)
    say_where(output_dir, results, tuple(f"{split}_{metric}" for split in tested for metric in task.shown_metrics))
    return results


def write_common(trainer, notes, tallies, wall_seconds: float) -> None:
    output_dir = trainer.args.output_dir
    Path(output_dir, "figures").mkdir(exist_ok=True)
    write_run(output_dir, trainer.args, notes, wall_seconds, verdict_lines(trainer))
    reports = {split: tally.report() for split, tally in tallies.items()}
    write_data_report(output_dir, trainer.train_dataset.description, trainer.hours_seen, reports)


def write_results(output_dir: str, results: dict) -> None:
    """Last of all: that they are there says that a run is at its end, with nothing left to do when it is resumed."""
    write_json(Path(output_dir, "all_results.json"), results)


def verdict_lines(trainer) -> list[str]:
    """What the watch over the training said."""
    return [verdict.line for verdict in trainer.health.said] if trainer.health else []


def collect_tallies(trainer, survey) -> dict:
    """By split, what the headers ruled out and what failed while decoding, over all processes."""
    total = {}
    for tallies in [{"train": survey.tally} if survey else {}, *trainer.gather([dict(trainer.tallies)])]:
        for split, tally in tallies.items():
            total.setdefault(split, type(tally)()).merge(tally)
    skipped = sum(len(tally.names) for tally in total.values())
    if skipped:
        say(f"skipped: {skipped} recordings, listed with their reasons in data_report.json")
    return total


def last_training(history: list[dict]) -> dict[str, float]:
    """The last logged values of training."""
    logged = [entry for entry in history if "loss" in entry]
    return (
        {f"train_{key}": value for key, value in logged[-1].items() if key not in ("step", "epoch")} if logged else {}
    )


def training_facts(trainer, survey, tallies: dict, wall_seconds: float) -> list[str]:
    facts = [f"data: {survey}" if survey else f"data: a stream, {trainer.train_dataset.description}"]
    skipped = sum(len(tally.names) for tally in tallies.values())
    if skipped:
        facts.append(f"skipped: {skipped} recordings (data_report.json says which and why)")
    facts.append(
        f"training: {trainer.state.global_step} updates, {trainer.hours_seen:.2f} h of audio seen, "
        f"{wall_seconds / 60:.1f} min on {trainer.args.world_size} process(es)"
    )
    if trainer.guard.reason is not None:
        facts.append(f"stopped before its last update: {trainer.guard.reason}")
    return facts


def numbers(results: dict, names: tuple[str, ...]) -> dict[str, float]:
    return {name: results[name] for name in names if isinstance(results.get(name), (int, float))}


def say_where(output_dir: str, results: dict, names: tuple[str, ...]) -> None:
    shown = ", ".join(f"{name} {results[name]:.4g}" for name in names if name in results)
    say(f"done: {output_dir}" + (f" ({shown})" if shown else ""))
