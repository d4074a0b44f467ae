/* What a case of the guest program is, and how it fails: with the line and the errno, at once. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* Leave the case unless `x` holds. */
#define MUST(x) do { if (!(x)) return fail(__LINE__, #x); } while (0)
/* Leave the case unless `x` fails with errno `e`. */
#define FAILS(x, e) MUST((x) == -1 && errno == (e))

/* A case runs in a fresh folder of its own, as root, in a process of its own. What it leaves there
 * is looked at by the host, under the case's name, in test_guest.py. */
struct guest_case {
    const char *name;
    int (*run)(void);    /* 0, or -1 from MUST */
    int (*again)(void);  /* the same after a second mount; NULL if there is nothing to see */
};

extern const struct guest_case cases[];

int fail(int line, const char *what);
