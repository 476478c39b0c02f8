"""How much audio is in a batch and in an update: what fits in memory, and how often that is accumulated."""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.utils import gather_object

from acoustic.console import UserError, say

CPU_BATCH_SECONDS, GPU_BATCH_SECONDS = 20.0, 87.5

# A CPU computes no faster on more (measured with the base model: 3.0 audio-seconds per second at 20 s, 3.3 at 31 s and
# at 62 s), and a GPU on more than ten minutes neither.
MOST_ON_CPU, MOST_ON_GPU = 60.0, 600.0

# Of updates on a CPU: bytes for each weight beside the weights themselves (gradients, AdamW's two moments, temporary
# tensors), and for each byte that a forward pass keeps (temporary tensors, what the allocator can't use again). In all
# 2.5 and 4.9 GB for 1 and 4 windows of 8 s of the base model, where 2.5 and 4.1 were measured (2026-11-23).
BYTES_PER_WEIGHT, OVERHEAD = 16, 2.5
# Of the memory that is free; other batches have other shapes, and the system needs some too.
USED_ON_CPU, USED_ON_GPU = 0.7, 0.9


def choose_sizes(args, data_args, rate: int, model=None, step=None, checkpoint: str | None = None) -> float:
    """The audio in a micro-batch in seconds; sets `args.gradient_accumulation_steps` where `update_seconds` is given.

    Args:
        rate: in Hz.
        model, step: to try 'auto' with; None where that can't be.
        checkpoint: to resume from; its place in the audio holds for its own size only.
    """
    wanted, longest = data_args.batch_seconds, data_args.max_duration_in_seconds
    chosen, reason, free = wanted, "", wanted in (None, "auto")
    if wanted == "auto" and checkpoint is not None and not args.ignore_data_skip:
        place = json.loads(Path(checkpoint, "stream_0.json").read_text())["place"]
        chosen, reason, free = place["batch_seconds"], " (as in the checkpoint)", False
    elif wanted == "auto":
        chosen, reason = fitting(args, longest, rate, model, step)
    elif wanted is None:
        chosen = max(CPU_BATCH_SECONDS if args.device.type == "cpu" else GPU_BATCH_SECONDS, longest)
    if args.update_seconds is not None:
        share = args.update_seconds / args.world_size
        chosen = max(min(chosen, share), longest) if free else chosen
        args.gradient_accumulation_steps = accumulation(share, chosen)
        if free:  # equal parts of the update
            chosen = max(math.floor(1000 * share / args.gradient_accumulation_steps) / 1000, longest)
    update = chosen * args.gradient_accumulation_steps * args.world_size
    asked = "" if args.update_seconds is None else f", for update_seconds {args.update_seconds:g}"
    say(
        f"update: up to {update:g} s of audio = {chosen:g} s in a batch{reason} x {args.gradient_accumulation_steps} "
        f"accumulated x {args.world_size} processes on {args.device.type}{asked}"
    )
    return chosen


def accumulation(share: float, batch_seconds: float) -> int:
    """How many batches make a process's share of an update: so many that it is not smaller, but for a rounding."""
    return max(math.ceil(share / batch_seconds - 0.01), 1)


