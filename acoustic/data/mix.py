"""The audio of a pretraining run: one source or a weighted mix of them, and the part of it that is held out."""

from acoustic.data.holdout import hold_out
from acoustic.data.sources import open_rows
from acoustic.data.windows import usable


def open_unlabeled(data_args, plan, evaluates: bool) -> tuple[list, list]:
    """(training sources, held-out sources), each [(rows, weight)]: two splits where both are named, else a part by the
    names' hashes."""
    sources, held_out = [], []
    for source in data_args.mix:
        options = {
            "dataset_config_name": source.config or data_args.dataset_config_name,
            "audio_column": source.audio_column or data_args.audio_column_name,
            "streaming": data_args.streaming if source.streaming is None else source.streaming,
        }
        others = tuple(filter(None, [data_args.eval_split_name]))
        rows = open_rows(source.name, source.split or data_args.train_split_name, other_splits=others, **options)
        rest = None
        if data_args.eval_split_name:
            rest = open_rows(source.name, data_args.eval_split_name, **options)
        elif evaluates:
            rows, rest = hold_out(rows, data_args.validation_split_percentage, usable(plan))
        sources.append((rows, source.weight))
        held_out += [(rest, source.weight)] if rest is not None else []
    return sources, held_out
