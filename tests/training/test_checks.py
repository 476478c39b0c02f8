"""The watch over the other objectives: every verdict is said of a run that goes wrong, none of one that learns."""

import math
import random

import pytest

from acoustic.training.checks import CODES, FAMILIES, PREDICTIVE, RECONSTRUCTION
from acoustic.training.health import Facts, watch

RUN = {"max_steps": 20_000, "warmup_steps": 1600, "learning_rate": 5e-4, "update_seconds": 350.0}
MACHINE = {"num_workers": 2, "cores": 8}
NO_CODES = {"num_codes": 0, "num_groups": 0}


def facts(**changed) -> Facts:
    return Facts(**{"num_negatives": 0, **NO_CODES, **RUN, **MACHINE, **changed})


WAV2VEC = facts(num_negatives=10, binary=True)
CPC = facts(num_negatives=128)
VQ = facts(num_negatives=10, binary=True, num_codes=640, num_groups=2)
MEL = facts()
CODE_BERT = facts(num_codes=640, num_groups=2)


def course(values, last: int, seed: int) -> list[dict]:
    """values: (learned from 0 to 1, noise) -> what is logged."""
    noise = random.Random(seed)
    history = []
    for step in (1, *range(10, last + 1, 10)):
        learned = 1 - math.exp(-max(step - 200, 0) / 1500)
        common = {"grad_norm": (0.2 + learned) * math.exp(noise.gauss(0, 0.4)), "data_wait_fraction": 0.01}
        history.append({"step": step, **common, **values(learned, lambda width: noise.gauss(0, width))})
    return history


def predictive(given: Facts):
    def values(learned, noise):
        loss = given.chance_loss * (1 - 0.5 * learned) + noise(0.03)
        accuracy = given.chance_accuracy + 0.5 * learned + noise(0.01)
        codes = (
            {"code_perplexity": 200 + noise(5), "lowest_group_perplexity": 90 + noise(3)} if given.num_codes else {}
        )
        return {"loss": loss, "contrastive_loss": loss, "accuracy": max(accuracy, 0.0), **codes}

    return values


def reconstruction(learned, noise):
    loss = 0.8 * (1 - 0.4 * learned) + noise(0.01)
    return {"loss": loss, "reconstruction_loss": loss, "mean_predictor_loss": 0.8 + noise(0.01)}


def codes(learned, noise):
    loss = 5.0 * (1 - 0.3 * learned) + noise(0.03)
    quantizer = {"code_perplexity": 150 + noise(4), "lowest_group_perplexity": 70 + noise(2)}
    return {"loss": loss, "unigram_loss": 5.0 + noise(0.02), "accuracy": 0.1 + 0.2 * learned, **quantizer}


# objective -> (family, facts, what a run that learns logs)
RUNS = {
    "wav2vec": (PREDICTIVE, WAV2VEC, predictive(WAV2VEC)),
    "cpc": (PREDICTIVE, CPC, predictive(CPC)),
    "vq_wav2vec": (PREDICTIVE, VQ, predictive(VQ)),
    "mockingjay": (RECONSTRUCTION, MEL, reconstruction),
    "code_bert": (CODES, CODE_BERT, codes),
}


def run(name: str, last: int = 4000, seed: int = 0, since: int = 0, **changed) -> list:
    """changed: what is logged from the update `since` on, in the place of what would be."""
    family, given, values = RUNS[name]
    history = [{**entry, **(changed if entry["step"] >= since else {})} for entry in course(values, last, seed)]
    return watch(history, given, family)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_said_of_a_run_that_learns(name, seed):
    assert run(name, seed=seed) == []


CHANCE_10 = WAV2VEC.chance_loss
FLAT_10 = {"loss": CHANCE_10, "contrastive_loss": CHANCE_10, "accuracy": 0.09}
MEAN = {"loss": 0.8, "reconstruction_loss": 0.8, "mean_predictor_loss": 0.8}
WRONG = {
    ("wav2vec", "at_chance"): FLAT_10,
    ("cpc", "at_chance"): {"contrastive_loss": CPC.chance_loss, "accuracy": 0.01},
    ("vq_wav2vec", "codebook_collapse"): {"code_perplexity": 2.0, "lowest_group_perplexity": 1.0},
    ("vq_wav2vec", "dead_code_group"): {"code_perplexity": 50.0, "lowest_group_perplexity": 1.0, "since": 500},
    ("cpc", "loss_at_zero"): {"contrastive_loss": 0.001, "accuracy": 1.0, "since": 500},
    ("wav2vec", "vanished_gradients"): {"grad_norm": 1e-9},
    ("cpc", "exploding_gradients"): {"grad_norm": 5000.0, "since": 1000},
    ("cpc", "data_bound"): {"data_wait_fraction": 0.7},
    ("cpc", "learning_rate_too_high"): {"contrastive_loss": 4.0, "accuracy": 0.15, "since": 2500},
    ("mockingjay", "at_the_mean"): MEAN,
    ("mockingjay", "vanished_gradients"): {"grad_norm": 1e-9},
    ("mockingjay", "exploding_gradients"): {"grad_norm": 500.0},
    ("mockingjay", "learning_rate_too_high"): {"reconstruction_loss": 0.74, "since": 2500},
    ("mockingjay", "data_bound"): {"data_wait_fraction": 0.7},
    ("code_bert", "codebook_collapse"): {"code_perplexity": 2.0, "lowest_group_perplexity": 1.0},
    ("code_bert", "at_the_frequencies"): {"loss": 5.0, "unigram_loss": 5.0},
    ("code_bert", "learning_rate_too_high"): {"loss": 4.5, "since": 2500},
    ("code_bert", "vanished_gradients"): {"grad_norm": 1e-9},
    ("code_bert", "exploding_gradients"): {"grad_norm": 500.0},
    ("code_bert", "data_bound"): {"data_wait_fraction": 0.7},
}


@pytest.mark.parametrize("name, verdict", WRONG)
def test_what_goes_wrong_is_said_once_with_its_cure(name, verdict):
    (said,) = run(name, **WRONG[name, verdict])
    assert said.name == verdict
    assert "--" in said.line and f"since update {said.since}" in said.line.replace("Since", "since")
    # These are wav2vec 2.0's own.
    assert not any(option in said.line for option in ("mask_time_length", "diversity_loss_weight", "--negatives_from"))


def test_every_check_of_every_family_has_a_history():
    """wav2vec 2.0's are in test_health.py."""
    families = {name: RUNS[name][0] for name in RUNS}
    covered = {(id(families[name]), verdict) for name, verdict in WRONG}
    for family in FAMILIES.values():
        if family.loss in ("reconstruction_loss", "loss") or family is PREDICTIVE:
            assert {(id(family), check.name) for check in family.checks} <= covered


def test_chance_of_what_is_judged_by_itself():
    """Eleven candidates, each given odds of 1 to 10; and nothing else does better."""

    def loss(odds):
        share = odds / (1 + odds)
        return -math.log(share) - 10 * math.log(1 - share)

    assert WAV2VEC.chance_loss == pytest.approx(loss(0.1))
    assert WAV2VEC.chance_loss <= min(loss(odds) for odds in (0.05, 0.09, 0.11, 0.2, 1.0))
