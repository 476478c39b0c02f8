"""Language-model-like pretraining for acoustic data: the package behind run_pretrain.py and run_finetune.py."""

import acoustic.models  # noqa: F401  (the architectures, known to transformers' Auto classes from here on)
