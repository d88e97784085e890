#!/usr/bin/env bash
# The whole model on a card, by `salalocal bench`: random int4 weights of the released shape.
#     benchmarks/model_bench.sh OUT dense     4K to 128K with the dense model beside it
#     benchmarks/model_bench.sh OUT int8      4K to 1M, int8 math
#     benchmarks/model_bench.sh OUT bf16      4K to 256K, bf16 math
#     benchmarks/model_bench.sh OUT cap8      256K in 8 GB, int8 cache
#     benchmarks/model_bench.sh OUT cap12     512K in 12 GB
#     benchmarks/model_bench.sh OUT cap16     1M in 16 GB
# Several parts can be named and run one after the other. Every part leaves a JSON document, a plot and its narration in OUT.
# PYTHON can be set.
set -uo pipefail
out=${1:?OUT}
shift
mkdir -p "$out"

bench() { # NAME FLAGS...
    local name=$1 started=$SECONDS
    shift
    ${PYTHON:-python3} -m salalocal bench -o json --plot "$out/$name.svg" "$@" \
        >"$out/$name.json" 2> >(tee "$out/$name.log" >&2)
    echo "$name: exit code $?, $((SECONDS - started)) s" >&2
}

for part in "$@"; do
    case $part in
    dense) bench dense --ctx 4k,64k,128k --math int8 --baseline dense ;;
    int8) bench int8 --ctx 4k,64k,128k,256k,512k,1m --math int8 --project "RTX 5090" --project "RTX 3090" ;;
    bf16) bench bf16 --ctx 4k,64k,128k,256k --math bf16 --project "RTX 5090" --project "RTX 3090" ;;
    cap8) bench cap8 --ctx 64k,256k --math int8 --kv-cache int8 --memory-cap 8g ;;
    cap12) bench cap12 --ctx 256k,512k --math int8 --memory-cap 12g ;;
    cap16) bench cap16 --ctx 512k,1m --math int8 --memory-cap 16g ;;
    *) echo "unknown part $part" >&2 && exit 2 ;;
    esac
done
