"""The watch over pretraining: every verdict is said of a history that goes wrong, and none of one that does not."""

import dataclasses
import json
import math
import random
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from acoustic.config import DataArguments, ModelArguments, PretrainingArguments
from acoustic.report import figures
from acoustic.training import health
from acoustic.training.checks import WAV2VEC2
from acoustic.training.health import Check, Facts, Family, HealthWatch, outside

HISTORIES = sorted(Path(__file__).parent.joinpath("histories").glob("*.json"))
LEARNED = {"demo", "demo_200_updates", "voice_prompts"}
CHANCE = math.log(101)
FACTS = Facts(
    num_negatives=100,
    num_codes=640,
    num_groups=2,
    max_steps=20_000,
    warmup_steps=1600,
    learning_rate=5e-4,
    update_seconds=350.0,
    num_workers=2,
    cores=8,
)


def healthy(last: int = 5000, logging_steps: int = 10, seed: int = 0, **changed) -> list[dict]:
    """What a run that learns logs: chance for 300 updates, then slowly better, with the noise of its batches.

    changed: name -> function of the update, in place of what is logged by that name.
    """
    noise = random.Random(seed)
    history = []
    for step in sorted({1, *range(logging_steps, last + 1, logging_steps)}):
        learned = 1 - math.exp(-max(step - 300, 0) / 1500)
        codes = 300 - 200 * learned + noise.gauss(0, 4)
        loss = CHANCE - 2 * learned + noise.gauss(0, 0.05)
        entry = {
            "step": step,
            "loss": loss + 0.07,
            "contrastive_loss": loss,
            "accuracy": 0.012 + 0.45 * learned * math.exp(noise.gauss(0, 0.05)),
            "code_perplexity": codes,
            "lowest_group_perplexity": 0.4 * codes,
            "grad_norm": (0.3 + 1.7 * learned) * math.exp(noise.gauss(0, 0.4)),
            "learning_rate": 5e-4,
            "data_wait_fraction": 0.3 if step == 1 else 0.01,
        }
        history.append(entry | {name: value(step) for name, value in changed.items()})
    return history


def watch(history, facts, family=WAV2VEC2) -> list:
    return health.watch(history, facts, family)


def names(verdicts: list) -> list[str]:
    return [verdict.name for verdict in verdicts]


def after(start: int, value: float, key: str, last: int = 5000, **settings) -> list[dict]:
    """A healthy history in which one value is another from an update on."""
    history = healthy(last, **settings)
    return [entry | ({key: value} if entry["step"] >= start else {}) for entry in history]


def change(history: list[dict], start: int, **values) -> list[dict]:
    return [entry | (values if entry["step"] >= start else {}) for entry in history]


def collapsed(**settings) -> list[dict]:
    """What is left of a codebook of one code per group."""
    return change(
        healthy(**settings),
        3000,
        contrastive_loss=0.0,
        accuracy=0.0,
        code_perplexity=2.0,
        lowest_group_perplexity=1.0,
        grad_norm=1e-18,
    )


def diverged(last: int = 8000, **settings) -> list[dict]:
    return change(healthy(last, **settings), 3000, contrastive_loss=3.6, accuracy=0.15)


WRONG = {
    "codebook_collapse": lambda **settings: collapsed(**settings),
    "loss_at_zero": lambda **settings: after(3000, 0.001, "contrastive_loss", **settings),
    "vanished_gradients": lambda **settings: after(3000, 1e-7, "grad_norm", **settings),
    "at_chance": lambda **settings: change(healthy(**settings), 1, contrastive_loss=CHANCE, accuracy=0.012),
    "exploding_gradients": lambda **settings: after(3000, 300.0, "grad_norm", **settings),
    "dead_code_group": lambda **settings: after(3000, 1.02, "lowest_group_perplexity", **settings),
    "learning_rate_too_high": diverged,
    "data_bound": lambda **settings: after(3000, 0.6, "data_wait_fraction", **settings),
}
COLLAPSES = {"codebook_collapse", "loss_at_zero", "vanished_gradients", "at_chance"}


def test_there_is_a_wrong_history_for_every_check():
    assert list(WRONG) == [check.name for check in WAV2VEC2.checks]


