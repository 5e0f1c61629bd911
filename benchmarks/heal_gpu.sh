#!/usr/bin/env bash
# What training a drafter brings, on one GPU: the tiny head healed in many ways, and served beside
# the head as upstream has it and the base; a step of healing at Flash's size; a DSpark drafter.
#
#     MTP_GRAFT_DATA=... benchmarks/heal_gpu.sh OUT SCRATCH [PART]...
#
# PART is captured, healed, choices, flash, served, soaked, healed_served, rtn_served, heads,
# dspark_trained, dspark_scored, drafters, asked or dspark_asked, best in this order. OUT gets
# result files and logs/; what they have is not measured again. The last two time servers, and want
# nothing else to compute. KS are the healed head's k, UPSTREAM_KS those of upstream's.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=$(realpath -m "$1") scratch=$2 tiny=models/tiny-dsv4
run=$scratch/heal dspark=$scratch/dspark
mkdir -p "$out/logs" "$run" "$dspark"
export VLLM_DEEP_GEMM_WARMUP=skip # minutes for a cold host; each measurement warms up by itself
mtp() { python3 -m mtp_graft.cli "$@"; }

step() { # NAME COMMAND...
    local began=$SECONDS
    "${@:2}" >>"$out/logs/$1.log" 2>&1
    echo "$1: status $?, $((SECONDS - began)) s" >>"$out/done.txt"
}

heal() { # NAMES...: five at a time
    printf '%s\n' "$@" | xargs -P 5 -I{} python3 benchmarks/heal.py --run "$run" --out "$out/heal.json" --only {}
}

captured() { # the base's own texts, and the experts calibrated on some of them
    python3 benchmarks/heal.py --run "$run" --out "$out/heal.json" --prompts
    local set=(--run "$run" --set "capture.calibration_prompts=$run/calibration.jsonl"
        --set "capture.evaluation_prompts=$run/evaluation.jsonl" --set capture.concurrency=64
        --set "capture.calibration_count=$(($(wc -l <"$run/calibration.jsonl") - 20))" # repeated ones are left out
        --set "capture.evaluation_count=$(($(wc -l <"$run/evaluation.jsonl") - 6))")
    step capture mtp capture recipes/tiny.toml "${set[@]}"
    step quantize mtp quantize recipes/tiny.toml "${set[@]}"
    grep '"held-' "$run/evaluation.jsonl" >"$scratch/held.jsonl" # which nothing is chosen by
}

healed() { step healed heal default rtn unhealed; }

choices() {
    step choices heal "mxfp4, gptq after" "k = 5" "30k tokens" "100k tokens" "loss kl" "loss tv" "loss ce" \
        "loss tv + 0.1 ce" "decay 1" "decay 0.3" "bf16 linears" "router too" "experts too" verse "gsm8k and verse" \
        "1000 steps" "100 steps" "lr 1e-3" "lr 1.5e-4" "k = 1"
}

flash() { step flash python3 benchmarks/heal_full.py --input "$scratch/heal_full" --out "$out/heal_full.json"; }

spliced() { # NAME UPSTREAM VARIANT: experts calibrated if by GPTQ
    python3 -c "
from pathlib import Path
from mtp_graft.stages.splice import splice
quantized = Path('$run/quantize') if '$3' == 'gptq' else None
splice(Path('$tiny/base'), Path('$2'), Path('$scratch/$1'), '$3', quantized=quantized)"
}

url() { echo "http://127.0.0.1:$1"; }

serve() { # PORT CHECKPOINT OPTIONS...
    python3 -m mtp_graft.cli serve "$2" --profile none --port "$1" --max-model-len 2048 --max-num-seqs 16 \
        --kv-cache-gib 2 --gpu-memory-utilization 0.08 "${@:3}" >"$out/logs/serve-$1.log" 2>&1 &
}

ready() { # PORTS...
    local port
    for port in "$@"; do
        timeout 400 bash -c "until curl -sf $(url "$port")/health; do sleep 1; done" >/dev/null ||
            echo "no server at $port" >>"$out/done.txt"
    done
}

decode() { # NAME PORT AGAINST
    step "$1" mtp bench decode --base-url "$(url "$2")" --against "$(url "$3")" --prompts "$scratch/held.jsonl" \
        --rounds 1 --limit 32 --max-tokens 128 --no-ignore-eos --pairs 4 --run "$out/$1" --json "$out/$1.json"
}

sweep() { # NAME PORT: twice, for the first one compiles what it needs
    local asked=(mtp bench sweep --base-url "$(url "$2")" --concurrency "1,4,16" --prompts "$scratch/held.jsonl"
        --limit 32 --max-tokens 128 --no-ignore-eos)
    step "$1_warm" "${asked[@]}"
    step "$1" "${asked[@]}" --run "$out/$1" --json "$out/$1.json"
}

