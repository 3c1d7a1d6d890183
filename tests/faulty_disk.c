/* A disk that fails, fills, is slow, or is cut off from its power: preloaded (LD_PRELOAD) under a process.
 *
 * In: FAULTY_DIRECTORY, whose files it watches; FAULTY_CONTROL, a file whose first byte says what happens now: "n" ENOSPC
 * and "e" EIO for each write, "s" EIO for each sync, "d" 30 ms more for each sync.
 * Out: FAULTY_LOG, every write, truncation, removal and sync in its order, from which a test makes what a power cut would leave.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static ssize_t (*real_write)(int, const void *, size_t);
static ssize_t (*real_pwrite)(int, const void *, size_t, off_t);
static int (*real_fsync)(int);
static int (*real_fdatasync)(int);
static int (*real_ftruncate)(int, off_t);
static int (*real_unlink)(const char *);
static int log_descriptor = -1;

__attribute__((constructor)) static void begin(void)
{
	const char *path = getenv("FAULTY_LOG");

	real_write = dlsym(RTLD_NEXT, "write");
	real_pwrite = dlsym(RTLD_NEXT, "pwrite64");
	real_fsync = dlsym(RTLD_NEXT, "fsync");
	real_fdatasync = dlsym(RTLD_NEXT, "fdatasync");
	real_unlink = dlsym(RTLD_NEXT, "unlink");
	real_ftruncate = dlsym(RTLD_NEXT, "ftruncate64");
	if (path != NULL)
		log_descriptor = open(path, O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600);
}

static const char *watched(int descriptor)
{
	static __thread char path[4096];
	char link[64];
	const char *directory = getenv("FAULTY_DIRECTORY");
	ssize_t size;

	if (directory == NULL || descriptor == log_descriptor)
		return NULL;
	snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
	size = readlink(link, path, sizeof path - 1);
	if (size < 0)
		return NULL;
	path[size] = 0;
	if (strncmp(path, directory, strlen(directory)) != 0)
		return NULL;
	return path + strlen(directory) + 1;
}

static char mode(void)
{
	const char *path = getenv("FAULTY_CONTROL");
	int descriptor = path == NULL ? -1 : open(path, O_RDONLY | O_CLOEXEC);
	char found = 0;

	if (descriptor < 0)
		return 0;
	if (read(descriptor, &found, 1) != 1)
		found = 0;
	close(descriptor);
	return found;
}

static void note(char kind, const char *name, uint64_t offset, const void *data, uint32_t size)
{
	char head[256];
	int length = snprintf(head, sizeof head, "%c %s %llu %u\n", kind, name, (unsigned long long)offset, size);

	if (log_descriptor < 0)
		return;
	real_write(log_descriptor, head, length);
	if (size)
		real_write(log_descriptor, data, size);
}

static int refused(const char *name)
{
	char now = name == NULL ? 0 : mode();

	if (now != 'n' && now != 'e')
		return 0;
	errno = now == 'n' ? ENOSPC : EIO;
	return 1;
}

ssize_t write(int descriptor, const void *data, size_t size)
{
	const char *name = watched(descriptor);
	ssize_t done;

	if (refused(name))
		return -1;
	done = real_write(descriptor, data, size);
	if (name != NULL && done > 0)
		note('w', name, lseek(descriptor, 0, SEEK_CUR) - done, data, done);
	return done;
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t offset)
{
	const char *name = watched(descriptor);
	ssize_t done;

	if (refused(name))
		return -1;
	done = real_pwrite(descriptor, data, size, offset);
	if (name != NULL && done > 0)
		note('w', name, offset, data, done);
	return done;
}

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset)
{
	return pwrite64(descriptor, data, size, offset);
}

int unlink(const char *path)
{
	const char *directory = getenv("FAULTY_DIRECTORY");
	int done = real_unlink(path);

	if (done == 0 && directory != NULL && strncmp(path, directory, strlen(directory)) == 0)
		note('u', path + strlen(directory) + 1, 0, NULL, 0);
	return done;
}

int ftruncate64(int descriptor, off64_t size)
{
	const char *name = watched(descriptor);
	int done = real_ftruncate(descriptor, size);

	if (name != NULL && done == 0)
		note('t', name, size, NULL, 0);
	return done;
}

int ftruncate(int descriptor, off_t size)
{
	return ftruncate64(descriptor, size);
}

static int sync_with(int (*real)(int), int descriptor)
{
	const char *name = watched(descriptor);
	char now = name == NULL ? 0 : mode();

	if (now == 's') {
		errno = EIO;
		return -1;
	}
	if (now == 'd')
		usleep(30000);
	if (real(descriptor) != 0)
		return -1;
	if (name != NULL)
		note('s', name, 0, NULL, 0);
	return 0;
}

int fsync(int descriptor)
{
	return sync_with(real_fsync, descriptor);
}

int fdatasync(int descriptor)
{
	return sync_with(real_fdatasync, descriptor);
}
