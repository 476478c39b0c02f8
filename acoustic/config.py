"""Every option of the two scripts: dataclasses on top of `TrainingArguments`; command line over YAML over defaults."""

import dataclasses
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.utils import is_torch_bf16_gpu_available

from acoustic.console import UserError, did_you_mean
from acoustic.models import OBJECTIVES
from acoustic.models.contrastive import NEGATIVES_FROM
from acoustic.tasks import TASKS
from acoustic.tasks.anomaly import FEATURES
from acoustic.tasks.anomaly_run import check_options
from acoustic.tasks.decoding import DecodingOptions
from acoustic.tasks.detectors import KINDS

# How the labels of a budget are used; see training/efficiency.py.
ADAPTATIONS = ("frozen", "fine_tuned")


def option(default, help: str, **kwargs):
    return field(default=default, metadata={"help": help.replace("%", "%%"), **kwargs})


def mapping(key: str, value: str | None) -> dict:
    """A JSON object given as a string (what a YAML mapping becomes on its way through the command line)."""
    try:
        result = json.loads(value) if value else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{key}: not a JSON object ({error.msg}): {value}") from None
    if not isinstance(result, dict):
        raise UserError(f"{key}: a mapping is needed, not {value}")
    return result


@dataclass
class ModelArguments:
    """Model"""

    model_name_or_path: str | None = option(
        None, "checkpoint to start from: a folder or a Hub id; pretraining without one starts from random weights"
    )
    model_revision: str | None = option(None, "branch, tag or commit of a Hub checkpoint")
    config_overrides: str | None = option(
        None,
        "values of the model's config to change: a mapping in YAML, a JSON object on the command line",
    )

    def __post_init__(self):
        self.config_overrides = mapping("config_overrides", self.config_overrides)


@dataclass
class DataArguments:
    """Audio"""

    dataset_name: str | None = option(
        None,
        "folder, glob, manifest (csv, tsv, jsonl, parquet), tar or parquet shards, a URL of these, or Hub id of the "
        "audio; in pretraining also a list of {name, weight, split, ...} to mix: YAML, or JSON on the command line",
    )
    dataset_config_name: str | None = option(None, "configuration of a Hub data set")
    train_split_name: str = option("train", "split to train on: a subfolder or manifest of the folder, or a Hub split")
    eval_split_name: str | None = option(
        None, "split to evaluate on while training; without one validation_split_percentage is held out"
    )
    audio_column_name: str = option("audio", "column that holds the audio, or its path in a manifest")
    streaming: bool = option(
        False, "read Hub data sets as a stream, without downloading them first (tar shards always are read in place)"
    )
    max_duration_in_seconds: float = option(15.6, "longest window, in seconds (15.6 s: the paper's 250,000 samples)")
    min_duration_in_seconds: float = option(1.0, "recordings shorter than this are skipped, in seconds")
    batch_seconds: str | None = option(
        None,
        "audio in one micro-batch on one device, in seconds, or 'auto' for what fits in memory (pretraining); default "
        "87.5 (the paper's) on a GPU, 20 on a CPU",
    )
    validation_split_percentage: float = option(
        5.0, "percent of the recordings that is held out, by a hash of their names, where no eval_split_name is given"
    )

    max_skipped_fraction: float = option(
        0.1, "end the run when more than this share of the recordings can't be read; single bad files are skipped"
    )

    def __post_init__(self):
        if not self.dataset_name:
            raise UserError("dataset_name: which audio? Give a folder, a glob, a manifest, a URL or a Hub id")
        self.mix = read_mix(self.dataset_name)
        if not 0 <= self.max_skipped_fraction <= 1:
            raise UserError("max_skipped_fraction: a share from 0 to 1")
        if self.min_duration_in_seconds < 0.1:
            raise UserError("min_duration_in_seconds: at least 0.1 s, or there is hardly a frame to predict")
        if self.max_duration_in_seconds < 2 * self.min_duration_in_seconds:
            raise UserError(
                f"max_duration_in_seconds ({self.max_duration_in_seconds:g}) must be at least twice "
                f"min_duration_in_seconds ({self.min_duration_in_seconds:g}): long recordings are cut without a rest"
            )
        if self.batch_seconds not in (None, "auto"):
            try:
                self.batch_seconds = float(self.batch_seconds)
            except ValueError:
                raise UserError(f"batch_seconds: seconds of audio, or 'auto', not {self.batch_seconds!r}") from None
        if isinstance(self.batch_seconds, float) and not self.batch_seconds >= self.max_duration_in_seconds:
            raise UserError(
                f"batch_seconds ({self.batch_seconds:g}) holds no window of max_duration_in_seconds "
                f"({self.max_duration_in_seconds:g}); raise the first or lower the second"
            )
        if not 0 <= self.validation_split_percentage < 100:
            raise UserError("validation_split_percentage: a percentage from 0 to below 100")


