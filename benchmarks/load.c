/*
 * The load generator: one operation, many times, each call timed.
 *
 *     load OPERATION cold|warm COUNT ROOT
 *
 * ROOT is the mounted tree that benchmarks/tree.py has laid out. Prints one line:
 *
 *     UNITS TOTAL_NS P50_NS P99_NS
 *
 * UNITS is what TOTAL_NS is to be divided by (calls; entries for listings); the percentiles are
 * per call. On an error: one line on stderr and exit status 1.
 *
 * In C because the fastest subject answers in half a microsecond, less than the interpreter's own
 * share of os.stat(), and because on one CPU the caches that a big load generator throws out are
 * the subject's. Names and offsets are made before the clock starts; between two looks at the
 * clock there is nothing but the system calls of the operation.
 *
 * All names are relative to an open folder, so that an operation is one component of a path and
 * not the depth of the place where the tree happens to be.
 *
 * "cold" means: no page is asked for twice, and the kernel's pages of the file are dropped first.
 * That makes 4 KiB reads uncached on every subject, also on those that answer OPEN without direct
 * I/O; read-ahead is switched off for random reads (POSIX_FADV_RANDOM). Names and attributes are
 * as cold as the subject's validity times make them. "warm" means: the same calls ran once before.
 */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define MEBIBYTE (1024 * 1024)
#define NAMES_IN_TURN 100 /* files that stat and lookup_miss go round */
#define UNTIMED 20        /* calls before the clock starts, in cold runs */
#define READERS 8         /* processes of read_4k_many */
#define POLL_NS 500000    /* between two looks for the mount */

struct run {
	const char *operation;
	const char *root;
	int warm;
	int count;    /* timed calls */
	int dir;      /* folder of the operation */
	int file;     /* data file, -1 if none */
	off_t pages;  /* in the data file */
	char (*names)[32];
	char (*new_names)[32];
	off_t *offsets;
	char *buffer; /* 1 MiB */
	volatile uint64_t *mapped; /* the data file, where it is mapped */
	long units;   /* what came out of each call, summed (listings) */
};

typedef void (*step)(struct run *, int);