METRICS=(-- --per-request-spec-decode-metrics detailed)
served() { # the base and upstream's head
    spliced unhealed $tiny/upstream gptq
    serve 8000 $tiny/base
    local k
    for k in ${UPSTREAM_KS-3 5}; do serve "800$k" "$scratch/unhealed" --k "$k" "${METRICS[@]}"; done
}

healed_served() {
    spliced healed "$run/ablations/default/heal/upstream" gptq
    local k
    for k in ${KS:-1 2 3 4 5}; do serve "801$k" "$scratch/healed" --k "$k" "${METRICS[@]}"; done
}

rtn_served() {
    spliced rtn "$run/ablations/rtn/heal/upstream" rtn
    serve 8023 "$scratch/rtn" --k 3 "${METRICS[@]}"
}

soak() { # NAME PORT
    step "$1" mtp bench soak --base-url "$(url "$2")" --minutes 5 --concurrency 16 --run "$out/$1" \
        --json "$out/$1.json"
}

soaks=()
soaked() { # five minutes, in the background
    ready 8000 8003
    soak soak_base 8000 & soaks+=($!)
    soak soak_k3 8003 & soaks+=($!)
}

asked() { # in turn, then several requests at a time
    local pid
    for pid in "${soaks[@]}"; do wait "$pid"; done
    ready 8000 8003 8005 8013 8015
    decode healed_against_unhealed_k5 8015 8005
    decode unhealed_k5 8005 8000
    sweep sweep_base 8000
    sweep sweep_healed_k3 8013
    decode healed_k5 8015 8000
    decode unhealed_k3 8003 8000
    decode healed_k3 8013 8000
    sweep sweep_healed_k5 8015
    sweep sweep_unhealed_k3 8003
}

dspark_asked() {
    decode dspark_against_healed_k5 8035 8015
    decode dspark_k5 8035 8000
    decode dspark_k3 8033 8000
    sweep sweep_dspark_k5 8035
}

accepted() { # NAME RUN WORDS...: what servers accept, by `--served NAME URL`
    step "$1" python3 benchmarks/heal.py --run "$2" --out "$out/heal.json" --concurrency 4 "${@:3}"
}

heads() {
    local k each=()
    for k in ${KS:-1 2 3 4 5}; do each+=(--served "healed k=$k" "$(url "801$k")"); done
    ready 8003 8005 8013 8015 8023
    accepted acceptance "$run" --served "unhealed k=3" "$(url 8003)" --served "unhealed k=5" "$(url 8005)" \
        --served "rtn k=3" "$(url 8023)" "${each[@]}"
}

drafters() { # DSpark's servers beside the healed head's; what is accepted, not timed
    local name k port each=()
    for name in mxfp4 gptq; do
        for k in 3 5; do
            port=80$([ $name = mxfp4 ] && echo 3 || echo 4)$k
            serve "$port" "$dspark/dspark/$name" --k $k "${METRICS[@]}"
            each+=(--served "dspark-$name k=$k" "$(url "$port")")
        done
    done
    for k in 3 5; do each+=(--served "healed k=$k" "$(url "801$k")"); done
    ready 8000 8013 8015 8033 8035 8043 8045
    accepted dspark_acceptance "$dspark" "${each[@]}"
}

# DSpark: trained on the captured texts and on more, scored on those whose taps forward.py records

dspark_trained() { # with the options of make/dspark.py in DSPARK
    local make=$tiny/make
    [ -e "$dspark/capture" ] || step dspark_texts python3 $make/forward.py --texts "$run/capture" \
        --out "$dspark/capture"
    mkdir -p "$dspark/train" && grep -v '"held-\|"verse-[0-9]*", "split": "eval' \
        "$run/capture/texts.jsonl" >"$dspark/train/texts.jsonl"
    # shellcheck disable=SC2086
    step dspark_trained python3 $make/dspark.py --texts "$dspark/train" \
        --data "$MTP_GRAFT_DATA" --out "$out/dspark" ${DSPARK:-}
}

dspark_scored() {
    step dspark_scored python3 benchmarks/dspark.py --run "$dspark" --drafter "$out/dspark" --out "$out/dspark.json"
}

trap 'jobs -p | xargs -r kill; wait' EXIT
shift 2
for part in "${@:-captured healed choices flash served soaked healed_served rtn_served heads dspark_trained dspark_scored drafters asked dspark_asked}"; do
    for each in $part; do "$each"; done
done
