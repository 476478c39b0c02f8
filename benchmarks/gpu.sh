#!/usr/bin/env bash
# bash benchmarks/gpu.sh [steps compiled others pretraining]
#
# What matters on one GPU, in under ten minutes: our pretraining step beside stock transformers, what fits, and two
# minutes of a real pretraining. Needs a GPU that PyTorch sees through CUDA (made for an H200; 24 GB do, with less
# of the largest batches) and the libraries of requirements.txt, in .venv (`make venv`) or in the Python that PYTHON
# names. Works without any data. Parts can be named; what the time (BUDGET seconds, 580) isn't enough for is left out,
# and said. Writes into the folder RESULTS (benchmarks/results).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-.venv/bin/python}
RESULTS=${RESULTS:-benchmarks/results}
BUDGET=${BUDGET:-580}
PARTS=${*:-steps compiled others pretraining}
STEPS="$RESULTS/pretrain_step_cuda.json"
LOG="$RESULTS/pretraining_cuda.log"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore

fail() { echo "gpu.sh: $1" >&2; exit 2; }
for part in $PARTS; do
  [[ " steps compiled others pretraining " == *" $part "* ]] || fail "no part $part; there are: steps compiled others pretraining"
done
command -v "$PYTHON" >/dev/null || fail "no $PYTHON; \`make venv\` makes one, or PYTHON=python3 bash benchmarks/gpu.sh takes another"
"$PYTHON" -c 'import soundfile, torch, torchaudio, transformers, accelerate, datasets, matplotlib' \
  || fail "$PYTHON lacks a library; $PYTHON -m pip install -r requirements.txt"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
  || fail "PyTorch finds no CUDA GPU (look at nvidia-smi, and at torch.version.cuda)"
mkdir -p "$RESULTS"

# run SECONDS COMMAND...: not begun where less than a third of that is left, ended when the budget is spent.
run() {
  local wanted=$1 left=$((BUDGET - SECONDS))
  shift
  if ((left < wanted / 3)); then
    echo "left out, only $left s left: $*"
    return
  fi
  echo "+ $*"
  timeout --kill-after=10 "$left" "$@" || echo "ended with code $?: $*"
}
measure() { run "$1" "$PYTHON" benchmarks/pretrain_step.py --device cuda --repeats 1 --output "$STEPS" "${@:2}"; }

has() { [[ " $PARTS " == *" $1 "* ]]; }

if has steps; then
  measure 90 --size base --precision bfloat16
fi
if has pretraining; then
  # Unlabeled audio only matters; the batch is the paper's for one GPU, 87.5 s.
  sounds=outputs/gpu/sounds
  run 60 "$PYTHON" recipes/demo/synthesize.py --output_dir "$sounds" --hours 0.5 --labeled_per_class 1 --test_per_class 1 \
    --num_workers "$(nproc)"
  run 150 timeout 150 "$PYTHON" run_pretrain.py --dataset_name "$sounds" --train_split_name unlabeled \
    --output_dir outputs/gpu/pretrain --overwrite_output_dir --config_overrides '{"layerdrop": 0.0}' --bf16 --torch_compile \
    --max_steps 800 --warmup_steps 80 --learning_rate 5e-4 --logging_steps 40 --eval_strategy no --save_strategy no \
    --dataloader_num_workers 6 2>&1 | tee "$LOG"
fi
if has others; then
  measure 60 --size base --precision float32 --lengths fixed --steps 10
  measure 60 --size large --precision bfloat16 --lengths fixed --steps 10
  measure 90 --size base --precision bfloat16 --largest_batch --steps 5
fi
if has compiled; then
  measure 100 --size base --precision bfloat16 --lengths fixed --compile on
  measure 150 --size base --precision bfloat16 --lengths voice_prompts --compile on --steps 10
fi

for file in "$STEPS" "$LOG"; do
  [[ -f $file ]] && echo "wrote $file"
done
echo "$SECONDS s"
