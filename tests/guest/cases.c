/* The contract, as a program in a guest sees it. */
#include "guest.h"
#include <dirent.h>
#include <linux/falloc.h>
#include <sys/file.h>
#include <sys/statfs.h>
#include <sys/xattr.h>

#define MIB (1 << 20)
#define GIB (1L << 30)
#define NAMES 10000
#define NOBODY 65534

/* Write a whole file; 0, or -1. */
static int put(const char *name, const char *text)
{
    int fd = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (fd < 0)
        return -1;
    ssize_t size = strlen(text);
    int result = write(fd, text, size) == size ? 0 : -1;
    return close(fd) ? -1 : result;
}

/* Whether a file holds exactly `text`. */
static int holds(const char *name, const char *text)
{
    char data[256];
    int fd = open(name, O_RDONLY);
    if (fd < 0)
        return 0;
    ssize_t size = read(fd, data, sizeof(data));
    close(fd);
    return size == (ssize_t)strlen(text) && memcmp(data, text, size) == 0;
}

/* Run `body` in a child as another user; its result, 0 to 255. */
static int as_nobody(int (*body)(void))
{
    pid_t child = fork();
    if (child == 0)
        _exit(setgid(NOBODY) || setuid(NOBODY) ? 255 : body());
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 255;
}

static int create(void)
{
    struct stat info;
    char data[16];
    umask(027);
    int fd = open("new", O_RDWR | O_CREAT | O_EXCL, 0664);
    MUST(fd >= 0);
    FAILS(open("new", O_RDWR | O_CREAT | O_EXCL, 0660), EEXIST);
    MUST(write(fd, "hello", 5) == 5);
    MUST(pread(fd, data, sizeof(data), 1) == 4 && !memcmp(data, "ello", 4));
    MUST(fstat(fd, &info) == 0 && info.st_size == 5 && (info.st_mode & 07777) == 0640);
    MUST(close(fd) == 0);
    fd = open("new", O_WRONLY | O_APPEND);
    MUST(fd >= 0 && write(fd, " world", 6) == 6 && close(fd) == 0);
    MUST(holds("new", "hello world"));

    MUST(put("gone", "still here") == 0);
    fd = open("gone", O_RDONLY);
    MUST(fd >= 0 && unlink("gone") == 0);
    MUST(read(fd, data, 5) == 5 && !memcmp(data, "still", 5));
    MUST(fstat(fd, &info) == 0 && info.st_nlink == 0);
    FAILS(access("gone", F_OK), ENOENT);
    return close(fd);
}

static int create_again(void)
{
    MUST(holds("new", "hello world"));
    return 0;
}

static int folders(void)
{
    char path[256];
    MUST(mkdir("a", 0700) == 0 && mkdir("a/b", 0755) == 0);
    FAILS(rmdir("a"), ENOTEMPTY);
    FAILS(mkdir("a", 0700), EEXIST);
    FAILS(unlink("a"), EISDIR);
    MUST(put("a/b/file", "deep") == 0);
    MUST(chdir("a/b") == 0 && rename("../../a", "../../moved") == 0);
    MUST(getcwd(path, sizeof(path)) && strstr(path, "/moved/b"));
    MUST(holds("../../moved/b/file", "deep"));
    FAILS(rename("../../moved", "inside"), EINVAL);
    MUST(mkdir("../../empty", 0755) == 0 && rmdir("../../empty") == 0);
    return 0;
}

static int rename_flags(void)
{
    MUST(put("one", "1") == 0 && put("two", "2") == 0 && put("three", "3") == 0);
    MUST(rename("three", "two") == 0 && holds("two", "3"));
    FAILS(renameat2(AT_FDCWD, "one", AT_FDCWD, "two", RENAME_NOREPLACE), EEXIST);
    MUST(renameat2(AT_FDCWD, "one", AT_FDCWD, "two", RENAME_EXCHANGE) == 0);
    MUST(holds("one", "3") && holds("two", "1"));
    FAILS(rename("three", "four"), ENOENT);
    return 0;
}

