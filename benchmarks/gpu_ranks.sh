#!/bin/bash
# Everything that several GPUs of one machine have to show, the weightiest first. It needs no network.
#
#   benchmarks/gpu_ranks.sh OUT [CASE...]        GPUS=8 to use fewer than there are
#
#   machine    the cards, their links, the version of NCCL
#   equal      the losses of N ranks are those of one, for ddp, fsdp2 and hsdp, in fp32: 20 steps of the quickstart
#   killed     a rank is killed: all end within 60 s with an exit code that is not 0, and the same command ends in the losses of a run
#              that nobody touched
#   speed      tokens/s and peak memory of 8 steps: 1B with ddp, 8B with fsdp2 and hsdp, random weights, on 2, 4, ... GPUs
#
# OUT/ranks_gpu.csv gets a row as soon as it is known, OUT/logs what the runs said. Started again with the same OUT, the script goes on
# with what has no row of result "ok". A run has LIMIT seconds (300), after which it ends with 124. The exit code is 1 if a row says "failed".
set -u
out=${1:?usage: benchmarks/gpu_ranks.sh OUT [CASE...]}; shift
mkdir -p "$out/logs" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit 74
csv=$out/ranks_gpu.csv limit=${LIMIT:-300} wanted=${*:-machine equal killed speed}
commit=${MINISFT_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
quickstart=(configs/quickstart.toml --precision fp32 --eval_steps never --generate_data none --generate_group_field none --report_to '[]' --progress_bar false)

row() { # part, strategy, ranks, result, value, unit, note
  [ -e "$csv" ] || echo "date,commit,gpu,part,strategy,ranks,result,value,unit,note" > "$csv"
  echo "$(date -u +%Y-%m-%dT%H:%MZ),$commit,$gpu,$1,$2,$3,$4,$5,$6,\"${7//\"/}\"" >> "$csv"
  sync "$csv"
  echo "$1 $2 $3 ranks: $4 $5 $6 $7"
}
is_done() { grep -q ",$1,$2,$3,ok," "$csv" 2>/dev/null; }

start() { # name, ranks, options of minisft.train: a run, whose log is OUT/logs/<name>.log
  local name=$1 ranks=$2; shift 2
  timeout --kill-after 30 "$limit" torchrun --standalone --nproc-per-node "$ranks" -m minisft.train "$@" \
    --output_dir "$out/$name" > "$out/logs/$name.log" 2>&1
}
reason() { grep -h "error:" "$out/logs/$1.log" | head -1 | tr ',' ';' | cut -c 1-200; }
losses() { # of two runs, step by step: the largest relative difference
  python - "$1/metrics.jsonl" "$2/metrics.jsonl" << 'PY'
import json, sys
a, b = ([row["loss"] for row in map(json.loads, open(path)) if "loss" in row] for path in sys.argv[1:])
print(f"{max(abs(x - y) / abs(y) for x, y in zip(a, b)):.2e}" if len(a) == len(b) > 0 else "nan")
PY
}
least() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a + 0 == a && a < b) }'; } # whether a < b, both numbers
last_timing() { # of a run: the value of a key in the last line of timings.jsonl
  python - "$1/timings.jsonl" "$2" << 'PY'
import json, sys
print(f"{json.loads(open(sys.argv[1]).read().splitlines()[-1])[sys.argv[2]]:.4g}")
PY
}

# ---- the machine ----
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
count=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | wc -l)
[ "$count" -ge 2 ] || { echo "$count GPUs here; two at least are needed" >&2; exit 1; }
count=${GPUS:-$count}
if [[ " $wanted " == *" machine "* ]] && ! is_done machine - "$count"; then
  { nvidia-smi; nvidia-smi topo -m; } > "$out/logs/machine.txt" 2>&1
  nccl=$(python -c "import torch; print(torch.__version__, *(torch.cuda.nccl.version() if torch.cuda.is_available() else ['none']), sep='.')")
  row machine - "$count" ok "" "" "torch and NCCL $nccl; links in logs/machine.txt"
fi

# ---- equal: as many packs a step on all ranks as on one ----
packs=$((2 * count))
if [[ " $wanted " == *" equal "* ]]; then
  [ -e "$out/one/model" ] || start one 1 "${quickstart[@]}" --max_steps 20 --logging_steps 1 --per_device_train_batch_size "$packs"
  for strategy in ddp fsdp2 hsdp; do
    is_done equal $strategy "$count" && continue
    [ $strategy = hsdp ] && [ $((count % 2)) -eq 1 -o "$count" -lt 4 ] && continue # two groups of two at least
    rm -rf "$out/$strategy"
    if start $strategy "$count" "${quickstart[@]}" --max_steps 20 --logging_steps 1 --per_device_train_batch_size 2 --strategy $strategy; then
      differs=$(losses "$out/$strategy" "$out/one")
      least "$differs" 1e-4 && result=ok || result=failed
      row equal $strategy "$count" $result "$differs" relative "largest difference of the losses of 20 steps; at most 1e-4"
    else
      row equal $strategy "$count" failed "" "" "exit code $?: $(reason $strategy)"
    fi
  done
