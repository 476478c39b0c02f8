"""What pretraining is worth, in words: the last start's scores beside each other one's, over budgets of labels."""

from dataclasses import dataclass

import numpy as np

ALL = "all"
# The error rate of saying nothing.
EMPTY = 1.0


@dataclass(frozen=True)
class Unit:
    """Of a budget: "label per class", "labels per class"."""

    one: str
    many: str

    def of(self, budget: str) -> str:
        """ "5 labels per class", "1 minute of labels", "all labels"."""
        if budget == ALL:
            return "all labels"
        return f"{budget} {self.one if float(budget) == 1 else self.many}"

    def listed(self, budgets: list[str]) -> str:
        """ "1 and 5 labels per class and all labels"."""
        numbers = [budget for budget in budgets if budget != ALL]
        joined = [", ".join(numbers[:-1]), self.of(numbers[-1])] if numbers else []
        return " and ".join(filter(None, [*joined, self.of(ALL) if ALL in budgets else ""]))


def curve(rows: list[dict], way: str, start: str, column: str) -> dict[str, list[float]]:
    """Budget -> scores of the draws, both in ascending order."""
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: (row["budget"] == ALL, number(row["budget"]), row["draw"])):
        if row["way"] == way and row["start"] == start:
            found.setdefault(row["budget"], []).append(row[column])
    return found


def number(budget: str) -> float:
    return np.inf if budget == ALL else float(budget)


def worth(
    ours: dict[str, list[float]],
    other: dict[str, list[float]],
    name: str,
    unit: Unit,
    greater_is_better: bool = True,
    subject: str = "pretraining",
) -> str | None:
    """What to say of the two, at the budgets at which ours is better in every draw.

    What that is worth is the budget at which the mean of the other reaches the mean of ours, on a straight line
    between the tried budgets' means, over the logarithm of the budget.

    Args:
        ours, other: budget -> scores of the draws; see `curve`.
        name, subject: of the other, and of ours.

    Returns:
        None where there is no budget at which both were tried.
    """
    sign = 1 if greater_is_better else -1
    if not greater_is_better:  # an error rate, which an empty answer brings down to 1
        ours, other = (
            {budget: [min(score, EMPTY) for score in scores] for budget, scores in curve.items()}
            for curve in (ours, other)
        )
    shared = [budget for budget in ours if budget in other]
    if not shared:
        return None
    differences = {budget: [sign * (a - b) for a, b in zip(ours[budget], other[budget])] for budget in shared}
    means = {budget: sign * float(np.mean(scores)) for budget, scores in other.items()}
    won = [budget for budget in shared if min(differences[budget]) > 0]
    if not won and not greater_is_better and all(min(other[b] + ours[b]) == EMPTY for b in shared):
        return f"beside {name}, {subject} makes no difference: no error rate is below 1, that of an empty answer"
    if not won:
        return not_better(differences, name, unit, subject)
    better = [
        budget
        for budget in won
        if all(means[few] < sign * np.mean(ours[budget]) for few in means if number(few) < number(budget))
    ]
    if not better:
        return f"beside {name}, {subject} is better with {unit.listed(won)}, but fewer do as well with {name}"
    rest = [budget for budget in shared if budget not in won]
    limits = f", but with {unit.listed(rest)} it is not better in every draw" if rest else ""
    if better == [ALL]:
        return f"beside {name}, {subject} is better with all labels{limits}"
    if [number(budget) for budget in better] == [max(map(number, means))]:
        return f"beside {name}, {subject} is better with {unit.of(better[0])}, the most that were tried{limits}"
    amounts = {
        budget: equal_amount(means, budget, sign * float(np.mean(ours[budget])))
        for budget in better
        if budget == better[0] or number(budget) < max(map(number, means))  # of the largest there is nothing to say
    }
    first, *more = amounts
    also = "".join(f"; with {budget}, {amounts[budget].rstrip(',')}" for budget in more)
    return f"with {unit.of(first)}, {subject} is worth {amounts[first]} with {name}{also}{limits}"


def equal_amount(means: dict[str, float], budget: str, mean: float) -> str:
    """The budget at which `means`, higher is better and below `mean` up to `budget`, reach it; in words."""
    tried = [key for key in means if number(key) >= number(budget)]
    reached = next((key for key in tried if means[key] >= mean), None)
    if reached is None:
        return "more than all of them" if tried[-1] == ALL else f"more than {tried[-1]}"
    before = tried[tried.index(reached) - 1]
    if reached == ALL:
        return "all of them" if means[reached] == mean else f"more than {before}, and less than all of them,"
    share = (mean - means[before]) / (means[reached] - means[before])
    exact = float(before) * (float(reached) / float(before)) ** share
    rounded = f"{float(f'{exact:.2g}'):g}"
    if number(rounded) <= number(budget):
        return f"hardly more than {budget}"
    return rounded if share == 1 else f"about {rounded}"


def not_better(differences: dict[str, list[float]], name: str, unit: Unit, subject: str) -> str:
    if not any(any(values) for values in differences.values()):
        return f"beside {name}, {subject} makes no difference: the scores are the same"
    worse = [budget for budget, values in differences.items() if max(values) < 0]
    also = f", and with {unit.listed(worse)} it is worse in every draw" if worse else ""
    return f"{subject} is not worth a label beside {name}: with no budget is it better in every draw{also}"
