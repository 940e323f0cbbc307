#!/usr/bin/env bash
# The records of docs/benchmarks and docs/conformance that need GPUs, on a host with two of one kind:
#
#     OUT=/tmp/records COMMIT=$(git rev-parse --short HEAD) bash bench/record.sh heads
#
# heads: kernels, heads of models, conformance, trained states, sweeps and the filter's threshold (12 to 13 minutes);
# models: loss curves, families of transformers (7); split: a vocabulary on both GPUs (3). Several parts run one after
# another. Every step ends by the time it is given and keeps what it has found till then: $OUT/steps.log has the time of
# each, $OUT/NAME.log what it printed; LIMIT=SECONDS ends a part sooner. Nothing else may run on the GPUs. Then
#
#     cp -r /tmp/records/{benchmarks,conformance,assets} docs/ && python bench/page.py
set -u
: "${OUT:?folder for the records}" "${COMMIT:?commit that the records name}"
NAME=${NAME:-h100} # of the device, in the records' names
PYTHON=${PYTHON:-python3}
LM=${LM:-/tmp/cce-lm} # trained states and tokens, some 600 MB: not part of the records
OUR="triton cupy numba"
RECORDS=$OUT/benchmarks CONFORMANCE=$OUT/conformance
mkdir -p "$RECORDS" "$CONFORMANCE" "$OUT/assets"

step() { # step NAME SECONDS COMMAND...: at most so long, and not beyond the end of the part
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    ((limit > ends - SECONDS)) && limit=$((ends - SECONDS))
    local status="no time left"
    if ((limit > 0)); then
        timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1
        status="exit $?"
    fi
    echo "$(date +%T) GPU ${CUDA_VISIBLE_DEVICES:-0,1}: $name, $((SECONDS - start)) of $limit s, $status" |
        tee -a "$OUT/steps.log"
}
bench() { # bench RECORD SECONDS OPTION...
    local record=$1 limit=$2
    shift 2
    step "$record" "$limit" "$PYTHON" -m cce bench "$@" --commit "$COMMIT" --out "$RECORDS/$record.jsonl"
}
gpu() { # gpu RECORD SECONDS OPTION...
    local record=$1 limit=$2
    shift 2
    step "$record" "$limit" "$PYTHON" bench/gpu.py --backends $OUR "$@" --commit "$COMMIT" --out "$RECORDS/$record.json"
}

# GPU 0 times kernels and heads; GPU 1 trains, times what was trained, and the sweeps. The conformance kit runs beside the
# making of tokens and the training, which are not timed. The making of tokens takes all cores for a minute: rows timed by
# the wall clock, of few tokens, come later.
heads() {
    (
        export CUDA_VISIBLE_DEVICES=0
        gpu "$NAME" 150 --only exact compiled
        gpu "$NAME-imposed" 90 --only imposed --shapes gemma2
        gpu "$NAME-few" 60 --only few
        bench "suite-$NAME" 480
    ) &
    (
        export CUDA_VISIBLE_DEVICES=1
        for backend in $OUR; do
            step "conformance-$backend" 240 "$PYTHON" -m cce.testing --backend "$backend" --device cuda \
                --commit "$COMMIT" --out "$CONFORMANCE/$backend-$NAME.json" &
        done
        step train 300 "$PYTHON" bench/train_lm.py --out "$LM" --seconds 115 55
        wait
        bench "trained-$NAME" 270 --trained "$LM"/*.pt --data trained --studies heads filter --backends $OUR \
            --passes forward+backward --peers compiled cut-cross-entropy
        step numba-first-call 120 "$PYTHON" bench/first_call.py --commit "$COMMIT" --out "$RECORDS/numba-first-call.json"
        bench "scaling-nf-$NAME" 180 --studies tokens filter
        bench "scaling-vd-$NAME" 180 --studies vocabulary width
    ) &
    wait
}

models() {
    CUDA_VISIBLE_DEVICES=0 step "curves-$NAME" 450 "$PYTHON" bench/curves.py --steps 2000 --commit "$COMMIT" \
        --out "$RECORDS/curves-$NAME.json" --plot "$OUT/assets/curves-$NAME.svg" &
    CUDA_VISIBLE_DEVICES=1 step "families-$NAME" 450 "$PYTHON" tests/gpu/families.py --backends $OUR \
        --commit "$COMMIT" --out "$CONFORMANCE/families-$NAME.json" &
    wait
}

split() { # NVLink multicast off
    step vocab-parallel 240 env NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 bench/vocab_parallel.py \
        --backends triton cupy --commit "$COMMIT" --out "$RECORDS/vocab-parallel.json"
}

# Seconds of each part.
declare -A MOST=([heads]=790 [models]=450 [split]=240)

for part in "${@:?heads, models or split}"; do
    [[ -v "MOST[$part]" ]] || { echo "got '$part', expected heads, models or split" >&2 && exit 2; }
    ends=$((SECONDS + ${LIMIT:-${MOST[$part]}}))
    "$part"
done
