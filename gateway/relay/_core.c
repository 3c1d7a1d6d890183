/* The compiled core: relays the messages of established sessions without Python.
 *
 * In: readable sockets of sessions that `gateway/relay/carrier.py` has lent.  Out: the same bytes on the other side,
 * encrypted or decrypted.  Anything unusual goes back to Python with the bytes; C never ends a session and never
 * decides that a packet is wrong.  It says "pass", or it says "look" and changes nothing.
 *
 * Ownership
 * ---------
 * A session's relaying state has one owner at a time.  Python is the owner until `Pair.lend`, C from there until the
 * pair is withdrawn.  Three things withdraw a pair:
 *
 *   - C itself, when an event is not ordinary (`hand_over`).  From then on C touches neither socket nor SSL object; the
 *     state, and the bytes that C could not deal with, wait in the Pair for `Pair.take_back`.
 *   - Python, by `Pair.take_back`, before it changes anything: what is watched, the framers, the TLS channel.
 *   - Nothing else.  In particular no destructor: the table holds a reference to every pair that is lent.
 *
 * What C may touch is alive as long as C may touch it:
 *
 *   - Descriptors: `slots` maps a descriptor to the pair that it is lent with.  RelayReactor takes the pair back before
 *     either socket is closed or watched otherwise, so a slot never names a descriptor that has been closed.
 *   - The SSL object and its two BIOs: the Pair holds a reference to the Python object that frees them.
 *   - Rule tables: bytes objects that Python builds and the Pair holds.  C only reads them.
 *
 * All of this runs in the reactor's thread and with the GIL; only waiting for events releases it.  The buffers below
 * are shared by all sessions and empty between two events.  Nothing is allocated for a message that passes.
 *
 * The one invariant of the TLS side: when a pair is lent, both memory BIOs are empty but for an unfinished record.
 * Every whole record of application data gives one successful SSL_read.  Any other record makes one SSL_read fail,
 * and that is handed over; so what TLS wants to answer (KeyUpdate) never waits here.
 *
 * No OpenSSL headers: the five functions are those that cryptography's wheel has inside, given by Python as addresses.
 *
 * If this has to be shorter, leave out `judge` and what only it calls, about 150 lines: sessions under
 * `limits.check_bodies` then stay with Python.
 */

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

enum {
    BATCH = 64,           /* events at a time, as in net/transport.py */
    HELD = 256,           /* most bytes of a packet's head that wait here for the rest of it */
    READ = 0x10000,       /* bytes read at a time */
    RECORD = 0x4000,      /* most plaintext in a TLS record (RFC 8446, 5.1) */
    RECORD_HEADER = 5,
    PLAIN = READ + 3 * RECORD, /* READ bytes complete at most READ bytes of plaintext and a record more; room for one */
    CIPHER = 2 * READ,    /* more than the records of READ + HELD bytes of plaintext */
    WORK = 8 * READ,      /* bytes at a time, about a millisecond's work; what is left waits for the next call */
    RECORD_WORK = 256,    /* a TLS record costs as much as so many bytes */
    HANDED_WORK = 2 * READ, /* and what is handed over, as so many: Python works on it */
    TABLE = 256,
    DESCRIPTORS = 0x20000, /* those beyond are not lent; pages of the table that are not used take no memory */
};

/* ---- OpenSSL, as cryptography has it */

static struct {
    int (*ssl_write)(void *ssl, const void *data, int size);
    int (*ssl_read)(void *ssl, void *data, int size);
    int (*bio_write)(void *bio, const void *data, int size);
    int (*bio_read)(void *bio, void *data, int size);
    void (*clear_errors)(void);
} openssl;

/* ---- Types */

/* What one sender may send in one version: tables over the 256 first bytes, made by gateway/mqtt/framer.py. */
struct rules {
    const uint8_t *low;        /* the shortest Remaining Length, or NEVER */
    const uint8_t *high;       /* the longest, or ANY for as long as the limit permits */
    const uint8_t *body;       /* which of the `enum body` bits apply */
    const uint8_t *properties; /* over property identifiers: how the value of each is written, 0 if not permitted */
    size_t max_packet;
};

enum { NEVER = 255, ANY = 127 };

enum body {
    NAMED = 1,       /* begins with a Topic Name */
    NUMBERED = 2,    /* then has a Packet Identifier */
    PROPERTIES = 4,  /* then has properties */
    SHORT = 8,       /* has at most a reason code behind the Packet Identifier, or needs a look */
};