@dataclass
class Source:
    """One data set of a mix; what is None is as the option of that name says for all of them."""

    name: str
    weight: float = 1.0
    config: str | None = None
    split: str | None = None
    audio_column: str | None = None
    streaming: bool | None = None


def read_mix(dataset_name: str) -> list[Source]:
    """One name, or the JSON of a list of names and {name, weight, ...}: what a YAML list comes as."""
    if not re.match(r'\s*\[\s*(["{]|\]\s*$)', dataset_name):  # `[ab]*.wav` is a glob
        return [Source(dataset_name)]
    known = [f.name for f in dataclasses.fields(Source)]
    try:
        entries = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in json.loads(dataset_name)]
    except (json.JSONDecodeError, TypeError, ValueError) as error:
        raise UserError(f"dataset_name: a list of names or of {{name, weight, ...}} is needed ({error})") from None
    if not entries:
        raise UserError("dataset_name: an empty list")
    for entry in entries:
        for key in entry:
            check_known(key, set(known), "dataset_name")
        weight = entry.get("weight", 1)
        named = isinstance(entry.get("name"), str) and entry["name"]
        if not named or not isinstance(weight, (int, float)) or not weight > 0:
            raise UserError(f"dataset_name: each entry needs a name, and a weight above 0: {json.dumps(entry)}")
    return [Source(**entry) for entry in entries]


@dataclass
class UnlabeledDataArguments(DataArguments):
    """Audio"""

    probe_dataset_name: str | None = option(
        None,
        "a few labeled clips: while pretraining, a frozen probe on them is logged as probe_accuracy; a folder, a "
        "manifest or a Hub id",
    )
    probe_split_name: str = option("train", "split of the probe's clips")
    probe_label_column_name: str | None = option(
        None, "column of the probe's classes; without one, folder-per-class gives them"
    )
    probe_steps: int | None = option(None, "probe every so many updates; default: eval_steps")
    probe_labels_per_class: int = option(40, "at most so many of the probe's clips of each class")

    def __post_init__(self):
        super().__post_init__()
        if self.probe_steps is not None and self.probe_steps < 1:
            raise UserError("probe_steps: at least 1")
        if self.probe_labels_per_class < 2:
            raise UserError("probe_labels_per_class: at least 2, one to learn from and one to be asked")