static void die(const struct run *run, const char *format, ...)
{
	int saved = errno;
	va_list arguments;

	fprintf(stderr, "%s: ", run->operation);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fprintf(stderr, ": %s\n", strerror(saved));
	exit(1);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static void *allocate(size_t size)
{
	void *memory = NULL;

	if (posix_memalign(&memory, PAGE, size ? size : 1)) {
		fputs("out of memory\n", stderr);
		exit(1);
	}
	memset(memory, 'x', size); /* touched: no page faults while the clock runs */
	return memory;
}

/* ---- what an operation needs before the clock starts ---- */

static void open_folder(struct run *run, const char *name)
{
	int root = open(run->root, O_RDONLY | O_DIRECTORY);

	if (root < 0)
		die(run, "open %s", run->root);
	run->dir = openat(root, name, O_RDONLY | O_DIRECTORY);
	if (run->dir < 0)
		die(run, "open %s", name);
	close(root);
}

static void open_data(struct run *run, const char *name, int flags)
{
	struct stat st;

	open_folder(run, "data");
	run->file = openat(run->dir, name, flags);
	if (run->file < 0 || fstat(run->file, &st) < 0)
		die(run, "open %s", name);
	run->pages = st.st_size / PAGE;
}

static void make_names(struct run *run, char (**names)[32], const char *prefix, int total)
{
	*names = allocate((size_t)(total + UNTIMED) * 32);
	for (int i = 0; i < total + UNTIMED; i++)
		snprintf((*names)[i], 32, "%s%05d", prefix, i);
	(void)run;
}

/* The first count of a fixed shuffle of all pages, so that none comes twice. */
static void make_offsets(struct run *run)
{
	off_t *all = allocate((size_t)run->pages * sizeof(off_t));
	uint64_t state = 88172645463325252u;

	if (run->count + UNTIMED > run->pages) {
		errno = EINVAL;
		die(run, "more calls than pages");
	}
	for (off_t i = 0; i < run->pages; i++)
		all[i] = i * PAGE;
	for (off_t i = run->pages - 1; i > 0; i--) {
		state ^= state << 13, state ^= state >> 7, state ^= state << 17;
		off_t j = (off_t)(state % (uint64_t)(i + 1)), kept = all[i];
		all[i] = all[j], all[j] = kept;
	}
	run->offsets = all;
}

static void drop_pages(struct run *run)
{
	if (posix_fadvise(run->file, 0, 0, POSIX_FADV_DONTNEED))
		die(run, "drop cached pages");
}

/* ---- the clock ---- */

static int by_value(const void *left, const void *right)
{
	uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;

	return (a > b) - (a < b);
}

static void report(uint64_t *samples, int count, long units)
{
	uint64_t total = 0;

	for (int i = 0; i < count; i++)
		total += samples[i];
	qsort(samples, (size_t)count, sizeof(*samples), by_value);
	printf("%ld %llu %llu %llu\n", units, (unsigned long long)total,
	       (unsigned long long)samples[count / 2],
	       (unsigned long long)samples[(long)count * 99 / 100]);
}

static void measure(struct run *run, step call)
{
	uint64_t *samples = allocate((size_t)run->count * sizeof(*samples));
	uint64_t before, after;

	run->units = 0;
	before = now_ns();
	for (int i = 0; i < run->count; i++) {
		call(run, i);
		after = now_ns();
		samples[i] = after - before;
		before = after;
	}
	report(samples, run->count, run->units ? run->units : run->count);
}

/* Calls may be repeated: a cold run goes over a few, a warm one over all of them first. */
static void measure_repeatable(struct run *run, step call)
{
	int untimed = run->warm ? run->count : UNTIMED;

	for (int i = 0; i < untimed && i < run->count; i++)
		call(run, i);
	measure(run, call);
}

/* A cold run must not touch anything twice: the spare items behind the counted ones warm it up. */
static void measure_once_each(struct run *run, step call)
{
	int first = run->warm ? 0 : run->count;

	for (int i = 0; i < (run->warm ? run->count : UNTIMED); i++)
		call(run, first + i);
	measure(run, call);
}

/* Calls that change the tree run once, on spare items first. */
static void measure_changes(struct run *run, step call)
{
	for (int i = 0; i < UNTIMED; i++)
		call(run, run->count + i);
	measure(run, call);
}

/* ---- names and attributes ---- */

static void step_stat(struct run *run, int i)
{
	struct stat st;

	if (fstatat(run->dir, run->names[i % NAMES_IN_TURN], &st, AT_SYMLINK_NOFOLLOW) < 0)
		die(run, "stat %s", run->names[i % NAMES_IN_TURN]);
}

static void do_stat(struct run *run)
{
	open_folder(run, "stat");
	make_names(run, &run->names, "f", NAMES_IN_TURN);
	measure_repeatable(run, step_stat);
}

static void step_miss(struct run *run, int i)
{
	struct stat st;

	if (!fstatat(run->dir, run->names[i % NAMES_IN_TURN], &st, AT_SYMLINK_NOFOLLOW))
		errno = EEXIST;
	if (errno != ENOENT)
		die(run, "absent name %s", run->names[i % NAMES_IN_TURN]);
}

static void do_lookup_miss(struct run *run)
{
	open_folder(run, "stat");
	make_names(run, &run->names, "absent", NAMES_IN_TURN);
	measure_repeatable(run, step_miss);
}

static void list(struct run *run, int with_stat)
{
	int fd = openat(run->dir, ".", O_RDONLY | O_DIRECTORY);
	DIR *stream = fd < 0 ? NULL : fdopendir(fd);
	struct dirent *entry;
	struct stat st;

	if (!stream)
		die(run, "open the folder");
	while (errno = 0, (entry = readdir(stream))) {
		if (entry->d_name[0] == '.')
			continue;
		if (with_stat && fstatat(fd, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0)
			die(run, "stat %s", entry->d_name);
		run->units++;
	}
	if (errno)
		die(run, "read the folder");
	closedir(stream);
}

static void step_list(struct run *run, int i)
{
	(void)i;
	list(run, 1);
}

/* Without stat: daemons hold a descriptor for each file that the kernel knows. */
static void step_names(struct run *run, int i)
{
	(void)i;
	list(run, 0);
}

static void do_readdir_stat(struct run *run)
{
	open_folder(run, "listing");
	step_list(run, 0);
	measure(run, step_list);
}

/* ---- data ---- */

static void step_open_read_close(struct run *run, int i)
{
	int fd = openat(run->dir, run->names[i], O_RDONLY);

	if (fd < 0)
		die(run, "open %s", run->names[i]);
	if (read(fd, run->buffer, PAGE) != PAGE)
		die(run, "read %s", run->names[i]);
	if (close(fd) < 0)
		die(run, "close %s", run->names[i]);
}

static void do_open_read_close(struct run *run)
{
	open_folder(run, "small");
	make_names(run, &run->names, "f", run->count);
	measure_once_each(run, step_open_read_close);
}

static void step_read_page(struct run *run, int i)
{
	if (pread(run->file, run->buffer, PAGE, run->offsets[i]) != PAGE)
		die(run, "read at %lld", (long long)run->offsets[i]);
}

static void read_pages_of(struct run *run, const char *name)
{
	open_data(run, name, O_RDONLY);
	make_offsets(run);
	if (posix_fadvise(run->file, 0, 0, POSIX_FADV_RANDOM))
		die(run, "switch read-ahead off");
	drop_pages(run);
	measure_once_each(run, step_read_page);
}

static void do_read_4k(struct run *run) { read_pages_of(run, "read"); }
static void do_read_4k_wide(struct run *run) { read_pages_of(run, "wide"); }

/*
 * As read_4k by READERS processes at once, each on its share of the pages. What is reported are the
 * calls of one, so that TOTAL_NS / UNITS is the time between two calls of anybody: TOTAL_NS is that
 * from the common start to the last one's end, UNITS are all calls. Percentiles are not known.
 */
static void do_read_4k_many(struct run *run)
{
	volatile int *start = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct timespec moment = { 0, 20000000 };
	int status, each = run->count / READERS, failed = 0;
	uint64_t begun, total;

	open_data(run, "read", O_RDONLY);
	make_offsets(run);
	if (start == MAP_FAILED || posix_fadvise(run->file, 0, 0, POSIX_FADV_RANDOM))
		die(run, "prepare");
	drop_pages(run);
	for (int reader = 0; reader < READERS; reader++) {
		pid_t child = fork();

		if (child < 0)
			die(run, "fork");
		if (child)
			continue;
		while (!*start)
			nanosleep(&(struct timespec){ 0, 50000 }, NULL);
		for (int i = 0; i < each; i++)
			step_read_page(run, reader * each + i);
		_exit(0);
	}
	nanosleep(&moment, NULL);
	begun = now_ns();
	*start = 1;
	while (wait(&status) > 0)
		failed |= status;
	total = now_ns() - begun;
	if (failed || !each)
		exit(1); /* it has said why */
	printf("%ld %llu 0 0\n", (long)each * READERS, (unsigned long long)total);
}

static void step_write_page(struct run *run, int i)
{
	if (pwrite(run->file, run->buffer, PAGE, run->offsets[i]) != PAGE)
		die(run, "write at %lld", (long long)run->offsets[i]);
}

static void do_write_4k(struct run *run)
{
	open_data(run, "write", O_WRONLY);
	make_offsets(run);
	measure_once_each(run, step_write_page);
}

static void step_read_mebibyte(struct run *run, int i)
{
	if (pread(run->file, run->buffer, MEBIBYTE, (off_t)i * MEBIBYTE) != MEBIBYTE)
		die(run, "read MiB %d", i);
}

static void do_read_1m(struct run *run)
{
	open_data(run, "read", O_RDONLY);
	drop_pages(run);
	for (int i = 0; run->warm && i < run->count; i++)
		step_read_mebibyte(run, i);
	measure(run, step_read_mebibyte);
}

static void step_write_mebibyte(struct run *run, int i)
{
	if (pwrite(run->file, run->buffer, MEBIBYTE, (off_t)i * MEBIBYTE) != MEBIBYTE)
		die(run, "write MiB %d", i);
}

static void do_write_1m(struct run *run)
{
	open_data(run, "write", O_WRONLY);
	measure(run, step_write_mebibyte);
}

/* A thousand words of a shared mapping, each read and written, on pages that are there. */
static void step_map_words(struct run *run, int i)
{
	uint64_t state = 88172645463325252u + (uint64_t)i;
	uint64_t words = (uint64_t)run->pages * (PAGE / 8);

	for (int word = 0; word < 1000; word++) {
		state ^= state << 13, state ^= state >> 7, state ^= state << 17;
		run->mapped[state % words] += state;
	}
}

static void do_map_8b(struct run *run)
{
	open_data(run, "write", O_RDWR);
	run->mapped = mmap(NULL, (size_t)run->pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
			   run->file, 0);
	if (run->mapped == MAP_FAILED)
		die(run, "map");
	for (off_t page = 0; page < run->pages; page++)
		run->mapped[page * (PAGE / 8)]++;
	measure_repeatable(run, step_map_words);
}

/* ---- changes of the tree ---- */

static void step_create(struct run *run, int i)
{
	int fd = openat(run->dir, run->names[i], O_WRONLY | O_CREAT | O_EXCL, 0644);

	if (fd < 0)
		die(run, "create %s", run->names[i]);
	if (close(fd) < 0)
		die(run, "close %s", run->names[i]);
}

static void step_rename(struct run *run, int i)
{
	if (renameat(run->dir, run->names[i], run->dir, run->new_names[i]) < 0)
		die(run, "rename %s", run->names[i]);
}

static void step_unlink(struct run *run, int i)
{
	if (unlinkat(run->dir, run->names[i], 0) < 0)
		die(run, "unlink %s", run->names[i]);
}

static void step_mkdir(struct run *run, int i)
{
	if (mkdirat(run->dir, run->names[i], 0755) < 0)
		die(run, "mkdir %s", run->names[i]);
}

static void step_rmdir(struct run *run, int i)
{
	if (unlinkat(run->dir, run->names[i], AT_REMOVEDIR) < 0)
		die(run, "rmdir %s", run->names[i]);
}

static void change(struct run *run, step call)
{
	open_folder(run, run->operation);
	make_names(run, &run->names, "f", run->count);
	make_names(run, &run->new_names, "g", run->count);
	measure_changes(run, call);
}

static void do_create(struct run *run) { change(run, step_create); }
static void do_rename(struct run *run) { change(run, step_rename); }
static void do_unlink(struct run *run) { change(run, step_unlink); }
static void do_mkdir(struct run *run) { change(run, step_mkdir); }
static void do_rmdir(struct run *run) { change(run, step_rmdir); }

/* ---- a great number of files come and go, for the memory that it leaves behind ---- */

static void churn(struct run *run, const char *folder, step call)
{
	open_folder(run, folder);
	make_names(run, &run->names, "f", run->count);
	measure(run, call);
}

static void do_churn_create(struct run *run) { churn(run, "churn", step_create); }
static void do_churn_remove(struct run *run) { churn(run, "churn", step_unlink); }

static void do_churn_list(struct run *run)
{
	run->count = 1;
	churn(run, "churn", step_list);
}

static void do_crowd_list(struct run *run)
{
	run->count = 1;
	churn(run, "crowd", step_names);
}

/*
 * Wait until something is mounted at ROOT, then read a file there. TOTAL_NS is not a duration but
 * the time by CLOCK_MONOTONIC at which the bytes were there; the caller knows when it began. Ends
 * when killed, if nothing is ever mounted: who waits for it sets the deadline.
 */
static void do_first_read(struct run *run)
{
	struct timespec pause = { 0, POLL_NS };
	struct stat above, here;
	char parent[4096];
	uint64_t sample;

	snprintf(parent, sizeof(parent), "%s/..", run->root);
	if (stat(parent, &above) < 0)
		die(run, "stat %s", parent);
	while (stat(run->root, &here) < 0 || here.st_dev == above.st_dev)
		nanosleep(&pause, NULL);
	open_folder(run, "stat");
	run->file = openat(run->dir, "f00000", O_RDONLY);
	if (run->file < 0 || read(run->file, run->buffer, PAGE) != PAGE)
		die(run, "read stat/f00000");
	sample = now_ns();
	report(&sample, 1, 1);
}

static const struct {
	const char *name;
	void (*run)(struct run *);
} operations[] = {
	{ "stat", do_stat },
	{ "lookup_miss", do_lookup_miss },
	{ "open_read_close", do_open_read_close },
	{ "readdir_stat", do_readdir_stat },
	{ "read_4k", do_read_4k },
	{ "read_4k_wide", do_read_4k_wide },
	{ "read_4k_many", do_read_4k_many },
	{ "write_4k", do_write_4k },
	{ "read_1m", do_read_1m },
	{ "write_1m", do_write_1m },
	{ "map_8b", do_map_8b },
	{ "create", do_create },
	{ "rename", do_rename },
	{ "unlink", do_unlink },
	{ "mkdir", do_mkdir },
	{ "rmdir", do_rmdir },
	{ "churn_create", do_churn_create },
	{ "churn_list", do_churn_list },
	{ "churn_remove", do_churn_remove },
	{ "crowd_list", do_crowd_list },
	{ "first_read", do_first_read },
};

int main(int argc, char **argv)
{
	struct run run = { .file = -1 };

	if (argc != 5 || (run.count = atoi(argv[3])) < 1) {
		fputs("usage: load OPERATION cold|warm COUNT ROOT\n", stderr);
		return 1;
	}
	run.operation = argv[1];
	run.warm = !strcmp(argv[2], "warm");
	run.root = argv[4];
	run.buffer = allocate(MEBIBYTE);
	for (size_t i = 0; i < sizeof(operations) / sizeof(*operations); i++) {
		if (!strcmp(operations[i].name, run.operation)) {
			operations[i].run(&run);
			return 0;
		}
	}
	fprintf(stderr, "%s: no such operation\n", run.operation);
	return 1;
}