fi

# ---- killed: SIGKILL to the last rank once a checkpoint is there ----
if [[ " $wanted " == *" killed "* ]]; then
  for strategy in ddp fsdp2; do
    is_done killed $strategy "$count" && continue
    rm -rf "$out/killed-$strategy" "$out/whole-$strategy"
    options=("${quickstart[@]}" --max_steps 400 --save_steps 50 --logging_steps 50 --per_device_train_batch_size 2 --strategy $strategy)
    start "killed-$strategy" "$count" "${options[@]}" & run=$!
    for _ in $(seq "$limit"); do ls -d "$out/killed-$strategy/checkpoints/step-"* > /dev/null 2>&1 && break; sleep 1; done
    # a rank's command has no torchrun in it, and its folder has
    victim=$(pgrep -f "minisft.train .*--output_dir $out/killed-$strategy\$" | while read -r pid; do
      grep -q torchrun "/proc/$pid/cmdline" || echo "$pid"; done | tail -n 1)
    [ -n "$victim" ] && kill -KILL "$victim"
    began=$(date +%s); wait $run; code=$?; took=$(($(date +%s) - began))
    if [ -z "$victim" ] || [ $code -eq 0 ]; then
      row killed $strategy "$count" failed "" "" "no rank could be killed in time: $(reason "killed-$strategy")"
    elif [ $took -gt 60 ]; then
      row killed $strategy "$count" failed $took s "all ranks should have ended within 60 s"
    elif start "killed-$strategy" "$count" "${options[@]}" && start "whole-$strategy" "$count" "${options[@]}"; then
      differs=$(losses "$out/killed-$strategy" "$out/whole-$strategy")
      least "$differs" 1e-5 && result=ok || result=failed
      row killed $strategy "$count" $result $took s "until all had ended; losses after the resume within $differs"
    else
      code=$? # 124: out of time
      row killed $strategy "$count" failed "" "" "the resume, or the run beside it: exit code $code; $(reason "killed-$strategy")"
    fi
  done
fi

# ---- speed: rows of the quickstart, packed to 4,096 tokens; one pack a GPU ----
llama() { # name, hidden, intermediate, layers, heads, checkpointing, tied
  cat > "$out/$1.toml" << TOML
output_dir = "$out/unused"
[model]
tokenizer_name_or_path = "$PWD/configs/quickstart/tokenizer"
gradient_checkpointing = $6
config = { model_type = "llama", vocab_size = 128256, hidden_size = $2, intermediate_size = $3, num_hidden_layers = $4, num_attention_heads = $5, num_key_value_heads = 8, max_position_embeddings = 4096, tie_word_embeddings = $7 }
[data]
train_data = "$PWD/configs/quickstart/train.jsonl"
prompt_format = "plain"
max_length = 4096
packing = true
[train]
max_steps = 8
per_device_train_batch_size = 1
[evaluate]
eval_steps = "never"
[checkpoint]
save_steps = "never"
[log]
logging_steps = 4 # the first four steps are not what counts
report_to = []
progress_bar = false
TOML
}
if [[ " $wanted " == *" speed "* ]]; then
  llama 1B 2048 8192 16 32 false true
  llama 8B 4096 14336 32 32 true false
  for case in "1B ddp" "8B fsdp2" "8B hsdp"; do
    read -r model strategy <<< "$case"
    for ((ranks = 2; ranks <= count; ranks *= 2)); do
      is_done "speed-$model" "$strategy" "$ranks" && continue
      [ "$strategy" = hsdp ] && [ "$ranks" -lt 4 ] && continue
      name=speed-$model-$strategy-$ranks
      rm -rf "${out:?}/$name"
      if start "$name" "$ranks" "$out/$model.toml" --strategy "$strategy"; then
        memory=$(last_timing "$out/$name" peak_memory_gib)
        row "speed-$model" "$strategy" "$ranks" ok "$(last_timing "$out/$name" tokens_per_second)" tokens/s "$memory GiB at the peak of rank 0"
      else
        row "speed-$model" "$strategy" "$ranks" failed "" "" "exit code $?: $(reason "$name")"
      fi
      rm -rf "${out:?}/$name/checkpoints" "${out:?}/$name/model" # 100 GB
    done
  done
fi
! grep -q ",failed," <(awk -F, '{ last[$4 "," $5 "," $6] = $0 } END { for (k in last) print last[k] }' "$csv")
