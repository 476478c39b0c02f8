"""Runs under FSDP2 and the same under DDP, on two CPU processes; each writes what it saw to FOLDER/{run}_{rank}.pt.

accelerate launch --config_file recipes/accelerate/fsdp.yaml --num_processes 2 tests/integration/sharded.py FOLDER
"""

import contextlib
import itertools
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import two_processes
from blank_figures import render
from two_processes import RANK, Given, train_on

import run_pretrain
from acoustic.config import PretrainingArguments
from acoustic.training.trainer import AcousticTrainer


@contextlib.contextmanager
def fsdp_on_cpu():
    """accelerate shards only what lies on accelerators, and on a CPU runs DDP without a word. torch shards both."""
    begin = AcceleratorState.__init__

    def begin_as_on_gpus(state, mixed_precision=None, cpu=False, **kwargs):
        if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(state, mixed_precision, cpu, **kwargs)

    with mock.patch.object(AcceleratorState, "__init__", begin_as_on_gpus):
        yield


@contextlib.contextmanager
def ddp():
    with mock.patch.dict(os.environ, ACCELERATE_USE_FSDP="false"):
        yield


def given(folder: Path) -> dict:
    """The batches of this process, by plain gradient descent."""
    saved = torch.load(folder / "batches.pt")
    run = train_on(saved["batches"][RANK], saved["checkpoint"], str(folder / "given"))
    weights = {name: value.full_tensor() for name, value in run["weights"].items()}  # all processes at once
    return {"weights": weights, "history": run["history"]}


class Once(Given):
    def __iter__(self):
        return itertools.islice(super().__iter__(), len(self.batches))


def accumulate(batches: list[dict], checkpoint: str, output_dir: str, steps: int) -> dict:
    """Three updates of so many micro-batches each, then an evaluation on all of them."""
    trainers = []

    def arguments(**options):
        return PretrainingArguments(**{**options, "max_steps": 3, "gradient_accumulation_steps": steps})

    def trainer(**options):
        trainers.append(AcousticTrainer(**options))
        return trainers[0]

    names = {"PretrainingArguments": arguments, "AcousticTrainer": trainer}
    with mock.patch.multiple(two_processes, **names):
        run = train_on(batches, checkpoint, output_dir)
    return {**run, "results": trainers[0].evaluate(Once(batches))}


def pretrain(argv: list[str]) -> dict:
    """What was logged, and how the model was sharded after the last update."""
    seen, train = {}, AcousticTrainer.train

    def spied(trainer, **kwargs):
        train(trainer, **kwargs)
        held = [p.to_local() if isinstance(p, DTensor) else p for p in trainer.model.parameters()]
        seen["held"] = sum(p.numel() for p in held) / sum(p.numel() for p in trainer.model.parameters())
        seen["units"] = [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)]

    with mock.patch.object(AcousticTrainer, "train", spied):
        seen["results"] = run_pretrain.main(argv)
    return seen


def main(folder: Path) -> None:
    argv = json.loads((folder / "argv.json").read_text())
    with fsdp_on_cpu():
        torch.save(given(folder), folder / f"given_{RANK}.pt")
        for run in (run for run in argv if not run.startswith("copied")):
            torch.save(pretrain(argv[run]), folder / f"{run}_{RANK}.pt")
    with ddp():
        saved = torch.load(folder / "batches.pt")
        run = accumulate(saved["batches"][RANK], saved["checkpoint"], str(folder / "accumulated"), steps=2)
        torch.save(run, folder / f"accumulated_{RANK}.pt")
        for run in (run for run in argv if run.startswith("copied")):
            torch.save(pretrain(argv[run]), folder / f"{run}_{RANK}.pt")


if __name__ == "__main__":
    render(figures=False)
    main(Path(sys.argv[1]))
