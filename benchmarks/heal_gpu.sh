#!/usr/bin/env bash
# What training a drafter brings, on one GPU: the tiny head healed in many ways, and served beside
# the head as upstream has it and the base; a step of healing at Flash's size; a DSpark drafter.
#
#     MTP_GRAFT_DATA=... benchmarks/heal_gpu.sh OUT SCRATCH [PART]...
#
# PART is captured, healed, choices, flash, dspark_trained, served, asked, loaded or timed. OUT gets
# result files and logs/; what they have is not measured again. After `captured` and `healed`,
# `served` starts the head that is healed by default beside others, `asked` times them while nothing
# else runs, `loaded` holds five minutes of load and starts DSpark's servers, `timed` times these.
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

healed() { step healed heal default unhealed; }

choices() {
    step choices heal rtn "mxfp4, gptq after" "k = 5" "30k tokens" "100k tokens" "loss kl" "loss tv" "loss ce" \
        "loss tv + 0.1 ce" "decay 1" "decay 0.3" "bf16 linears" "router too" "experts too" verse "gsm8k and verse" \
        "1000 steps" "100 steps" "lr 1e-3" "lr 1.5e-4" "k = 1"
}

flash() { step flash python3 benchmarks/heal_full.py --input "$scratch/heal_full" --out "$out/heal_full.json"; }

spliced() { # NAME UPSTREAM: with the calibrated experts
    python3 -c "
from pathlib import Path
from mtp_graft.stages.splice import splice
splice(Path('$tiny/base'), Path('$2'), Path('$scratch/$1'), 'gptq', quantized=Path('$run/quantize'))"
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
        --rounds 1 --limit 12 --max-tokens 128 --no-ignore-eos --pairs 6 --run "$out/$1" --json "$out/$1.json"
}

sweep() { # NAME PORT: twice, for the first one compiles what it needs
    local asked=(mtp bench sweep --base-url "$(url "$2")" --concurrency "1,4,16" --prompts "$scratch/held.jsonl"
        --limit 32 --max-tokens 128 --no-ignore-eos)
    step "$1_warm" "${asked[@]}"
    step "$1" "${asked[@]}" --run "$out/$1" --json "$out/$1.json"
}

METRICS=(-- --per-request-spec-decode-metrics detailed)
served() { # the base, upstream's head and the healed one
    spliced unhealed $tiny/upstream
    spliced healed "$run/ablations/default/heal/upstream"
    serve 8000 $tiny/base
    local k
    for k in 3 5; do serve 800$k "$scratch/unhealed" --k $k "${METRICS[@]}"; done
    for k in 1 3 5; do serve 801$k "$scratch/healed" --k $k "${METRICS[@]}"; done
    ready 8000 8003 8005 8011 8013 8015
}

asked() { # in turn, then several requests at a time
    decode healed_k5 8015 8000
    decode unhealed_k3 8003 8000
    decode healed_k3 8013 8000
    decode unhealed_k5 8005 8000
    decode healed_against_unhealed_k5 8015 8005
    sweep sweep_base 8000
    sweep sweep_healed_k3 8013
    sweep sweep_unhealed_k3 8003
    sweep sweep_healed_k5 8015
}

accepted() { # NAME RUN WORDS...: what servers accept, by `--served NAME URL`
    step "$1" python3 benchmarks/heal.py --run "$2" --out "$out/heal.json" --concurrency 4 "${@:3}"
}

soak() { # NAME PORT
    step "$1" mtp bench soak --base-url "$(url "$2")" --minutes 5 --concurrency 16 --run "$out/$1" \
        --json "$out/$1.json"
}

loaded() { # not timed: soaks, and what is accepted
    local name k port soaks=() each=() healed=()
    soak soak_base 8000 & soaks+=($!)
    soak soak_k3 8013 & soaks+=($!)
    for k in 2 4; do serve 801$k "$scratch/healed" --k $k "${METRICS[@]}"; done
    dspark_scored
    for name in mxfp4 gptq; do
        for k in 3 5; do
            port=80$([ $name = mxfp4 ] && echo 2 || echo 3)$k
            serve "$port" "$dspark/dspark/$name" --k $k "${METRICS[@]}"
            each+=(--served "dspark-$name k=$k" "$(url "$port")")
        done
    done
    ready 8012 8014
    for k in 1 2 4 5; do healed+=(--served "healed k=$k" "$(url 801$k)"); done
    accepted acceptance "$run" --served "unhealed k=3" "$(url 8003)" \
        --served "unhealed k=5" "$(url 8005)" "${healed[@]}"
    ready 8023 8025 8033 8035
    accepted dspark_acceptance "$dspark" "${each[@]}"
    wait "${soaks[@]}"
    accepted acceptance "$run" --served "healed k=3" "$(url 8013)"
}

timed() { # DSpark beside the base
    decode dspark_k5 8025 8000
    decode dspark_k3 8023 8000
    sweep sweep_dspark_k5 8025
}

# DSpark: trained on the base's training texts and the captured ones, whose states transformers computes

dspark_trained() { # with the options of make/dspark.py in DSPARK
    local make=$tiny/make
    [ -e "$dspark/capture" ] || step dspark_texts python3 $make/forward.py --texts "$run/capture" \
        --data "$MTP_GRAFT_DATA" --out "$dspark/capture"
    PYTHONPATH=benchmarks:${PYTHONPATH:-} python3 -c "
from pathlib import Path
from heal import part_of
part_of(Path('$dspark/capture'), Path('$dspark/train'), '', 'choose')"
    # shellcheck disable=SC2086
    step dspark_trained python3 $make/dspark.py --capture "$dspark/train" --out "$out/dspark" ${DSPARK:-}
}

dspark_scored() {
    step dspark_scored python3 benchmarks/dspark.py --run "$dspark" --drafter "$out/dspark" --out "$out/dspark.json"
}

trap 'jobs -p | xargs -r kill; wait' EXIT
shift 2
for part in "${@:-captured healed choices flash dspark_trained served asked loaded timed}"; do
    for each in $part; do "$each"; done
done
