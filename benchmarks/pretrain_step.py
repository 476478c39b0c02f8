"""What a step of wav2vec 2.0 pretraining costs: ours beside stock transformers, on the same audio and weights.

    python benchmarks/pretrain_step.py [--size base] [--lengths voice_prompts fixed] [--precision bfloat16] ...
    python benchmarks/pretrain_step.py --curve 400      # do both learn alike? results/pretrain_curve.{json,png}
    python benchmarks/pretrain_step.py --profile        # the costliest operators of our step
    python benchmarks/pretrain_step.py --largest_batch  # what fits on a GPU

`stock` is transformers' model, fed the way its pretraining example feeds it: clips in random order, padded to the
longest, masks and negatives by numpy within the step. `ours` is this repository's model on its data stream's batches.
Each (case, side) runs in fresh processes that take turns with those of the other side. A table goes to stdout and each
case into the JSON file, in the place of an earlier one of the same settings.
"""

import argparse
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import soundfile
import torch
import transformers
import yaml
from torch._dynamo.utils import counters
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor
from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from acoustic.data.batches import BatchStream  # noqa: E402
from acoustic.data.collate import Rectangle  # noqa: E402
from acoustic.data.sources import open_rows  # noqa: E402
from acoustic.data.windows import cover  # noqa: E402
from acoustic.models.wav2vec2 import Wav2Vec2ForPreTraining  # noqa: E402
from acoustic.report.figures import ACCENT, FAINT, INK, STYLE  # noqa: E402
from acoustic.report.record import command_line, commit, hardware  # noqa: E402
from acoustic.training.setup import keep_memory  # noqa: E402

RATE, MIN_SECONDS, MAX_SECONDS = 16_000, 0.5, 15.6
RESULTS = ROOT / "benchmarks/results"
DURATIONS = ROOT / "benchmarks/voice_prompt_seconds.json"
SIDES = {"stock": transformers.Wav2Vec2ForPreTraining, "ours": Wav2Vec2ForPreTraining}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

NO_DROPOUT = {f"{name}_dropout": 0.0 for name in ("hidden", "activation", "attention", "feat_proj", "feat_quantizer")}
NO_DROPOUT["layerdrop"] = 0.0
BASE = {**NO_DROPOUT, "hidden_dropout": 0.1, "feat_proj_dropout": 0.1, "mask_time_prob": 0.65}
TINY = dict(BASE, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, conv_dim=[32] * 7)
TINY |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_codevectors_per_group": 16}
TINY |= {"codevector_dim": 32, "proj_codevector_dim": 32, "num_negatives": 10}
LARGE = dict(NO_DROPOUT, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
LARGE |= {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True, "mask_time_prob": 0.65}
LARGE |= {"codevector_dim": 768, "proj_codevector_dim": 768}
CONFIGS = {"tiny": TINY, "base": BASE, "large": LARGE}


class Case(NamedTuple):
    """What is measured; two with equal fields are the same row of the results."""

    size: str
    lengths: str
    precision: str
    compile: str
    attention_dropout: float
    batch_seconds: float
    device: str
    what: str = "step"  # or "largest batch"

    def config(self) -> Wav2Vec2Config:
        return Wav2Vec2Config(**{**CONFIGS[self.size], "attention_dropout": self.attention_dropout})


@dataclass
class Batch:
    """input_values (rows, samples) float32; attention_mask likewise or None; samples of each row that are audio."""

    input_values: torch.Tensor
    attention_mask: torch.Tensor | None
    lengths: list[int]

    @property
    def seconds(self) -> tuple[float, float]:
        """(audio, padding)"""
        audio = sum(self.lengths)
        return audio / RATE, (self.input_values.numel() - audio) / RATE


# --- Batches, made beforehand: the loader has a benchmark of its own ------------------------------------------------


def pad(clips: list[np.ndarray], config: Wav2Vec2Config) -> Batch:
    """Scaled and padded to the longest; an attention mask for layer norm only, as released checkpoints have it."""
    masked = config.feat_extract_norm == "layer"
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=masked)
    scaled = [extractor(clip, sampling_rate=RATE)["input_values"][0] for clip in clips]
    padded = extractor.pad({"input_values": scaled}, padding="longest", return_tensors="pt")
    return Batch(padded["input_values"], padded.get("attention_mask"), [len(clip) for clip in clips])


