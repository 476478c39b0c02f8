"""The watch over a pretraining run: what is logged goes in, verdicts come out. Nothing else is touched.

A check looks at what was logged and says whether something is wrong now. It becomes a verdict once that has lasted,
counted in updates, so that it means the same whether every update is logged or one in 500; it is said once, and again
only if it ended in between. An objective is a table of checks.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# What the paper's base model was trained with: 64 x 1.4 M samples of audio in an update at a peak of 5e-4.
PAPER_UPDATE_SECONDS, PAPER_LEARNING_RATE = 5760, 5e-4


@dataclass(frozen=True)
class Facts:
    """What a run was asked for.

    Args:
        num_codes: of all groups together.
        warmup_steps: in updates.
        update_seconds: audio in an update, over all processes.
        num_workers, cores: for each process.
    """

    num_negatives: int
    num_codes: int
    num_groups: int
    max_steps: int
    warmup_steps: int
    learning_rate: float
    update_seconds: float
    num_workers: int
    cores: int

    @property
    def chance_loss(self) -> float:
        """Nats per masked frame of one who can't tell the target from its negatives."""
        return math.log(self.num_negatives + 1)

    @property
    def chance_accuracy(self) -> float:
        return 1 / (self.num_negatives + 1)

    def of_the_run(self, share: float, least: int, most: int) -> int:
        """A share of all updates, within bounds."""
        return int(min(max(share * self.max_steps, least), most))


@dataclass(frozen=True)
class Verdict:
    """Something wrong.

    Args:
        since, said: the updates at which it began and was said.
        line: what was seen, since when, why it matters, what to change.
        collapse: whether the run learns nothing more.
    """

    name: str
    since: int
    said: int
    line: str
    collapse: bool


class Smooth:
    """A mean that forgets: what lies `horizon` updates back weighs 1/e, however often it is logged."""

    def __init__(self, horizon: float):
        self.horizon, self.total, self.weight = horizon, 0.0, 0.0

    def add(self, value: float | None, updates: int) -> None:
        if value is not None:
            kept = math.exp(-updates / self.horizon)
            self.total = kept * self.total + (1 - kept) * value
            self.weight = kept * self.weight + (1 - kept)

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None


# Beside the last entry the watch remembers these: the last hundredth of a run, for the noise of its batches; gradient
# norms, which are of one update each, not means of several; and waiting for audio, which comes in bursts.
SMOOTHED = ("contrastive_loss", "accuracy", "code_perplexity")
GRADIENT_HORIZON, WAIT_HORIZON = 20, 100

# The first entries tell of workers that start and files that are opened for the first time.
LOGS_OF_THE_START = 2