/* Where the packets of one direction stand. */
struct stream {
    struct rules rules;
    size_t skip;             /* bytes of the current packet that are still to come */
    uint64_t packets;        /* passed since the last settlement */
    uint64_t bytes;          /* likewise */
    size_t held_size;
    uint8_t held[HELD];      /* the beginning of a packet whose head is not whole; it has not been passed on */
};

/* Where the TLS records from the broker stand: bytes missing of the current one, or the beginning of a header. */
struct records {
    size_t missing;
    size_t header_size;
    uint8_t header[RECORD_HEADER];
};

/* Why a pair was handed over. */
enum handed {
    NOTHING,        /* the next event is for Python */
    FROM_DEVICE,    /* `data` came from the device; the framer has not seen it */
    FROM_BROKER,    /* `data` is plaintext from the broker; the framer has not seen it */
    TO_DEVICE,      /* `data` has passed and is to be sent before anything else */
    TO_BROKER,      /* likewise; it is ciphertext */
    TLS_ENDED,      /* as FROM_BROKER, and behind it SSL_read returned `result` */
    DEVICE_ENDED,   /* recv failed with errno `result`, or 0 for the end */
    BROKER_ENDED,   /* likewise */
    FAILED,         /* bytes are lost: no memory, or OpenSSL has taken a part of them */
};

typedef struct {
    PyObject_HEAD
    PyObject *owner;          /* who is told of a hand-over; set from `lend` to `take_back` */
    PyObject *kept;           /* what the pointers below and in the rules point into */
    void *ssl, *into_ssl, *from_ssl;
    struct stream up, down;
    struct records records;
    int device, broker;       /* descriptors */
    bool heard;               /* whether the device has sent anything since the last settlement */
    enum handed handed;
    int result;
    PyObject *data;
} Pair;

/* ---- The table of lent descriptors */

static Pair *slots[DESCRIPTORS];

static bool is_in_table(int descriptor)
{
    return descriptor >= 0 && descriptor < DESCRIPTORS;
}

static Pair *lent(int descriptor)
{
    return is_in_table(descriptor) ? slots[descriptor] : NULL;
}

/* Take a pair out of the table.  The caller has a reference of its own. */
static void withdraw(Pair *pair)
{
    if (lent(pair->device) != pair)
        return;
    slots[pair->device] = slots[pair->broker] = NULL;
    Py_DECREF(pair);
}

/* Withdraw a pair and keep for Python what could not be dealt with. */
static void hand_over(Pair *pair, enum handed why, const uint8_t *data, size_t size, int result)
{
    pair->handed = why;
    pair->result = result;
    pair->data = PyBytes_FromStringAndSize((const char *)data, (Py_ssize_t)size);
    if (pair->data == NULL) {
        PyErr_Clear();
        pair->handed = FAILED;
    }
    /* The table's reference goes with the call to `deal`, which adds the owner to what it reports. */
    slots[pair->device] = slots[pair->broker] = NULL;
}

/* ---- MQTT: what may pass unseen */

static size_t two_bytes(const uint8_t *at)
{
    return (size_t)at[0] << 8 | at[1];
}

/* Read a Variable Byte Integer: how many bytes it takes, 0 if it is cut off, -1 if it is too long or padded. */
static int variable_integer(const uint8_t *at, size_t left, size_t *value)
{
    *value = 0;
    for (int size = 0; size < 4; size++) {
        if ((size_t)size == left)
            return 0;
        *value |= (size_t)(at[size] & 0x7F) << 7 * size;
        if (at[size] < 0x80)
            return size > 0 && at[size] == 0 ? -1 : size + 1;
    }
    return -1;
}

/* How many bytes the UTF-8 sequence at `at` takes; 0 if it is none (RFC 3629, 4). */
static size_t sequence_size(const uint8_t *at, size_t left)
{
    uint8_t first = at[0], low = 0x80, high = 0xBF;
    size_t size = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (first < 0xC2 || first > 0xF4 || size > left)
        return 0;
    if (first == 0xE0)
        low = 0xA0; /* shorter would do */
    else if (first == 0xED)
        high = 0x9F; /* surrogates */
    else if (first == 0xF0)
        low = 0x90; /* shorter would do */
    else if (first == 0xF4)
        high = 0x8F; /* beyond U+10FFFF */
    if (at[1] < low || at[1] > high)
        return 0;
    for (size_t index = 2; index < size; index++)
        if ((at[index] & 0xC0) != 0x80)
            return 0;
    return size;
}