@pytest.mark.parametrize("logging_steps", [1, 10, 100, 500])
@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_is_said_once_and_by_name(name, logging_steps):
    last = 12_000 if name == "data_bound" and logging_steps == 500 else 5000
    settings = {"last": last} if name == "data_bound" else {}
    verdicts = watch(WRONG[name](logging_steps=logging_steps, **settings), FACTS)
    assert names(verdicts) == [name]
    (verdict,) = verdicts
    began = 1 if name == "at_chance" else 3000
    assert began <= verdict.since <= began + 5 * logging_steps + 250
    assert verdict.collapse == (name in COLLAPSES)
    if verdict.collapse and name != "at_chance":
        assert verdict.said <= 3000 + 100 + 3 * logging_steps


@pytest.mark.parametrize("name", WRONG)
def test_a_line_is_one_line_that_names_options_there_are(name):
    (verdict,) = watch(WRONG[name](), FACTS)
    options = re.findall(r"--([a-z_0-9]+)", verdict.line)
    fields = {f.name for cls in (ModelArguments, DataArguments, PretrainingArguments) for f in dataclasses.fields(cls)}
    assert options and set(options) <= fields | {"update_seconds", "on_collapse"}
    assert "\n" not in verdict.line and "None" not in verdict.line and str(verdict.since) in verdict.line
    assert len(verdict.line) < 520


def test_the_lines_give_values():
    lines = {name: watch(wrong(), FACTS)[0].line for name, wrong in WRONG.items()}
    assert "--learning_rate 0.00025 (half)" in lines["codebook_collapse"]
    assert "--update_seconds 1400" in lines["learning_rate_too_high"] and "5760" in lines["learning_rate_too_high"]
    assert "350 s of audio per update" in lines["learning_rate_too_high"]
    assert "--warmup_steps 3200" in lines["exploding_gradients"]
    assert "--dataloader_num_workers 4" in lines["data_bound"] and "4% of the time" in lines["data_bound"]
    all_cores = watch(WRONG["data_bound"](), dataclasses.replace(FACTS, num_workers=8))[0].line
    assert "takes all 8 cores" in all_cores


# ---- healthy runs


@pytest.mark.parametrize("logging_steps", [1, 10, 100, 500])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_said_of_a_run_that_learns(logging_steps, seed):
    assert watch(healthy(min(20_000, 5000 * logging_steps), logging_steps, seed), FACTS) == []


def test_nothing_is_said_where_the_loss_rises_as_more_codes_come_into_use():
    """As published runs do: an accuracy of .49 with 26 of 640 codes (fairseq #3391), later hundreds of codes."""

    def codes(step):
        return 20 + 480 * min(max(step - 2000, 0) / 6000, 1)

    def loss(step):
        return 2.3 + 0.9 * min(max(step - 2000, 0) / 6000, 1)

    def accuracy(step):
        return 0.5 - 0.2 * min(max(step - 2000, 0) / 6000, 1)

    changed = {"code_perplexity": codes, "contrastive_loss": loss, "accuracy": accuracy}
    assert watch(healthy(20_000, **changed), FACTS) == []


def test_after_more_codes_a_rising_loss_is_said_all_the_same():
    def codes(step):
        return 20 + 480 * min(step / 4000, 1)

    def loss(step):
        return 2.3 + 0.9 * min(step / 4000, 1) + (0.8 if step > 10_000 else 0)

    def accuracy(step):
        return 0.5 - 0.2 * min(step / 4000, 1) - (0.2 if step > 10_000 else 0)

    changed = {"code_perplexity": codes, "contrastive_loss": loss, "accuracy": accuracy}
    assert names(watch(healthy(20_000, **changed), FACTS)) == ["learning_rate_too_high"]


def test_nothing_is_said_of_a_slow_start_within_a_long_warmup():
    facts = dataclasses.replace(FACTS, max_steps=400_000, warmup_steps=32_000)
    slow = [entry | {"step": entry["step"] + 9000} for entry in healthy(30_000, 100)]
    start = [
        {**slow[1], "step": step, "contrastive_loss": CHANCE + 0.01, "accuracy": 0.011}
        for step in range(100, 9000, 100)
    ]
    assert watch([*start, *slow], facts) == []


def test_nothing_is_said_of_noisy_gradients_nor_of_single_spikes():
    noise = random.Random(1)
    noisy = {"grad_norm": lambda step: 5000.0 if step % 700 == 0 else 2 * math.exp(noise.gauss(0, 1))}
    for logging_steps in (1, 10, 100):
        assert watch(healthy(min(20_000, 5000 * logging_steps), logging_steps, **noisy), FACTS) == []


def test_nothing_is_said_of_slow_first_batches_nor_of_waiting_in_bursts():
    waits = {"data_wait_fraction": lambda step: 0.95 if step < 15 or step % 20 == 0 else 0.02}
    assert watch(healthy(3000, 1, **waits), FACTS) == []
    assert watch(healthy(3000, 10, data_wait_fraction=lambda step: 0.9 if step <= 10 else 0.05), FACTS) == []