static int links(void)
{
    struct stat first, second;
    char target[64];
    MUST(put("file", "linked") == 0 && link("file", "hard") == 0);
    MUST(stat("file", &first) == 0 && stat("hard", &second) == 0);
    MUST(first.st_ino == second.st_ino && first.st_nlink == 2);
    FAILS(link("file", "hard"), EEXIST);
    MUST(symlink("file", "soft") == 0 && symlink("nowhere", "dangling") == 0);
    MUST(readlink("dangling", target, sizeof(target)) == 7 && !memcmp(target, "nowhere", 7));
    MUST(holds("soft", "linked") && lstat("soft", &first) == 0 && S_ISLNK(first.st_mode));
    FAILS(open("dangling", O_RDONLY), ENOENT);
    FAILS(open("soft", O_RDONLY | O_NOFOLLOW), ELOOP);
    return 0;
}

static int links_again(void)
{
    struct stat info;
    MUST(stat("hard", &info) == 0 && info.st_nlink == 2 && holds("soft", "linked"));
    return 0;
}

static int attributes(void)
{
    struct stat info;
    struct timespec times[2] = {{1000000000, 123456789}, {1100000000, 987654321}};
    MUST(put("file", "x") == 0 && chmod("file", 0604) == 0 && chown("file", 12, 34) == 0);
    MUST(utimensat(AT_FDCWD, "file", times, 0) == 0 && stat("file", &info) == 0);
    MUST((info.st_mode & 07777) == 0604 && info.st_uid == 12 && info.st_gid == 34);
    MUST(info.st_mtim.tv_sec == 1100000000 && info.st_mtim.tv_nsec == 987654321);
    return 0;
}

static int nobody_opens(void)
{
    int fd = open("closed", O_RDONLY);
    return fd >= 0 ? 1 : errno != EACCES;
}

static int nobody_writes(void)
{
    int fd = open("set-id", O_WRONLY);
    return fd < 0 || write(fd, "changed", 7) != 7;
}

static int nobody_creates(void)
{
    struct stat info;
    return put("open/mine", "x") || stat("open/mine", &info) || info.st_uid != NOBODY;
}

static int permissions(void)
{
    struct stat info;
    MUST(put("closed", "x") == 0 && chmod("closed", 0600) == 0);
    MUST(put("set-id", "x") == 0 && chmod("set-id", 04777) == 0);
    MUST(mkdir("open", 0777) == 0 && chmod("open", 0777) == 0);
    MUST(as_nobody(nobody_opens) == 0);
    MUST(as_nobody(nobody_creates) == 0);
    MUST(as_nobody(nobody_writes) == 0);
    MUST(stat("set-id", &info) == 0 && !(info.st_mode & S_ISUID)); /* a write takes it away */
    return 0;
}

static int xattr(void)
{
    char data[64];
    MUST(put("file", "x") == 0);
    MUST(setxattr("file", "user.one", "first", 5, 0) == 0);
    FAILS(setxattr("file", "user.one", "x", 1, XATTR_CREATE), EEXIST);
    FAILS(setxattr("file", "user.two", "x", 1, XATTR_REPLACE), ENODATA);
    MUST(getxattr("file", "user.one", NULL, 0) == 5);
    FAILS(getxattr("file", "user.one", data, 2), ERANGE);
    MUST(getxattr("file", "user.one", data, sizeof(data)) == 5 && !memcmp(data, "first", 5));
    MUST(setxattr("file", "user.two", "", 0, 0) == 0);
    MUST(listxattr("file", data, sizeof(data)) >= 18);
    MUST(removexattr("file", "user.two") == 0);
    FAILS(getxattr("file", "user.two", data, sizeof(data)), ENODATA);
    return 0;
}

static int truncation(void)
{
    char data[8192];
    MUST(put("file", "0123456789") == 0 && truncate("file", 4) == 0 && holds("file", "0123"));
    int fd = open("file", O_RDWR);
    MUST(fd >= 0 && ftruncate(fd, 8000) == 0);
    MUST(pread(fd, data, sizeof(data), 0) == 8000 && !memcmp(data, "0123", 4));
    for (int at = 4; at < 8000; at++)
        MUST(data[at] == 0);
    MUST(ftruncate(fd, 2) == 0 && ftruncate(fd, 6) == 0);
    MUST(pread(fd, data, sizeof(data), 0) == 6 && !memcmp(data, "01\0\0\0\0", 6));
    MUST(close(fd) == 0 && put("emptied", "x") == 0);
    MUST((fd = open("emptied", O_WRONLY | O_TRUNC)) >= 0 && close(fd) == 0 && holds("emptied", ""));
    return 0;
}