class Memory:
    """What checks look at: `now` (the finite values of the last entry), means over updates, and the best so far."""

    def __init__(self, facts: Facts):
        self.facts, self.now, self.step, self.logs = facts, {}, 0, 0
        self.horizon = facts.of_the_run(0.01, 20, 500)
        self.means = {name: Smooth(self.horizon) for name in SMOOTHED}
        self.log_gradient, self.wait = Smooth(GRADIENT_HORIZON), Smooth(WAIT_HORIZON)
        self.best: dict[str, float] | None = None  # the smoothed metrics at the lowest loss
        self.has_learned = False

    def add(self, entry: dict) -> int:
        """Returns how many updates the entry stands for."""
        updates, self.step, self.logs = entry["step"] - self.step, entry["step"], self.logs + 1
        self.now = {name: value for name, value in entry.items() if is_finite(value)}
        for name, mean in self.means.items():
            mean.add(self.now.get(name), updates)
        if self.now.get("grad_norm", -1) >= 0:
            self.log_gradient.add(math.log(max(self.now["grad_norm"], 1e-30)), updates)
        if self.logs > LOGS_OF_THE_START:
            self.wait.add(self.now.get("data_wait_fraction"), updates)
        self.remember_the_best()
        return updates

    def remember_the_best(self) -> None:
        smoothed = {name: self.mean(name) for name in SMOOTHED}
        if self.step < self.horizon or None in smoothed.values():
            return
        # Near collapse the loss is low as well, as equal codes are no negatives: nothing to measure by.
        if smoothed["code_perplexity"] - self.facts.num_groups < 4 * self.fewest_codes:
            return
        # More codes make a harder task, whose loss is measured anew.
        lower = self.best is None or smoothed["contrastive_loss"] < self.best["contrastive_loss"]
        if lower or smoothed["code_perplexity"] > 1.1 * self.best["code_perplexity"]:
            self.best = {**smoothed, "step": self.step}
        # Half a nat below chance: an accuracy of 5 to 10 %, which no healthy run gives back.
        self.has_learned |= smoothed["contrastive_loss"] < self.facts.chance_loss - 0.5

    def mean(self, name: str) -> float | None:
        return self.means[name].value

    @property
    def gradient(self) -> float | None:
        """Geometric mean of the gradient norm."""
        return None if self.log_gradient.value is None else math.exp(self.log_gradient.value)

    @property
    def excess_codes(self) -> float | None:
        """Code perplexity above its floor, which is one code in each group."""
        perplexity = self.now.get("code_perplexity")
        return None if perplexity is None else perplexity - self.facts.num_groups

    @property
    def fewest_codes(self) -> float:
        """Below this many above the floor the codebook has collapsed: 1 % of the codes, for small ones 1/4 per group.

        Of 640 codes that is a perplexity of 8.4. Collapsed runs sit at 2.0 (transformers #14387); the lowest that was
        published of runs that learned is 17.8, after 1000 updates (fairseq #2981, #3391).
        """
        return max(0.01 * (self.facts.num_codes - self.facts.num_groups), 0.25 * self.facts.num_groups)


def is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Check:
    """
    Args:
        name: what it finds.
        state: memory -> True where it is so, False where it clearly is not, None in between or where it can't be
            told. That True and False lie apart keeps a verdict from coming and going.
        line: memory, the update since when -> what is said.
        updates: facts -> for how many updates it must have been so, and must have been gone to have ended.
        logs: in how many entries at least; a value that is of a single update needs more than one.
        collapse: see `Verdict`.
        explained_by: verdicts of which this one is but a consequence; while one of them holds it is not said.
        due: memory -> whether it is time to say so at all.
    """

    name: str
    state: Callable[[Memory], bool | None]
    line: Callable[[Memory, int], str]
    updates: Callable[[Facts], int]
    logs: int = 1
    collapse: bool = False
    explained_by: tuple[str, ...] = ()
    due: Callable[[Memory], bool] = lambda memory: True


class Course:
    """How long a check has held."""

    def __init__(self):
        self.since: int | None = None
        self.held = self.logs = self.gone = 0

    def add(self, state: bool | None, step: int, updates: int, to_end: int) -> bool:
        """Returns whether it has ended: gone for `to_end` updates."""
        if state is None:
            return False
        if state:
            self.since = step if self.since is None else self.since
            self.held, self.logs, self.gone = self.held + updates, self.logs + 1, 0
            return False
        self.gone += updates
        if self.gone >= to_end:
            self.__init__()
            return True
        return False


