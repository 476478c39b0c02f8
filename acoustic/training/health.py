"""The watch over a pretraining run: what is logged goes in, verdicts come out. Nothing else is touched.

A check looks at what was logged and says whether something is wrong now. It becomes a verdict once that has lasted,
counted in updates, so that it means the same whether every update is logged or one in 500; it is said once, and again
only if it ended in between. What is checked of which objective: checks.py.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Facts:
    """What a run was asked for.

    Args:
        num_negatives: 0 where the objective has none.
        num_codes: of all groups together; 0 where there are none.
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
    objective: str = "wav2vec2"
    negatives_from: str = ""  # where the objective has any
    binary: bool = False  # the target and each negative are judged by themselves

    @property
    def chance_loss(self) -> float:
        """Nats per target of one who can't tell it from its negatives."""
        candidates = self.num_negatives + 1
        if not self.binary:
            return math.log(candidates)
        # Who gives all of them the odds of 1 to num_negatives.
        return candidates * math.log(candidates) - self.num_negatives * math.log(max(self.num_negatives, 1))

    @property
    def chance_accuracy(self) -> float:
        return 1 / (self.num_negatives + 1)

    @property
    def fewest_codes(self) -> float:
        """Below this many above the floor, of one in each group, the codebook has collapsed: 1 % of the codes, for
        small ones 1/4 per group.

        Of 640 codes that is a perplexity of 8.4. Collapsed runs sit at 2.0 (transformers #14387); the lowest that was
        published of runs that learned is 17.8, after 1000 updates (fairseq #2981, #3391).
        """
        return max(0.01 * (self.num_codes - self.num_groups), 0.25 * self.num_groups)

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


# Beside the last entry the watch remembers what a family names (the last hundredth of a run, for the noise of its
# batches); gradient norms, which are of one update each, not means of several; and waiting for audio, which comes in
# bursts.
GRADIENT_HORIZON, WAIT_HORIZON = 20, 100

# The first entries tell of workers that start and files that are opened for the first time.
LOGS_OF_THE_START = 2


class Memory:
    """What checks look at: `now` (the finite values of the last entry), means over updates, and the best so far."""

    def __init__(self, facts: Facts, family: "Family"):
        self.facts, self.family, self.now, self.step, self.logs = facts, family, {}, 0, 0
        self.horizon = facts.of_the_run(0.01, 20, 500)
        self.means = {name: Smooth(self.horizon) for name in (family.loss, *family.smoothed)}
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
        smoothed = {name: mean.value for name, mean in self.means.items() if mean.weight}
        if self.step < self.horizon or self.family.loss not in smoothed:
            return
        loss, codes = smoothed[self.family.loss], smoothed.get("code_perplexity", math.inf)
        # Near collapse the loss is low as well, as equal codes are no negatives: nothing to measure by.
        if codes - self.facts.num_groups < 4 * self.facts.fewest_codes:
            return
        # More codes make a harder task, whose loss is measured anew.
        best_codes = math.inf if self.best is None else self.best.get("code_perplexity", math.inf)
        if self.best is None or loss < self.best[self.family.loss] or codes > 1.1 * best_codes:
            self.best = {**smoothed, "step": self.step}
        known = self.family.learned_below(self)
        self.has_learned |= known is not None and loss < known

    @property
    def loss(self) -> float | None:
        """What the objective is about, smoothed."""
        return self.mean(self.family.loss)

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


@dataclass(frozen=True)
class Family:
    """What is watched of objectives that are alike.

    Args:
        loss: the logged name of what they are about.
        smoothed: other names of which checks want a mean over updates.
        learned_below: memory -> the loss that only a run that has learned something has; None where unknown.
        checks: in this order, so that causes come before their consequences.
    """

    loss: str
    smoothed: tuple[str, ...]
    learned_below: Callable[[Memory], float | None]
    checks: tuple[Check, ...]


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
        family: of the objective, one of `checks.FAMILIES`.

    Attributes:
        active: name -> verdict, of what holds now.
        said: every verdict, in order.
    """

    def __init__(self, facts: Facts, family: Family):
        self.facts, self.checks = facts, family.checks
        self.memory = Memory(facts, family)
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


def watch(history: Iterable[dict], facts: Facts, family: Family) -> list[Verdict]:
    """All that there is to say of a log."""
    watching = HealthWatch(facts, family)
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