def fixed_batch(rows: int, config: Wav2Vec2Config, seed: int) -> Batch:
    """Rows of MAX_SECONDS of noise."""
    noise = np.random.default_rng(seed).standard_normal((rows, round(MAX_SECONDS * RATE)), np.float32)
    return pad(list(noise), config)


def write_clips(folder: Path, durations: list[float], seed: int) -> None:
    """Wav files of noise at RATE, of these seconds, named 0.wav and so on."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number, seconds in enumerate(durations):
        samples = 0.1 * generator.standard_normal(round(seconds * RATE), np.float32)
        soundfile.write(folder / f"{number}.wav", samples, RATE)


def our_stream(rows, batch_seconds: float, max_seconds: float, seed: int):
    """Batches of audio as run_pretrain.py streams them."""
    plan, collate = cover(MIN_SECONDS, max_seconds), Rectangle(Wav2Vec2FeatureExtractor(do_normalize=True))
    options = {"rate": RATE, "batch_seconds": batch_seconds, "train": True, "unlabeled": True, "seed": seed}
    stream = BatchStream([(rows, 1.0)], plan, collate, **options)
    return (batch for batch in stream.batches(0, 1) if "audio_seconds" in batch)


def our_epoch(folder: Path, case: Case, seed: int):
    batches = our_stream(open_rows(str(folder)), case.batch_seconds, MAX_SECONDS, seed)
    for batch in itertools.takewhile(lambda batch: batch["epoch"] <= 1 + 1e-9, batches):
        rows, samples = batch["input_values"].shape
        yield Batch(batch["input_values"], None, [samples] * rows)


def stock_epoch(folder: Path, durations: list[float], batch_audio_seconds: float, config: Wav2Vec2Config, seed: int):
    """Clips in random order, those too short left out and long ones cut; as many a batch as make the audio of ours."""
    usable = [number for number, seconds in enumerate(durations) if seconds >= MIN_SECONDS]
    mean = statistics.mean(min(durations[number], MAX_SECONDS) for number in usable)
    count = max(round(batch_audio_seconds / mean), 1)
    order = np.random.default_rng(seed).permutation(usable)
    for start in range(0, len(order) - count + 1, count):
        files = [folder / f"{number}.wav" for number in order[start : start + count]]
        yield pad([soundfile.read(file, round(MAX_SECONDS * RATE), dtype="float32")[0] for file in files], config)


def representative(seconds: list[tuple[float, float]], count: int, seed: int) -> list[int]:
    """Of 1,000 random choices of `count` batches the one nearest in its means to all; seconds: (audio, padding)."""
    generator, values = np.random.default_rng(seed), np.array(seconds)
    choices = [generator.choice(len(values), count, replace=count > len(values)) for _ in range(1000)]
    away = [np.abs(values[choice].mean(0) - values.mean(0)).sum() for choice in choices]
    return choices[int(np.argmin(away))].tolist()


def save_batches(epoch, folder: Path, steps: int, seed: int) -> dict[str, float]:
    """The representative batches of an epoch, which is a function and called twice; returns what the epoch is like."""
    folder.mkdir(parents=True)
    seconds = [batch.seconds for batch in epoch()]
    chosen = representative(seconds, steps, seed)
    for index, batch in enumerate(epoch()):
        masked = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
        for number in (number for number, wanted in enumerate(chosen) if wanted == index):
            np.savez(folder / f"{number}.npz", input_values=batch.input_values, lengths=batch.lengths, **masked)
    audio, padding = np.mean(seconds, axis=0).round(2).tolist()
    about = {"batches": len(seconds), "mean_audio_seconds": audio, "mean_padded_seconds": padding}
    return {**about, "largest_batch_seconds": round(max(map(sum, seconds)), 2)}


def prepare_batches(case: Case, args, work: Path) -> dict[str, dict]:
    """{side: what an epoch of its batches is like}; the batches lie in the folder work/SIDE."""
    config, clips = case.config(), work / "clips"
    if case.lengths == "fixed":
        batch = fixed_batch(round(case.batch_seconds / MAX_SECONDS), config, args.seed)
        epochs = {"stock": lambda: [batch], "ours": lambda: [Batch(batch.input_values, None, batch.lengths)]}
        return {side: save_batches(epochs[side], work / side, 1, args.seed) for side in SIDES}
    durations = json.loads(DURATIONS.read_text())
    write_clips(clips, durations, args.seed)
    ours = save_batches(partial(our_epoch, clips, case, args.seed), work / "ours", args.steps, args.seed)
    audio = ours["mean_audio_seconds"]
    epoch = partial(stock_epoch, clips, durations, audio, config, args.seed)
    return {"stock": save_batches(epoch, work / "stock", args.steps, args.seed), "ours": ours}


def load_batches(folder: Path, device: str) -> list[Batch]:
    """In page-locked memory where a GPU waits for them."""
    batches = []
    for file in sorted(folder.iterdir(), key=lambda file: int(file.stem)):
        arrays = np.load(file)
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays if name != "lengths"}
        if device == "cuda":
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        batches.append(Batch(tensors["input_values"], tensors.get("attention_mask"), arrays["lengths"].tolist()))
    return batches


# --- A step of either side ------------------------------------------------------------------------------------------


def draw_like_stock(model, batch: Batch) -> dict[str, torch.Tensor]:
    """mask_time_indices (rows, frames) bool and sampled_negative_indices (rows, frames, negatives), by transformers.

    From numpy's global generator. Where there is an attention mask, what it leaves out is never masked.
    """
    rows, samples = batch.input_values.shape
    frames, config = int(model._get_feat_extract_output_lengths(samples)), model.config
    real = batch.attention_mask
    if real is not None:
        real = model._get_feature_vector_attention_mask(frames, real)
    probability, length = config.mask_time_prob, config.mask_time_length
    mask = _compute_mask_indices((rows, frames), probability, length, attention_mask=real, min_masks=2)
    negatives = _sample_negative_indices((rows, frames), config.num_negatives, mask_time_indices=mask)
    indices = {"mask_time_indices": mask, "sampled_negative_indices": negatives}
    return {name: torch.from_numpy(value) for name, value in indices.items()}


def stock_loss(model, batch: Batch, device: str, seed: int) -> torch.Tensor:
    """Nats per masked frame; `seed` plays no part, numpy draws on."""
    inputs = {"input_values": batch.input_values, **draw_like_stock(model, batch)}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    masked = int(inputs["mask_time_indices"].sum())
    return model(**{name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}).loss / masked


def our_loss(model, batch: Batch, device: str, seed: int) -> torch.Tensor:
    outputs = model(batch.input_values.to(device, non_blocking=True), seed=seed)
    return outputs.loss / outputs.num_targets


def make_model(side: str, config: Wav2Vec2Config, device: str, seed: int):
    """Equal weights for both sides."""
    torch.manual_seed(seed)
    model = SIDES[side](config)
    torch.manual_seed(seed)
    for head in (model.project_hid, model.project_q):  # which a subclass draws at another point
        head.reset_parameters()
    return model.to(device).train()


class Trainer:
    """Weights, AdamW and its state on the device, made alike for both sides; call it with a batch for an update."""

    def __init__(self, case: Case, side: str, seed: int):
        np.random.seed(seed)
        self.case, self.loss, self.count = case, {"stock": stock_loss, "ours": our_loss}[side], 0
        self.plain = make_model(side, case.config(), case.device, seed)
        self.optimizer = torch.optim.AdamW(self.plain.parameters(), lr=5e-4, fused=True)
        for parameter in self.plain.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # makes its state, which belongs to what is there before a step
        self.optimizer.zero_grad()
        self.model = self.plain
        if case.compile == "on" and side == "stock":
            self.model = torch.compile(self.plain)
        elif case.compile == "on":
            self.plain.compile_regions()

    def __call__(self, batch: Batch) -> None:
        self.plain.set_gumbel_temperature(max(2 * 0.999995**self.count, 0.5))
        self.count += 1
        with torch.autocast(self.case.device, torch.bfloat16, enabled=self.case.precision == "bfloat16"):
            loss = self.loss(self.model, batch, self.case.device, self.count)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# --- Measuring, each in a process of its own ------------------------------------------------------------------------


def forward_flops(config: Wav2Vec2Config, samples: int) -> int:
    """Floating-point operations of the encoder's forward pass on one clip, a multiply-add as two.

    Convs: 2 * frames * in * out * kernel each. Projection: 2 * frames * conv width * hidden. Positional conv: 2 *
    frames * hidden * (hidden / groups) * kernel. Each layer: 8 * frames * hidden^2 (query, key, value, output) + 4 *
    frames * hidden * intermediate + 4 * frames^2 * hidden (scores, and their sum over values). Norms, activations and
    the head (quantizer and loss on masked frames, below 1 % in base size) are left out. A training step counts three
    times this.
    """
    flops, frames, channels = 0, samples, 1
    for width, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride):
        frames = (frames - kernel) // stride + 1
        flops += 2 * frames * channels * width * kernel
        channels = width
    hidden = config.hidden_size
    flops += 2 * frames * channels * hidden
    flops += 2 * frames * hidden * hidden // config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    layer = 8 * frames * hidden**2 + 4 * frames * hidden * config.intermediate_size + 4 * frames**2 * hidden
    return flops + config.num_hidden_layers * layer


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s, the best of a few square products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, repeats = math.inf, 20 if device == "cuda" else 1
    for _ in range(3):
        settle(device)
        start = time.perf_counter()
        for _ in range(repeats):
            a @ b
        settle(device)
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2 * size**3 / best


def memory(device: str) -> tuple[int, int]:
    """(now, the most so far) in bytes: what tensors take on a GPU, else resident pages of this process."""
    if device == "cuda":
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss, which begins with what the parent process had.
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))


def ready(case: Case, side: str, seed: int) -> Trainer:
    if case.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which torch allows in convolutions alone by itself
    elif side == "ours":
        keep_memory()
    return Trainer(case, side, seed)


def measure(case: Case, side: str, folder: Path, steps: int, seed: int) -> dict:
    """Seconds of each span (a step; on a GPU all of them, which nothing interrupts), and what was computed in it."""
    batches = load_batches(folder, case.device)
    batches = [batches[index % len(batches)] for index in range(steps)]
    trainer = ready(case, side, seed)
    before, _ = memory(case.device)
    settle(case.device)
    start = time.perf_counter()
    # All, where a new shape means new code or new memory.
    for batch in batches if case.compile == "on" or case.device == "cuda" else batches[:1]:
        trainer(batch)
    settle(case.device)
    warm_up_seconds = time.perf_counter() - start
    graphs = counters["stats"]["unique_graphs"]
    spans = timed(trainer, [batches] if case.device == "cuda" else [[batch] for batch in batches])
    found = {"spans": spans, "before_bytes": before, "peak_bytes": memory(case.device)[1]}
    found |= {"warm_up_seconds": warm_up_seconds, "graphs": graphs}
    found["late_graphs"] = counters["stats"]["unique_graphs"] - graphs
    del trainer
    found["matmul_flops"] = matmul_rate(case.device, DTYPES[case.precision], 256 if case.size == "tiny" else 4096)
    return found


def timed(trainer: Trainer, groups: list[list[Batch]]) -> list[dict]:
    spans, flops = [], partial(forward_flops, trainer.plain.config)
    for group in groups:
        settle(trainer.case.device)
        start = time.perf_counter()
        for batch in group:
            trainer(batch)
        settle(trainer.case.device)
        span = {"seconds": time.perf_counter() - start, "steps": len(group)}
        span["audio"], span["padded"] = map(sum, zip(*(batch.seconds for batch in group)))
        span["flops"] = 3 * sum(flops(length) for batch in group for length in batch.lengths)
        spans.append(span)
    return spans


def measure_largest(case: Case, side: str, steps: int, seed: int) -> dict:
    """The most rows of MAX_SECONDS that two updates fit with, within a tenth, and the speed there."""
    trainer = ready(case, side, seed)
    before, _ = memory(case.device)
    fits, fails, reason = 0, None, ""
    while fails is None or fails - fits > max(0.1 * fits, 1):
        rows = max(2 * fits, 1) if fails is None else (fits + fails) // 2
        if why := why_not(trainer, rows, seed):
            fails, reason = rows, why
        else:
            fits = rows
    if not fits:
        raise RuntimeError(f"not one row of {MAX_SECONDS} s fits: {reason}")
    torch.cuda.reset_peak_memory_stats()
    spans = timed(trainer, [[rectangle(fits, trainer, seed)] * steps])
    found = {"spans": spans, "before_bytes": before, "peak_bytes": memory(case.device)[1], "stopped_by": reason}
    found |= {"warm_up_seconds": 0.0, "graphs": 0, "late_graphs": 0, "largest_batch_seconds": fits * MAX_SECONDS}
    del trainer
    return {**found, "matmul_flops": matmul_rate(case.device, DTYPES[case.precision], 4096)}


def rectangle(rows: int, trainer: Trainer, seed: int) -> Batch:
    """One row of noise so many times; an attention mask for stock where its feature extractor would give one."""
    one = fixed_batch(1, trainer.plain.config, seed)
    mask = (
        one.attention_mask.repeat(rows, 1) if trainer.loss is stock_loss and one.attention_mask is not None else None
    )
    return Batch(one.input_values.repeat(rows, 1), mask, one.lengths * rows)


def why_not(trainer: Trainer, rows: int, seed: int) -> str:
    """Empty where a batch fits, else what was said."""
    try:
        batch = rectangle(rows, trainer, seed)
        for _ in range(2):
            trainer(batch)
        settle(trainer.case.device)
        return ""
    except RuntimeError as error:  # out of memory, or more than a kernel can index
        reason = str(error).splitlines()[0][:120]
    trainer.optimizer.zero_grad()
    torch.cuda.empty_cache()
    return reason


def quiet() -> None:
    """Of what stock's graphs are broken by, torch says a page."""
    torch._logging.set_logs(all=logging.ERROR)
    warnings.simplefilter("ignore")


