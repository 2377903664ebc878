#!/usr/bin/env bash
# Build the libFuzzer targets and run each for a bounded count, two at a time: first over the kept inputs, which have
# found something once, then over mutations of those and of the seeds. Usage: fuzz.sh JOBS [TIMES]
# TIMES multiplies the counts; 0 builds only. HLFS_SEED repeats a run. What is found stays in build/fuzz/found.
set -euo pipefail

jobs=$1 times=${2:-1} dir=build/fuzz seed=${HLFS_SEED:-$RANDOM}
# Inputs a run; so many that each takes some seconds on one core.
declare -A runs=([summary]=200000 [footer]=200000 [checkpoint]=20000 [segment]=1000 [table]=1000 [log]=400 [ring]=400 [fuse]=8000 [snapshots]=100000)

build() {
    if [ ! -f "$dir/build.ninja" ]; then
        cmake -S . -B "$dir" -G Ninja --log-level=WARNING -DCMAKE_CXX_COMPILER=clang++-14 \
            -DHLFS_BINDINGS=OFF -DHLFS_FUZZERS=ON >/dev/null
    fi
    cmake --build "$dir" --parallel "$jobs" -- --quiet | sed '/^ninja: no work to do/d'
}

fuzz() {
    local name=$1 program="$dir/fuzz_$1" failed=0 work output count=$((${runs[$1]} * times))
    work=$(mktemp -d) && output="$work/output"
    mkdir -p "$work/seeds" "$work/corpus" "$dir/found"
    HLFS_FUZZ_SEEDS="$work/seeds" "$program"
    local kept="hlfsfs/core/fuzz/corpus/$name" directories=("$work/corpus" "$work/seeds")
    [ ! -d "$kept" ] || directories+=("$kept")
    # Without comparison traces: they would teach the fuzzer to forge checksums, and damage does not.
    # Leaks are the core's own tests' business; looking for them after every input takes longer than the input.
    if ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=8 timeout $((300 * times)) "$program" -seed="$seed" \
        -runs="$count" -use_cmp=0 -detect_leaks=0 -timeout=60 -artifact_prefix="$dir/found/$name-" \
        "${directories[@]}" >"$output" 2>&1; then
        printf 'fuzz %-10s %s\n' "$name" "$(grep -o 'Done.*' "$output")"
    else
        tail -n 60 "$output"
        echo "fuzz $name: failed; again with: HLFS_SEED=$seed contrib/setup/fuzz.sh $jobs $times"
        failed=1
    fi
    rm -rf "$work"
    return $failed
}

{ flock 9 && build 9>&-; } 9>build/.lock
[ "$times" -gt 0 ] || exit 0
echo "fuzzing with HLFS_SEED=$seed:"
status=0
for pair in "log summary" "ring footer" "fuse checkpoint" "segment table" "snapshots"; do
    for name in $pair; do fuzz "$name" & done
    for name in $pair; do wait -n || status=1; done
done
exit $status