@dataclass
class LabeledDataArguments(DataArguments):
    """Audio and labels"""

    test_split_name: list[str] = field(
        default_factory=list, metadata={"help": "splits to report at the end; they never choose a checkpoint"}
    )
    text_column_name: str = option("text", "column of the transcripts (ctc)")
    label_column_name: list[str] = field(
        default_factory=list,
        metadata={
            "help": "column of the classes (classification); without one, folder-per-class gives them. Several "
            "classes at once: a list or 'a|b' in the column, or several columns of 0 and 1, each a class"
        },
    )
    spans_column_name: str = option(
        "spans",
        "column of the spans, for each recording a list of {start, end, label} in seconds (segmentation); without "
        "one, Audacity label files or Raven selection tables beside the audio give them",
    )
    median_filter_seconds: float | None = option(
        None,
        "width of the median filter over a class's probabilities, in seconds, 0 for none (segmentation); default: "
        "what 95 % of the training spans and gaps are longer than, at most 1",
    )
    min_span_seconds: float = option(0.0, "predicted spans shorter than this are left out, in seconds (segmentation)")
    min_gap_seconds: float = option(
        0.0, "shorter gaps between two predicted spans of a class are closed, in seconds (segmentation)"
    )
    machine_column_name: str | None = option(
        None, "column of the machines' ids: what is normal is learned of each one by itself (anomaly)"
    )
    normal_label: str = option("normal", "the label of normal clips; any other is an anomaly (anomaly)")
    decoding: str = option(
        "greedy",
        "how the test splits' text is read off: the likeliest character of each frame, or a prefix beam search, which "
        "sums over alignments (ctc)",
        choices=("greedy", "beam"),
    )
    beam_width: int | None = option(None, "hypotheses that the beam search keeps; default: 100 (ctc)")
    language_model: str | None = option(
        None, "an n-gram for the beam search, an ARPA file (KenLM's lmplz writes one); only its words come out (ctc)"
    )
    lm_weight: float | None = option(
        None, "factor on the n-gram's log-probability (natural logarithm); default: 0.5 (ctc)"
    )
    length_bonus: float | None = option(
        None, "what each word adds to a hypothesis' log-probability; default: 1.5 with a language_model, else 0 (ctc)"
    )
    labels_per_class: int | None = option(
        None, "train on so many clips of each class only, drawn by the seed (classification)"
    )
    validation_split_percentage: float = option(
        0.0, "percent of the training recordings held out to choose a checkpoint"
    )
    max_duration_in_seconds: float = option(
        20.0,
        "longest window, in seconds: of a longer clip, classification trains on a part and pools over all parts when "
        "it is scored; a longer transcript's clip is skipped",
    )
    min_duration_in_seconds: float = option(0.1, "recordings shorter than this are skipped, in seconds")

    def __post_init__(self):
        super().__post_init__()
        names = tuple(self.label_column_name)
        self.label_column_name = names if len(names) > 1 else names[0] if names else None


# Of transformers' those that can be resumed from, or need no more room than a model.
HUB_STRATEGIES = ("every_save", "checkpoint", "end")


@dataclass
class RunArguments(TrainingArguments):
    """What both scripts change in transformers' `TrainingArguments`, and what they add."""

    # No options themselves: which names were on the command line, and the recipe.
    on_command_line, recipe = frozenset(), None

    overwrite_output_dir: bool = option(False, "write into an output_dir that already holds a run's checkpoints")
    adam_beta2: float = option(0.98, "Adam's second-moment decay rate")
    logging_steps: float = option(10, "log every so many updates")
    logging_first_step: bool = option(True, "log the first update too")
    line_seconds: float = option(
        60.0, "least time between two printed lines of training where no terminal shows them, in seconds; 0: each log"
    )
    logging_nan_inf_filter: bool = option(False, "hide non-finite losses from the log (costs a device sync per step)")
    eval_strategy: str = option("steps", "evaluate every eval_steps updates ('steps') or never ('no')")
    save_total_limit: int | None = option(2, "checkpoints to keep")
    update_seconds: float | None = option(
        None,
        "audio in an optimizer update over all processes, in seconds (paper: 5760); gradient accumulation follows",
    )
    save_minutes: float | None = option(
        None, "save a checkpoint whenever so many minutes have passed since the last, beside save_steps"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "'true': go on from the newest whole checkpoint in output_dir; 'auto': the same, or start anew where there is "
        "none yet; 'hub': from last-checkpoint/ of hub_model_id; or a checkpoint's folder",
    )
    max_nonfinite_updates: int = option(
        10, "updates in a row with gradients that are not finite, each of them left out, after which a run stops"
    )
    dataloader_num_workers: int = option(
        2, "processes that decode audio, per device; 0 decodes in the training process"
    )
    bf16: bool | None = option(None, "bfloat16 where it is safe; default: on a GPU that has it, else float32")
    remove_unused_columns: bool = option(False, "unused here: batches hold what the model takes")
    max_steps: int = option(-1, "optimizer updates; overrides num_train_epochs")
    hub_strategy: str = option(
        "every_save",
        "what push_to_hub pushes, beside the trained model: the model at every save, in the background; with "
        "'checkpoint' also last-checkpoint/, optimizer included, to go on from on another machine; 'end': nothing",
    )

    def __post_init__(self):
        self.given: dict = getattr(self, "given", {})
        if self.gradient_accumulation_steps < 1:
            raise UserError("gradient_accumulation_steps: at least 1")
        if self.seed < 0:
            raise UserError("seed: not below 0")
        if self.update_seconds is not None and not self.update_seconds > 0:
            raise UserError("update_seconds: above 0")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise UserError("save_minutes: above 0")
        self.check_hub()
        if self.max_nonfinite_updates < 1:
            raise UserError("max_nonfinite_updates: at least 1")
        if not self.output_dir:
            raise UserError("output_dir: where should the model go? Give a folder")
        # A tracker goes on with the run of that name, when the updates are done and when a run is resumed.
        self.run_name = self.run_name or Path(self.output_dir).resolve().name
        if self.project == "huggingface":
            self.project = "acoustic-recipes"
        if self.eval_strategy == "epoch" or self.save_strategy == "epoch":
            raise UserError(
                "eval_strategy and save_strategy: 'steps' or 'no'; the audio stream has no end of an epoch"
            )
        # Without this, processes that find no GPU would not find each other either: every one would train alone.
        if "WORLD_SIZE" in os.environ and not torch.cuda.is_available():
            self.use_cpu = True
        self.choose_precision()
        try:
            super().__post_init__()
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None

    def check_hub(self):
        if self.hub_strategy not in HUB_STRATEGIES:
            raise UserError(f"hub_strategy: {self.hub_strategy!r} is none of {', '.join(HUB_STRATEGIES)}")
        if self.hub_token is not None:
            raise UserError(
                "hub_token: others on this machine can read a command line; `hf auth login`, or HF_TOKEN in the "
                "environment"
            )
        if self.hub_revision is not None or self.hub_always_push:
            name = "hub_always_push" if self.hub_always_push else "hub_revision"
            raise UserError(f"{name}: not used here; every push is a commit on main, and the newest save is pushed")
        if str(self.resume_from_checkpoint).lower() == "hub" and not self.hub_model_id:
            raise UserError(
                "hub_model_id: resume_from_checkpoint 'hub' needs the repository that holds last-checkpoint/"
            )

    def choose_precision(self):
        if self.bf16 is None:
            by_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
            on_gpu = (
                torch.cuda.is_available()
                and not self.use_cpu
                and torch.cuda.is_bf16_supported(including_emulation=False)
            )
            self.bf16 = on_gpu and not self.fp16 and not by_launcher
        elif self.bf16 and not torch.cuda.is_available() and not is_torch_bf16_gpu_available():
            self.use_cpu = True  # transformers wants to be told so


