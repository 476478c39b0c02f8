"""Pretrain on unlabeled audio, from scratch or continued from a checkpoint.

    python run_pretrain.py [recipe.yaml] [--key value ...]
    accelerate launch run_pretrain.py recipes/demo/pretrain.yaml

parse -> data -> model -> train -> report
"""

import time

from acoustic.config import parse_pretraining
from acoustic.console import one_line_errors, say
from acoustic.data.collate import Rectangle
from acoustic.data.mix import open_unlabeled
from acoustic.data.windows import cover
from acoustic.models import build_for_pretraining
from acoustic.report import report_pretraining
from acoustic.report.heard import ShowHeard
from acoustic.training import setup
from acoustic.training.pretraining import PretrainingStep
from acoustic.training.probe import add_probe, open_probe
from acoustic.training.resume import find_checkpoint, make_room
from acoustic.training.sizing import choose_sizes
from acoustic.training.trainer import AcousticTrainer


def main(argv: list[str] | None = None) -> dict:
    model_args, data_args, args = parse_pretraining(argv)
    started = setup.start(args)
    checkpoint = find_checkpoint(args)

    model, feature_extractor, notes = build_for_pretraining(
        args.objective,
        model_args.model_name_or_path,
        model_args.model_revision,
        model_args.config_overrides,
        args.objective_settings,
        args.quantizer_name_or_path,
    )
    for note in [*notes, *setup.left_out(args)]:
        say(note)
    setup.check_memory_options(model, args)
    setup.check_windows(model, data_args, feature_extractor.sampling_rate)
    probed = open_probe(data_args)

    plan = cover(data_args.min_duration_in_seconds, data_args.max_duration_in_seconds)
    sources, held_out = open_unlabeled(data_args, plan, evaluates=args.eval_strategy != "no")
    found = setup.survey_once(
        args,
        sources,
        plan,
        unlabeled=True,
        max_skipped_fraction=data_args.max_skipped_fraction,
        count_all=args.max_steps <= 0,
        show_progress=args.process_index == 0,
    )
    say(f"audio: {found or 'a stream from ' + ', '.join(rows.description for rows, _ in sources)}")
    for line in setup.held_out_lines(held_out, found):
        say(line)
    setup.prepare_step(args, model)
    step, rate = PretrainingStep(model, args), feature_extractor.sampling_rate
    batch_seconds = choose_sizes(args, data_args, rate, model, step, checkpoint)
    setup.choose_max_steps(args, found, batch_seconds)
    setup.choose_workers(args, found)

    stream = {"rate": rate, "batch_seconds": batch_seconds, "unlabeled": True}
    collate = Rectangle(feature_extractor)
    eval_stream = None
    if held_out and args.eval_strategy != "no":
        eval_plan = setup.limit_seconds(held_out, plan, args.max_eval_seconds)
        limit = {"max_seconds": args.max_eval_seconds}
        eval_stream = setup.make_stream(held_out, eval_plan, collate, args, train=False, **limit, **stream)
    trainer = AcousticTrainer(
        model=model,
        processing_class=feature_extractor,
        args=setup.without_evaluation(args) if eval_stream is None else args,
        step=step,
        train_dataset=setup.make_stream(sources, plan, collate, args, train=True, **stream),
        eval_dataset=eval_stream,
        max_skipped_fraction=data_args.max_skipped_fraction,
    )
    trainer.add_callback(ShowHeard(trainer))
    if probed is not None:
        add_probe(trainer, probed, data_args, rate, batch_seconds)
    make_room(args, checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    results = trainer.last_evaluation() if eval_stream is not None and trainer.guard.reason is None else {}
    setup.finish(trainer)
    wall_seconds = time.perf_counter() - started
    results = report_pretraining(trainer, model_args, data_args, found, notes, results, wall_seconds)
    setup.end(trainer)
    return results


if __name__ == "__main__":
    with one_line_errors():
        main()
