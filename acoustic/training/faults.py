"""Batches and updates that go wrong: what is left out, counted and said, and when it is too much."""

from collections import deque

import torch

from acoustic.console import say

# Fragmentation can cost one batch; a size that doesn't fit comes back.
MAX_OUT_OF_MEMORY, WITHIN_UPDATES = 3, 100


class NonFiniteUpdates:
    """Leaves out updates whose gradients are not finite, without waiting for the device; log() reads how many.

    AdamW's fused kernels take a flag (`found_inf`, made for loss scaling) that leaves weights, moments and step counts
    as they are. Another optimizer gets no gradients, which takes a look at the device.
    """

    def __init__(self, device, limit: int):
        self.limit, self.told = limit, 0
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)  # in a row, in all

    def leave_out(self, norm, optimizer, parameters, scaled: bool, sharded: bool) -> None:
        """Before the optimizer's step.

        Args:
            norm: of all gradients, on all processes the same.
            scaled: float16's loss scaling leaves such updates out itself, and begins with some.
            sharded: parameters are DTensors, which the flag isn't made for.
        """
        bad = ~torch.isfinite(torch.as_tensor(norm, device=self.counts.device))
        self.counts[0] = (self.counts[0] + 1) * bad
        self.counts[1] += bad
        if scaled:
            return
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if optimizer.defaults.get("fused") and not sharded:
            optimizer.found_inf = bad.float()
        elif bad:
            for parameter in parameters:
                parameter.grad = None

    def judge(self, update: int) -> tuple[int, str | None]:
        """(how many so far, why the run should stop); says what was left out since the last time."""
        in_a_row, total = self.counts.tolist()
        if in_a_row >= self.limit:
            return total, (
                f"the gradients of the last {in_a_row} updates up to {update} were not finite, and these updates were "
                "left out: the weights are those from before. Lower --learning_rate, raise --warmup_steps, or use "
                "--bf16 or float32 in place of --fp16"
            )
        if total > self.told:
            say(
                f"warning: {total - self.told} updates up to {update} left out, their gradients were not finite "
                f"({total} in all); {self.limit} in a row end the run"
            )
        self.told = total
        return total, None

    def state_dict(self) -> list[int]:
        return self.counts.tolist()

    def load_state_dict(self, counts: list[int]) -> None:
        self.counts.copy_(torch.tensor(counts))
        self.told = counts[1]


class OutOfMemory:
    """Counts the batches that did not fit in memory. Each is left out; soon again, and the run stops."""

    def __init__(self, batch_seconds: float):
        self.batch_seconds = batch_seconds
        self.updates: deque[int] = deque(maxlen=MAX_OUT_OF_MEMORY)
        self.total = 0

    def note(self, update: int, rows: int, seconds: float) -> None:
        self.total += 1
        self.updates.append(update)
        self.batch = f"{rows} windows of {seconds:.1f} s"
        print(f"warning: out of memory at update {update}: a batch of {self.batch} is left out", flush=True)

    @property
    def too_often(self) -> bool:
        return len(self.updates) == MAX_OUT_OF_MEMORY and self.updates[-1] - self.updates[0] < WITHIN_UPDATES

    def advice(self) -> str:
        batch = f" (the last had {self.batch})" if self.total else " (on another process)"
        return (
            f"out of memory {MAX_OUT_OF_MEMORY} times within {WITHIN_UPDATES} updates{batch}; lower --batch_seconds "
            f"(now {self.batch_seconds:g}), or trade time for memory with --recompute_convs true and "
            "--gradient_checkpointing true"
        )


IN_BACKWARD = (
    "out of memory where other processes wait for what this one computes; lower --batch_seconds, and continue with "
    "--resume_from_checkpoint true --ignore_data_skip true"
)


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
