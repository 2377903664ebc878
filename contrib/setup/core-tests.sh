#!/usr/bin/env bash
# Build the core's own tests under the named sanitizers and run them, in two halves each and all at the same time, as
# they mostly wait.
# Usage: core-tests.sh JOBS address|thread...
set -euo pipefail

jobs=$1 && shift
# Against what hangs, four times what it takes where nothing else runs; with more rounds than usual, as long as they take.
limit_s=$([ -n "${HLFS_ROUNDS:-}" ] && echo 0 || echo 900)

build() {
    local sanitizer dir
    for sanitizer in "$@"; do
        dir=build/core-$sanitizer
        if [ ! -f "$dir/build.ninja" ]; then
            cmake -S . -B "$dir" -G Ninja --log-level=WARNING \
                -DHLFS_BINDINGS=OFF -DHLFS_CORE_TESTS=ON -DHLFS_SANITIZE="$sanitizer" >/dev/null
        fi
        cmake --build "$dir" --parallel "$jobs" -- --quiet | sed '/^ninja: no work to do/d'
    done
}

# Without address randomisation: g++ 12's ThreadSanitizer refuses the mappings of kernels that randomise 32 bits.
run() {
    local output status=0 names filter=() program=(setarch --addr-no-randomize "build/core-$1/core_tests")
    # What does one thing after the other, and much of it, shows nothing to the thread sanitizer but takes it a minute.
    [ "$1" != thread ] || filter=("~[sequential]")
    # Every second case, from the first or the second on. A comma would end a name, a bracket begin a tag.
    # Its exit status is how many there are.
    names=$({ "${program[@]}" "${filter[@]}" --list-test-names-only || true; } | sed -n "$2~2{s/[\\\\,[]/\\\\&/g;p}")
    output=$(timeout --foreground "$limit_s" "${program[@]}" --input-file <(echo "$names") 2>&1) || status=$?
    output=$(grep -v '^Filters: ' <<<"$output")
    printf 'core tests, %s sanitizer, half %s of %s cases:\n%s\n' "$1" "$2" "$(wc -l <<<"$names")" "$output"
    # Names that the program did not find are not told of otherwise.
    [ $status -ne 0 ] || grep -q "All tests passed .* in $(wc -l <<<"$names") test cases" <<<"$output" || status=1
    return $status
}

# The lock is for the build alone: tests of one checkout may run at the same time.
{ flock 9 && build "$@" 9>&-; } 9>build/.lock
status=0
for sanitizer in "$@"; do run "$sanitizer" 1 & run "$sanitizer" 2 & done
for _ in "$@" "$@"; do wait -n || status=1; done
exit $status
