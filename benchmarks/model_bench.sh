#!/usr/bin/env bash
# The whole model on a card, by `salalocal bench`: random int4 weights of the released shape.
#     benchmarks/model_bench.sh OUT math      64K to 256K, bf16 math and int8 math, plots              about 2 minutes
#     benchmarks/model_bench.sh OUT baseline  the same depths with the dense model beside it           about 2 minutes
#     benchmarks/model_bench.sh OUT long      512K and 1M                                              about 2 minutes
#     benchmarks/model_bench.sh OUT caps      256K in 8 GB, 512K in 12 GB, 1M in 16 GB                 about 3 minutes
# Every run leaves a JSON document, a plot and its narration in OUT. PYTHON and SALALOCAL_CHUNK_SIZE can be set.
set -uo pipefail
out=${1:?OUT} part=${2:?math, baseline, long or caps}
export SALALOCAL_CHUNK_SIZE=${SALALOCAL_CHUNK_SIZE:-8192}
mkdir -p "$out"

bench() { # NAME FLAGS...
    local name=$1
    shift
    ${PYTHON:-python3} -m salalocal bench --gen 128 -r 3 -o json --plot "$out/$name.svg" "$@" \
        >"$out/$name.json" 2> >(tee "$out/$name.log" >&2)
    echo "$name: exit code $?"
}

case $part in
math)
    bench bf16 --ctx 4k,64k,128k,256k --math bf16 --project "RTX 5090" --project "RTX 3090"
    bench int8 --ctx 4k,64k,128k,256k --math int8 --project "RTX 5090" --project "RTX 3090"
    ;;
baseline) bench dense --ctx 4k,64k,128k,256k --math int8 --baseline dense ;;
long) bench long --ctx 512k,1m --math int8 --project "RTX 5090" ;;
caps)
    bench cap8 --ctx 64k,256k --math int8 --memory-cap 8g
    bench cap12 --ctx 256k,512k --math int8 --memory-cap 12g
    bench cap16 --ctx 512k,1m --math int8 --memory-cap 16g
    ;;
*) echo "unknown part $part" >&2 && exit 2 ;;
esac
