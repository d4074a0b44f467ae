/* Process 1 of the guest: mount the share, run every case, unmount, mount again, look, power off.
 *
 * Tells over the serial console, a line each: "guest: case NAME ok", "guest: case NAME failed ...",
 * "guest: interrupts QUEUE COUNT", "guest: end". The kernel's own lines may lie between them. */
#include "guest.h"
#include <sys/mount.h>
#include <sys/reboot.h>

#define SHARE "/share"
#define CASE_SECONDS 120

int fail(int line, const char *what)
{
    printf("failed cases.c:%d: %s (last error: %s)\n", line, what, strerror(errno));
    return -1;
}

static void mount_share(const char *when)
{
    if (mount("share", SHARE, "virtiofs", 0, NULL) == 0)
        printf("guest: case mount%s ok\n", when);
    else
        printf("guest: case mount%s failed: %s\n", when, strerror(errno));
}

static void unmount_share(const char *when)
{
    if (umount2(SHARE, 0) == 0)
        printf("guest: case unmount%s ok\n", when);
    else
        printf("guest: case unmount%s failed: %s\n", when, strerror(errno));
}

static void run(const char *name, const char *when, int (*body)(void))
{
    char folder[64];
    snprintf(folder, sizeof(folder), SHARE "/%s", name);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        printf("guest: case %s%s ", name, when);
        alarm(CASE_SECONDS);
        umask(022);
        if ((mkdir(folder, 0755) != 0 && errno != EEXIST) || chdir(folder) != 0)
            printf("failed: its folder (%s)\n", strerror(errno));
        else if (body() == 0)
            printf("ok\n");
        fflush(stdout);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFSIGNALED(status))
        printf("\nguest: case %s%s failed: signal %d\n", name, when, WTERMSIG(status));
}

/* Print how often each queue of the device has called: the sum over all CPUs. */
static void tell_interrupts(void)
{
    char line[1024];
    FILE *table = fopen("/proc/interrupts", "r");
    while (table && fgets(line, sizeof(line), table)) {
        char *queue = strstr(line, "virtio0-"), *at = strchr(line, ':'), *end;
        if (!queue || !at)
            continue;
        unsigned long total = 0, count;
        while (count = strtoul(++at, &end, 10), end != at) {
            total += count;
            at = end;
        }
        queue[strcspn(queue, "\n")] = 0;
        printf("guest: interrupts %s %lu\n", queue + strlen("virtio0-"), total);
    }
    if (table)
        fclose(table);
}

int main(void)
{
    mount("proc", "/proc", "proc", 0, NULL);
    mount_share("");
    for (const struct guest_case *at = cases; at->name; at++)
        run(at->name, "", at->run);
    unmount_share("");
    mount_share("-again");
    for (const struct guest_case *at = cases; at->name; at++)
        if (at->again)
            run(at->name, "-again", at->again);
    unmount_share("-again");
    tell_interrupts();
    printf("guest: end\n");
    fflush(stdout);
    reboot(RB_POWER_OFF);
    return 0;
}