/* Whether this is UTF-8 without U+0000 and, in a Topic Name, without wildcards. */
static bool is_text(const uint8_t *at, size_t size, bool is_topic)
{
    for (size_t index = 0; index < size;) {
        uint8_t byte = at[index];
        if (byte >= 0x80) {
            size_t taken = sequence_size(at + index, size - index);
            if (taken == 0)
                return false;
            index += taken;
        } else if (byte == 0 || (is_topic && (byte == '+' || byte == '#'))) {
            return false;
        } else {
            index++;
        }
    }
    return true;
}

enum { TOPIC_ALIAS = 0x23, SUBSCRIPTION_IDENTIFIER = 0x0B, USER_PROPERTY = 0x26 };

/* How many bytes a string or binary value takes with its length; 0 if it is not in order. */
static size_t counted_size(const uint8_t *at, size_t left, bool is_string)
{
    if (left < 2 || left - 2 < two_bytes(at))
        return 0;
    size_t size = two_bytes(at);
    return !is_string || is_text(at + 2, size, false) ? size + 2 : 0;
}

/* How many bytes the value of a property takes, written as `kind` says; 0 if it is not in order. */
static size_t value_size(uint8_t kind, const uint8_t *at, size_t left)
{
    size_t value, size;
    int taken;
    switch (kind) {
    case '1': /* a byte that is 0 or 1 */
        return left >= 1 && at[0] <= 1 ? 1 : 0;
    case '2': /* two bytes, not zero: Topic Alias */
        return left >= 2 && two_bytes(at) != 0 ? 2 : 0;
    case '4':
        return left >= 4 ? 4 : 0;
    case 'v': /* a Variable Byte Integer, not zero */
        taken = variable_integer(at, left, &value);
        return taken > 0 && value != 0 ? (size_t)taken : 0;
    case 's':
        return counted_size(at, left, true);
    case 'b':
        return counted_size(at, left, false);
    case 'p': /* two strings */
        size = counted_size(at, left, true);
        value = size != 0 ? counted_size(at + size, left - size, true) : 0;
        return value != 0 ? size + value : 0;
    default:
        return 0;
    }
}

/* Whether properties are in order (MQTT 5.0, 2.2.2); `has_alias` says whether there is a Topic Alias. */
static bool are_properties(const struct rules *rules, const uint8_t *at, size_t size, bool *has_alias)
{
    uint64_t seen = 0;
    while (size > 0) {
        uint8_t identifier = at[0];
        size_t taken = value_size(rules->properties[identifier], at + 1, size - 1);
        if (taken == 0 || identifier > 63)
            return false;
        uint64_t bit = (uint64_t)1 << identifier;
        if ((seen & bit) != 0 && identifier != USER_PROPERTY && identifier != SUBSCRIPTION_IDENTIFIER)
            return false;
        seen |= bit;
        at += 1 + taken;
        size -= 1 + taken;
    }
    *has_alias = (seen & (uint64_t)1 << TOPIC_ALIAS) != 0;
    return true;
}

enum verdict { PASS, CUT, LOOK };

/* Judge properties at the beginning of `body`, of whose `length` bytes `left` are there. */
static enum verdict judge_properties(const struct rules *rules, const uint8_t *body, size_t left, size_t length,
                                     bool *has_alias)
{
    size_t size;
    int taken = variable_integer(body, left < length ? left : length, &size);
    if (taken < 0 || (taken == 0 && left >= length))
        return LOOK;
    if (taken == 0)
        return CUT;
    size_t offset = (size_t)taken;
    if (length - offset < size)
        return LOOK;
    if (left - offset < size)
        return CUT;
    return are_properties(rules, body + offset, size, has_alias) ? PASS : LOOK;
}

/* Judge the head of a body of `length` bytes of which `left` are there, or more behind it. */
static enum verdict judge(const struct rules *rules, uint8_t bits, const uint8_t *body, size_t left, size_t length)
{
    size_t offset = 0;
    bool needs_alias = false, has_alias = false;
    if (bits & NAMED) {
        if (length < 2)
            return LOOK;
        if (left < 2)
            return CUT;
        size_t topic = two_bytes(body);
        offset = 2 + topic;
        if (length < offset)
            return LOOK;
        if (left < offset)
            return CUT;
        if (!is_text(body + 2, topic, true))
            return LOOK;
        needs_alias = topic == 0;
    }
    if (bits & NUMBERED) {
        if (length < offset + 2)
            return LOOK;
        if (left < offset + 2)
            return CUT;
        if (two_bytes(body + offset) == 0)
            return LOOK;
        offset += 2;
    }
    if ((bits & SHORT) && length > offset + 1)
        return LOOK;
    if (bits & PROPERTIES) {
        enum verdict verdict = judge_properties(rules, body + offset, left - offset, length - offset, &has_alias);
        if (verdict != PASS)
            return verdict;
    }
    return needs_alias && !has_alias ? LOOK : PASS;
}

