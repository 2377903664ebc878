// Runs in a guest: writes every piece of a disk, in order and then a part of them again, with a flush after some, and
// says after each flush how far it got. Ends with status 0 only if the disk never reported an error.
//
// Each block holds 512 times one number: seed, turn and its own place.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { kBlockBytes = 4096, kPieceBytes = 65536, kPiecesPerFlush = 16, kStride = 7 };

static void fill(uint64_t* words, uint64_t seed, uint64_t turn, uint64_t piece) {
    for (uint64_t i = 0; i < kPieceBytes / sizeof *words; ++i) {
        const uint64_t block = piece * (kPieceBytes / kBlockBytes) + i / (kBlockBytes / sizeof *words);
        words[i] = seed << 56 | turn << 48 | block;
    }
}

int main(int argc, char** argv) {
    static uint64_t words[kPieceBytes / sizeof(uint64_t)];
    if (argc != 5)
        return 2;
    const int fd = open(argv[1], O_RDWR);
    const uint64_t seed = strtoull(argv[2], NULL, 10);
    const uint64_t pieces = strtoull(argv[3], NULL, 10);
    const uint64_t again = strtoull(argv[4], NULL, 10);
    for (uint64_t turn = 1; turn <= 2; ++turn) {
        const uint64_t count = turn == 1 ? pieces : again;
        for (uint64_t i = 0; i < count; ++i) {
            const uint64_t piece = turn == 1 ? i : i * kStride % pieces;
            fill(words, seed, turn, piece);
            if (pwrite(fd, words, sizeof words, (off_t)(piece * kPieceBytes)) != sizeof words) {
                perror("write");
                return 1;
            }
            if ((i + 1) % kPiecesPerFlush != 0 && i + 1 != count)
                continue;
            if (fdatasync(fd) != 0) {
                perror("flush");
                return 1;
            }
            printf("flushed %d %d\n", (int)turn, (int)(i + 1));
            fflush(stdout);
        }
    }
    return 0;
}