def test_nothing_is_said_of_easy_audio_with_many_codes_in_use():
    easy = {"contrastive_loss": lambda step: 4.6 * math.exp(-step / 300) + 0.15, "accuracy": lambda step: 0.93}
    assert watch(healthy(20_000, **easy), FACTS) == []


def test_nothing_is_said_of_the_fewest_codes_that_were_published_of_a_run_that_learned():
    few = {"code_perplexity": lambda step: 17.8, "lowest_group_perplexity": lambda step: 7.0}
    assert watch(healthy(3000, **few), FACTS) == []


@pytest.mark.parametrize("path", [p for p in HISTORIES if p.stem in LEARNED], ids=lambda path: path.stem)
def test_nothing_is_said_of_real_runs_that_learned(path):
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert len(saved["history"]) >= 20
    assert watch(saved["history"], Facts(**saved["facts"])) == []


# ---- real collapses


@pytest.mark.parametrize("path", [p for p in HISTORIES if p.stem.startswith("collapsed")], ids=lambda path: path.stem)
def test_a_real_collapse_is_named_long_before_the_end(path):
    saved = json.loads(path.read_text(encoding="utf-8"))
    (verdict,) = watch(saved["history"], Facts(**saved["facts"]))
    assert verdict.name == "codebook_collapse" and verdict.collapse
    assert verdict.said < 100 and saved["history"][-1]["step"] == 200


def test_a_real_run_that_stays_at_chance_is_named_after_its_warmup():
    """A learning rate ten times too high, with a healthy codebook."""
    saved = json.loads((HISTORIES[0].parent / "stuck_at_chance.json").read_text(encoding="utf-8"))
    (verdict,) = watch(saved["history"], Facts(**saved["facts"]))
    assert (verdict.name, verdict.since, verdict.said) == ("at_chance", 1, 350)


def test_there_are_real_runs_of_all_kinds():
    stems = {path.stem for path in HISTORIES}
    collapsed = {"collapsed_by_learning_rate", "collapsed_without_diversity"}
    assert stems == LEARNED | collapsed | {"stuck_at_chance"}


# ---- how it is said


def test_a_run_that_falls_back_to_chance_need_not_wait_for_the_end_of_its_warmup():
    """fairseq #4948: accuracy falls, the perplexity jumps up, the loss goes up and stays."""
    fell = change(healthy(4000), 3000, contrastive_loss=CHANCE + 0.1, accuracy=0.01, code_perplexity=500.0)
    facts = dataclasses.replace(FACTS, warmup_steps=10_000)
    (verdict,) = watch(fell, facts)
    assert verdict.name == "at_chance" and 3000 <= verdict.said <= 3600 and "fell back" in verdict.line