def fresh(function, *arguments):
    """function(*arguments) in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), quiet) as pool:
        return pool.submit(function, *arguments).result()


def profile(case: Case, folder: Path, seed: int) -> str:
    """The 25 costliest operators of our second step."""
    batch, trainer = load_batches(folder, case.device)[0], ready(case, "ours", seed)
    trainer(batch)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if case.device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        trainer(batch)
        settle(case.device)
    return profiler.key_averages().table(sort_by=f"self_{case.device}_time_total", row_limit=25)


# --- Numbers --------------------------------------------------------------------------------------------------------


def summarise(found: list[dict]) -> dict:
    """Of a side's processes: the median over them of each span's seconds, added up; the most memory of any of them."""
    spans = found[0]["spans"]
    total = {name: sum(span[name] for span in spans) for name in ("steps", "audio", "padded", "flops")}
    seconds = sum(
        statistics.median(span["seconds"] for span in same) for same in zip(*(one["spans"] for one in found))
    )
    spent = [sum(span["seconds"] for span in one["spans"]) for one in found]
    peak, before = (max(one[name] for one in found) for name in ("peak_bytes", "before_bytes"))
    numbers = {
        "seconds_per_step": seconds / total["steps"],
        "audio_seconds_per_second": total["audio"] / seconds,
        "audio_seconds_per_step": total["audio"] / total["steps"],
        "padded_seconds_per_step": total["padded"] / total["steps"],
        "peak_gb": peak / 1e9,
        "before_gb": before / 1e9,
        "step_gb": (peak - before) / 1e9,
        "flop_utilisation": statistics.median(
            total["flops"] / s / one["matmul_flops"] for s, one in zip(spent, found)
        ),
        "matmul_tflops": statistics.median(one["matmul_flops"] for one in found) / 1e12,
        "warm_up_seconds": statistics.median(one["warm_up_seconds"] for one in found),
        "graphs": found[0]["graphs"],
        "late_graphs": found[0]["late_graphs"],
    }
    extra = {name: found[0][name] for name in ("largest_batch_seconds", "stopped_by") if name in found[0]}
    extra["span_seconds"] = [[round(span["seconds"], 4) for span in one["spans"]] for one in found]
    return {name: round(value, 4) for name, value in numbers.items()} | extra


def ratios(stock: dict, ours: dict) -> dict[str, float]:
    """Ours over stock; nothing where one of them failed."""
    names = ("audio_seconds_per_second", "peak_gb", "step_gb", "largest_batch_seconds")
    return {name: round(ours[name] / stock[name], 3) for name in names if stock.get(name) and ours.get(name)}


# header, name in the results, format
COLUMNS = (
    ("s/step", "seconds_per_step", ".3f"),
    ("audio s/s", "audio_seconds_per_second", ",.1f"),
    ("audio s", "audio_seconds_per_step", ".1f"),
    ("padding s", "padded_seconds_per_step", ".1f"),
    ("peak GB", "peak_gb", ".2f"),
    ("before GB", "before_gb", ".2f"),
    ("% of matmul", "flop_utilisation", ".1%"),
    ("warm-up s", "warm_up_seconds", ".1f"),
    ("graphs", "graphs", "d"),
    ("late", "late_graphs", "d"),
)


RATIO_NAMES = {
    "audio_seconds_per_second": "audio-seconds per second",
    "peak_gb": "peak memory",
    "step_gb": "memory above weights and optimizer",
    "largest_batch_seconds": "largest batch",
}


def table(entries: list[dict]) -> str:
    """A line for each case and side, then ours / stock."""
    lines, below = [("case", "side", *(header for header, _, _ in COLUMNS))], []
    for entry in entries:
        name = named(Case(**entry["case"]))
        for side in SIDES:
            numbers = entry[side]
            cells = (format(numbers[key], form) if key in numbers else "-" for _, key, form in COLUMNS)
            lines.append((name, side, *cells))
            below += [f"{name}: {side} failed: {numbers['failed']}"] if "failed" in numbers else []
        words = ", ".join(f"{RATIO_NAMES[key]} {value:.2f}" for key, value in entry["ratios"].items())
        below += [f"{name}: ours / stock: {words}"] if words else []
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[cell.rjust(width) for cell, width in zip(line, widths)] for line in lines]
    for words, line in zip(aligned, lines):
        words[:2] = [cell.ljust(width) for cell, width in zip(line[:2], widths)]
    return "\n".join(["  ".join(line) for line in aligned] + below)


def named(case: Case) -> str:
    words = [case.size, case.lengths, case.precision, "compiled" if case.compile == "on" else ""]
    words += [f"dropout {case.attention_dropout:g}", f"{case.batch_seconds:g} s" if case.what == "step" else case.what]
    return " ".join(filter(None, words))


def about(args) -> dict:
    """What a number has to travel with."""
    return {
        "command": f"python benchmarks/{command_line()}",
        "commit": commit(),
        "date": date.today().isoformat(),
        "seed": args.seed,
        "steps": args.steps,
        "repeats": args.repeats,
        "hardware": {**hardware(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
    }


def write_case(output: Path, entry: dict) -> None:
    """In the place of an earlier one of the same case; the others stay."""
    output.parent.mkdir(parents=True, exist_ok=True)
    entries = json.loads(output.read_text())["cases"] if output.exists() else []
    entries = [old for old in entries if old["case"] != entry["case"]] + [entry]
    output.write_text(json.dumps({"cases": entries}, indent=2) + "\n")


# --- Runs -----------------------------------------------------------------------------------------------------------


def run_case(case: Case, args, work: Path) -> dict:
    """Processes of the two sides in turns; one that fails is not tried again."""
    epochs = prepare_batches(case, args, work) if case.what == "step" else {}
    found, failed = {side: [] for side in SIDES}, {}
    for number, side in itertools.product(range(args.repeats), SIDES):
        if side in failed:
            continue
        start = time.perf_counter()
        try:
            if case.what == "step":
                found[side].append(fresh(measure, case, side, work / side, args.steps, args.seed))
            else:
                found[side].append(fresh(measure_largest, case, side, args.steps, args.seed))
        except (RuntimeError, BrokenProcessPool) as error:  # the latter where the system ended it for its memory
            failed[side] = {"failed": str(error).splitlines()[0][:200]}
        seconds = time.perf_counter() - start
        print(f"{named(case)}: {side}, {number + 1} of {args.repeats}: {seconds:.0f} s", file=sys.stderr, flush=True)
    numbers = {side: failed.get(side) or summarise(found[side]) for side in SIDES}
    for side, epoch in epochs.items():
        numbers[side]["epoch"] = epoch
    return {"case": case._asdict(), **numbers, "ratios": ratios(**numbers), "about": about(args)}


def default_seconds(lengths: str, device: str) -> float:
    if device == "cuda":
        return 87.5
    # Stock at 31.2 s of voice prompts, padded and with dropout in its attention, takes more than 24 GB.
    return 20.0 if lengths == "voice_prompts" else 31.2


def cases(args) -> list[Case]:
    """Every combination; by itself dropout within attention as base has it, and none where each clip is long."""
    found, what = [], "largest batch" if args.largest_batch else "step"
    lengths_of = ["fixed"] if args.largest_batch else args.lengths
    for lengths, precision, compiled in itertools.product(lengths_of, args.precision, args.compile):
        dropout = args.attention_dropout
        if dropout is None:
            dropout = 0.1 if lengths == "voice_prompts" and args.size != "large" else 0.0
        seconds = args.batch_seconds or default_seconds(lengths, args.device)
        if lengths == "fixed":
            seconds = 0.0 if args.largest_batch else round(max(round(seconds / MAX_SECONDS), 1) * MAX_SECONDS, 1)
        found.append(Case(args.size, lengths, precision, compiled, dropout, seconds, args.device, what))
    return found


# --- Do both learn alike? -------------------------------------------------------------------------------------------


def curve_audio(work: Path) -> tuple[str, str]:
    """(folder, split): the voice prompts where they are, else the demo's sounds, made if need be."""
    if (ROOT / "data/voice_prompts/unlabeled.csv").exists():
        return str(ROOT / "data/voice_prompts"), "unlabeled"
    folder = ROOT / "data/demo"
    if not (folder / "unlabeled").is_dir():
        folder = work / "demo"
        command = [sys.executable, ROOT / "recipes/demo/synthesize.py", "--output_dir", folder, "--hours", "0.3"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return str(folder), "unlabeled"


def train_curve(side: str, audio: tuple[str, str], noise: int, args) -> list[float]:
    """Contrastive loss per masked frame (nats) of each update; `noise` seeds dropout and Gumbel noise alone."""
    recipe = yaml.safe_load((ROOT / "recipes/voice_prompts/pretrain.yaml").read_text())
    changed = {**recipe["config_overrides"], **NO_DROPOUT, "hidden_dropout": 0.1, "mask_time_prob": 0.65}
    model, losses = make_model(side, Wav2Vec2Config(**changed), args.device, args.seed), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    warm = max(args.curve // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min((update + 1) / warm, 1))
    torch.manual_seed(noise)
    stream = our_stream(open_rows(*audio), args.batch_seconds or 31.2, 8.0, args.seed)
    for update, made in enumerate(itertools.islice(stream, args.curve)):
        np.random.seed([args.seed, update])
        inputs = {"input_values": made["input_values"]}
        inputs |= draw_like_stock(model, Batch(made["input_values"], None, []))
        model.set_gumbel_temperature(max(2 * 0.999**update, 0.5))
        outputs = model(**{name: tensor.to(args.device) for name, tensor in inputs.items()})
        masked = int(inputs["mask_time_indices"].sum())
        (outputs.loss / masked).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(outputs.contrastive_loss.item() / masked)
    return losses


def curve(args, work: Path, results: Path) -> dict:
    """The same audio, weights, masks and negatives for both; a second stock run shows what other noise alone does."""
    audio, curves = curve_audio(work), {}
    for name, side, noise in (("stock", "stock", 1), ("ours", "ours", 2), ("stock, other noise", "stock", 3)):
        print(f"curve: {name}, {args.curve} updates", file=sys.stderr, flush=True)
        curves[name] = fresh(train_curve, side, audio, args.seed + noise, args)
    last = {name: np.array(losses[args.curve // 2 :]) for name, losses in curves.items()}
    away = {"ours - stock": last["ours"] - last["stock"], "stock - stock": last["stock, other noise"] - last["stock"]}
    content = {
        "mean_absolute_difference": {name: round(float(np.abs(values).mean()), 5) for name, values in away.items()},
        "mean_difference": {name: round(float(values.mean()), 5) for name, values in away.items()},
        "unit": "nats per masked frame",
        "audio": Path(audio[0]).name,
        "about": about(args),
        "curves": {name: [round(loss, 5) for loss in losses] for name, losses in curves.items()},
    }
    results.mkdir(parents=True, exist_ok=True)
    (results / "pretrain_curve.json").write_text(json.dumps(content) + "\n")
    draw_curve(curves, results / "pretrain_curve.png")
    return content


def show_curve(content: dict) -> None:
    print(f"last half, {content['unit']}:")
    for name, value in content["mean_absolute_difference"].items():
        print(f"  {name}: {value:.4f} apart, {content['mean_difference'][name]:+.4f} on average")


def draw_curve(curves: dict[str, list[float]], file: Path) -> None:
    """Running means, so that the batches' own ups and downs don't hide the rest."""
    width = max(len(curves["ours"]) // 50, 1)
    styles = {"stock": (INK, "-"), "ours": (ACCENT, "-"), "stock, other noise": (FAINT, "--")}
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
        for name, (color, line) in styles.items():
            smooth = np.convolve(curves[name], np.ones(width) / width, "valid")
            axis.plot(np.arange(width, len(smooth) + width), smooth, line, color=color, label=name, linewidth=1.4)
        axis.set(xlabel="updates", ylabel="contrastive loss\n(nats per masked frame)")
        axis.set_title(f"same audio, weights, masks and negatives; means over {width} updates")
        axis.legend()
        figure.savefig(file, facecolor="white")
        plt.close(figure)


# --- The command ----------------------------------------------------------------------------------------------------


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def within(kind, low: float, high: float, text: str):
    value = kind(text)
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
    return value


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count, share, seconds = (
        partial(within, int, 1, 1e6),
        partial(within, float, 0, 0.99),
        partial(within, float, 8, 1e6),
    )
    count.__name__, share.__name__, seconds.__name__ = "whole number", "number", "number"  # for argparse's messages
    add = parser.add_argument
    add("--size", choices=CONFIGS, default="base")
    add("--lengths", nargs="+", choices=("voice_prompts", "fixed"), default=["voice_prompts", "fixed"])
    add("--precision", nargs="+", choices=DTYPES, default=["float32"])
    add("--compile", nargs="+", choices=("off", "on"), default=["off"])
    add("--attention_dropout", type=share, help="default: 0.1 for voice_prompts except in size large, else 0")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--batch_seconds",
        type=seconds,
        help="audio in a batch (87.5 on a GPU; on a CPU 20, what run_pretrain.py takes there, and fixed 31.2); "
        "fixed: nearest n x 15.6",
    )
    add("--steps", type=count, help="timed in each process (4 on a CPU, 20 on a GPU)")
    add("--repeats", type=count, default=2, help="processes of each side, in turns")
    add("--seed", type=int, default=0)
    add("--output", type=Path, help="default: benchmarks/results/pretrain_step_{cpu,cuda}.json; others go beside it")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--largest_batch", action="store_true", help="what fits on a GPU, and the speed there")
    mode.add_argument("--curve", type=count, metavar="N", help="train a small model N updates with both sides")
    mode.add_argument("--profile", action="store_true", help="the costliest operators of our step, first case")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if args.largest_batch and args.device != "cuda":
        parser.error("--largest_batch: only on a GPU, where running out of memory is no harm")
    args.steps = args.steps or (4 if args.device == "cpu" else 20)
    args.output = args.output or RESULTS / f"pretrain_step_{args.device}.json"
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    args, entries = parse(argv), []
    wanted = cases(args)
    with tempfile.TemporaryDirectory() as work:
        if args.curve:
            show_curve(curve(args, Path(work), args.output.parent))
        elif args.profile:
            prepare_batches(wanted[0], args, Path(work))
            print(fresh(profile, wanted[0], Path(work, "ours"), args.seed))
        else:
            for number, case in enumerate(wanted):
                entries.append(run_case(case, args, Path(work, str(number))))
                write_case(args.output, entries[-1])
            print(table(entries))
    return entries


if __name__ == "__main__":
    main()
