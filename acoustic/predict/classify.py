"""Which class a recording is of, or which of several are there at once."""

from collections.abc import Iterator

import torch
import transformers

from acoustic.data.headers import Header
from acoustic.data.windows import Plan, divide_evenly
from acoustic.predict.predictor import Head
from acoustic.tasks.multilabel import DEFAULT_THRESHOLD


class Classifier(Head):
    """A recording longer than a window is cut evenly, and the parts' probabilities are averaged, as in evaluation.

    {"prediction", "scores": {class: probability}}; of several classes at once {"labels", "scores"}: the labels are
    those whose probability reaches the threshold in `config.thresholds` (a list by class id), else 0.5.
    """

    auto_class = transformers.AutoModelForAudioClassification

    def plan(self) -> Plan:
        return divide_evenly(0.0, self.max_seconds)

    def answer(self, header: Header, heard: Iterator) -> dict:
        config = self.model.config
        several = config.problem_type == "multi_label_classification"
        # A sum, not a list: small tensors that stay between large ones that go would keep the memory of these.
        total, count = torch.zeros(len(self.classes), dtype=torch.float64), 0
        for _, logits in heard:
            total += logits.sigmoid() if several else logits.softmax(-1)
            count += 1
        scores = (total / count).numpy()
        named = {name: round(float(score), 6) for name, score in zip(self.classes, scores)}
        if not several:
            return {"prediction": self.classes[scores.argmax()], "scores": named}
        least = getattr(config, "thresholds", None) or [DEFAULT_THRESHOLD] * len(self.classes)
        return {"labels": [name for name, score, t in zip(self.classes, scores, least) if score >= t], "scores": named}
