#!/usr/bin/env bash
# The whole model on a card, by `salalocal bench`: random int4 weights of the released shape.
#     benchmarks/model_bench.sh OUT PART[=SECONDS]...
#     warm    compiles what the other parts launch, in four processes side by side: only fills Triton's cache
#     int8    4K to 1M, int8 math: the figures that count, so it comes first
#     dense   4K to 128K with the dense model beside it
#     bf16    4K to 256K, bf16 math
#     cap8    256K in 8 GB, int8 cache
#     cap12   512K in 12 GB
#     cap16   1M in 16 GB
#     cap16i  2M in 16 GB, int8 cache
#     cap24   2M in 24 GB, int8 cache
#     cap32   2M in 32 GB
#     host8   64K to 1M in 8 GB, int8 keys and values in host memory
# Parts run one after the other, each within its seconds (240 if none are given): then it is interrupted, which keeps the
# depths that are measured, and killed 30 seconds later. A part that fails, is cut or is not known is told, and the next
# one runs. Every part leaves a JSON document, a plot and its narration in OUT; OUT/parts.tsv lists name, exit code,
# seconds, how many tests were measured. The exit code is 0 if every part measured something. PYTHON can be set.
set -uo pipefail
out=${1:?OUT}
shift
mkdir -p "$out"
failed=0
usual_seconds=240

warm() { # SECONDS: a compiler holds one core, and a single process would compile one kernel after the other
    local started=$SECONDS number=0 flags
    for flags in "--math int8" "--math bf16" "--math int8 --kv-cache int8" "--math int8 --ctx 4k --baseline dense"; do
        number=$((number + 1))
        # shellcheck disable=SC2086 # words are flags
        timeout --kill-after=30 "$1" ${PYTHON:-python3} -m salalocal bench -o json --ctx 4k,20k --gen 8 -r 1 $flags \
            >"$out/warm-$number.json" 2>"$out/warm-$number.log" &
    done
    wait
    echo "warm: $((SECONDS - started)) s, $(cat "$out"/warm-*.json | grep -c avg_ts) tests ran"
    tail -qn 2 "$out"/warm-*.log
}

measured() { # FILE: how many tests of a report have figures
    ${PYTHON:-python3} - "$1" <<'PY'
import json, pathlib, sys
try:
    print(sum("avg_ts" in test for test in json.loads(pathlib.Path(sys.argv[1]).read_text())["tests"]))
except (OSError, ValueError, KeyError):
    print(0)
PY
}

bench() { # NAME SECONDS FLAGS...
    local name=$1 seconds=$2 started=$SECONDS code tests
    shift 2
    timeout --signal=INT --kill-after=30 "$seconds" \
        ${PYTHON:-python3} -m salalocal bench -o json --plot "$out/$name.svg" "$@" >"$out/$name.json" 2>"$out/$name.log"
    code=$?
    tests=$(measured "$out/$name.json")
    printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$((SECONDS - started))" "$tests" >>"$out/parts.tsv"
    echo "$name: exit code $code, $((SECONDS - started)) s, $tests tests measured"
    tail -n 5 "$out/$name.log"
    [ "$tests" -gt 0 ] || failed=1
}

for part in "$@"; do
    name=${part%%=*}
    seconds=$usual_seconds
    [ "$name" = "$part" ] || seconds=${part#*=}
    case $name in
    warm) warm "$seconds" ;;
    int8) bench int8 "$seconds" --ctx 4k,64k,128k,256k,512k,1m --math int8 --project "RTX 5090" --project "RTX 3090" ;;
    dense) bench dense "$seconds" --ctx 4k,64k,128k --math int8 --baseline dense ;;
    bf16) bench bf16 "$seconds" --ctx 4k,64k,128k,256k --math bf16 --project "RTX 5090" --project "RTX 3090" ;;
    cap8) bench cap8 "$seconds" --ctx 64k,256k --math int8 --kv-cache int8 --memory-cap 8g ;;
    cap12) bench cap12 "$seconds" --ctx 256k,512k --math int8 --memory-cap 12g ;;
    cap16) bench cap16 "$seconds" --ctx 512k,1m --math int8 --memory-cap 16g ;;
    cap16i) bench cap16i "$seconds" --ctx 1m,2m --math int8 --kv-cache int8 --memory-cap 16g ;;
    cap24) bench cap24 "$seconds" --ctx 1m,2m --math int8 --kv-cache int8 --memory-cap 24g ;;
    cap32) bench cap32 "$seconds" --ctx 1m,2m --math int8 --memory-cap 32g ;;
    host8) bench host8 "$seconds" --ctx 64k,256k,1m --gen 64 --math int8 --kv-cache int8 --kv-place host --memory-cap 8g ;;
    *)
        echo "unknown part $part"
        failed=1
        ;;
    esac
done
exit $failed
