"""What the processes of a run tell each other on their hosts, without waiting for a device."""

from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate.utils import broadcast_object_list
from torch import distributed

from acoustic.console import LOST_PROCESS, Interrupted, RunError, UserError, is_main_process, tell


class Exchange:
    """Sums of a few numbers over all processes; with one process, the numbers themselves."""

    def __init__(self, world_size: int, patience: float = 1800):
        """patience: seconds to wait for the others (`ddp_timeout`)."""
        self.group = None
        if world_size > 1:
            # Not NCCL, which only knows tensors on the device, behind everything that is still to be computed there.
            self.group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=patience))

    def totals(self, *numbers: float) -> list[float]:
        """
        Raises:
            RunError: another process is gone.
        """
        if self.group is None:
            return list(map(float, numbers))
        values = torch.tensor(numbers, dtype=torch.float64)
        try:
            distributed.all_reduce(values, group=self.group)
        except RuntimeError as error:
            raise RunError(f"{LOST_PROCESS} ({str(error).splitlines()[0]})") from None
        return values.tolist()


def leave_together(exchange: Exchange, error: RunError | Interrupted) -> None:
    """Raise what all processes agree on, after the first has written all of its report and said why.

    A launcher ends the others as soon as one is gone.
    """
    exchange.totals(0)
    if is_main_process():
        tell(error)
    error.told = True
    exchange.totals(0)
    raise error


def found_by_first(world_size: int, process_index: int, find: Callable):
    """What `find()` returns on the first process, for all: what only one of them sees must not make them disagree.

    Raises:
        UserError: on all processes, where it was raised on the first.
    """
    if world_size == 1:
        return find()
    told: list = [None, None]
    if process_index == 0:
        try:
            told[0] = find()
        except UserError as error:
            told[1] = error
    found, mistake = broadcast_object_list(told)
    if mistake is not None:
        raise mistake
    return found