def fitting(args, longest: float, rate: int, model, step) -> tuple[float, str]:
    """(the most seconds that fit, by what), the same on all processes."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError("batch_seconds: 'auto' tries the whole model on a device; under FSDP, give a number")
    if model is None:
        raise UserError("batch_seconds: 'auto' is for pretraining; here, give the seconds of audio in a batch")
    on_cpu = args.device.type == "cpu"
    most = MOST_ON_CPU if on_cpu else MOST_ON_GPU
    if args.update_seconds is not None:
        most = min(most, args.update_seconds / args.world_size)
    most_rows = max(int(most / longest), 1)
    trial = Trial(args, model, step, longest, rate)
    rows, memory = trial.on_cpu(most_rows) if on_cpu else trial.on_gpu(most_rows)
    if args.world_size > 1:
        rows = min(gather_object([rows]))
    if rows < 1:
        raise UserError(
            f"batch_seconds: not one window of {longest:g} s fits in {memory}: lower --max_duration_in_seconds, or "
            "use --recompute_convs true and --gradient_checkpointing true"
        )
    if rows < most_rows:
        why = f"what fits in {memory}"
    else:
        why = f"{memory} would hold more" + ("" if args.update_seconds else ", which is no faster")
    return rows * longest, f" ({rows} windows of {longest:g} s: {why})"


class Trial:
    """Updates on noise, in windows of the greatest length, that leave nothing behind."""

    def __init__(self, args, model, step, longest: float, rate: int):
        self.args, self.model, self.step = args, model, step
        self.samples = round(longest * rate)

    def forward(self, rows: int) -> torch.Tensor:
        batch = {"input_values": torch.randn(rows, self.samples, device=self.args.device)}
        self.step.add_targets(batch, (0, 0, 0, 0))
        if "kept_layers" in batch:
            batch["kept_layers"] = (True,) * len(batch["kept_layers"])
        self.step.before_forward(self.model, 0)
        half = torch.bfloat16 if self.args.bf16 else torch.float16
        with torch.autocast(self.args.device.type, half, enabled=bool(self.args.bf16 or self.args.fp16)):
            return self.step.forward(self.model, batch).loss

    def without_a_trace(self, action: Callable):
        training = self.model.training
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        if self.args.gradient_checkpointing:  # as the Trainer will
            self.model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self.model.train()
            try:
                return action()
            finally:
                self.model.zero_grad()
                self.model.train(training)
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])

    def on_cpu(self, most: int) -> tuple[int, str]:
        """From what a forward pass keeps; a real trial could have the system kill the process."""
        one, two = self.without_a_trace(lambda: [self.bytes_kept(rows) for rows in (1, 2)])
        fixed = BYTES_PER_WEIGHT * sum(parameter.numel() for parameter in self.model.parameters())
        room = USED_ON_CPU * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - fixed
        rows = int((room / OVERHEAD - (2 * one - two)) / max(two - one, 1))
        return max(min(rows, most), 0), gigabytes(room + fixed)

    def bytes_kept(self, rows: int) -> int:
        """Of the tensors that the backward pass needs, weights aside."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.forward(rows)
        del loss
        return sum(size for pointer, size in kept.items() if pointer not in weights)

    def on_gpu(self, most: int) -> tuple[int, str]:
        """By forward and backward passes beside the room that gradients' buckets and AdamW's moments will take."""
        self.model.to(self.args.device)
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        taken = 8 * weights + (4 * weights if self.args.world_size > 1 else 0)
        total = torch.cuda.get_device_properties(self.args.device).total_memory
        taken += int((1 - USED_ON_GPU) * total)

        def fits(rows: int) -> bool:
            return fits_in_memory(lambda: self.with_ballast(taken, rows))

        rows = self.without_a_trace(lambda: largest_that_fits(fits, most))
        torch.cuda.empty_cache()
        return rows, gigabytes(total)

    def with_ballast(self, taken: int, rows: int) -> None:
        ballast = torch.empty(taken, dtype=torch.uint8, device=self.args.device)
        self.forward(rows).backward()
        del ballast


def fits_in_memory(action: Callable[[], None]) -> bool:
    try:
        action()
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    # After the error and its frames, which hold tensors, are gone.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fits


def largest_that_fits(fits: Callable[[int], bool], most: int) -> int:
    """The largest of 0 .. most for which `fits`, which is true up to some number and false beyond."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def free_memory() -> float:
    """Bytes that this machine has left, or the container or job that this process is in."""
    free = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    if (information := Path("/proc/meminfo")).is_file():  # what only keeps copies of files is free, too
        words = dict(line.split(":") for line in information.read_text().splitlines())
        free = [int(words["MemAvailable"].split()[0]) * 1024]
    return float(min(free + [left_in(group) for group in control_groups() if (group / "memory.max").is_file()]))


def control_groups() -> list[Path]:
    """This process's, and those that it is in (cgroups, version 2)."""
    place = Path("/proc/self/cgroup")
    names = re.findall(r"^0::/(.*)$", place.read_text(), re.MULTILINE) if place.is_file() else []
    return [folder for name in names for folder in (CGROUPS / name, *(CGROUPS / name).parents)]


def left_in(group: Path) -> float:
    most = (group / "memory.max").read_text().strip()
    if not most.isdigit():
        return math.inf
    files = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    return int(most) - int((group / "memory.current").read_text()) + (int(files[1]) if files else 0)


CGROUPS = Path("/sys/fs/cgroup")
