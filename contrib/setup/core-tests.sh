#!/usr/bin/env bash
# Build the core's own tests under a sanitizer and run them. Usage: core-tests.sh address|thread JOBS
set -euo pipefail

sanitizer=$1 jobs=$2 dir=build/core-$1

build() {
    if [ ! -f "$dir/build.ninja" ]; then
        cmake -S . -B "$dir" -G Ninja --log-level=WARNING \
            -DHLFS_BINDINGS=OFF -DHLFS_CORE_TESTS=ON -DHLFS_SANITIZE="$sanitizer" >/dev/null
    fi
    cmake --build "$dir" --parallel "$jobs" -- --quiet | sed '/^ninja: no work to do/d'
}

# The lock is for the build alone: tests of one checkout may run at the same time.
{ flock 9 && build 9>&-; } 9>build/.lock
echo "core tests, $sanitizer sanitizer:"
# Without address randomisation: g++ 12's ThreadSanitizer refuses the mappings of kernels that randomise 32 bits.
setarch --addr-no-randomize timeout --foreground 300 "$dir/core_tests"