static int mmap_shared(void)
{
    int size = 3 * 4096 + 100;
    char data[16];
    int fd = open("file", O_RDWR | O_CREAT, 0644);
    MUST(fd >= 0 && ftruncate(fd, size) == 0);
    char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    MUST(map != MAP_FAILED);
    memcpy(map + 4090, "across pages", 12);
    map[size - 1] = 'z';
    MUST(msync(map, size, MS_SYNC) == 0);
    MUST(pread(fd, data, 12, 4090) == 12 && !memcmp(data, "across pages", 12));
    MUST(pwrite(fd, "written", 7, 100) == 7 && !memcmp(map + 100, "written", 7));
    MUST(munmap(map, size) == 0);
    return close(fd);
}

static int mmap_again(void)
{
    int fd = open("file", O_RDONLY);
    char *map = mmap(NULL, 8192, PROT_READ, MAP_PRIVATE, fd, 0);
    MUST(map != MAP_FAILED && !memcmp(map + 4090, "across pages", 12));
    return munmap(map, 8192) | close(fd);
}

static int others_lock(void)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 10};
    int fd = open("file", O_RDWR);
    if (fcntl(fd, F_SETLK, &lock) != -1 || (errno != EAGAIN && errno != EACCES))
        return 1;
    if (fcntl(fd, F_GETLK, &lock) != 0 || lock.l_type != F_WRLCK || lock.l_start != 0)
        return 2;
    lock.l_start = 50;
    lock.l_type = F_WRLCK;
    return fcntl(fd, F_SETLK, &lock) != 0;
}

static int locks(void)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 20};
    MUST(put("file", "locked") == 0);
    int one = open("file", O_RDWR), two = open("file", O_RDWR);
    MUST(one >= 0 && two >= 0 && flock(one, LOCK_EX) == 0);
    FAILS(flock(two, LOCK_SH | LOCK_NB), EWOULDBLOCK);
    MUST(flock(one, LOCK_UN) == 0 && flock(two, LOCK_SH | LOCK_NB) == 0);
    MUST(flock(one, LOCK_SH | LOCK_NB) == 0 && flock(one, LOCK_UN) == 0);
    MUST(flock(two, LOCK_UN) == 0);
    MUST(fcntl(one, F_SETLK, &lock) == 0);
    MUST(as_nobody(others_lock) == 1); /* may not even open it for writing */
    MUST(chmod("file", 0666) == 0 && as_nobody(others_lock) == 0);
    return close(one) | close(two);
}

/* Wait for the lock that the parent holds, then say so; 0 if it was waited for. */
static int wait_and_write(int with_flock)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = open("file", O_RDWR);
    if (fd < 0 || (with_flock ? flock(fd, LOCK_EX) : fcntl(fd, F_SETLKW, &lock)) != 0)
        return 1;
    return write(fd, "second", 6) != 6;
}

static int waiting_for(int with_flock)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int status, fd;
    char text[8];
    MUST(put("file", "first.") == 0 && (fd = open("file", O_RDWR)) >= 0);
    MUST((with_flock ? flock(fd, LOCK_EX) : fcntl(fd, F_SETLK, &lock)) == 0);
    pid_t child = fork();
    if (child == 0)
        _exit(wait_and_write(with_flock));
    usleep(200000); /* for it to have a chance to be wrong */
    MUST(put("meanwhile", "others are served") == 0);
    /* Not by a second descriptor: closing that would give the lock up (POSIX). */
    MUST(pread(fd, text, sizeof text, 0) == 6 && memcmp(text, "first.", 6) == 0);
    MUST(waitpid(child, &status, WNOHANG) == 0);
    lock.l_type = F_UNLCK;
    MUST((with_flock ? flock(fd, LOCK_UN) : fcntl(fd, F_SETLK, &lock)) == 0);
    MUST(waitpid(child, &status, 0) == child && status == 0 && holds("file", "second"));
    return close(fd);
}

static int waiting(void)
{
    return waiting_for(0) || waiting_for(1) ? -1 : 0;
}

