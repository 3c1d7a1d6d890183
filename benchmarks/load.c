/* Devices and a broker in one process, with the relay to be measured between them.
 *
 * In: which work to do, the port of the relay, the port to be a TLS broker on, the process ids of the relay.
 * Out: one line of JSON with what was done in the measured time, the CPU time that the relay spent in it, and latencies.
 *
 * One thread and one epoll serve both ends: nothing is spent on switching between a generator and a sink, and both ends
 * of a message are stamped by the same clock.  Both ends check the framing of every packet that they get.
 *
 *   load roundtrip|up|down|paced|setup|storm|idle NAME=VALUE...
 *
 *   device_port=N   where devices connect: the relay, or the broker itself
 *   broker_port=N   where the broker listens
 *   cert=F key=F    PEM files of the broker; without them the broker speaks no TLS (to measure without a relay)
 *   sessions=N      sessions at a time
 *   payload=N       bytes of payload in each PUBLISH
 *   rate=N          messages per second in all (paced), or sessions (setup; as many as there can be if not given)
 *   warmup=S        seconds of the same work before the measured time
 *   seconds=S       measured time
 *   pids=N,N        the relay's processes
 *   pause=1         print "established" and wait for a line on standard input before the work, and once more at the end
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_PIDS 64
#define IN_FLIGHT 64         /* messages of one session that may wait for their PUBACK; a power of two */
#define ESTABLISHING 50      /* sessions that are set up at a time, where that is not what is measured */
#define PATIENCE 60.0        /* seconds after which something has failed that should have come about */
#define RETRY_AFTER 0.2      /* seconds after which a device that was turned away in the storm comes again */
#define RECORD 16384         /* the most that one TLS record carries */
#define DEVICE_CHUNK 65536   /* what a flooding device gives to one send */

enum mode { ROUNDTRIP, UP, DOWN, PACED, SETUP, STORM, IDLE };
static const char *const mode_names[] = {"roundtrip", "up", "down", "paced", "setup", "storm", "idle"};

enum phase { ESTABLISH, WARMUP, MEASURE, DRAIN };

/* One end of a connection.  A broker's has no number; a device's struct lives on when its socket is replaced. */
struct end {
    int fd;
    SSL *ssl;             /* NULL where there is no TLS */
    bool broker;
    bool connecting;      /* the device's connect has not been reported yet */
    bool shaking;         /* the handshake is not done */
    bool established;     /* CONNACK was sent, or came */
    uint32_t events;
    size_t offset;        /* in the flood */
    /* framing: MQTT 3.1.1 section 2.2 */
    enum { TYPE, LENGTH, BODY } expected;
    uint8_t type, shift, kept;
    uint8_t head[32];     /* the first bytes of a body */
    uint32_t length, left;
    /* PUBACKs to be sent when the bytes that came have been worked off */
    uint8_t acks[4096];
    size_t acks_length;
    /* devices */
    double started;       /* when it began to connect; 0: it does not stand in line to */
    double retry;         /* when to connect again; 0: not */
    uint16_t sent, acked; /* Packet Identifiers, counted from 1, wrapping at 65535 */
    double stamps[IN_FLIGHT];
    struct end *next, **link;  /* the broker's ends, to start a flood on all of them */
};

static enum mode mode;
static enum phase phase = ESTABLISH;
static int device_port, broker_port, sessions = 1, payload = 64, paused;
static double rate, warmup = 0.5, seconds = 3;
static double due; /* when the next message, or session, of a pace is to begin */
static const char *cert, *key;
static clockid_t clocks[MAX_PIDS];
static int clock_count;

static int poller, listener;
static SSL_CTX *tls;
static struct end *devices, *broker_ends, listener_end, input_end;
static int established, starting, next_device;
static bool waiting_for_input, input_came;

static uint8_t *flood;
static size_t flood_length, packet_length;
static uint8_t buffer[1 << 18];

/* what happened in the measured time */
static double phase_since, measured_since, relay_before, load_before;
static uint64_t units, bytes, failures, outstanding, handshakes, resumed;
/* connections that the broker has accepted since the start */
static uint64_t attempts;
static double *latencies;
static size_t latency_count, latency_room;
static char cipher[64] = "none";

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "load: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}

