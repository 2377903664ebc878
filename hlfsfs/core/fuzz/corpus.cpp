// HLFS_FUZZ_SEEDS=DIRECTORY: write the target's seeds there instead of fuzzing.
#include <cstdio>
#include <fstream>
#include <string>

#include "fuzz.hpp"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    const char* directory = std::getenv("HLFS_FUZZ_SEEDS");
    if (directory == nullptr)
        return 0;
    int number = 0;
    for (const hlfs::fuzz::Bytes& seed : hlfs::fuzz::seeds()) {
        std::ofstream file(std::string(directory) + "/seed-" + std::to_string(number++), std::ios::binary);
        file.write(reinterpret_cast<const char*>(seed.data()), static_cast<std::streamsize>(seed.size()));
        if (!file.flush())
            std::abort();
    }
    std::fflush(nullptr);
    std::_Exit(0);
}