/* The host has mounted another filesystem on "inner" before we came. */
static int submount(void)
{
    struct stat outer, inner;
    MUST(stat(".", &outer) == 0 && holds("inner/file", "below"));
    MUST(stat("inner", &inner) == 0 && put("inner/new", "from the guest") == 0);
    FAILS(rename("inner/new", "new"), EXDEV);
    MUST(inner.st_dev != outer.st_dev);
    return 0;
}

static int allocation(void)
{
    char data[4096];
    struct stat info;
    int fd = open("file", O_RDWR | O_CREAT, 0644);
    MUST(fd >= 0 && fallocate(fd, 0, 0, 65536) == 0);
    MUST(fstat(fd, &info) == 0 && info.st_size == 65536 && info.st_blocks >= 128);
    MUST(fallocate(fd, FALLOC_FL_KEEP_SIZE, 65536, 65536) == 0);
    MUST(fstat(fd, &info) == 0 && info.st_size == 65536);
    memset(data, 'x', sizeof(data));
    for (int at = 0; at < 65536; at += sizeof(data))
        MUST(pwrite(fd, data, sizeof(data), at) == sizeof(data));
    MUST(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 8192, 16384) == 0);
    MUST(pread(fd, data, 1, 8191) == 1 && data[0] == 'x');
    MUST(pread(fd, data, 1, 8192) == 1 && data[0] == 0);
    MUST(pread(fd, data, 1, 24576) == 1 && data[0] == 'x');
    return close(fd);
}

static int sparse(void)
{
    char data[8];
    struct stat info;
    int fd = open("file", O_RDWR | O_CREAT, 0644);
    MUST(fd >= 0 && ftruncate(fd, GIB) == 0);
    MUST(pwrite(fd, "middle", 6, GIB / 2) == 6 && pwrite(fd, "end", 3, GIB - 3) == 3);
    MUST(fsync(fd) == 0 && fstat(fd, &info) == 0);
    MUST(info.st_size == GIB && info.st_blocks < 2048);
    MUST(lseek(fd, 0, SEEK_DATA) == GIB / 2);
    MUST(lseek(fd, 0, SEEK_HOLE) == 0);
    MUST(lseek(fd, GIB / 2, SEEK_HOLE) == GIB / 2 + 4096);
    FAILS(lseek(fd, GIB, SEEK_DATA), ENXIO);
    MUST(pread(fd, data, 8, GIB - 3) == 3 && !memcmp(data, "end", 3));
    MUST(pread(fd, data, 8, GIB / 4) == 8 && !memcmp(data, "\0\0\0\0\0\0\0\0", 8));
    return close(fd);
}

static int copy_range(void)
{
    loff_t from = 2, to = 5;
    MUST(put("source", "0123456789") == 0 && put("copy", "abcdefghij") == 0);
    int in = open("source", O_RDONLY), out = open("copy", O_RDWR);
    MUST(in >= 0 && out >= 0);
    MUST(copy_file_range(in, &from, out, &to, 6, 0) == 6 && from == 8 && to == 11);
    MUST(close(in) == 0 && close(out) == 0);
    MUST(holds("copy", "abcde234567"));
    return 0;
}

static int tmpfile_link(void)
{
    char path[64];
    int fd = open(".", O_TMPFILE | O_RDWR, 0644);
    MUST(fd >= 0 && write(fd, "unnamed", 7) == 7);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    MUST(linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW) == 0);
    MUST(close(fd) == 0 && holds("named", "unnamed"));
    return 0;
}

static int special(void)
{
    struct stat info;
    char data[4];
    MUST(mkfifo("fifo", 0644) == 0 && mknod("device", S_IFCHR | 0600, 0x103) == 0);
    MUST(lstat("device", &info) == 0 && S_ISCHR(info.st_mode) && info.st_rdev == 0x103);
    int reader = open("fifo", O_RDONLY | O_NONBLOCK), writer = open("fifo", O_WRONLY);
    MUST(reader >= 0 && writer >= 0 && write(writer, "pipe", 4) == 4);
    MUST(read(reader, data, 4) == 4 && !memcmp(data, "pipe", 4));
    return close(reader) | close(writer);
}

/* Byte `at` of the big file; test_guest.py knows it, too. */
static unsigned char pattern(long at)
{
    return (at * 7 + at / 4096) & 0xff;
}