static double clock_seconds(clockid_t clock) {
    struct timespec time;
    if (clock_gettime(clock, &time) < 0)
        die("a process of the relay is gone");
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

static double now(void) { return clock_seconds(CLOCK_MONOTONIC); }

/* CPU seconds of all threads of the relay's processes, also of threads that have ended. */
static double relay_seconds(void) {
    double sum = 0;
    for (int index = 0; index < clock_count; index++)
        sum += clock_seconds(clocks[index]);
    return sum;
}

static void record_latency(double latency) {
    if (latency_count == latency_room) {
        latency_room = latency_room ? 2 * latency_room : 65536;
        latencies = realloc(latencies, latency_room * sizeof *latencies);
        if (!latencies)
            die("out of memory");
    }
    latencies[latency_count++] = latency;
}

static int compare(const void *left, const void *right) {
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static double percentile(double share) {
    return latency_count ? latencies[(size_t)(share * (double)(latency_count - 1) + 0.5)] : 0;
}

/* ---- epoll */

static void watch(struct end *end, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = end};
    if (end->events == events)
        return;
    if (epoll_ctl(poller, end->events ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, end->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
    end->events = events;
}

static void close_end(struct end *end) {
    SSL_free(end->ssl);
    end->ssl = NULL;
    close(end->fd);
    end->fd = -1;
    end->events = 0;
    if (end->broker) {
        *end->link = end->next;
        if (end->next)
            end->next->link = end->link;
        free(end);
    }
}

/* ---- packets */

static size_t build_publish(uint8_t *to, int qos, uint16_t id) {
    static const char topic[] = "bench";
    size_t length = 2 + strlen(topic) + (qos ? 2 : 0) + (size_t)payload, rest = length;
    uint8_t *at = to;
    *at++ = (uint8_t)(0x30 | qos << 1);
    do {
        *at++ = (uint8_t)((rest & 0x7f) | (rest > 0x7f ? 0x80 : 0));
        rest >>= 7;
    } while (rest);
    *at++ = 0;
    *at++ = (uint8_t)strlen(topic);
    memcpy(at, topic, strlen(topic));
    at += strlen(topic);
    if (qos) {
        *at++ = (uint8_t)(id >> 8);
        *at++ = (uint8_t)id;
    }
    memset(at, 'x', (size_t)payload);
    return (size_t)(at - to) + (size_t)payload;
}

/* Whole packets of QoS 0 that are sent again and again. */
static void build_flood(void) {
    flood = malloc((size_t)payload + (1 << 20));
    if (!flood)
        die("out of memory");
    do {
        packet_length = build_publish(flood + flood_length, 0, 0);
        flood_length += packet_length;
    } while (flood_length + packet_length < 1 << 20);
}

/* Send a few bytes, for which there is always room, or it is the relay that has stalled. */
static void send_small(struct end *end, const uint8_t *data, size_t length) {
    ssize_t sent = end->ssl ? SSL_write(end->ssl, data, (int)length) : send(end->fd, data, length, MSG_NOSIGNAL);
    /* A connection that has broken is met again when it is read. */
    if (sent >= 0 && (size_t)sent != length)
        die("no room for %zu bytes: the relay reads no more", length);
    if (sent < 0)
        ERR_clear_error();
}

static void send_publish(struct end *device, double stamp) {
    uint8_t packet[2048];
    if ((uint16_t)(device->sent - device->acked) >= IN_FLIGHT)
        die("%d messages of a session are not acknowledged", IN_FLIGHT);
    if (++device->sent == 0)
        device->sent = 1;
    device->stamps[device->sent % IN_FLIGHT] = stamp;
    send_small(device, packet, build_publish(packet, 1, device->sent));
}

static void connect_device(struct end *device) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)device_port)};
    int one = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    memset(device, 0, sizeof *device);
    device->started = now();
    device->connecting = true;
    device->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (device->fd < 0)
        die("socket: %s", strerror(errno));
    setsockopt(device->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(device->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS)
        die("connect: %s", strerror(errno));
    watch(device, EPOLLOUT);
}

static void send_connect(struct end *device) {
    /* MQTT 3.1.1, a clean session, keep alive of 10 minutes, a Client Identifier of its own */
    uint8_t packet[] = "\x10\x16\x00\x04MQTT\x04\x02\x02\x58\x00\x0a" "bench00000";
    char number[16];
    snprintf(number, sizeof number, "%05d", (int)(device - devices) % 100000);
    memcpy(packet + sizeof packet - 1 - 5, number, 5);
    send_small(device, packet, sizeof packet - 1);
}

/* ---- devices */

