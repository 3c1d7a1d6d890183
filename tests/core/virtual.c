/* The compiled core, its source unchanged, over a kernel that a test makes up (tests/core/virtual.py).
 *
 * `recv`, `send` and `epoll_wait` call Python if it wants them, and the real ones otherwise; `fail_after` makes memory
 * for bytes objects run out.
 */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <sys/epoll.h>
#include <sys/socket.h>

/* Each returns what the system call does, or the errno negated. */
typedef ssize_t (*receive_call)(int descriptor, void *data, size_t size);
typedef ssize_t (*send_call)(int descriptor, const void *data, size_t size);
typedef int (*wait_call)(int *pairs, int most); /* writes descriptors and events by turns */

static receive_call python_receive;
static send_call python_send;
static wait_call python_wait;
static int left_before_failure = -1;

__attribute__((visibility("default"))) void set_kernel(receive_call, send_call, wait_call);
__attribute__((visibility("default"))) void fail_after(int);

void set_kernel(receive_call receive, send_call send_on, wait_call wait)
{
    python_receive = receive;
    python_send = send_on;
    python_wait = wait;
}

/* Let so many allocations succeed and the one after them fail; -1 for no failure. */
void fail_after(int allocations)
{
    left_before_failure = allocations;
}

static int is_out_of_memory(void)
{
    return left_before_failure >= 0 && left_before_failure-- == 0;
}

static ssize_t result_of(ssize_t result)
{
    if (result >= 0)
        return result;
    errno = (int)-result;
    return -1;
}

static ssize_t virtual_recv(int descriptor, void *data, size_t size, int flags)
{
    return python_receive ? result_of(python_receive(descriptor, data, size)) : recv(descriptor, data, size, flags);
}

static ssize_t virtual_send(int descriptor, const void *data, size_t size, int flags)
{
    return python_send ? result_of(python_send(descriptor, data, size)) : send(descriptor, data, size, flags);
}

static int virtual_epoll_wait(int epoll, struct epoll_event *events, int most, int milliseconds)
{
    if (!python_wait)
        return epoll_wait(epoll, events, most, milliseconds);
    int pairs[2 * 64];
    int count = (int)result_of(python_wait(pairs, most < 64 ? most : 64));
    for (int index = 0; index < count; index++) {
        events[index].data.fd = pairs[2 * index];
        events[index].events = (uint32_t)pairs[2 * index + 1];
    }
    return count;
}

static PyObject *virtual_bytes(const char *data, Py_ssize_t size)
{
    return is_out_of_memory() ? PyErr_NoMemory() : PyBytes_FromStringAndSize(data, size);
}

#define recv virtual_recv
#define send virtual_send
#define epoll_wait virtual_epoll_wait
#define PyBytes_FromStringAndSize virtual_bytes

#include "_core.c"

__attribute__((visibility("default"))) size_t records(struct records *, const uint8_t *, size_t);

/* Count TLS records as for a lent pair. */
size_t records(struct records *records, const uint8_t *data, size_t size)
{
    return completed_records(records, data, size);
}