static int big_file(void)
{
    unsigned char *data = malloc(MIB), *aligned = aligned_alloc(4096, MIB);
    struct statfs room;
    int fd = open("file", O_RDWR | O_CREAT, 0644);
    MUST(fd >= 0 && data && aligned && statfs(".", &room) == 0 && room.f_blocks > 0);
    for (long at = 0; at < 16 * MIB; at += MIB) {
        for (long i = 0; i < MIB; i++)
            data[i] = pattern(at + i);
        MUST(write(fd, data, MIB) == MIB);
    }
    MUST(fsync(fd) == 0 && syncfs(fd) == 0 && close(fd) == 0);
    MUST(put("/proc/sys/vm/drop_caches", "3") == 0);
    MUST((fd = open("file", O_RDONLY | O_DIRECT)) >= 0);
    MUST(pread(fd, aligned, MIB, 5 * MIB) == MIB);
    for (long i = 0; i < MIB; i++)
        MUST(aligned[i] == pattern(5 * MIB + i));
    return close(fd);
}

static int big_file_again(void)
{
    unsigned char data[65536];
    ssize_t size;
    long at = 0;
    int fd = open("file", O_RDONLY);
    MUST(fd >= 0);
    while ((size = read(fd, data, sizeof(data))) > 0)
        for (ssize_t i = 0; i < size; i++, at++)
            MUST(data[i] == pattern(at));
    MUST(size == 0 && at == 16 * MIB);
    return close(fd);
}

/* Count the names of the folder that are numbers, each once. */
static int count_names(void)
{
    static char seen[NAMES];
    int count = 0;
    DIR *folder = opendir(".");
    for (struct dirent *entry; folder && (entry = readdir(folder));) {
        long number = atol(entry->d_name);
        if (entry->d_name[0] == '.' || number >= NAMES || seen[number]++)
            continue;
        count++;
    }
    return folder && closedir(folder) == 0 ? count : -1;
}

static int many_names(void)
{
    char name[16];
    struct stat info;
    for (int number = 0; number < NAMES; number++) {
        snprintf(name, sizeof(name), "%05d", number);
        MUST(mknod(name, S_IFREG | 0644, 0) == 0);
    }
    MUST(count_names() == NAMES);
    for (int number = 0; number < NAMES; number += 101) {
        snprintf(name, sizeof(name), "%05d", number);
        MUST(stat(name, &info) == 0 && S_ISREG(info.st_mode));
    }
    return 0;
}

static int many_names_again(void)
{
    MUST(count_names() == NAMES);
    return 0;
}

static int busy_child(int child)
{
    char name[32], moved[32], text[32];
    for (int turn = 0; turn < 50; turn++) {
        snprintf(name, sizeof(name), "%d-%d", child, turn);
        snprintf(moved, sizeof(moved), "%d-%d.moved", child, turn);
        snprintf(text, sizeof(text), "child %d turn %d", child, turn);
        MUST(put(name, text) == 0 && rename(name, moved) == 0 && holds(moved, text));
        if (turn % 5)
            MUST(unlink(moved) == 0);
    }
    return 0;
}

static int several_at_once(void)
{
    int failures = 0, status;
    for (int child = 0; child < 4; child++)
        if (fork() == 0)
            _exit(busy_child(child) ? 1 : 0);
    while (wait(&status) > 0)
        failures += status != 0;
    MUST(failures == 0);
    return 0;
}

const struct guest_case cases[] = {
    {"create", create, create_again},
    {"folders", folders, NULL},
    {"rename", rename_flags, NULL},
    {"links", links, links_again},
    {"attributes", attributes, NULL},
    {"permissions", permissions, NULL},
    {"xattr", xattr, NULL},
    {"truncate", truncation, NULL},
    {"mmap", mmap_shared, mmap_again},
    {"locks", locks, NULL},
    {"waiting", waiting, NULL},
    {"submount", submount, NULL},
    {"fallocate", allocation, NULL},
    {"sparse", sparse, NULL},
    {"copy_file_range", copy_range, NULL},
    {"tmpfile", tmpfile_link, NULL},
    {"special", special, NULL},
    {"big_file", big_file, big_file_again},
    {"many_names", many_names, many_names_again},
    {"several_at_once", several_at_once, NULL},
    {NULL, NULL, NULL},
};