/* The device has lost its connection, or was refused. */
static void device_failed(struct end *device, const char *why) {
    int number = (int)(device - devices);
    bool was_established = device->established;
    close_end(device);
    if (mode == SETUP) {
        failures++;
        connect_device(device);
    } else if (mode == STORM && phase == MEASURE && !was_established) {
        failures++;
        device->retry = now() + RETRY_AFTER;
    } else
        die("device %d of %d: %s", number, sessions, why);
}

/* Begin the next session: at once, or in its turn of a pace. */
static void connect_when_due(struct end *device) {
    if (rate <= 0) {
        connect_device(device);
        return;
    }
    due = fmax(due, now()) + 1 / rate;
    device->retry = due;
}

static void device_connack(struct end *device, bool accepted) {
    static const uint8_t disconnect[] = {0xe0, 0x00};
    if (device->established)
        die("a second CONNACK");
    if (!accepted) {
        device_failed(device, "CONNACK says no");
        return;
    }
    device->established = true;
    established++;
    if (phase == ESTABLISH)
        starting--;
    if (phase == MEASURE && (mode == SETUP || mode == STORM)) {
        units++;
        record_latency(now() - (mode == STORM ? measured_since : device->started));
    }
    if (mode == SETUP) {
        send_small(device, disconnect, sizeof disconnect);
        close_end(device);
        connect_when_due(device);
    }
}

static void device_acked(struct end *device, uint16_t id) {
    double moment = now(), stamp = device->stamps[id % IN_FLIGHT];
    if (++device->acked == 0)
        device->acked = 1;
    if (id != device->acked)
        die("PUBACK %d where %d is due", id, device->acked);
    if (mode == ROUNDTRIP) {
        if (phase == MEASURE) {
            units++;
            record_latency(moment - stamp);
        }
        if (phase != DRAIN)
            send_publish(device, moment);
    } else if (stamp >= measured_since && phase >= MEASURE) {
        outstanding--;
        record_latency(moment - stamp);
    }
}

/* ---- what arrives */

/* Returns whether the end is still there. */
static bool packet_came(struct end *end) {
    static const uint8_t connack[] = {0x20, 0x02, 0x00, 0x00};
    int type = end->type >> 4;
    if (type == 3) {
        if ((end->type & 0x06) == 0)
            return true;
        size_t topic = end->kept < 2 ? sizeof end->head : (size_t)(end->head[0] << 8 | end->head[1]);
        if (!end->broker || topic + 4 > end->kept || end->acks_length + 4 > sizeof end->acks)
            die("a PUBLISH that nobody has sent");
        end->acks[end->acks_length++] = 0x40;
        end->acks[end->acks_length++] = 0x02;
        end->acks[end->acks_length++] = end->head[topic + 2];
        end->acks[end->acks_length++] = end->head[topic + 3];
    } else if (end->broker && type == 1) {
        end->established = true;
        send_small(end, connack, sizeof connack);
    } else if (!end->broker && type == 2 && end->length >= 2) {
        device_connack(end, end->head[1] == 0);
        return mode != SETUP && end->fd >= 0;
    } else if (!end->broker && type == 4 && end->length == 2) {
        device_acked(end, (uint16_t)(end->head[0] << 8 | end->head[1]));
    } else if (!(end->broker && type == 14))
        die("%s got a packet of type %d", end->broker ? "the broker" : "a device", type);
    return true;
}

static bool bytes_came(struct end *end, const uint8_t *data, size_t length) {
    if (end->broker ? mode == UP : mode == DOWN)
        bytes += length;
    while (length) {
        if (end->expected == TYPE) {
            end->type = *data++;
            length--;
            end->expected = LENGTH;
            end->length = end->shift = 0;
            continue;
        }
        if (end->expected == LENGTH) {
            uint8_t byte = *data++;
            length--;
            end->length |= (uint32_t)(byte & 0x7f) << end->shift;
            end->shift += 7;
            if (byte & 0x80) {
                if (end->shift > 21)
                    die("a Remaining Length of more than 4 bytes: the relay has changed the stream");
                continue;
            }
            end->left = end->length;
            end->kept = 0;
            end->expected = BODY;
        } else {
            size_t part = length < end->left ? length : end->left, keep = sizeof end->head - end->kept;
            if (keep > part)
                keep = part;
            memcpy(end->head + end->kept, data, keep);
            end->kept += (uint8_t)keep;
            end->left -= (uint32_t)part;
            data += part;
            length -= part;
        }
        if (end->left == 0) {
            end->expected = TYPE;
            if (!packet_came(end))
                return false;
        }
    }
    if (end->acks_length) {
        send_small(end, end->acks, end->acks_length);
        end->acks_length = 0;
    }
    return true;
}