class HealthWatch:
    """
    Args:
        checks: the objective's; in this order, so that causes come before their consequences.

    Attributes:
        active: name -> verdict, of what holds now.
        said: every verdict, in order.
    """

    def __init__(self, facts: Facts, checks: tuple[Check, ...] | None = None):
        self.facts, self.checks = facts, WAV2VEC2 if checks is None else checks
        self.memory = Memory(facts)
        self.courses = {check.name: Course() for check in self.checks}
        self.active: dict[str, Verdict] = {}
        self.said: list[Verdict] = []

    def see(self, entry: dict) -> list[Verdict]:
        """What is new with an entry of the log; evaluations and what was seen before (on resuming) are passed over."""
        if "loss" not in entry or not is_finite(entry.get("step")) or entry["step"] <= self.memory.step:
            return []
        updates = self.memory.add(entry)
        new = [verdict for check in self.checks if (verdict := self.judge(check, updates))]
        self.said += new
        return new

    def judge(self, check: Check, updates: int) -> Verdict | None:
        course, enough = self.courses[check.name], check.updates(self.facts)
        state = check.state(self.memory)
        # What was never said is forgotten at once.
        ended = course.add(state, self.memory.step, updates, to_end=enough if check.name in self.active else 0)
        if ended:
            self.active.pop(check.name, None)
        if check.name in self.active or not state or course.held < enough or course.logs < check.logs:
            return None
        if not check.due(self.memory) or any(name in self.active for name in check.explained_by):
            return None
        line = check.line(self.memory, course.since)
        verdict = Verdict(check.name, course.since, self.memory.step, line, check.collapse)
        self.active[check.name] = verdict
        return verdict


def watch(history: Iterable[dict], facts: Facts, checks: tuple[Check, ...] | None = None) -> list[Verdict]:
    """All that there is to say of a log."""
    watching = HealthWatch(facts, checks)
    for entry in history:
        watching.see(entry)
    return watching.said


def outside(value: float | None, wrong: float, right: float) -> bool | None:
    """True at or beyond `wrong`, False at or beyond `right`, which lies on its other side; None between them."""
    if value is None:
        return None
    if (value >= wrong) if wrong > right else (value <= wrong):
        return True
    return False if ((value <= right) if wrong > right else (value >= right)) else None


# ---- what to change


def smaller_rate(facts: Facts) -> str:
    if facts.learning_rate >= 4 * PAPER_LEARNING_RATE:
        return f"--learning_rate {PAPER_LEARNING_RATE:g} (the paper's)"
    return f"--learning_rate {facts.learning_rate / 2:.2g} (half)"


def longer_warmup(facts: Facts) -> str:
    """Twice the updates, or the paper's 8 % where there was none."""
    return f"--warmup_steps {max(2 * facts.warmup_steps, math.ceil(0.08 * facts.max_steps))} (longer)"


def larger_update(facts: Facts) -> str:
    """Four times the audio; what the paper took where a run is near it or beyond."""
    more = 4 * facts.update_seconds
    if more > PAPER_UPDATE_SECONDS:
        return f"--update_seconds {max(PAPER_UPDATE_SECONDS, 2 * facts.update_seconds):g}"
    return f"--update_seconds {more:g} (four times the audio; the paper took 1.6 h, {PAPER_UPDATE_SECONDS})"


# ---- the checks


def patience(facts: Facts) -> int:
    """A thousandth of the run, at least 50 updates: cheap to wait for, and a codebook may dip and recover."""
    return facts.of_the_run(0.001, 50, 500)


def codes_collapsed(memory: Memory) -> bool | None:
    return outside(memory.excess_codes, memory.fewest_codes, 2 * memory.fewest_codes)


def say_codes_collapsed(memory: Memory, since: int) -> str:
    facts = memory.facts
    return (
        f"codebook collapse: code perplexity {memory.now['code_perplexity']:.1f} of {facts.num_codes} since update "
        f"{since}; nearly all frames have the same code, so there is nothing left to tell apart and nothing more is "
        f"learned. Start again with {smaller_rate(facts)} and {longer_warmup(facts)}, then {larger_update(facts)}, "
        "--negatives_from utterance, or a larger diversity_loss_weight in --config_overrides"
    )


def loss_at_zero(memory: Memory) -> bool | None:
    """Below .02 nats the target is named with a probability of 98 %: collapsed runs sit at .000 to .0013 (transformers
    #14387, #12934). Released models name 60 to 70 % of the targets (fairseq #2949)."""
    return outside(memory.now.get("contrastive_loss"), 0.02, 0.05)


