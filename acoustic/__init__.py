"""Language-model-like pretraining for acoustic data: the package behind run_pretrain.py and run_finetune.py."""