def test_equal_vectors_are_at_chance_whatever_their_accuracy():
    """fairseq #3661: a loss of log(101) with an accuracy of .2 to .8."""
    stuck = healthy(5000, contrastive_loss=lambda step: CHANCE, accuracy=lambda step: 0.2 + 0.6 * (step % 20 > 9))
    assert names(watch(stuck, FACTS)) == ["at_chance"]


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("cut", [0, 299, 301, 340, 499])
def test_resuming_gives_the_same(name, cut):
    history = WRONG[name]()
    whole, resumed = HealthWatch(FACTS, WAV2VEC2), HealthWatch(FACTS, WAV2VEC2)
    for entry in history:
        whole.see(entry)
    for entry in history[:cut]:
        resumed.see(entry)
    for entry in history[cut // 2 :]:  # some are seen twice
        resumed.see(entry)
    assert resumed.said == whole.said == watch(history, FACTS)
    assert resumed.active == whole.active


def test_what_ended_and_came_back_is_said_again_and_flapping_is_not():
    def codes(step):
        return 2.0 if 1000 <= step < 1500 or step >= 2500 else 200.0

    verdicts = watch(healthy(4000, code_perplexity=codes), FACTS)
    assert names(verdicts) == ["codebook_collapse"] * 2
    assert [verdict.since for verdict in verdicts] == [1000, 2500]
    flapping = healthy(4000, code_perplexity=lambda step: 2.0 if step % 40 else 9.0)
    assert names(watch(flapping, FACTS)) == ["codebook_collapse"]
    back_for_a_moment = healthy(4000, code_perplexity=lambda step: 200.0 if step % 200 == 0 else 2.0)
    assert names(watch(back_for_a_moment, FACTS)) == ["codebook_collapse"]


def test_what_holds_is_active_until_it_ends():
    watching = HealthWatch(FACTS, WAV2VEC2)
    for entry in healthy(4000, code_perplexity=lambda step: 2.0 if 1000 <= step < 2000 else 200.0):
        watching.see(entry)
        if entry["step"] in (1500, 1990):
            assert list(watching.active) == ["codebook_collapse"]
    assert watching.active == {} and names(watching.said) == ["codebook_collapse"]


def test_see_returns_what_is_new():
    watching, new = HealthWatch(FACTS, WAV2VEC2), []
    for entry in collapsed():
        new += watching.see(entry)
    assert new == watching.said and len(new) == 1


def test_other_entries_are_passed_over():
    evaluations = [
        {"step": 3010, "eval_loss": 1.0, "eval_code_perplexity": 2.0},
        {"step": 3020, "train_runtime": 3.0, "train_loss": 2.0},
        {"loss": 1.0},
        {"loss": 1.0, "step": None},
        {},
    ]
    history = healthy()
    assert watch(history[:301] + evaluations + history[301:], FACTS) == []


def test_missing_and_non_finite_values_are_no_verdict_and_no_crash():
    for key in healthy(10)[0]:
        if key not in ("step", "loss"):
            for wrong in WRONG.values():
                without = [{k: v for k, v in entry.items() if k != key or entry["step"] % 30} for entry in wrong()]
                watch(without, FACTS)
    for value in (math.nan, math.inf, None, "text"):
        broken = [{name: v if name in ("step", "loss") else value for name, v in entry.items()} for entry in healthy()]
        assert watch(broken, FACTS) == []
    assert watch([{"step": step, "loss": 1.0} for step in range(1, 500)], FACTS) == []


def test_one_group_alone_is_never_dead():
    one = dataclasses.replace(FACTS, num_groups=1, num_codes=320)
    assert watch(healthy(lowest_group_perplexity=lambda step: 1.0), one) == []


@pytest.mark.parametrize("max_steps", [20, 200, 1200, 400_000])
def test_a_collapse_is_seen_in_short_and_long_runs(max_steps):
    facts = dataclasses.replace(FACTS, max_steps=max_steps, warmup_steps=int(0.08 * max_steps))
    history = collapsed() if max_steps > 5000 else healthy(max_steps, 1, code_perplexity=lambda step: 2.0)
    said = names(watch(history, facts))
    assert said == (["codebook_collapse"] if max_steps > 50 else [])


def test_an_entry_costs_the_same_late_in_a_run():
    """What is kept does not grow."""
    watching = HealthWatch(FACTS, WAV2VEC2)
    sizes = []
    for entry in healthy(5000, 1):
        watching.see(entry)
        if entry["step"] in (500, 5000):
            sizes.append(len(json.dumps([vars(watching.memory), vars(watching.courses["at_chance"])], default=vars)))
    assert abs(sizes[1] - sizes[0]) < 100


def test_a_family_is_a_table_of_checks():
    """A reconstruction that is no better than a given number, say."""
    at_the_mean = Check(
        "at_the_mean",
        lambda memory: outside(memory.now.get("reconstruction_loss"), 1.0, 0.9),
        lambda memory, since: f"no better than the mean since update {since}: --learning_rate",
        lambda facts: 100,
    )
    history = [{"step": step, "loss": 1.0, "reconstruction_loss": 1.01} for step in range(10, 500, 10)]
    family = Family("reconstruction_loss", (), lambda memory: None, (at_the_mean,))
    (verdict,) = watch(history, FACTS, family)
    assert (verdict.name, verdict.since, verdict.said, verdict.collapse) == ("at_the_mean", 10, 100, False)


# ---- what the figure makes of it


@pytest.mark.figures
def test_the_curves_show_where_the_watch_spoke(tmp_path):
    drawn, curves = {}, figures.Curves(collapsed(), FACTS)
    for name, verdicts in (("none", []), ("one", [(3050, "codebook_collapse")]), ("many", [(3050, "at_chance")] * 30)):
        path = figures.pretraining_curves(str(tmp_path / name), curves, "contrastive", verdicts)
        drawn[name] = plt.imread(path)[..., :3]
    assert drawn["none"].shape == drawn["one"].shape
    assert np.abs(drawn["one"] - drawn["none"]).mean() > 1e-3
    height, width = drawn["one"].shape[:2]
    assert drawn["many"].shape[0] <= 1.1 * height and drawn["many"].shape[1] <= 1.1 * width
    assert not plt.get_fignums()