/* What a walk over a piece of the stream has found. */
struct walk {
    size_t passed; /* so many bytes may go on; the rest is the beginning of a packet that is to be held */
    size_t skip;
    size_t packets;
};

/* Walk over the packets in `data`; false if one of them needs a look.  Changes nothing of the stream. */
static bool walk(const struct stream *stream, const uint8_t *data, size_t size, struct walk *found)
{
    const struct rules *rules = &stream->rules;
    size_t position = stream->skip;
    size_t packets = 0;
    while (position < size) {
        size_t left = size - position, length;
        uint8_t first = data[position];
        if (rules->low[first] == NEVER)
            return false;
        int taken = variable_integer(data + position + 1, left - 1, &length);
        if (taken < 0)
            return false;
        if (taken == 0)
            break;
        size_t header = 1 + (size_t)taken;
        bool is_too_long = rules->high[first] == ANY ? length > rules->max_packet - header : length > rules->high[first];
        if (length < rules->low[first] || is_too_long)
            return false;
        if (rules->body[first] != 0) {
            enum verdict verdict =
                judge(rules, rules->body[first], data + position + header, left - header, length);
            if (verdict == LOOK)
                return false;
            if (verdict == CUT)
                break;
        }
        position += header + length;
        packets++;
    }
    found->passed = position < size ? position : size;
    found->skip = position < size ? 0 : position - size;
    found->packets = packets;
    return size - found->passed <= HELD;
}

/* Make what a walk has found the stream's state; `data` is what it walked over. */
static void commit(struct stream *stream, const uint8_t *data, size_t size, const struct walk *found)
{
    stream->skip = found->skip;
    stream->packets += found->packets;
    stream->bytes += found->passed;
    stream->held_size = size - found->passed;
    memcpy(stream->held, data + found->passed, stream->held_size);
}

/* Put what is held before the bytes at `data`, which have HELD bytes of room before them; the new beginning. */
static uint8_t *join(const struct stream *stream, uint8_t *data)
{
    memcpy(data - stream->held_size, stream->held, stream->held_size);
    return data - stream->held_size;
}

/* ---- TLS records */

/* How many records `data` completes (RFC 8446, 5.1), remembering where it ends. */
static size_t completed_records(struct records *records, const uint8_t *data, size_t size)
{
    size_t completed = 0, position = 0;
    while (position < size) {
        if (records->missing == 0) {
            records->header[records->header_size++] = data[position++];
            if (records->header_size < RECORD_HEADER)
                continue;
            records->header_size = 0;
            records->missing = two_bytes(records->header + 3);
        } else {
            size_t taken = size - position < records->missing ? size - position : records->missing;
            position += taken;
            records->missing -= taken;
        }
        if (records->missing == 0)
            completed++;
    }
    return completed;
}

/* ---- One event */

static uint8_t network[HELD + READ];  /* what was received, with room for what is held before it */
static uint8_t plain[HELD + PLAIN];   /* what was decrypted, likewise */
static uint8_t cipher[CIPHER];        /* what was encrypted */

/* Bytes' worth of work since the last batch began. */
static size_t work;

/* Receive into `network`; true if there is something, false if there is not or the pair was handed over. */
static bool receive(Pair *pair, int descriptor, enum handed ended, size_t *size)
{
    ssize_t got = recv(descriptor, network + HELD, READ, MSG_DONTWAIT);
    if (got > 0) {
        *size = (size_t)got;
        work += (size_t)got;
        return true;
    }
    if (got == 0)
        hand_over(pair, ended, NULL, 0, 0);
    else if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
        hand_over(pair, ended, NULL, 0, errno);
    return false;
}

