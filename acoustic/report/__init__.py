"""What a run leaves behind besides its weights: numbers, figures and a model card, all from what was measured."""

from collections import Counter
from pathlib import Path

from acoustic.console import say
from acoustic.report import classes, efficiency, figures, timeline
from acoustic.report.card import write_card
from acoustic.report.embedding_map import draw_map
from acoustic.report.heard import draw_heard, examples_of
from acoustic.report.provenance import how_it_was_made, limits, metadata, model_index, shown_name
from acoustic.report.record import write_data_report, write_json, write_run
from acoustic.report.reference import load_reference

PRETRAINED_USE = """
{needs}import soundfile  # a recording of {rate} Hz
from transformers import AutoFeatureExtractor, AutoModel

extractor, model = AutoFeatureExtractor.from_pretrained("{name}"), AutoModel.from_pretrained("{name}")
waveform, rate = soundfile.read("recording.wav", dtype="float32", always_2d=True)
print(model(**extractor(waveform.mean(1), sampling_rate=rate, return_tensors="pt")).last_hidden_state.shape)
"""
# A file name instead of the waveform would need the ffmpeg program.
PIPELINE_USE = """
{needs}import soundfile
from transformers import pipeline

waveform, rate = soundfile.read("recording.wav", dtype="float32", always_2d=True)
print(pipeline("{pipeline}", model="{name}")({{"raw": waveform.mean(1), "sampling_rate": rate}}))
"""
# For a checkpoint of a system that transformers has no class for.
NEEDS = "import acoustic  # of this repository: makes the architecture known to transformers\n"

# The held-out metrics that a family of objectives is judged by.
RESULTS = {
    "contrastive": ("eval_contrastive_loss", "eval_accuracy", "eval_code_perplexity"),
    "predictive": ("eval_contrastive_loss", "eval_accuracy", "eval_code_perplexity"),
    "reconstruction": ("eval_reconstruction_loss", "eval_mean_predictor_loss"),
    "codes": ("eval_loss", "eval_unigram_loss", "eval_accuracy"),
}
PIPELINES = {"classification": "audio-classification", "ctc": "automatic-speech-recognition"}
MAX_REASONS = 8  # why recordings were skipped
# transformers has no pipeline for what sounds when.
FRAMES_USE = """
{needs}import soundfile  # a recording of {rate} Hz
from transformers import AutoFeatureExtractor, AutoModelForAudioFrameClassification

extractor = AutoFeatureExtractor.from_pretrained("{name}")
model = AutoModelForAudioFrameClassification.from_pretrained("{name}")
waveform, rate = soundfile.read("recording.wav", dtype="float32", always_2d=True)
logits = model(**extractor(waveform.mean(1), sampling_rate=rate, return_tensors="pt")).logits
print(logits.sigmoid())  # (1, frames, classes): model.config.id2label; thresholds in model.config.segmentation
"""
figures.classes, figures.timeline = classes, timeline  # tasks get `figures` handed in


def report_pretraining(trainer, model_args, data_args, survey, notes, results, wall_seconds: float) -> dict:
    """Write everything that a pretraining run leaves beside its weights; returns all_results.json's content."""
    output_dir, history, model = trainer.args.output_dir, trainer.state.log_history, trainer.model
    tallies = collect_tallies(trainer, survey)
    results = {**last_training(history), **results, "hours_seen": trainer.hours_seen, "wall_seconds": wall_seconds}
    if not trainer.is_world_process_zero():
        return results
    write_common(trainer, notes, tallies, wall_seconds)
    names, base = RESULTS[model.family], model_args.model_name_or_path
    if trainer.probe is not None:
        results |= trainer.probe.results
        names = (*names, *trainer.probe.results)
    write_card(
        output_dir,
        kind=f"{trainer.args.objective} pretrained on {sources(data_args)}",
        metadata=metadata(trainer.args, data_args, base, ["pretraining", trainer.args.objective]),
        facts=[*notes, *training_facts(trainer, survey, tallies, wall_seconds), *probe_facts(trainer)],
        results=numbers(results, (*names, "hours_seen")),
        figures=draw_pretraining(trainer),
        usage=PRETRAINED_USE.format(rate=trainer.train_dataset.rate, needs=needs(model), name=loads_as(trainer)),
        limits=limits("pretraining", heard(trainer, data_args)),
        made=how_it_was_made(trainer.args, wall_seconds),
        base=base,
        health=verdict_lines(trainer) or [f"the watch ({len(trainer.health.checks)} checks) had nothing to say"],
    )
    write_results(output_dir, results)
    say_where(output_dir, results, names)
    return results