def say_loss_at_zero(memory: Memory, since: int) -> str:
    facts, codes = memory.facts, memory.now.get("code_perplexity")
    used = "" if codes is None else f" (code perplexity {codes:.1f} of {facts.num_codes})"
    return (
        f"contrastive loss at zero: {memory.now['contrastive_loss']:.4f} nats per masked frame since update {since}"
        f"{used}; the task is solved without any idea of the audio, and nothing more is learned. Start again with "
        f"--mask_time_length 20 (nothing to copy from neighbours), --negatives_from utterance, {smaller_rate(facts)}"
    )


def vanished_gradients(memory: Memory) -> bool | None:
    """The smallest norm of a healthy run here was .13, on the plateau at its start; collapsed ones have 1e-18."""
    return outside(memory.gradient, 1e-3, 3e-3)


def say_vanished_gradients(memory: Memory, since: int) -> str:
    facts = memory.facts
    return (
        f"vanished gradients: their norm is {memory.gradient:.1g} since update {since} (0.5 to 4 is healthy), so the "
        f"weights hardly move and nothing more is learned. Start again with {smaller_rate(facts)} and "
        f"{longer_warmup(facts)}; with --fp16, try --bf16 instead"
    )


def at_chance(memory: Memory) -> bool | None:
    """By the loss, as with equal vectors accuracy can be anything (fairseq #3661, #3718: stuck at log 101 with .2 to
    .8); by accuracy, as a loss can be below log(101) where equal codes leave fewer negatives."""
    facts, loss = memory.facts, memory.mean("contrastive_loss")
    by_accuracy = outside(memory.mean("accuracy"), 1.5 * facts.chance_accuracy, 2 * facts.chance_accuracy)
    if by_accuracy or loss is None:
        return by_accuracy
    return outside(loss, facts.chance_loss - 0.1, facts.chance_loss - 0.2)


def long_after_warmup(memory: Memory) -> bool:
    """Healthy runs stay at chance for most of their warmup, and small ones for 100 updates more (measured); 300, or a
    twentieth of the run. A run that had left chance needs no such time."""
    grace = memory.facts.of_the_run(0.05, 300, 5000)
    return memory.has_learned or memory.step >= memory.facts.warmup_steps + grace


def say_at_chance(memory: Memory, since: int) -> str:
    facts, loss, accuracy = memory.facts, memory.mean("contrastive_loss"), memory.mean("accuracy")
    seen = [
        *([] if loss is None else [f"contrastive loss {loss:.2f} (chance is {facts.chance_loss:.2f})"]),
        *([] if accuracy is None else [f"accuracy {accuracy:.3f} (chance is {facts.chance_accuracy:.3f})"]),
    ]
    began = "it had learned before and fell back" if memory.has_learned else "long after its warmup"
    return (
        f"at chance: {', '.join(seen)} since update {since}, {began}; the run is learning nothing. Start again with "
        f"{smaller_rate(facts)} and {larger_update(facts)}; where sounds are steady within a recording, "
        "--negatives_from batch"
    )


def exploding_gradients(memory: Memory) -> bool | None:
    """Healthy norms are 0.5 to 4.5 (quoted and measured); five times that, and not a single spike."""
    return outside(memory.gradient, 20.0, 10.0)


def say_exploding_gradients(memory: Memory, since: int) -> str:
    facts = memory.facts
    return (
        f"exploding gradients: their norm is {memory.gradient:.3g} since update {since} (0.5 to 4 is healthy), so "
        f"updates go far astray. Start again with {smaller_rate(facts)}, {longer_warmup(facts)}, or --max_grad_norm 1"
    )


def dead_group(memory: Memory) -> bool | None:
    """A group at 1.1 gives 98 % of the frames one code; others at 2 or more use theirs."""
    lowest, total = memory.now.get("lowest_group_perplexity"), memory.now.get("code_perplexity")
    others = memory.facts.num_groups - 1
    if lowest is None or total is None or others == 0:
        return None
    return outside(lowest, 1.1, 1.5) if (total - lowest) / others >= 2 else None