static void read_device(struct end *device) {
    ssize_t got = recv(device->fd, buffer, sizeof buffer, 0);
    if (got > 0)
        bytes_came(device, buffer, (size_t)got);
    else if (got == 0)
        device_failed(device, "the relay has closed the connection");
    else if (errno != EAGAIN)
        device_failed(device, strerror(errno));
}

static void read_broker(struct end *end) {
    /* What OpenSSL has read ahead must be taken, what is in the kernel is reported again. */
    for (;;) {
        int got = end->ssl ? SSL_read(end->ssl, buffer, RECORD) : (int)recv(end->fd, buffer, sizeof buffer, 0);
        if (got > 0) {
            bytes_came(end, buffer, (size_t)got);
            if (!end->ssl || !SSL_has_pending(end->ssl))
                return;
            continue;
        }
        bool again = end->ssl ? SSL_get_error(end->ssl, got) == SSL_ERROR_WANT_READ : got < 0 && errno == EAGAIN;
        ERR_clear_error();
        if (!again)
            close_end(end);
        return;
    }
}

static void write_flood(struct end *end) {
    for (int chunks = 0; chunks < 16; chunks++) {
        size_t left = flood_length - end->offset, most = end->ssl ? RECORD : DEVICE_CHUNK;
        size_t length = left < most ? left : most;
        ssize_t sent = end->ssl ? SSL_write(end->ssl, flood + end->offset, (int)length)
                                : send(end->fd, flood + end->offset, length, MSG_NOSIGNAL);
        if (sent <= 0) {
            ERR_clear_error();
            return;
        }
        end->offset = (end->offset + (size_t)sent) % flood_length;
    }
}

static void accept_ends(void) {
    int one = 1;
    for (int count = 0; count < 64; count++) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EAGAIN || errno == ECONNABORTED)
                return;
            die("accept: %s", strerror(errno));
        }
        struct end *end = calloc(1, sizeof *end);
        if (!end)
            die("out of memory");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        attempts++;
        end->fd = fd;
        end->broker = true;
        if (tls) {
            end->ssl = SSL_new(tls);
            SSL_set_fd(end->ssl, fd);
            SSL_set_accept_state(end->ssl);
            end->shaking = true;
        }
        end->next = broker_ends;
        end->link = &broker_ends;
        if (broker_ends)
            broker_ends->link = &end->next;
        broker_ends = end;
        watch(end, EPOLLIN);
    }
}

static void shake_hands(struct end *end) {
    int done = SSL_do_handshake(end->ssl);
    if (done == 1) {
        end->shaking = false;
        handshakes++;
        resumed += (uint64_t)SSL_session_reused(end->ssl);
        snprintf(cipher, sizeof cipher, "%s %s", SSL_get_version(end->ssl), SSL_get_cipher_name(end->ssl));
        watch(end, EPOLLIN);
        if (SSL_has_pending(end->ssl))
            read_broker(end);
        return;
    }
    int error = SSL_get_error(end->ssl, done);
    ERR_clear_error();
    if (error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE)
        watch(end, error == SSL_ERROR_WANT_READ ? EPOLLIN : EPOLLOUT);
    else
        close_end(end);
}

static void device_connected(struct end *device) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(device->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        device_failed(device, strerror(error));
        return;
    }
    device->connecting = false;
    watch(device, EPOLLIN);
    send_connect(device);
}

static void handle(struct end *end, uint32_t events) {
    if (end == &listener_end)
        accept_ends();
    else if (end == &input_end) {
        if (read(end->fd, buffer, sizeof buffer) <= 0)
            die("nobody waits for the result");
        input_came = true;
    } else if (end->connecting)
        device_connected(end);
    else if (end->shaking)
        shake_hands(end);
    else if (events & ~(uint32_t)EPOLLOUT)
        end->broker ? read_broker(end) : read_device(end);
    else
        write_flood(end);
}

/* ---- the course of a measurement */

static void start_work(void) {
    if (mode == ROUNDTRIP)
        for (int index = 0; index < sessions; index++)
            send_publish(&devices[index], now());
    if (mode == UP)
        for (int index = 0; index < sessions; index++)
            watch(&devices[index], EPOLLIN | EPOLLOUT);
    if (mode == DOWN)
        for (struct end *end = broker_ends; end; end = end->next)
            if (end->established)
                watch(end, EPOLLIN | EPOLLOUT);
}