/* Send; what the kernel does not take is handed over. */
static void send_on(Pair *pair, int descriptor, enum handed rest, const uint8_t *data, size_t size)
{
    ssize_t sent = send(descriptor, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
    size_t gone = sent < 0 ? 0 : (size_t)sent;
    if (gone < size)
        hand_over(pair, rest, data + gone, size - gone, 0);
}

/* The device has sent something. */
static void device_readable(Pair *pair)
{
    size_t received;
    struct walk found;
    if (!receive(pair, pair->device, DEVICE_ENDED, &received))
        return;
    uint8_t *data = join(&pair->up, network + HELD);
    size_t size = pair->up.held_size + received;
    if (!walk(&pair->up, data, size, &found)) {
        hand_over(pair, FROM_DEVICE, network + HELD, received, 0);
        return;
    }
    if (found.passed > 0) {
        openssl.clear_errors();
        int written = openssl.ssl_write(pair->ssl, data, (int)found.passed);
        if (written != (int)found.passed) {
            /* What OpenSSL took a part of must not be encrypted again.  As it is set up, it takes all or nothing. */
            hand_over(pair, written > 0 ? FAILED : FROM_DEVICE, network + HELD, received, 0);
            return;
        }
    }
    commit(&pair->up, data, size, &found);
    pair->heard = true;
    if (found.passed > 0) {
        int taken = openssl.bio_read(pair->from_ssl, cipher, CIPHER);
        if (taken <= 0 || taken == CIPHER)
            hand_over(pair, TO_BROKER, cipher, taken > 0 ? (size_t)taken : 0, 0);
        else
            send_on(pair, pair->broker, TO_BROKER, cipher, (size_t)taken);
    }
}

/* Decrypt `records` records; false if the pair was handed over. */
static bool decrypt(Pair *pair, size_t records, size_t *filled)
{
    *filled = 0;
    for (size_t index = 0; index < records; index++) {
        if (*filled > PLAIN - RECORD) { /* cannot be: so much was not received */
            hand_over(pair, FAILED, NULL, 0, 0);
            return false;
        }
        openssl.clear_errors();
        int got = openssl.ssl_read(pair->ssl, plain + HELD + *filled, RECORD);
        if (got <= 0) {
            hand_over(pair, TLS_ENDED, plain + HELD, *filled, got);
            return false;
        }
        *filled += (size_t)got;
    }
    return true;
}

/* The broker has sent something. */
static void broker_readable(Pair *pair)
{
    size_t received, decrypted;
    struct walk found;
    if (!receive(pair, pair->broker, BROKER_ENDED, &received))
        return;
    if (openssl.bio_write(pair->into_ssl, network + HELD, (int)received) != (int)received) {
        hand_over(pair, FAILED, NULL, 0, 0);
        return;
    }
    size_t records = completed_records(&pair->records, network + HELD, received);
    work += records * RECORD_WORK;
    if (!decrypt(pair, records, &decrypted) || decrypted == 0)
        return;
    uint8_t *data = join(&pair->down, plain + HELD);
    size_t size = pair->down.held_size + decrypted;
    if (!walk(&pair->down, data, size, &found)) {
        hand_over(pair, FROM_BROKER, plain + HELD, decrypted, 0);
        return;
    }
    commit(&pair->down, data, size, &found);
    if (found.passed > 0)
        send_on(pair, pair->device, TO_DEVICE, data, found.passed);
}

/* ---- A batch of events */

/* Descriptors of lent pairs that are readable and for which there was no time in the last batch. */
static int left[BATCH];
static int left_count;

/* Deal with one event: 0, or -1 with an exception.  `stop` is set when OpenSSL's error queue must not be disturbed. */
static int deal(const struct epoll_event *event, PyObject *handed, PyObject *others, bool *stop)
{
    int descriptor = event->data.fd;
    Pair *pair = lent(descriptor);
    if (pair != NULL) {
        if (event->events != EPOLLIN)
            hand_over(pair, NOTHING, NULL, 0, 0);
        else if (descriptor == pair->device)
            device_readable(pair);
        else
            broker_readable(pair);
        if (lent(descriptor) == pair)
            return 0;
        work += HANDED_WORK;
        /* Why OpenSSL failed stands in a queue of the thread: that one first, and nothing else before it. */
        *stop = pair->handed == TLS_ENDED;
        int failed = *stop ? PyList_Insert(handed, 0, pair->owner) : PyList_Append(handed, pair->owner);
        bool is_for_python = pair->handed == NOTHING;
        Py_DECREF(pair); /* the table's; the owner has one of its own */
        if (failed || !is_for_python)
            return failed;
    }
    PyObject *item = Py_BuildValue("(iI)", descriptor, (unsigned int)event->events);
    if (item == NULL)
        return -1;
    int failed = PyList_Append(others, item);
    Py_DECREF(item);
    return failed;
}

/* Leave an event of a lent pair to the next call; anything but data is reported by the kernel again. */
static void leave(const struct epoll_event *event)
{
    for (int index = 0; index < left_count; index++)
        if (left[index] == event->data.fd)
            return;
    if (event->events == EPOLLIN && left_count < BATCH)
        left[left_count++] = event->data.fd;
}

PyDoc_STRVAR(poll_doc,
"poll(epoll, milliseconds, most) -> (count, handed, others)\n\n"
"Wait for events and deal with those of lent pairs, as far as there is time; what is left comes first in the next\n"
"call, and `count` is then that of a full batch.  `handed` are the owners of pairs that were handed over, which come\n"
"first, in this order; `others` are events as select.epoll.poll gives them.");

static PyObject *poll_events(PyObject *self, PyObject *args)
{
    struct epoll_event events[BATCH];
    int epoll, milliseconds, most, count;
    bool stop = false;
    (void)self;
    if (!PyArg_ParseTuple(args, "iii:poll", &epoll, &milliseconds, &most))
        return NULL;
    if (most < 1 || most > BATCH)
        return PyErr_Format(PyExc_ValueError, "at most %d events at a time", BATCH);
    Py_BEGIN_ALLOW_THREADS
    count = epoll_wait(epoll, events, most, left_count > 0 ? 0 : milliseconds);
    Py_END_ALLOW_THREADS
    if (count < 0) {
        if (errno != EINTR)
            return PyErr_SetFromErrno(PyExc_OSError);
        if (PyErr_CheckSignals())
            return NULL;
        count = 0;
    }
    PyObject *handed = PyList_New(0), *others = PyList_New(0);
    bool is_well = handed != NULL && others != NULL;
    work = 0;
    for (; is_well && !stop && work < WORK && left_count > 0; left_count--) {
        /* Its pair may have been withdrawn meanwhile; a socket that is not readable does no harm. */
        struct epoll_event event = {.events = EPOLLIN, .data.fd = left[0]};
        memmove(left, left + 1, (size_t)(left_count - 1) * sizeof *left);
        if (lent(event.data.fd) != NULL)
            is_well = deal(&event, handed, others, &stop) == 0;
    }
    for (int index = 0; is_well && !stop && index < count; index++) {
        if (work >= WORK && lent(events[index].data.fd) != NULL)
            leave(&events[index]);
        else
            is_well = deal(&events[index], handed, others, &stop) == 0;
    }
    if (left_count > 0)
        count = BATCH;
    PyObject *result = is_well ? Py_BuildValue("(iOO)", count, handed, others) : NULL;
    Py_XDECREF(handed);
    Py_XDECREF(others);
    return result;
}

/* ---- Pairs, as Python sees them */

/* Point into tables that Python has made: low, high, body, properties. */
static bool read_rules(struct rules *rules, PyObject *tables, Py_ssize_t max_packet)
{
    char *bytes;
    Py_ssize_t size;
    if (PyBytes_AsStringAndSize(tables, &bytes, &size) < 0)
        return false;
    if (size != 4 * TABLE || max_packet < TABLE) {
        PyErr_SetString(PyExc_ValueError, "four tables of 256 bytes, and a limit of at least 256");
        return false;
    }
    rules->low = (const uint8_t *)bytes;
    rules->high = rules->low + TABLE;
    rules->body = rules->high + TABLE;
    rules->properties = rules->body + TABLE;
    rules->max_packet = (size_t)max_packet;
    return true;
}

static PyObject *pair_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    PyObject *kept, *up, *down;
    Py_ssize_t max_up, max_down;
    unsigned long long ssl, into_ssl, from_ssl;
    (void)keywords;
    if (!PyArg_ParseTuple(args, "O(KKK)OnOn:Pair", &kept, &ssl, &into_ssl, &from_ssl, &up, &max_up, &down, &max_down))
        return NULL;
    if (!ssl || !into_ssl || !from_ssl || !openssl.ssl_read)
        return PyErr_Format(PyExc_ValueError, "a null pointer, or `use` has not been called");
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Pair *pair = (Pair *)allocate(type, 0); /* zeroed */
    if (pair == NULL)
        return NULL;
    pair->device = pair->broker = -1;
    pair->ssl = (void *)(uintptr_t)ssl;
    pair->into_ssl = (void *)(uintptr_t)into_ssl;
    pair->from_ssl = (void *)(uintptr_t)from_ssl;
    pair->kept = PyTuple_Pack(3, kept, up, down);
    if (pair->kept == NULL || !read_rules(&pair->up.rules, up, max_up) ||
        !read_rules(&pair->down.rules, down, max_down)) {
        Py_DECREF(pair);
        return NULL;
    }
    return (PyObject *)pair;
}

