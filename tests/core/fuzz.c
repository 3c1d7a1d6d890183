/* libFuzzer's target for what of the core reads bytes from peers: packets and TLS records, cut anywhere.
 *
 * In: one byte that chooses the tables, one seed for the cuts, the stream.  Each piece lies in memory of its own size, so
 * that AddressSanitizer sees a byte read too many.  Traps if cutting the stream makes a difference.
 */

#include "../../gateway/relay/_core.c"

#include <stdlib.h>

#include "tables.h" /* by tests/core/__main__.py: `tables`, 1024 bytes each, and TABLES */

enum { LIMIT = 1000 };

static struct stream begin(uint8_t which)
{
    struct stream stream = {0};
    const uint8_t *low = tables[which % TABLES];
    stream.rules = (struct rules){low, low + TABLE, low + 2 * TABLE, low + 3 * TABLE, LIMIT};
    return stream;
}

/* Feed a piece as `device_readable` does; false if it needs a look. */
static bool feed(struct stream *stream, const uint8_t *piece, size_t size)
{
    struct walk found;
    uint8_t *room = malloc(HELD + size);
    if (size > 0)
        memcpy(room + HELD, piece, size);
    uint8_t *data = join(stream, room + HELD);
    size_t joined = stream->held_size + size;
    /* What lies before the held bytes is not to be read either. */
    uint8_t *exact = malloc(joined + 1);
    memcpy(exact + 1, data, joined);
    free(room);
    bool passes = walk(stream, exact + 1, joined, &found);
    if (passes) {
        if (found.passed > joined || (found.skip > 0 && found.passed != joined))
            __builtin_trap();
        commit(stream, exact + 1, joined, &found);
    }
    free(exact);
    return passes;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 3)
        return 0;
    uint32_t seed = data[1] + 1u;
    struct stream whole = begin(data[0]), cut = begin(data[0]);
    struct records at_once = {0}, in_pieces = {0};
    size_t completed = 0;
    data += 2;
    size -= 2;
    bool passes = feed(&whole, data, size);
    bool pieces_pass = true;
    for (size_t start = 0; start < size;) {
        seed = seed * 1103515245u + 12345u;
        size_t piece = 1 + (seed >> 16) % 40;
        if (piece > size - start)
            piece = size - start;
        pieces_pass = pieces_pass && feed(&cut, data + start, piece);
        completed += completed_records(&in_pieces, data + start, piece);
        start += piece;
    }
    /* A look may come sooner or later, and a long head only if it is cut; but what passes is the same. */
    if (passes && pieces_pass &&
        (whole.bytes != cut.bytes || whole.packets != cut.packets || whole.skip != cut.skip ||
         whole.held_size != cut.held_size || memcmp(whole.held, cut.held, cut.held_size) != 0))
        __builtin_trap();
    if (pieces_pass && !passes)
        __builtin_trap();
    if (completed != completed_records(&at_once, data, size) || at_once.missing != in_pieces.missing ||
        at_once.header_size != in_pieces.header_size)
        __builtin_trap();
    return 0;
}
