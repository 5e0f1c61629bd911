#!/usr/bin/env bash
# A tiny DSpark drafter: trained, quantized, scored offline, served beside the base. One GPU.
#
#     MTP_GRAFT_DATA=... benchmarks/dspark_gpu.sh OUT SCRATCH [captured|trained|scored|served]...
#
# OUT gets result files, the drafter and logs/; what is there is not made again.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=$(realpath -m "$1") run=$2/dspark tiny=models/tiny-dsv4
mkdir -p "$out/logs" "$run"
export VLLM_DEEP_GEMM_WARMUP=skip # minutes for a cold host; each measurement warms up by itself
mtp() { python3 -m mtp_graft.cli "$@"; }

step() { # NAME COMMAND...
    local began=$SECONDS
    "${@:2}" >>"$out/logs/$1.log" 2>&1
    echo "$1: status $?, $((SECONDS - began)) s" >>"$out/done.txt"
}

captured() { # what the base says to all training questions, with what the drafter reads of it
    python3 benchmarks/heal.py --run "$run" --out "$out/dspark_served.json" --prompts --questions 7473
    step dspark-capture mtp capture recipes/tiny.toml --run "$run" --set capture.taps='[1, 2, 3]' \
        --set "capture.calibration_prompts=$run/calibration.jsonl" --set capture.concurrency=96 \
        --set "capture.evaluation_prompts=$run/evaluation.jsonl" \
        --set "capture.calibration_count=$(($(wc -l <"$run/calibration.jsonl") - 50))" \
        --set "capture.evaluation_count=$(($(wc -l <"$run/evaluation.jsonl") - 6))"
}

trained() { # ARGUMENTS of dspark.py in DSPARK; judged while it trains on the questions to choose by
    python3 -c "
from pathlib import Path
import sys
sys.path.insert(0, 'benchmarks')
from heal import part_of
part_of(Path('$run/capture'), Path('$run/train-${DSPARK_NAME:-dspark}'), '', 'choose')"
    # shellcheck disable=SC2086
    step "train-${DSPARK_NAME:-dspark}" python3 $tiny/make/dspark.py --capture "$run/train-${DSPARK_NAME:-dspark}" \
        --out "$out/${DSPARK_NAME:-dspark}" ${DSPARK:-}
}

scored() {
    step dspark-score python3 benchmarks/dspark.py --run "$run" --drafter "$out/dspark" --out "$out/dspark.json"
}

serve() { # PORT CHECKPOINT OPTIONS...
    python3 -m mtp_graft.cli serve "$2" --profile none --port "$1" --max-model-len 2048 --max-num-seqs 16 \
        --kv-cache-gib 2 --gpu-memory-utilization 0.1 "${@:3}" >"$out/logs/serve-$1.log" 2>&1 &
}

served() {
    local name port each=() url=http://127.0.0.1
    serve 8020 $tiny/base
    for name in mxfp4 gptq; do
        for k in 3 5; do
            port=80$([ $name = mxfp4 ] && echo 2 || echo 3)$k
            serve "$port" "$run/dspark/$name" --k $k -- --per-request-spec-decode-metrics detailed
            each+=(--served "dspark-$name k=$k" "$url:$port")
        done
    done
    for port in 8020 8023 8025 8033 8035; do
        timeout 400 bash -c "until curl -sf $url:$port/health; do sleep 1; done" >/dev/null ||
            echo "no server at $port" >>"$out/done.txt"
    done
    step dspark-acceptance python3 benchmarks/heal.py --run "$run" --out "$out/dspark_served.json" --concurrency 4 "${each[@]}"
    grep '"held-' "$run/evaluation.jsonl" >"$run/held.jsonl"
    for port in 8025 8023; do
        step "dspark-decode-$port" mtp bench decode --base-url $url:$port --against $url:8020 --prompts "$run/held.jsonl" \
            --rounds 1 --limit 12 --max-tokens 128 --no-ignore-eos --pairs 6 --run "$out/decode-$port" \
            --json "$out/dspark_decode_$port.json"
    done
    jobs -p | xargs -r kill
    wait
}

shift 2
for part in "${@:-captured trained scored served}"; do
    for each in $part; do "$each"; done
done
