"""Fine-tune a pretrained encoder on a few labels: classification, CTC, segmentation; or find anomalies with it.

    python run_finetune.py [recipe.yaml] [--key value ...]
    accelerate launch run_finetune.py recipes/demo/classification.yaml

parse -> data -> labels -> model -> train -> test -> report
"""

import time

from acoustic.config import parse_finetuning
from acoustic.console import one_line_errors, say
from acoustic.data.collate import PadToLongest
from acoustic.data.holdout import hold_out
from acoustic.report import report_efficiency, report_finetuning
from acoustic.report.anomaly import report_anomaly
from acoustic.tasks import make_task
from acoustic.tasks.anomaly_run import run_anomaly
from acoustic.training import setup
from acoustic.training.efficiency import prove
from acoustic.training.finetuning import FinetuningStep, choose_freeze_steps
from acoustic.training.resume import find_checkpoint, make_room
from acoustic.training.sizing import choose_sizes
from acoustic.training.trainer import AcousticTrainer


def main(argv: list[str] | None = None) -> dict:
    model_args, data_args, args = parse_finetuning(argv)
    if args.task == "anomaly":  # nothing to train
        return find_anomalies(model_args, data_args, args)
    if args.label_budgets:
        return report_efficiency(args, prove(model_args, data_args, args, finetune))
    return finetune(model_args, data_args, args)


def finetune(model_args, data_args, args) -> dict:
    started = setup.start(args)
    checkpoint = find_checkpoint(args)

    rows = setup.open_labeled(data_args, args, data_args.train_split_name)
    if data_args.eval_split_name:
        held_out = setup.open_labeled(data_args, args, data_args.eval_split_name)
    else:
        rows, held_out = hold_out(rows, data_args.validation_split_percentage)
    # Opened before training, so that a split that isn't there costs no hours.
    tests = {split: setup.open_labeled(data_args, args, split) for split in data_args.test_split_name}
    if held_out is None and not tests:
        say("note: nothing is held out or tested, so nothing tells how good it is; see --validation_split_percentage")
    task = make_task(args.task, rows, data_args)
    rows = task.subset(rows, data_args.labels_per_class, args.seed)
    model, feature_extractor, notes = task.build(
        model_args, args.random_weights, setup.total_seconds(rows), args.weighted_layer_sum
    )
    notes += task.unseen({"the held-out part": held_out, **tests})
    for note in [*task.notes(), *notes]:
        say(note)
    model.config.window_seconds = data_args.max_duration_in_seconds  # what acoustic.predict will cut into
    setup.check_memory_options(model, args)

    frames = setup.frame_counter(model, feature_extractor.sampling_rate)
    train_plan, eval_plan = task.plan(data_args, frames, train=True), task.plan(data_args, frames, train=False)
    found = setup.survey_once(
        args,
        [(rows, 1.0)],
        train_plan,
        max_skipped_fraction=data_args.max_skipped_fraction,
        count_all=args.max_steps <= 0,
    )
    say(f"labeled audio: {found or 'a stream from ' + rows.description}")
    rate = feature_extractor.sampling_rate
    batch_seconds = choose_sizes(args, data_args, rate)
    setup.choose_max_steps(args, found, batch_seconds)
    setup.choose_workers(args, found)

    if args.freeze_feature_encoder and not args.random_weights:
        model.freeze_feature_encoder()
    collate = PadToLongest(feature_extractor, task.encode)
    stream = {"rate": rate, "batch_seconds": batch_seconds}
    eval_stream = None
    if held_out is not None and args.eval_strategy != "no":
        eval_stream = setup.make_stream([(held_out, 1.0)], eval_plan, collate, args, train=False, **stream)
    trainer = AcousticTrainer(
        model=model,
        processing_class=task.processing_class(feature_extractor),
        args=setup.choose_best(args, task) if eval_stream else setup.without_evaluation(args),
        step=FinetuningStep(model, task, choose_freeze_steps(args, found)),
        train_dataset=setup.make_stream([(rows, 1.0)], train_plan, collate, args, train=True, **stream),
        eval_dataset=eval_stream,
        max_skipped_fraction=data_args.max_skipped_fraction,
    )
    make_room(args, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    notes += task.settle(trainer.evaluate if eval_stream else None)

    results, tested = {}, {}
    for split, test_rows in tests.items():
        test_stream = setup.make_stream([(test_rows, 1.0)], eval_plan, collate, args, train=False, **stream)
        scores = trainer.evaluate(test_stream, metric_key_prefix=split)
        results.update(scores)
        tested[split] = task.last if scores else []
    setup.finish(trainer)
    wall_seconds = time.perf_counter() - started
    results = report_finetuning(trainer, task, model_args, data_args, found, notes, results, tested, wall_seconds)
    setup.end(trainer)
    return results


def find_anomalies(model_args, data_args, args) -> dict:
    started = setup.start(args)
    run = run_anomaly(model_args, data_args, args)
    return report_anomaly(run, args, time.perf_counter() - started)


if __name__ == "__main__":
    with one_line_errors():
        main()
