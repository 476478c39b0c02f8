"""What both scripts do before they train and after: seeds, quiet libraries, derived settings, saving."""

import contextlib
import ctypes
import logging
import math
import os
import time
import warnings
from pathlib import Path

import datasets
import numpy as np
import transformers
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from acoustic.console import RunError, UserError, did_you_mean, is_main_process, say
from acoustic.data.batches import BatchStream
from acoustic.data.headers import Skip, read_header
from acoustic.data.rows import IndexedRows
from acoustic.data.sources import open_rows
from acoustic.data.survey import SAMPLE, Survey, survey
from acoustic.data.windows import thin
from acoustic.tasks import TASKS
from acoustic.training.exchange import found_by_first, leave_together
from acoustic.training.pushing import open_repo
from acoustic.training.stopping import stop_with_launcher

# Held out, from which on it is said aloud.
LARGE_SHARE = 0.2

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def start(args) -> float:
    """Seed everything, quiet the libraries, make the output folder. Returns the time for `wall_seconds`."""
    if args.n_gpu > 1:
        raise UserError(
            f"this machine has {args.n_gpu} GPUs: start one process for each (accelerate launch --config_file "
            "recipes/accelerate/multi_gpu.yaml ...), or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    stop_with_launcher()
    transformers.set_seed(args.seed)
    transformers.logging.set_verbosity(
        args.get_process_log_level() if args.log_level != "passive" else logging.WARNING
    )
    transformers.logging.disable_progress_bar()  # weights load and save in a blink; training has its own bar
    datasets.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    if not is_main_process():
        args.disable_tqdm = True
        datasets.disable_progress_bars()
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        # What `accelerate launch --cpu --num_processes 2` leaves behind: it starts one process, and says nothing.
        say("warning: accelerate's --cpu starts one process; for two: recipes/accelerate/two_cpu_processes.yaml")
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and args.device.type == "cpu":
        say("warning: accelerate shards a model (FSDP) on GPUs only; here each process has a copy of it (DDP)")
    try:
        os.makedirs(args.output_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: can't make {args.output_dir!r}: {error.strerror}") from None
    check_trackers(args)
    if args.push_to_hub:
        args.hub_model_id = found_by_first(args.world_size, args.process_index, lambda: open_repo(args))
    return time.perf_counter()


def check_trackers(args) -> None:
    """Of `--report_to`, one or several with commas, before any audio is read; the Trainer asks for them last.

    Raises:
        UserError: there is no such one, or its package isn't installed.
    """
    args.report_to = [name.strip() for names in args.report_to for name in names.split(",")]
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(name, INTEGRATION_TO_CALLBACK) or ": trackio, tensorboard, wandb, ..."
            raise UserError(f"report_to: there is no {name!r}{hint}")
        if name not in get_available_reporting_integrations():
            raise UserError(f"report_to: {name!r} needs a package that is not installed: pip install {name}")


def left_out(args) -> list[str]:
    """What a recipe says for another objective."""
    return (
        [f"left out, as objective {args.objective} has no such: {', '.join(args.left_out)}"] if args.left_out else []
    )


def check_memory_options(model, args) -> None:
    """
    Raises:
        UserError: the model has nothing that gradient checkpointing could make again.
    """
    if args.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UserError(
            f"gradient_checkpointing: a {model.config.model_type} model has no layers that it works on; to save "
            "memory, lower --batch_seconds"
        )


def check_windows(model, data_args, rate: int) -> None:
    """Whether there is something to predict in the shortest window.

    Raises:
        UserError: there is not.
    """
    for name in ("max_duration_in_seconds", "min_duration_in_seconds"):
        seconds = getattr(data_args, name)
        if model.count_targets(1, int(seconds * rate)) < 1:
            tenths = next((n for n in range(1, 10_000) if model.count_targets(1, n * rate // 10) > 0), None)
            enough = "even 1000 s are too short" if tenths is None else f"{tenths / 10:g} s are enough"
            objective = model.config.model_type
            raise UserError(
                f"{name}: in {seconds:g} s there is nothing for objective {objective} to predict; {enough}"
            )


def open_labeled(data_args, args, split: str):
    """The rows of one split with the column that the task needs."""
    kind = TASKS[args.task].label_kind
    columns = {"text": data_args.text_column_name, "spans": data_args.spans_column_name}
    return open_rows(
        data_args.dataset_name,
        split,
        dataset_config_name=data_args.dataset_config_name,
        audio_column=data_args.audio_column_name,
        streaming=data_args.streaming,
        indexed=not data_args.streaming,
        other_splits=tuple(filter(None, [data_args.eval_split_name, *data_args.test_split_name])),
        **{f"{kind}_column": columns.get(kind, data_args.label_column_name)},
    )


def survey_once(args, sources: list, plan, **options) -> Survey | None:
    return found_by_first(args.world_size, args.process_index, lambda: survey(sources, plan, **options))


def choose_max_steps(args, survey: Survey | None, batch_seconds: float) -> None:
    """max_steps as given, or num_train_epochs over what the headers say."""
    if args.max_steps > 0:
        return
    if survey is None:
        raise UserError("max_steps: a stream's length is not known beforehand, so say how many updates to train")
    per_update = batch_seconds * args.gradient_accumulation_steps * args.world_size
    args.max_steps = max(math.ceil(args.num_train_epochs * survey.seconds / per_update), 1)
    epochs = f"{args.num_train_epochs:g} epochs of {survey.seconds:.0f} s"
    say(f"updates: {args.max_steps} = {epochs} / {per_update:g} s an update")


def choose_workers(args, survey: Survey | None) -> None:
    """No more decoding workers than there are windows for them."""
    if survey is None or not survey.complete:
        return
    if survey.windows < args.world_size:
        raise UserError(
            f"dataset_name: {survey.windows} windows of audio for {args.world_size} processes; use fewer processes"
        )
    most = max(survey.windows // args.world_size, 1)
    if most < args.dataloader_num_workers:
        args.dataloader_num_workers = most if most > 1 else 0


def prepare_step(args, model) -> None:
    """What makes a pretraining step fast or small, as the options say."""
    if args.device.type == "cpu":
        keep_memory()
    if "recompute_convs" in model.options:
        model.recompute_convs = args.recompute_convs
    if args.compile_options is not None:
        model.compile_regions(**args.compile_options)
        on_cpu = "; on a CPU the later ones are no faster than without" if args.device.type == "cpu" else ""
        say(f"torch.compile: the first updates take minutes{on_cpu}")
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # a layer left out still has gradients: of zero


def keep_memory() -> None:
    """Make glibc keep the memory that tensors free, instead of giving it back and asking for zeroed pages anew.

    On a CPU the activations of a step are gigabytes that come and go; half of the time can go into page faults.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
            libc.mallopt(parameter, value)


def make_stream(sources, plan, collate, args, *, train: bool, **options) -> BatchStream:
    """This process's share of the sources: [(rows, weight)]."""
    return BatchStream(
        sources,
        plan,
        collate,
        train=train,
        **options,
        seed=args.seed,
        rank=args.process_index,
        world_size=args.world_size,
    )


def finish(trainer) -> None:
    """The model, its preprocessor and the history into output_dir, on one process.

    Raises:
        RunError: they can't be written.
    """
    trainer.speed()  # counts the audio heard since the last log
    problem = trainer.attempt(lambda: write_model(trainer))
    if problem is not None:
        raise RunError(
            f"output_dir: the model could not be written to {trainer.args.output_dir!r} ({problem}); all updates "
            "are in its newest checkpoint: make room, and --resume_from_checkpoint true writes what is missing"
        )


def write_model(trainer) -> None:
    trainer.save_model(_internal_call=True)
    trainer.save_state()
    if trainer.is_world_process_zero():
        Path(trainer.args.output_dir, "training_args.bin").unlink(missing_ok=True)  # a pickle, see the trainer


def end(trainer) -> None:
    """After all is written.

    Raises:
        RunError: the run stopped itself before its last update.
    """
    if trainer.pusher is not None:
        trainer.pusher.finish(trainer.args.output_dir)
    if trainer.guard.reason is not None:
        line = f"stopped at update {trainer.state.global_step}: {trainer.guard.reason}"
        leave_together(trainer.exchange, RunError(line))


def without_evaluation(args):
    args.eval_strategy = IntervalStrategy.NO
    return args


def limit_seconds(sources: list, plan, max_seconds: float):
    """The plan for so much of the sources, a part of every recording; as it is where they are streams.

    Raises:
        UserError: none of the recordings can be used.
    """
    if not all(isinstance(rows, IndexedRows) for rows, _ in sources):
        return plan
    windows, share = [], 1.0
    for rows, _ in sources:
        indices = np.arange(len(rows))
        if len(rows) > SAMPLE:
            indices = np.random.default_rng(0).choice(len(rows), SAMPLE, replace=False)
        share = min(share, len(indices) / len(rows))
        for index in indices:
            row = rows[int(index)]
            with contextlib.suppress(Skip):
                windows += [(window.hash, window.seconds) for window in plan(row, read_header(row["audio"]), None)]
    if not windows:
        description = ", ".join(rows.description for rows, _ in sources)
        raise UserError(f"eval_split_name: nothing in {description!r} can be used to evaluate")
    windows.sort()
    enough = np.searchsorted(np.cumsum([seconds for _, seconds in windows]), max_seconds * share)
    return plan if enough >= len(windows) else thin(plan, windows[enough][0])


def choose_best(args, task):
    """Keep the checkpoint that did best on the held-out part; evaluations and checkpoints must then coincide.

    Raises:
        UserError: metric_for_best_model is none of the task's.
    """
    args.eval_steps, args.eval_strategy = min(args.eval_steps, args.max_steps), IntervalStrategy.STEPS
    if args.given.get("load_best_model_at_end") is False:  # the last one is wanted
        args.load_best_model_at_end, args.metric_for_best_model = False, None
        return args
    wanted = str(args.given.get("metric_for_best_model") or task.best_metric).removeprefix("eval_")
    if wanted not in (*task.shown_metrics, task.best_metric, "loss"):
        raise UserError(f"metric_for_best_model: {wanted!r} is none of {', '.join((*task.shown_metrics, 'loss'))}")
    if args.given.get("save_steps", args.eval_steps) != args.eval_steps:
        say(f"save_steps: {args.eval_steps}, as eval_steps; the best checkpoint is one that was evaluated")
    args.load_best_model_at_end, args.metric_for_best_model = True, wanted
    args.greater_is_better = task.greater_is_better and wanted != "loss"
    args.save_steps, args.save_strategy = args.eval_steps, SaveStrategy.STEPS
    return args


def total_seconds(rows) -> float | None:
    """Seconds of audio by the headers; None for a stream."""
    if not isinstance(rows, IndexedRows):
        return None
    total = 0.0
    for index in range(len(rows)):
        with contextlib.suppress(Skip):
            total += read_header(rows[index]["audio"]).seconds
    return total


def held_out_lines(held_out: list, found: Survey | None) -> list[str]:
    """How much audio is not trained on; nothing of streams, and of more recordings than are looked at.

    A part is chosen by recordings: a long one among short ones can be most of the audio.
    """
    if found is None or not all(isinstance(rows, IndexedRows) and len(rows) <= SAMPLE for rows, _ in held_out):
        return []
    seconds, recordings = sum(total_seconds(rows) for rows, _ in held_out), sum(len(rows) for rows, _ in held_out)
    if not recordings:
        return []
    share = seconds / max(seconds + found.seconds, 1e-9)
    lines = [f"held out: {recordings} recordings, {seconds / 3600:.2f} h ({share:.0%} of the audio)"]
    if share > LARGE_SHARE:
        lines.append(
            f"warning: {share:.0%} of the audio is not trained on; cut long recordings into several files, name an "
            "eval_split_name, or lower validation_split_percentage"
        )
    return lines


def frame_counter(model, rate: int):
    """seconds of audio -> number of frames that the model makes of it."""
    return lambda seconds: int(model._get_feat_extract_output_lengths(int(seconds * rate)))