OBJECTIVE = "wav2vec2"  # by default


@dataclass
class PretrainingArguments(RunArguments):
    """Pretraining"""

    objective: str = option(OBJECTIVE, "pretraining system", choices=tuple(OBJECTIVES))
    quantizer_name_or_path: str | None = option(
        None, "the vq_wav2vec checkpoint whose codes code_bert learns from: a folder or a Hub id"
    )
    mask_time_prob: float | None = option(
        None,
        "sum of the masked spans' lengths over frames, before overlaps; default: the paper's, in wav2vec2 0.65, which "
        "masks about 49 %, in code_bert 0.5, in mockingjay and audio_albert 0.15",
    )
    mask_time_length: int | None = option(
        None,
        "length of a masked span, in frames; default: the paper's, in wav2vec2 (of 20 ms each) and code_bert 10, "
        "in mockingjay and audio_albert 7 (of 10 ms)",
    )
    negatives_from: str = option(
        "masked",
        "negatives: other masked frames of the same window ('masked'), any frames of it ('utterance': more to draw "
        "from), or masked frames of all windows of the batch ('batch': for steady sounds, whose frames are all alike "
        "within a recording)",
        choices=NEGATIVES_FROM,
    )
    feature_grad_mult: float | None = option(
        None, "factor on the gradient into the convs; default: the paper's, 0.1 with group norm in them, 1 with layer"
    )
    feature_penalty_weight: float | None = option(
        None, "weight of the mean square of the convs' output in the loss; default: the paper's, 10 with group norm, 0"
    )
    recompute_convs: bool = option(
        False, "keep nothing of the convs for the backward pass: less memory, a third more time in them"
    )
    gumbel_temperature_start: float = option(2.0, "Gumbel softmax temperature at the first update")
    gumbel_temperature_floor: float = option(0.5, "Gumbel softmax temperature at the end of its decay")
    gumbel_temperature_decay: float = option(0.999995, "factor on the temperature per optimizer update")
    max_eval_seconds: float = option(600.0, "held-out audio used in an evaluation, in seconds")
    learning_rate: float = option(5e-4, "peak learning rate")
    warmup_steps: float = option(
        0.08, "updates of linear warmup; below 1, a share of all updates (paper: 32k of 400k)"
    )
    weight_decay: float = option(0.01, "AdamW's weight decay")
    adam_epsilon: float = option(1e-6, "Adam's epsilon")
    eval_steps: float | None = option(500, "evaluate every so many updates")
    on_collapse: str = option(
        "warn",
        "what the watch does where a run has collapsed (its codebook, its loss, its gradients): go on and say so, or "
        "save, report and stop",
        choices=("warn", "stop"),
    )
    torch_compile: bool = option(False, "torch.compile of the transformer's layers and of the loss")

    def __post_init__(self):
        self.take_over_compile()
        super().__post_init__()
        for name in ("feature_grad_mult", "feature_penalty_weight"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise UserError(f"{name}: not below 0")
        if self.mask_time_prob is not None and not 0 < self.mask_time_prob < 1:
            raise UserError("mask_time_prob: between 0 and 1; without masked frames there is nothing to predict")
        if self.mask_time_length is not None and self.mask_time_length < 1:
            raise UserError("mask_time_length: at least one frame")
        if self.gumbel_temperature_floor > self.gumbel_temperature_start:
            raise UserError("gumbel_temperature_floor: not above gumbel_temperature_start")

    def take_over_compile(self):
        """The model compiles its own regions (`compile_regions`); transformers would compile all of it as one."""
        options = {"backend": self.torch_compile_backend, "mode": self.torch_compile_mode}
        options = {name: value for name, value in options.items() if value is not None}
        self.compile_options = options if self.torch_compile or options else None
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None

    @property
    def objective_settings(self) -> dict:
        """What the model keeps in its config."""
        return {name: getattr(self, name) for name in OBJECTIVES[self.objective].config_options}


@dataclass
class FinetuningArguments(RunArguments):
    """Fine-tuning"""

    task: str = option("classification", "what the labels are", choices=(*TASKS, "anomaly"))
    freeze_feature_encoder: bool = option(
        True, "never train the front end: the convs over the waveform (mel frames have nothing to train)"
    )
    freeze_encoder_steps: int | None = option(
        None, "updates in which only the new head is trained; default by the amount of labels, see tasks/defaults.py"
    )
    random_weights: bool = option(
        False, "take the architecture of model_name_or_path with random weights, all of it trained: the control"
    )
    weighted_layer_sum: bool = option(
        False, "give the head a learned weighted sum over all layers (SUPERB), instead of the last one's output"
    )
    features: str = option(
        "encoder",
        "what is compared with normal: the encoder's embeddings, or log-mel bands, the floor (anomaly)",
        choices=FEATURES,
    )
    detector: str = option(
        "mahalanobis",
        "distance from normal: mahalanobis (with shrinkage), knn (mean distance to the nearest), lof (local density), "
        "or 'auto': the mean of the three (anomaly)",
        choices=("auto", *KINDS),
    )
    embedding_layer: str = option(
        "auto", "layer that is compared, 0 is the input of the first; 'auto': the mean over all of them (anomaly)"
    )
    label_budgets: list[str] = field(
        default_factory=list,
        metadata={
            "help": "compare starts on so many clips of each class (classification) or minutes of transcripts (ctc), "
            "and on 'all', instead of a single run"
        },
    )
    initializations: list[str] = field(
        default_factory=list,
        metadata={
            "help": "the starts that label_budgets compares, the one in question last: 'random' (model_name_or_path's "
            "architecture), 'log_mel' (no encoder at all), folders, Hub ids; default: random log_mel and "
            "model_name_or_path"
        },
    )
    num_draws: int = option(3, "draws of the clips of each of label_budgets, by the seed and those after it")
    adaptation: list[str] = field(
        default_factory=lambda: list(ADAPTATIONS),
        metadata={
            "help": "how label_budgets learns: a probe on the frozen encoder, fine-tuning, or both",
            "choices": ADAPTATIONS,
        },
    )
    # The few-label defaults of the wav2vec 2.0 paper's fine-tuning; tasks/defaults.py scales the rest by the labels.
    learning_rate: float = option(5e-5, "peak learning rate")
    lr_scheduler_type: str = option(
        "tri_stage", "'tri_stage' (10 % warmup, 40 % hold, 50 % exponential decay) or any of transformers'"
    )
    eval_steps: float | None = option(200, "evaluate every so many updates")
    save_steps: float = option(200, "save a checkpoint every so many updates")

    def __post_init__(self):
        if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise UserError(
                "fsdp is for pretraining; fine-tune under recipes/accelerate/multi_gpu.yaml, from a model of either"
            )
        # transformers only knows its own schedules by name; ours is made by the trainer.
        self.tri_stage = self.lr_scheduler_type == "tri_stage"
        if self.tri_stage:
            self.lr_scheduler_type = "constant"
        super().__post_init__()


PRETRAIN = (ModelArguments, UnlabeledDataArguments, PretrainingArguments)
FINETUNE = (ModelArguments, LabeledDataArguments, FinetuningArguments)

# Options of TrainingArguments that would do nothing here, and what to use instead.
REPLACED = {
    "per_device_train_batch_size": "batches are sized in seconds: use batch_seconds",
    "per_device_eval_batch_size": "batches are sized in seconds: use batch_seconds",
    "auto_find_batch_size": "batches are sized in seconds: use batch_seconds",
    "train_sampling_strategy": "batches are always bucketed by length",
    "label_smoothing_factor": "the losses here take none",
    "prediction_loss_only": "an evaluation always gives all of its metrics",
    "eval_accumulation_steps": "an evaluation keeps sums, not outputs",
    "length_column_name": "lengths come from the audio's headers",
    "data_seed": "the order of the audio follows seed",
    "dataloader_drop_last": "the stream has no last batch",
    "dataloader_persistent_workers": "the stream has no end, so its workers stay",
    "dataloader_prefetch_factor": "each worker keeps four batches ready",
    "save_only_model": "a checkpoint is to go on from; the model alone lies in output_dir at the end",
    "save_on_each_node": "output_dir is one folder that all machines see",
    "enable_jit_checkpoint": "SIGTERM always saves a checkpoint",
    "do_train": "the scripts always train",
    "do_eval": "an eval_split_name or a held-out part is always evaluated, unless eval_strategy is no",
    "do_predict": "name the splits to report with test_split_name",
}


class Parser(HfArgumentParser):
    """argparse over the dataclasses; its errors are `UserError`s, and the groups of --help are our own."""

    def error(self, message: str):
        raise UserError(message.replace("argument --", "option ").split("/--")[0] + tail(message))

    def _add_dataclass_arguments(self, dtype):
        before = len(self._actions)
        super()._add_dataclass_arguments(dtype)
        own = {name for cls in dtype.__mro__ if cls.__module__ == __name__ for name in cls.__annotations__}
        title = dtype.__doc__.splitlines()[0]
        ours, theirs = (
            self.add_argument_group(title),
            self.add_argument_group(f"{title}: transformers.TrainingArguments"),
        )
        for action in self._actions[before:]:
            if action.type is string_to_bool and action.nargs is None:
                action.nargs, action.const = "?", True  # --bf16 alone: transformers wants a value where None is one
            (ours if action.dest.removeprefix("no_") in own else theirs)._group_actions.append(action)
        self._optionals._group_actions = self._optionals._group_actions[:1]


def tail(message: str) -> str:
    """What argparse said after the option's many spellings."""
    return ": " + message.split(": ", 1)[1] if "/--" in message and ": " in message else ""


def parse(dataclasses_: tuple, argv: list[str] | None = None) -> tuple:
    """`[recipe.yaml] [--key value ...]` -> one instance of each dataclass.

    Raises:
        UserError: an unknown key (with the nearest known one), a value of the wrong type, an impossible combination.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(dataclasses_, allow_abbrev=False, usage="%(prog)s [recipe.yaml] [--key value ...]")
    known = {name[2:] for name in parser._option_string_actions if name.startswith("--")}
    tokens, recipe = [], None
    if argv and not argv[0].startswith("-"):
        objective = chosen_objective(argv) if PretrainingArguments in dataclasses_ else None
        recipe = argv.pop(0)
        tokens = read_recipe(recipe, known, objective)
    for token in argv:
        if token.startswith("--") and token not in ("--help",):
            check_known(token[2:].split("=")[0].replace("-", "_"), known, "command line")
    explicit = {token[2:].split("=")[0].replace("-", "_") for token in [*tokens, *argv] if token.startswith("--")}
    for key in sorted(explicit & set(REPLACED)):
        raise UserError(f"{key}: {REPLACED[key]}")
    namespace, rest = parser.parse_known_args(tokens + argv)
    if rest:
        raise UserError(f"{rest[0]!r} is no option; write --key value (a recipe.yaml comes first)")
    parsed = []
    for cls in dataclasses_:
        values = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls) if f.init}
        parsed.append(cls(**values))
    # As they were given, before transformers turns some into its own types; run.json keeps them.
    names = {key.removeprefix("no_") for key in explicit} & set(vars(namespace))
    parsed[-1].given = {name: getattr(namespace, name) for name in sorted(names)}
    parsed[-1].recipe = recipe
    parsed[-1].on_command_line = {token[2:].split("=")[0].replace("-", "_") for token in argv if token[:2] == "--"}
    if "config_overrides" in names:
        parsed[-1].given["config_overrides"] = parsed[0].config_overrides
    if {"update_seconds", "gradient_accumulation_steps"} <= explicit:
        raise UserError("update_seconds: chooses gradient_accumulation_steps; give one of the two")
    if getattr(parsed[-1], "tri_stage", False) and "warmup_steps" in explicit:
        raise UserError(
            "warmup_steps: tri_stage warms up for 10 % of the updates; choose lr_scheduler_type linear, say"
        )
    return tuple(parsed)


class RecipeLoader(yaml.SafeLoader):
    """Two rules of YAML 1.2: `no` is a word (`eval_strategy: no`), and 1e-5 is a number."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$", re.IGNORECASE), "tTfF")
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), "-+0123456789"
)


