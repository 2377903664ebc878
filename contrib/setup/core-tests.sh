#!/usr/bin/env bash
# Build the core's own tests under the named sanitizers and run them, all at the same time, as they mostly wait.
# Usage: core-tests.sh JOBS address|thread...
set -euo pipefail

jobs=$1 && shift
# With more rounds than usual, as long as they take.
limit_s=$([ -n "${HLFS_ROUNDS:-}" ] && echo 0 || echo 360)

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
    local output status=0
    output=$(setarch --addr-no-randomize timeout --foreground "$limit_s" "build/core-$1/core_tests" 2>&1) || status=$?
    printf 'core tests, %s sanitizer:\n%s\n' "$1" "$output"
    return $status
}

# The lock is for the build alone: tests of one checkout may run at the same time.
{ flock 9 && build "$@" 9>&-; } 9>build/.lock
status=0
for sanitizer in "$@"; do run "$sanitizer" & done
for _ in "$@"; do wait -n || status=1; done
exit $status
