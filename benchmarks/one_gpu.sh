#!/usr/bin/env bash
# All that is measured of the tiny model on one GPU, in about twelve minutes with warm
# kernel caches: speeds while nothing else computes, then a whole run, then what needs no quiet.
#
#     benchmarks/one_gpu.sh OUT [HEAD [timed|checks]]
#
# OUT gets a JSON file after each step, logs/ and done.txt; a step whose file is there is skipped.
# HEAD is a checkpoint that `mtp-graft demo` spliced; without it one is made with rounded experts.
# `timed` does the speeds only, `checks` the rest, so that two GPUs share the work.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
out=$(realpath -m "$1") base=models/tiny-dsv4/base
mkdir -p "$out/logs"
head=${2:-$out/head}
mtp() { python3 -m mtp_graft.cli "$@"; }

step() { # NAME COMMAND...: skip it if NAME.json is there
    local name=$1 began=$SECONDS
    shift
    [ -e "$out/$name.json" ] && return
    "$@" >"$out/logs/$name.log" 2>&1
    echo "$name: status $?, $((SECONDS - began)) s" >>"$out/done.txt"
}

serve() { # PORT CHECKPOINT OPTIONS...: little memory, so that several fit
    python3 -m mtp_graft.cli serve "${@:2}" --profile none --port "$1" --max-model-len 4096 --max-num-seqs 16 \
        --kv-cache-gib 4 --gpu-memory-utilization 0.1 >"$out/logs/serve-$1.log" 2>&1 &
}

url() { echo "http://127.0.0.1:$1"; }

decode() { # NAME PORT OPTIONS...: in turns with the base's server
    step "$1" mtp bench decode --base-url "$(url "$2")" --against "$(url 8000)" --rounds 1 \
        --limit 8 --max-tokens 256 --run "$out/$1" --json "$out/$1.json" "${@:3}"
}

sweep() { # NAME PORT OPTIONS...
    step "$1" mtp bench sweep --base-url "$(url "$2")" --concurrency 1,4,16 --run "$out/$1" \
        --json "$out/$1.json" "${@:3}"
}

[ -e "$head" ] || step head python3 -c "
from pathlib import Path
from mtp_graft.stages.splice import splice
splice(Path('$base'), Path('models/tiny-dsv4/upstream'), Path('$head'), 'rtn')"
stop() { jobs -p | xargs -r kill; wait; }
trap stop EXIT

timed() { # four servers, asked in turn
    serve 8000 "$base"
    serve 8001 "$head" --k 1
    serve 8003 "$head" --k 3
    serve 8013 "$head" --k 3 --draft-sample-method greedy
    for port in 8000 8001 8003 8013; do
        timeout 600 bash -c "until curl -sf $(url $port)/health; do sleep 1; done" >/dev/null ||
            { echo "no server at $port: see logs/serve-$port.log" >&2; exit 1; }
    done
    decode decode_k3 8003 --pairs 8
    decode temperature_probabilistic 8003 --pairs 6 --temperature 1
    decode temperature_greedy 8013 --pairs 6 --temperature 1
    decode decode_k1 8001 --pairs 6
    step sampling_cost mtp bench decode --base-url "$(url 8003)" --against "$(url 8013)" --rounds 1 \
        --limit 8 --max-tokens 256 --pairs 6 --run "$out/sampling_cost" --json "$out/sampling_cost.json"
    sweep sweep_k3 8003
    sweep sweep_k1 8001
    sweep sweep_base 8000
    stop
}

checks() { # a run and a server with all defaults, each alone on the GPU, then small engines
    step run mtp run recipes/tiny.toml --run "$out/run" --json "$out/run.json"
    step card mtp card "$out/run" --json "$out/card.json"
    step serve_check mtp serve "$head" --profile none --check --json "$out/serve_check.json"
    # These need little memory and no quiet: side by side.
    step rows python3 benchmarks/gpu_serve_check.py --out "$out/rows.json" \
        --reference benchmarks/results/serve_check_cpu.json &
    step gaps python3 benchmarks/gaps.py --runs gpu --out "$out/gaps.json" \
        --only complete "no plugin" &
    wait
}

case ${3:-all} in
timed) timed ;;
checks) checks ;;
*) timed && checks ;;
esac
