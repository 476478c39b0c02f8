"""Fine-tune a pretrained encoder on a few labels: classification or CTC.

    python run_finetune.py [recipe.yaml] [--key value ...]
    accelerate launch run_finetune.py recipes/demo/classification.yaml

parse -> data -> labels -> model -> train -> test -> report
"""

import time

from acoustic.config import parse_finetuning
from acoustic.console import one_line_errors, say
from acoustic.data.collate import PadToLongest
from acoustic.data.holdout import hold_out
from acoustic.data.sources import open_rows
from acoustic.report import report_finetuning
from acoustic.tasks import TASKS
from acoustic.training import setup
from acoustic.training.finetuning import FinetuningStep, choose_freeze_steps
from acoustic.training.resume import find_checkpoint, make_room
from acoustic.training.sizing import choose_sizes
from acoustic.training.trainer import AcousticTrainer


def main(argv: list[str] | None = None) -> dict:
    model_args, data_args, args = parse_finetuning(argv)
    started = setup.start(args)
    checkpoint = find_checkpoint(args)

    rows = open_labeled(data_args, args, data_args.train_split_name)
    if data_args.eval_split_name:
        held_out = open_labeled(data_args, args, data_args.eval_split_name)
    else:
        rows, held_out = hold_out(rows, data_args.validation_split_percentage)
    # Opened before training, so that a split that isn't there costs no hours.
    tests = {split: open_labeled(data_args, args, split) for split in data_args.test_split_name}
    task = TASKS[args.task](rows, data_args)
    rows = task.subset(rows, data_args.labels_per_class, args.seed)
    model, feature_extractor, notes = task.build(model_args, args.random_weights, setup.total_seconds(rows))
    for note in [*task.notes(), *notes]:
        say(note)

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


def open_labeled(data_args, args, split: str):
    """The rows of one split with the column that the task needs."""
    kind = TASKS[args.task].label_kind
    column = data_args.text_column_name if kind == "text" else data_args.label_column_name
    return open_rows(
        data_args.dataset_name,
        split,
        dataset_config_name=data_args.dataset_config_name,
        audio_column=data_args.audio_column_name,
        streaming=data_args.streaming,
        indexed=not data_args.streaming,
        other_splits=tuple(filter(None, [data_args.eval_split_name, *data_args.test_split_name])),
        **{f"{kind}_column": column},
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
