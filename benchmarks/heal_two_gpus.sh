#!/usr/bin/env bash
# What healing brings, on two GPUs in about 20 minutes: the tiny head healed in many ways, and served
# beside the head as upstream has it and the base; then a step of training at Flash's size.
#
#     MTP_GRAFT_DATA=... benchmarks/heal_two_gpus.sh OUT SCRATCH
#
# OUT gets result files and logs/; what they have is not measured again. Speed is measured on the
# second GPU while the first one heals, each with half of the cores.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=$(realpath -m "$1") scratch=$2 tiny=models/tiny-dsv4 cores=$(nproc)
run=$scratch/heal first=0-$((cores / 2 - 1)) second=$((cores / 2))-$((cores - 1))
mkdir -p "$out/logs" "$run"
mtp() { python3 -m mtp_graft.cli "$@"; }

on() { # GPU COMMAND...
    local half=$first
    [ "$1" = 1 ] && half=$second
    CUDA_VISIBLE_DEVICES=$1 taskset -c "$half" "${@:2}"
}

step() { # NAME COMMAND...
    local began=$SECONDS
    "${@:2}" >>"$out/logs/$1.log" 2>&1
    echo "$1: status $?, $((SECONDS - began)) s, at $SECONDS" >>"$out/done.txt"
}

heal() { step "heal-$2" on "$1" python3 benchmarks/heal.py --run "$run" --out "$out/heal.json" "${@:3}"; }

captured() { # the base's own texts, and the experts calibrated on some of them
    python3 benchmarks/heal.py --run "$run" --out "$out/heal.json" --prompts
    local set=(--run "$run" --set "capture.calibration_prompts=$run/calibration.jsonl"
        --set "capture.evaluation_prompts=$run/evaluation.jsonl" --set capture.concurrency=128
        --set "capture.calibration_count=$(wc -l <"$run/calibration.jsonl")"
        --set "capture.evaluation_count=$(wc -l <"$run/evaluation.jsonl")")
    step capture on 1 python3 -m mtp_graft.cli capture recipes/tiny.toml "${set[@]}"
    step quantize on 1 python3 -m mtp_graft.cli quantize recipes/tiny.toml "${set[@]}"
}

spliced() { # NAME UPSTREAM: with the calibrated experts
    python3 -c "
from pathlib import Path
from mtp_graft.stages.splice import splice
splice(Path('$tiny/base'), Path('$2'), Path('$scratch/$1'), 'gptq', quantized=Path('$run/quantize'))"
}

url() { echo "http://127.0.0.1:$1"; }

serve() { # PORT CHECKPOINT OPTIONS...
    on 1 python3 -m mtp_graft.cli serve "${@:2}" --profile none --port "$1" --max-model-len 2048 \
        --max-num-seqs 16 --kv-cache-gib 2 --gpu-memory-utilization 0.08 \
        -- --per-request-spec-decode-metrics detailed >"$out/logs/serve-$1.log" 2>&1 &
}

decode() { # NAME PORT AGAINST
    step "$1" on 1 python3 -m mtp_graft.cli bench decode --base-url "$(url "$2")" --against "$(url "$3")" \
        --prompts "$scratch/held.jsonl" --rounds 1 --limit 12 --max-tokens 128 --no-ignore-eos --pairs 6 \
        --run "$out/$1" --json "$out/$1.json"
}

sweep() { # NAME PORT
    step "$1" on 1 python3 -m mtp_graft.cli bench sweep --base-url "$(url "$2")" --concurrency 1,4,16 \
        --prompts "$scratch/held.jsonl" --limit 32 --max-tokens 128 --no-ignore-eos \
        --run "$out/$1" --json "$out/$1.json"
}

served() { # three heads at k = 1, 3, 5 and the base, asked in turn
    grep '"held-' "$run/evaluation.jsonl" >"$scratch/held.jsonl"
    spliced unhealed $tiny/upstream
    spliced healed "$run/ablations/default/heal/upstream"
    local k
    serve 8000 $tiny/base
    for k in 1 3 5; do
        serve 800$k "$scratch/unhealed" --k $k
        serve 801$k "$scratch/healed" --k $k
    done
    for k in 8000 8001 8003 8005 8011 8013 8015; do
        timeout 400 bash -c "until curl -sf $(url "$k")/health; do sleep 1; done" >/dev/null ||
            echo "no server at $k" >>"$out/done.txt"
    done
    wait "${on_second[@]}" # what heals there
    decode healed_k3 8013 8000
    decode healed_k5 8015 8000
    decode unhealed_k3 8003 8000
    local each=()
    for k in 1 3 5; do each+=(--served "unhealed k=$k" "$(url 800$k)" --served "healed k=$k" "$(url 801$k)"); done
    step acceptance on 1 python3 benchmarks/heal.py --run "$run" --out "$out/heal.json" "${each[@]}"
    decode healed_against_unhealed_k3 8013 8003
    sweep sweep_healed_k3 8013
    sweep sweep_base 8000
    sweep sweep_unhealed_k3 8003
    decode healed_against_unhealed_k1 8011 8001
    sweep sweep_healed_k1 8011
    decode unhealed_k5 8005 8000
    sweep sweep_healed_k5 8015
}

later() { # GPU NAMES...: five at a time
    printf '%s\n' "${@:2}" | xargs -P 5 -I{} bash -c "$(declare -f on step heal); out='$out' run='$run' \
        first=$first second=$second; heal $1 '{}' --only '{}'"
}

step flash on 0 python3 benchmarks/heal_full.py --input "$scratch/heal_full" --out "$out/heal_full.json" &
flash=$!
captured
on_second=()
heal 1 default --only default &
on_second+=($!)
heal 1 unhealed --only unhealed &
on_second+=($!)
later 1 rtn "mxfp4, gptq after" "k = 5" &
on_second+=($!)
wait $flash
later 0 "30k tokens" "100k tokens" "loss kl" "loss tv" "loss ce" "loss tv + 0.1 ce" "decay 1" "decay 0.3" \
    "bf16 linears" "router too" "experts too" verse "gsm8k and verse" "1000 steps" "100 steps" "lr 1e-3" \
    "lr 1.5e-4" "k = 1" &
ablations=$!
while [ ! -e "$run/ablations/default/heal/upstream/model.safetensors.index.json" ]; do sleep 1; done
served
wait $ablations
pkill -f "mtp_graft.cli serve"
wait
