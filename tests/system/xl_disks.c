// What Xen's own parser makes of the disk lines of an xl domain: a line each, of what xl would give to the backend.
//
// Usage: xl_disks CONFIG
#include <libxlutil.h>
#include <stdio.h>
#include <string.h>

// Prints one disk. Returns what the parser says: 0, or an errno once it has told why.
static int show(XLU_Config* config, const char* line) {
    libxl_device_disk disk;
    libxl_device_disk_init(&disk);
    int error = xlu_disk_parse(config, 1, &line, &disk);
    // As libxl does later.
    libxl_defbool_setdefault(&disk.discard_enable, disk.readwrite != 0);
    if (error == 0)
        printf("%s %s %s %s%s discard=%d direct=%d %s\n", disk.vdev, libxl_disk_backend_to_string(disk.backend),
               libxl_disk_format_to_string(disk.format), disk.readwrite ? "rw" : "ro", disk.is_cdrom ? " cdrom" : "",
               libxl_defbool_val(disk.discard_enable), disk.direct_io_safe, disk.pdev_path);
    libxl_device_disk_dispose(&disk);
    return error;
}

int main(int argc, char** argv) {
    if (argc != 2)
        return 2;
    XLU_Config* config = xlu_cfg_init(stderr, argv[1]);
    if (config == NULL || xlu_cfg_readfile(config, argv[1]) != 0)
        return 1;
    XLU_ConfigList* disks;
    int count = 0, error = xlu_cfg_get_list(config, "disk", &disks, &count, 0);
    for (int i = 0; i < count && error == 0; i++)
        error = show(config, xlu_cfg_get_listitem(disks, i));
    xlu_cfg_destroy(config);
    if (error != 0)
        fprintf(stderr, "%s: %s\n", argv[1], strerror(error));
    return error != 0;
}