/* All devices lose their connection in the same moment and come back at once. */
static void start_storm(void) {
    struct linger reset = {.l_onoff = 1, .l_linger = 0};
    for (int index = 0; index < sessions; index++) {
        setsockopt(devices[index].fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        close_end(&devices[index]);
    }
    established = 0;
    for (int index = 0; index < sessions; index++)
        connect_device(&devices[index]);
}

static void enter(enum phase next) {
    phase = next;
    phase_since = now();
    if (next == WARMUP)
        start_work();
    if (next == MEASURE) {
        units = bytes = failures = handshakes = resumed = 0;
        measured_since = phase_since;
        load_before = clock_seconds(CLOCK_PROCESS_CPUTIME_ID);
        relay_before = relay_seconds();
        if (mode == STORM)
            start_storm();
    }
}

static void wait_for_input(const char *word) {
    printf("%s\n", word);
    fflush(stdout);
    waiting_for_input = true;
    input_came = false;
}

static void print_result(double elapsed, double relay, double load) {
    qsort(latencies, latency_count, sizeof *latencies, compare);
    if (mode == UP || mode == DOWN)
        units = bytes / packet_length;
    printf("{\"elapsed\": %.6f, \"units\": %llu, \"bytes\": %llu, \"relay_cpu\": %.9f, \"load_cpu\": %.9f, "
           "\"failures\": %llu, \"attempts\": %llu, \"handshakes\": %llu, \"resumed\": %llu, \"cipher\": \"%s\", "
           "\"p50\": %.9f, \"p99\": %.9f, \"p999\": %.9f, \"max\": %.9f}\n",
           elapsed, (unsigned long long)units, (unsigned long long)bytes, relay, load, (unsigned long long)failures,
           (unsigned long long)attempts, (unsigned long long)handshakes, (unsigned long long)resumed, cipher,
           percentile(0.5), percentile(0.99), percentile(0.999), percentile(1));
    fflush(stdout);
}

/* Exponential gaps from a fixed seed: every relay gets the same messages at the same times, and they come in bunches
   as those of independent devices do. */
static double random_share(void) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (double)(state >> 11) / 9007199254740992.0;
}

static void send_what_is_due(void) {
    if (phase != WARMUP && phase != MEASURE)
        return;
    if (due == 0)
        due = now();
    while (due <= now()) {
        struct end *device = &devices[(int)(random_share() * sessions)];
        /* Stamped with the time that it should have left at: a stall of the relay's is not left out. */
        if (phase == MEASURE && due >= measured_since) {
            units++;
            outstanding++;
        }
        send_publish(device, due);
        due -= log(1 - random_share()) / rate;
    }
}

static void retry_devices(double moment) {
    for (int index = 0; index < sessions; index++)
        if (devices[index].retry && devices[index].retry <= moment)
            connect_device(&devices[index]);
}

static void establish(void) {
    while (next_device < sessions && starting < (mode == SETUP ? sessions : ESTABLISHING)) {
        starting++;
        connect_device(&devices[next_device++]);
    }
}

static void run(void) {
    struct epoll_event events[512];
    double elapsed = 0, relay = 0, load = 0;
    bool measured = false;
    phase_since = now();
    for (;;) {
        /* Where latency is measured at a given rate, the process never sleeps: waking up would be measured, too. */
        int count = epoll_wait(poller, events, 512, mode == PACED && phase != ESTABLISH ? 0 : rate > 0 ? 1 : 20);
        if (count < 0 && errno != EINTR)
            die("epoll_wait: %s", strerror(errno));
        for (int index = 0; index < count; index++)
            handle(events[index].data.ptr, events[index].events);
        double moment = now();
        if (waiting_for_input) {
            if (!input_came)
                continue;
            if (measured || mode == IDLE)
                return;
            waiting_for_input = false;
            enter(WARMUP);
            continue;
        }
        if (mode == PACED)
            send_what_is_due();
        else if (mode == SETUP)
            retry_devices(moment);
        switch (phase) {
        case ESTABLISH:
            establish();
            if (mode != SETUP && established < sessions) {
                if (moment - phase_since > PATIENCE)
                    die("only %d of %d sessions within %.0f s", established, sessions, PATIENCE);
            } else if (paused)
                wait_for_input("established");
            else
                enter(WARMUP);
            break;
        case WARMUP:
            if (moment - phase_since >= (mode == STORM ? 0 : warmup))
                enter(MEASURE);
            break;
        case MEASURE:
            if (mode == STORM) {
                retry_devices(moment);
                if (moment - measured_since > PATIENCE)
                    die("only %d of %d sessions came back within %.0f s", established, sessions, PATIENCE);
                if (established < sessions)
                    break;
            } else if (moment - measured_since < seconds)
                break;
            elapsed = moment - measured_since;
            relay = relay_seconds() - relay_before;
            load = clock_seconds(CLOCK_PROCESS_CPUTIME_ID) - load_before;
            enter(DRAIN);
            break;
        case DRAIN:
            if (outstanding) {
                if (moment - phase_since > PATIENCE)
                    die("%llu messages were never acknowledged", (unsigned long long)outstanding);
                break;
            }
            print_result(elapsed, relay, load);
            measured = true;
            if (!paused)
                return;
            wait_for_input("done");
        }
    }
}