static void pair_dealloc(PyObject *self)
{
    Pair *pair = (Pair *)self;
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    Py_XDECREF(pair->owner);
    Py_XDECREF(pair->kept);
    Py_XDECREF(pair->data);
    release(self);
    Py_DECREF(type);
}

/* Set where a direction stands; false with an exception if that cannot be. */
static bool place(struct stream *stream, Py_ssize_t skip, const char *held, Py_ssize_t held_size)
{
    if (skip < 0 || held_size > HELD || (skip > 0 && held_size > 0)) {
        PyErr_SetString(PyExc_ValueError, "a stream cannot stand so");
        return false;
    }
    stream->skip = (size_t)skip;
    stream->held_size = (size_t)held_size;
    memcpy(stream->held, held, (size_t)held_size);
    return true;
}

PyDoc_STRVAR(lend_doc,
"lend(device, broker, owner, up_skip, up_held, down_skip, down_held, missing, header)\n\n"
"Give C two descriptors and where their streams stand, until `take_back` or a hand-over, of which `owner` is told.");

static PyObject *pair_lend(PyObject *self, PyObject *args)
{
    Pair *pair = (Pair *)self;
    int device, broker;
    PyObject *owner;
    const char *up_held, *down_held, *header;
    Py_ssize_t up_skip, up_size, down_skip, down_size, missing, header_size;
    if (!PyArg_ParseTuple(args, "iiOny#ny#ny#:lend", &device, &broker, &owner, &up_skip, &up_held, &up_size, &down_skip,
                          &down_held, &down_size, &missing, &header, &header_size))
        return NULL;
    if (pair->owner != NULL || !is_in_table(device) || !is_in_table(broker) || device == broker || lent(device) ||
        lent(broker))
        return PyErr_Format(PyExc_ValueError, "descriptors %d and %d cannot be lent", device, broker);
    if (missing < 0 || header_size >= RECORD_HEADER || (missing > 0 && header_size > 0))
        return PyErr_Format(PyExc_ValueError, "records cannot stand so");
    if (!place(&pair->up, up_skip, up_held, up_size) || !place(&pair->down, down_skip, down_held, down_size))
        return NULL;
    pair->records.missing = (size_t)missing;
    pair->records.header_size = (size_t)header_size;
    memcpy(pair->records.header, header, (size_t)header_size);
    pair->device = device;
    pair->broker = broker;
    Py_INCREF(owner);
    pair->owner = owner;
    pair->handed = NOTHING;
    Py_INCREF(self);
    slots[device] = slots[broker] = pair;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(take_back_doc,
"take_back() -> (up_skip, up_held, down_skip, down_held, missing, header, handed, data, result)\n\n"
"Take everything from C; without effect on what was handed over, which is given with its reason.");

static PyObject *pair_take_back(PyObject *self, PyObject *unused)
{
    Pair *pair = (Pair *)self;
    (void)unused;
    if (pair->owner == NULL)
        return PyErr_Format(PyExc_RuntimeError, "the pair is not lent");
    PyObject *state = Py_BuildValue(
        "(ny#ny#ny#iOi)", (Py_ssize_t)pair->up.skip, (const char *)pair->up.held, (Py_ssize_t)pair->up.held_size,
        (Py_ssize_t)pair->down.skip, (const char *)pair->down.held, (Py_ssize_t)pair->down.held_size,
        (Py_ssize_t)pair->records.missing, (const char *)pair->records.header, (Py_ssize_t)pair->records.header_size,
        (int)pair->handed, pair->data != NULL ? pair->data : Py_None, pair->result);
    if (state == NULL)
        return NULL;
    withdraw(pair);
    Py_CLEAR(pair->data);
    Py_CLEAR(pair->owner);
    pair->device = pair->broker = -1;
    return state;
}

PyDoc_STRVAR(settle_doc,
"settle() -> (bytes_up, bytes_down, packets_up, packets_down, heard)\n\n"
"What has passed since the last time, lent or not, and whether the device has sent anything.");

static PyObject *pair_settle(PyObject *self, PyObject *unused)
{
    Pair *pair = (Pair *)self;
    (void)unused;
    PyObject *counts = Py_BuildValue("(KKKKO)", (unsigned long long)pair->up.bytes,
                                     (unsigned long long)pair->down.bytes, (unsigned long long)pair->up.packets,
                                     (unsigned long long)pair->down.packets, pair->heard ? Py_True : Py_False);
    if (counts == NULL)
        return NULL;
    pair->up.bytes = pair->down.bytes = pair->up.packets = pair->down.packets = 0;
    pair->heard = false;
    return counts;
}

static PyMethodDef pair_methods[] = {
    {"lend", pair_lend, METH_VARARGS, lend_doc},
    {"take_back", pair_take_back, METH_NOARGS, take_back_doc},
    {"settle", pair_settle, METH_NOARGS, settle_doc},
    {NULL, NULL, 0, NULL},
};

PyDoc_STRVAR(pair_doc,
"Pair(keep, (ssl, into_ssl, from_ssl), up_tables, up_limit, down_tables, down_limit)\n\n"
"The two connections of a session.  `keep` is what keeps the SSL object and its BIOs alive, given by address; tables\n"
"are those of `Framer.tables`, limits the largest packets.");

static PyType_Slot pair_slots[] = {
    {Py_tp_new, pair_new},
    {Py_tp_dealloc, pair_dealloc},
    {Py_tp_methods, pair_methods},
    {Py_tp_doc, (void *)pair_doc},
    {0, NULL},
};

static PyType_Spec pair_spec = {
    .name = "gateway.relay._core.Pair",
    .basicsize = (int)sizeof(Pair),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = pair_slots,
};

/* ---- The module */

PyDoc_STRVAR(use_doc,
"use(SSL_write, SSL_read, BIO_write, BIO_read, ERR_clear_error)\n\n"
"Take the addresses of OpenSSL's functions.");

static PyObject *use(PyObject *self, PyObject *args)
{
    unsigned long long ssl_write, ssl_read, bio_write, bio_read, clear_errors;
    (void)self;
    if (!PyArg_ParseTuple(args, "KKKKK:use", &ssl_write, &ssl_read, &bio_write, &bio_read, &clear_errors))
        return NULL;
    if (!ssl_write || !ssl_read || !bio_write || !bio_read || !clear_errors)
        return PyErr_Format(PyExc_ValueError, "a null pointer");
    openssl.ssl_write = (int (*)(void *, const void *, int))(uintptr_t)ssl_write;
    openssl.ssl_read = (int (*)(void *, void *, int))(uintptr_t)ssl_read;
    openssl.bio_write = (int (*)(void *, const void *, int))(uintptr_t)bio_write;
    openssl.bio_read = (int (*)(void *, void *, int))(uintptr_t)bio_read;
    openssl.clear_errors = (void (*)(void))(uintptr_t)clear_errors;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(walk_doc,
"walk(tables, limit, skip, data) -> (passed, skip, packets) or None\n\n"
"Walk over packets as for a lent pair: how many bytes may pass, where the stream then stands, how many packets began.\n"
"None if one needs a look.  For the trial at the start, and for tests.");

static PyObject *walk_stream(PyObject *self, PyObject *args)
{
    PyObject *tables;
    struct stream stream = {0};
    struct walk found;
    const char *data;
    Py_ssize_t max_packet, skip, size;
    (void)self;
    if (!PyArg_ParseTuple(args, "Onny#:walk", &tables, &max_packet, &skip, &data, &size) ||
        !read_rules(&stream.rules, tables, max_packet) || !place(&stream, skip, "", 0))
        return NULL;
    if (!walk(&stream, (const uint8_t *)data, (size_t)size, &found))
        Py_RETURN_NONE;
    return Py_BuildValue("(nnn)", (Py_ssize_t)found.passed, (Py_ssize_t)found.skip, (Py_ssize_t)found.packets);
}

static PyMethodDef core_methods[] = {
    {"use", use, METH_VARARGS, use_doc},
    {"poll", poll_events, METH_VARARGS, poll_doc},
    {"walk", walk_stream, METH_VARARGS, walk_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_core",
    .m_doc = "Relays the messages of established sessions; gateway/relay/carrier.py lends them.",
    .m_size = -1, /* static state: the process has one gateway */
    .m_methods = core_methods,
};

PyMODINIT_FUNC PyInit__core(void)
{
    PyObject *module = PyModule_Create(&core_module);
    if (module == NULL)
        return NULL;
    PyObject *type = PyType_FromSpec(&pair_spec);
    if (type == NULL || PyModule_AddObjectRef(module, "Pair", type) < 0 ||
        PyModule_AddIntConstant(module, "HELD", HELD) < 0 ||
        PyModule_AddIntConstant(module, "DESCRIPTORS", DESCRIPTORS) < 0) {
        Py_XDECREF(type);
        Py_DECREF(module);
        return NULL;
    }
    Py_DECREF(type);
    return module;
}