def check_known(key: str, known: set[str], where: str) -> None:
    if key not in known:
        longer = sorted((name for name in known if name.startswith(f"{key}_")), key=lambda name: (len(name), name))
        hint = f"; did you mean {longer[0]!r}?" if longer else did_you_mean(key, known)
        raise UserError(f"unknown option {key!r} ({where}){hint}")


def chosen_objective(argv: list[str]) -> str | None:
    """By the command line; None where it says nothing."""
    given = [token.split("=")[1] for token in argv if token.startswith("--objective=")]
    given += [value for token, value in zip(argv, argv[1:]) if token == "--objective"]
    return given[-1] if given else ""


def read_recipe(path: str, known: set[str], objective: str | None = None) -> list[str]:
    """A YAML recipe as command-line tokens, so that both go through the same checks and the later one wins.

    Args:
        objective: of the command line, "" where it says nothing; it chooses one section of the recipe's `objectives`,
            whose options come after the others. None where a recipe can have no such sections.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no recipe {path!r}")
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if recipe is not None and not isinstance(recipe, dict):
        raise UserError(f"{path}: a recipe is a mapping of options to values")
    recipe = recipe or {}
    if objective is not None and "objectives" in recipe:
        objective = objective or recipe.get("objective", OBJECTIVE)
        section = choose_section(recipe.pop("objectives"), objective, path)
        recipe = {**recipe, **section}
    tokens = []
    for key, value in recipe.items():
        check_known(str(key), known, path)
        if value is None:
            raise UserError(f"{key} has no value in {path}; leave the line out for the default")
        if isinstance(value, dict) or (isinstance(value, list) and key == "dataset_name"):
            tokens += [f"--{key}", json.dumps(value)]
        elif isinstance(value, list):
            tokens += [f"--{key}", *map(str, value)]
        else:
            tokens += [f"--{key}={value}"]
    return tokens


def choose_section(sections, objective: str, path: str) -> dict:
    """The options that a recipe has for one objective."""
    if not isinstance(sections, dict):
        raise UserError(f"{path}: objectives: a mapping of objectives to their options is needed")
    for name, section in sections.items():
        check_known(str(name), set(OBJECTIVES), f"objectives, {path}")
        if not isinstance(section, dict):
            raise UserError(f"{path}: objectives: {name} needs a mapping of options to values")
    if objective not in sections and objective in OBJECTIVES:
        raise UserError(f"{path} has no section for objective {objective}; it has {', '.join(sections)}")
    return sections.get(objective, {})


def parse_pretraining(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, UnlabeledDataArguments, PretrainingArguments]:
    model_args, data_args, training_args = parse(PRETRAIN, argv)
    check_objective(training_args, model_args)
    return model_args, data_args, training_args


def check_objective(args: PretrainingArguments, model_args: ModelArguments) -> None:
    """Options of other objectives: on the command line an error; a recipe may have them, for whom they concern.

    Raises:
        UserError: see above; or code_bert is asked for without what it needs.
    """
    model_class = OBJECTIVES[args.objective]
    owners = {name: [key for key, other in OBJECTIVES.items() if name in other.options] for name in args.given}
    foreign = {name: keys for name, keys in owners.items() if keys and args.objective not in keys}
    for name in sorted(foreign.keys() & args.on_command_line):
        having = f"{', '.join(foreign[name])} {'does' if len(foreign[name]) == 1 else 'do'}"
        raise UserError(f"{name}: objective {args.objective} has no such setting; {having}")
    args.left_out = sorted(foreign)
    if "quantizer_name_or_path" not in model_class.options:
        return
    if model_args.model_name_or_path is not None:  # it has its own
        if "quantizer_name_or_path" in args.on_command_line:
            raise UserError(
                f"quantizer_name_or_path: {model_args.model_name_or_path!r} goes on with the codes that it learned; "
                "leave this out, or start afresh without model_name_or_path"
            )
        args.quantizer_name_or_path = None
    elif args.quantizer_name_or_path is None:
        raise UserError(
            "quantizer_name_or_path: code_bert learns from the codes of a vq_wav2vec model; pretrain one with "
            "--objective vq_wav2vec and give its folder"
        )


def parse_finetuning(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, LabeledDataArguments, FinetuningArguments]:
    model_args, data_args, training_args = parse(FINETUNE, argv)
    if model_args.model_name_or_path is None and training_args.features != "log_mel":
        raise UserError("model_name_or_path: which pretrained model? Give a folder or a Hub id")
    check_options(training_args, data_args)
    if training_args.push_to_hub and (training_args.task == "anomaly" or training_args.label_budgets):
        raise UserError("push_to_hub: belongs to a training; `hf upload` takes what this leaves in output_dir")
    if len(data_args.mix) > 1:
        raise UserError("dataset_name: a mix of data sets is for pretraining; labels come from one")
    check_comparison(data_args, training_args)
    if data_args.labels_per_class is not None and data_args.labels_per_class < 1:
        raise UserError("labels_per_class: at least 1")
    for name in ("median_filter_seconds", "min_span_seconds", "min_gap_seconds"):
        if (getattr(data_args, name) or 0.0) < 0:
            raise UserError(f"{name}: not below 0")
    if training_args.task != "segmentation":
        only = {"spans_column_name", "median_filter_seconds", "min_span_seconds", "min_gap_seconds"}
        for name in sorted(only & set(training_args.given)):
            raise UserError(f"{name}: task {training_args.task} has no spans; --task segmentation has")
    if training_args.task == "ctc":
        DecodingOptions.of(data_args)
    for name in sorted(set(DecodingOptions.__dataclass_fields__) & set(training_args.given)):
        if training_args.task != "ctc":
            raise UserError(f"{name}: task {training_args.task} writes no text; --task ctc does")
        if training_args.label_budgets:
            raise UserError(f"{name}: label_budgets compares greedy decoding; leave it out")
    if data_args.labels_per_class is not None and training_args.task != "classification":
        raise UserError(f"labels_per_class: task {training_args.task} has no classes")
    return model_args, data_args, training_args


def check_comparison(data_args: LabeledDataArguments, args: FinetuningArguments) -> None:
    """
    Raises:
        UserError: what belongs to a comparison of starts, and what doesn't.
    """
    if not args.label_budgets:
        for name in sorted({"initializations", "num_draws", "adaptation"} & set(args.given)):
            raise UserError(f"{name}: belongs to label_budgets, which says how many labels to compare with")
        return
    if args.task not in ("classification", "ctc"):
        raise UserError(f"label_budgets: task {args.task} has neither classes to draw clips of, nor transcripts")
    if data_args.streaming:
        raise UserError("label_budgets: a stream can't be drawn from; leave out streaming")
    if args.random_weights:
        raise UserError("random_weights: label_budgets compares with random weights by itself; leave it out")
    if args.num_draws < 1:
        raise UserError("num_draws: at least 1")
    if not data_args.eval_split_name or not data_args.test_split_name:
        raise UserError(
            "label_budgets: learning rates are chosen on an eval_split_name, scores are of test_split_name; name both"
        )