/* ---- beginning */

static void read_arguments(int count, char **arguments) {
    mode = IDLE + 1;
    for (int index = 0; count > 1 && index <= IDLE; index++)
        if (!strcmp(arguments[1], mode_names[index]))
            mode = (enum mode)index;
    if (mode > IDLE)
        die("say what to do: roundtrip, up, down, paced, setup, storm or idle");
    for (int index = 2; index < count; index++) {
        char *name = arguments[index], *value = strchr(name, '=');
        if (!value)
            die("%s: NAME=VALUE is due", name);
        *value++ = 0;
        if (!strcmp(name, "device_port")) device_port = atoi(value);
        else if (!strcmp(name, "broker_port")) broker_port = atoi(value);
        else if (!strcmp(name, "cert")) cert = value;
        else if (!strcmp(name, "key")) key = value;
        else if (!strcmp(name, "sessions")) sessions = atoi(value);
        else if (!strcmp(name, "payload")) payload = atoi(value);
        else if (!strcmp(name, "rate")) rate = atof(value);
        else if (!strcmp(name, "warmup")) warmup = atof(value);
        else if (!strcmp(name, "seconds")) seconds = atof(value);
        else if (!strcmp(name, "pause")) paused = atoi(value);
        else if (!strcmp(name, "pids")) {
            for (char *pid = strtok(value, ","); pid; pid = strtok(NULL, ",")) {
                if (clock_count == MAX_PIDS || clock_getcpuclockid(atoi(pid), &clocks[clock_count++]) != 0)
                    die("the CPU time of process %s cannot be read", pid);
            }
        } else
            die("%s is not known", name);
    }
    if (!device_port || !broker_port || sessions < 1 || payload < 0 || (mode == PACED && rate <= 0))
        die("device_port, broker_port, sessions, and rate if paced, are needed");
    if ((mode == ROUNDTRIP || mode == PACED) && payload > 1024)
        die("at most 1024 bytes of payload where messages are acknowledged");
}

static void start_broker(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)broker_port)};
    int one = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (cert) {
        tls = SSL_CTX_new(TLS_server_method());
        /* Session tickets are on, as they are in every server that is not told otherwise. */
        SSL_CTX_set_session_id_context(tls, (const unsigned char *)"bench", 5);
        SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
        SSL_CTX_set_read_ahead(tls, 1);
        if (SSL_CTX_use_certificate_chain_file(tls, cert) != 1 || SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) != 1)
            die("%s and %s cannot be used", cert, key);
    }
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 4096) < 0)
        die("port %d: %s", broker_port, strerror(errno));
    listener_end.fd = listener;
    watch(&listener_end, EPOLLIN);
}

int main(int count, char **arguments) {
    struct rlimit limit;
    read_arguments(count, arguments);
    signal(SIGPIPE, SIG_IGN);
    getrlimit(RLIMIT_NOFILE, &limit);
    paused |= mode == IDLE;
    /* In the storm the broker may not have seen the end of the old connections yet. */
    if (limit.rlim_max < (rlim_t)(3 * sessions + 64))
        die("%d sessions need %d descriptors, and the limit is %llu", sessions, 3 * sessions + 64,
            (unsigned long long)limit.rlim_max);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    poller = epoll_create1(EPOLL_CLOEXEC);
    devices = calloc((size_t)sessions, sizeof *devices);
    if (!devices)
        die("out of memory");
    build_flood();
    start_broker();
    if (paused) {
        input_end.fd = STDIN_FILENO;
        watch(&input_end, EPOLLIN);
    }
    run();
    return 0;
}