def say_dead_group(memory: Memory, since: int) -> str:
    facts, lowest = memory.facts, memory.now["lowest_group_perplexity"]
    return (
        f"dead code group: one of {facts.num_groups} groups has a perplexity of {lowest:.2f} since update {since}, so "
        f"1/{facts.num_groups} of every code says nothing. Start again with a larger diversity_loss_weight in "
        f"--config_overrides (0.1 is the paper's), {smaller_rate(facts)}, or --gumbel_temperature_floor 1"
    )


def rate_too_high(memory: Memory) -> bool | None:
    """The loss .3 nats above its best (batches differ by .1) and accuracy down by a fifth.

    The best is of the codes in use: in healthy runs the loss can rise with their number.
    """
    best = memory.best
    if best is None:
        return None
    risen = outside(memory.mean("contrastive_loss") - best["contrastive_loss"], 0.3, 0.15)
    fallen = outside(memory.mean("accuracy"), 0.8 * best["accuracy"], 0.9 * best["accuracy"])
    if risen is False or fallen is False:
        return False
    return True if risen and fallen else None


def say_rate_too_high(memory: Memory, since: int) -> str:
    facts, best = memory.facts, memory.best
    return (
        f"learning rate too high for the batch: since update {since} the contrastive loss is "
        f"{memory.mean('contrastive_loss'):.2f} and accuracy {memory.mean('accuracy'):.2f}, worse than "
        f"{best['contrastive_loss']:.2f} and {best['accuracy']:.2f} at update {best['step']}, with no more codes in "
        f"use. A rate of {facts.learning_rate:.2g} at {facts.update_seconds:g} s of audio per update; the paper took "
        f"{PAPER_LEARNING_RATE:g} at 1.6 h ({PAPER_UPDATE_SECONDS} s). Start again with {smaller_rate(facts)}, or "
        f"{larger_update(facts)}"
    )


def data_bound(memory: Memory) -> bool | None:
    """A fifth of the time is worth a worker; our runs on two cores waited for 0.2 to 1 %."""
    return outside(memory.wait.value, 0.2, 0.1)


def say_data_bound(memory: Memory, since: int) -> str:
    facts = memory.facts
    more = min(max(2 * facts.num_workers, 2), facts.cores)
    if more > facts.num_workers:
        cure = f"Go on with --dataloader_num_workers {more} (it is {facts.num_workers}, of {facts.cores} cores)"
    else:
        cure = (
            f"--dataloader_num_workers {facts.num_workers} takes all {facts.cores} cores already: put the audio on a "
            "local disk, as flac or wav at 16 kHz, which decode several times faster"
        )
    return f"data-bound: {memory.wait.value:.0%} of the time goes into waiting for audio, since update {since}. {cure}"


COLLAPSED = ("codebook_collapse", "loss_at_zero")

WAV2VEC2 = (
    Check("codebook_collapse", codes_collapsed, say_codes_collapsed, patience, collapse=True),
    Check("loss_at_zero", loss_at_zero, say_loss_at_zero, patience, collapse=True, explained_by=COLLAPSED[:1]),
    Check(
        "vanished_gradients",
        vanished_gradients,
        say_vanished_gradients,
        patience,
        logs=3,
        collapse=True,
        explained_by=COLLAPSED,
    ),
    Check(
        "at_chance",
        at_chance,
        say_at_chance,
        lambda facts: 2 * patience(facts),
        collapse=True,
        explained_by=COLLAPSED,
        due=long_after_warmup,
    ),
    Check("exploding_gradients", exploding_gradients, say_exploding_gradients, lambda facts: 20, logs=3),
    Check("dead_code_group", dead_group, say_dead_group, lambda facts: 2 * patience(facts), explained_by=COLLAPSED),
    Check(
        "learning_rate_too_high",
        rate_too_high,
        say_rate_too_high,
        lambda facts: facts.of_the_run(0.05, 100, 2000),  # longer than a hard stretch of the data
        explained_by=(*COLLAPSED, "at_chance"),
    ),
    Check("data_bound", data_bound, say_data_bound, lambda facts: 100, logs=8),
)