def draw_pretraining(trainer) -> list[Path]:
    """The curves, and what else there is to see of this objective."""
    output_dir, history, model = trainer.args.output_dir, trainer.state.log_history, trainer.model
    facts = trainer.health.facts
    verdicts = [(verdict.said, verdict.name) for verdict in trainer.health.said]
    curves = figures.Curves(history, facts, load_reference(trainer.args.recipe, trainer.args.objective))
    drawn = [figures.pretraining_curves(output_dir, curves, model.family, verdicts)]
    if trainer.probe is not None:
        drawn.append(figures.probe(output_dir, history, trainer.probe.clips.chance))
        drawn.append(draw_clips(trainer))
    if figures.by_step(history):
        drawn.append(figures.steps_ahead(output_dir, history, facts.chance_accuracy))
    if trainer.example is None or trainer.is_fsdp_enabled:  # under FSDP no process has all of a model
        return drawn
    audio = trainer.example.to(trainer.args.device)
    drawn.append(draw_heard(output_dir, examples_of(model, audio, trainer.train_dataset.rate, trainer.args.seed)))
    if hasattr(model, "code_usage"):
        drawn.append(figures.code_usage(output_dir, model.code_usage(audio).cpu().numpy()))
    if hasattr(model, "training_examples"):
        drawn.append(figures.reconstruction(output_dir, model.training_examples(audio, trainer.args.seed)))
    return drawn


def draw_clips(trainer) -> Path:
    """The probe's clips, as they lie in the embedding of the trained model."""
    path, clips = Path(trainer.args.output_dir, "figures", "embeddings.png"), trainer.probe.clips
    layer = int(trainer.probe.results["probe_layer"])
    return draw_map(path, trainer.probe.embeddings, clips.labels.tolist(), f"the probe's clips in layer {layer}")


def needs(model) -> str:
    return NEEDS if type(model.config).__module__.startswith("acoustic.") else ""


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
    drawn, sections = [figures.finetuning_curves(output_dir, history, task.best_metric)], {}
    for split, collected in tested.items():
        sections |= task.sections(split, collected)
        write_json(Path(output_dir, f"predictions_{split}.json"), {"predictions": task.readable(collected)})
        drawn += task.figures(output_dir, split, collected, figures)
    name, base = trainer.args.task, model_args.model_name_or_path
    scores = {
        split: {
            metric: results[f"{split}_{metric}"] for metric in task.shown_metrics if f"{split}_{metric}" in results
        }
        for split in tested
    }
    index = model_index(trainer.args, data_args, scores)
    write_card(
        output_dir,
        kind=f"{name} fine-tuned from {shown_name(base)} on {sources(data_args)}",
        metadata={**metadata(trainer.args, data_args, base, [name], **pipeline_tag(name)), **index},
        facts=[*task.notes(), *notes, *training_facts(trainer, survey, tallies, wall_seconds)],
        results=numbers(results, tuple(f"{split}_{metric}" for split in tested for metric in task.shown_metrics)),
        figures=drawn,
        usage=usage(name, trainer),
        sections=sections,
        limits=limits(kind_of_limits(task, name), heard(trainer, data_args), getattr(task, "classes", None)),
        made=how_it_was_made(trainer.args, wall_seconds),
        base=base,
    )
    write_results(output_dir, results)
    say_where(output_dir, results, tuple(f"{split}_{metric}" for split in tested for metric in task.shown_metrics))
    return results


def report_efficiency(args, found: dict) -> dict:
    """The figure, and what came out in words; the numbers are in label_efficiency.json already."""
    figure = efficiency.label_efficiency(args.output_dir, found)
    for line in found["says"]:
        say(line)
    say(f"done: {figure}")
    return found


def pipeline_tag(task: str) -> dict[str, str]:
    return {"pipeline_tag": PIPELINES[task]} if task in PIPELINES else {}


def usage(task: str, trainer) -> str:
    given = {"needs": needs(trainer.model), "name": loads_as(trainer)}
    if task in PIPELINES:
        return PIPELINE_USE.format(pipeline=PIPELINES[task], **given)
    return FRAMES_USE.format(rate=trainer.train_dataset.rate, **given)


def loads_as(trainer) -> str:
    """What `from_pretrained` takes: the repository on the Hub, or this folder."""
    return trainer.args.hub_model_id if trainer.args.push_to_hub else "."


def sources(data_args) -> str:
    return ", ".join(shown_name(source.name) for source in data_args.mix)


def heard(trainer, data_args) -> str:
    return f"{sources(data_args)} ({trainer.hours_seen:.2f} h, repeats counted)"


def kind_of_limits(task, name: str) -> str:
    return "several" if name == "segmentation" or hasattr(task, "thresholds") else name


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
    reasons = sum((tally.reasons for tally in tallies.values()), Counter())
    if reasons:
        why = ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(MAX_REASONS))
        more = ", ..." if len(reasons) > MAX_REASONS else ""
        facts.append(f"skipped: {reasons.total()} recordings: {why}{more}")
    facts.append(
        f"training: {trainer.state.global_step} updates, {trainer.hours_seen:.2f} h of audio seen, "
        f"{wall_seconds / 60:.1f} min on {trainer.args.world_size} process(es)"
    )
    if trainer.guard.reason is not None:
        facts.append(f"stopped before its last update: {trainer.guard.reason}")
    return facts


def probe_facts(trainer) -> list[str]:
    return [] if trainer.probe is None else [f"probe while pretraining: {trainer.probe.clips}"]


def numbers(results: dict, names: tuple[str, ...]) -> dict[str, float]:
    return {name: results[name] for name in names if isinstance(results.get(name), (int, float))}


def say_where(output_dir: str, results: dict, names: tuple[str, ...]) -> None:
    shown = ", ".join(f"{name} {results[name]:.4g}" for name in names if name in results)
    say(f"done: {output_dir}" + (f" ({shown})" if shown else ""))
