// Runs in a guest: as much of QEMU's guest agent as libvirt needs to freeze and thaw one file system.
//
// Usage: guest_agent PORT DIRECTORY. PORT is the virtio port, a line of JSON each way (QEMU's
// docs/interop/qemu-ga.rst).
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static void answer(int port, const char* text) {
    if (write(port, text, strlen(text)) != (ssize_t)strlen(text))
        exit(1);
}

static void obey(int port, int directory, const char* line) {
    char text[256];
    const char* id = strstr(line, "\"id\":");
    if (strstr(line, "guest-sync") != NULL) {
        const char* mark = strstr(line, "guest-sync-delimited") != NULL ? "\xff" : "";
        snprintf(text, sizeof text, "%s{\"return\": %lld}\n", mark, id != NULL ? atoll(id + 5) : 0LL);
        answer(port, text);
    } else if (strstr(line, "guest-fsfreeze-freeze") != NULL) {
        answer(port, ioctl(directory, FIFREEZE, 0) == 0 ? "{\"return\": 1}\n" : "{\"return\": 0}\n");
    } else if (strstr(line, "guest-fsfreeze-thaw") != NULL) {
        answer(port, ioctl(directory, FITHAW, 0) == 0 ? "{\"return\": 1}\n" : "{\"return\": 0}\n");
    } else if (strstr(line, "guest-ping") != NULL) {
        answer(port, "{\"return\": {}}\n");
    } else {
        answer(port, "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"not known\"}}\n");
    }
}

int main(int argc, char** argv) {
    static char line[65536];
    size_t length = 0;
    if (argc != 3)
        return 2;
    const int port = open(argv[1], O_RDWR);
    const int directory = open(argv[2], O_RDONLY | O_DIRECTORY);
    if (port < 0 || directory < 0) {
        perror("guest_agent");
        return 1;
    }
    for (;;) {
        char byte = 0;
        const ssize_t got = read(port, &byte, 1);
        if (got == 0) {
            // Nobody is at the other end.
            usleep(50000);
            continue;
        }
        if (got < 0)
            return 1;
        if (byte == '\n') {
            line[length] = '\0';
            obey(port, directory, line);
            length = 0;
        } else if (length + 1 < sizeof line) {
            line[length++] = byte;
        }
    }
}
