"""Batches and updates that go wrong: what is left out, counted and said, and when it is too much."""

from collections import deque

import torch

from acoustic.console import say

# Fragmentation can cost one batch; a size that doesn't fit comes back.
MAX_OUT_OF_MEMORY, WITHIN_UPDATES = 3, 100

# Updates after which the device is asked at the latest how many were left out.
MOST_UNSEEN = 50


class NonFiniteUpdates:
    """Leaves out updates whose gradients are not finite, without waiting for the device; log() reads how many.

    AdamW's fused kernels take a flag (`found_inf`, made for loss scaling) that leaves weights, moments and step counts
    as they are. Another optimizer gets no gradients, which takes a look at the device.
    """

    def __init__(self, device, limit: int):
        self.limit, self.told = limit, 0
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # in a row, the longest such row, in all

    def leave_out(self, norm, optimizer, parameters, scaled: bool, sharded: bool) -> None:
        """Before the optimizer's step.

        Args:
            norm: of all gradients, on all processes the same.
            scaled: float16's loss scaling leaves such updates out itself, and begins with some.
            sharded: parameters are DTensors, which the flag isn't made for.
        """
        bad = ~torch.isfinite(torch.as_tensor(norm, device=self.counts.device))
        self.counts[0] = (self.counts[0] + 1) * bad
        self.counts[1] = torch.maximum(self.counts[0], self.counts[1])
        self.counts[2] += bad
        if scaled:
            return
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if optimizer.defaults.get("fused") and not sharded:
            optimizer.found_inf = bad.float()
        elif bad:
            for parameter in parameters:
                parameter.grad = None

    def look(self, update: int, at_the_end: bool) -> str | None:
        """Why the run should stop; says what was left out since it last looked. It waits for a GPU: not every time."""
        on_device = self.counts.device.type != "cpu"
        if on_device and update % min(self.limit, MOST_UNSEEN) and not at_the_end:
            return None
        _, longest, total = self.counts.tolist()
        if longest >= self.limit:
            return (
                f"the gradients of {longest} updates in a row up to {update} were not finite, and these updates were "
                "left out: the weights are those from before. Lower --learning_rate, raise --warmup_steps, or use "
                "--bf16 or float32 in place of --fp16"
            )
        if total > self.told:
            say(
                f"warning: gradients were not finite, updates left out up to update {update}: {total - self.told} "
                f"({total} in all); {self.limit} in a row end the run"
            )
        self.told = total
        return None

    def total(self) -> int:
        return int(self.counts[2])

    def state_dict(self) -> list[int]:
        return self.counts.tolist()

    def load_state_dict(self, counts: list[int]) -> None:
        """The row that ended a run is not held against the one that goes on."""
        self.counts.copy_(torch.tensor([0, 0, counts[2]] if counts[1] >= self.limit else counts))
        self.told = counts[2]


class OutOfMemory:
    """Counts the batches that did not fit in memory. Each is left out; soon again, and the run stops."""

    def __init__(self, batch_seconds: float):
        self.batch_seconds, self.batch = batch_seconds, "on another process"
        self.new = 0
        self.updates: deque[int] = deque(maxlen=MAX_OUT_OF_MEMORY)

    def note(self, update: int, rows: int, seconds: float, before: int) -> None:
        """before: batches of the same update that this process had computed, and that are lost with it."""
        self.new, self.batch = self.new + 1, f"{rows} windows of {seconds:.1f} s"
        more = f", and the {before} before it in this update" if before else ""
        print(f"warning: out of memory at update {update}: a batch of {self.batch} is left out{more}", flush=True)

    def take_new(self) -> int:
        new, self.new = self.new, 0
        return new

    def count(self, update: int, batches: int) -> None:
        """batches: left out in this update, on all processes."""
        self.updates.extend([update] * batches)

    @property
    def too_often(self) -> bool:
        return len(self.updates) == MAX_OUT_OF_MEMORY and self.updates[-1] - self.updates[0] < WITHIN_UPDATES

    def advice(self) -> str:
        return (
            f"out of memory {MAX_OUT_OF_MEMORY} times within {WITHIN_UPDATES} updates (the last: {self.batch}); lower "
            f"--batch_seconds (now {self.batch_seconds:g}), which needs --ignore_data_skip true to go on, or trade "
            "time for memory with --recompute_convs true and --gradient_checkpointing true"
        )


# On a CPU, from other libraries on a GPU, and where an asynchronous error comes late.
SIGNS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)
