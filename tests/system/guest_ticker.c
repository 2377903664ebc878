// Runs in a guest: writes one block of a disk after the other for ever, and says so after the flush of each. When the
// disk gets larger it writes the last block first, and says how large it is. Ends at the first error.
//
// Each block holds 512 times one number: which write it was, or the size in bytes.
#include <fcntl.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { kBlockBytes = 4096, kStride = 7919, kPauseUs = 5000 };

static void put(int fd, uint64_t number, uint64_t block) {
    static uint64_t words[kBlockBytes / sizeof(uint64_t)];
    for (uint64_t i = 0; i < kBlockBytes / sizeof *words; ++i)
        words[i] = number;
    if (pwrite(fd, words, sizeof words, (off_t)(block * kBlockBytes)) != sizeof words || fdatasync(fd) != 0) {
        perror("ticker: failed");
        exit(1);
    }
}

static uint64_t size_of(int fd) {
    uint64_t bytes = 0;
    if (ioctl(fd, BLKGETSIZE64, &bytes) != 0) {
        perror("ticker: failed");
        exit(1);
    }
    return bytes;
}

int main(int argc, char** argv) {
    if (argc != 2)
        return 2;
    const int fd = open(argv[1], O_RDWR);
    const uint64_t blocks = size_of(fd) / kBlockBytes;
    uint64_t known = blocks * kBlockBytes;
    for (uint64_t tick = 1;; ++tick) {
        const uint64_t bytes = size_of(fd);
        if (bytes != known) {
            put(fd, bytes, bytes / kBlockBytes - 1);
            printf("grown %llu\n", (unsigned long long)bytes);
            known = bytes;
        }
        put(fd, tick, tick * kStride % blocks);
        printf("tick %llu\n", (unsigned long long)tick);
        fflush(stdout);
        usleep(kPauseUs);
    }
}
