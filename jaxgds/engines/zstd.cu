// A zstd (RFC 8878) frame decoder that runs on GPUs: in lanes, each one frame at a time, in pieces.
//
// The host stages the next compressed bytes of each lane's frame, writes an Order for each lane, and
// launches these kernels in this order, in one stream. A grid has a row (y) of CTAs for every lane.
//
//   walk       finds the blocks (and before them the frame's header)        one CTA
//   parse      reads every block's headers, builds its decoding tables      a thread per block
//   link       gives every block its tables and its room in the pool        one thread
//   sequences  decodes the sequences                                        a thread per block
//   place      finds where in the output every block begins                 one thread
//   literals   decodes the literals                                         a CTA per block
//   scatter    moves literals to their places between the matches           a CTA per block
//   execute    copies the matches, in the frame's order                     one CTA
//
// All state is in a lane's Workspace in device memory. It needs no particular content before a frame's
// first piece: every field is written before it is read.
//
// Literals are decoded into the output itself. Those of a block with sequences first stand at the end
// of the block's room there, so that their final places are at the same address or before it.
//
// What the source says is never trusted. Reads of it touch only the aligned eight-byte words that
// overlap [piece - carried bytes, piece + nbytes), writes to the output stay in [out, out + capacity),
// indices into the Workspace are checked, and every loop has a bound that the source cannot raise.
// The host must see to it that those words are readable, and that HEADROOM bytes in front of `piece`
// are writable. What is staged must stay as it is until the kernels are done.
//
// zstd.ptx and the machine code beside it are compiled of this file: `make ptx`.

#ifndef MAX_BLOCKS
#define MAX_BLOCKS 256u  // per piece
#endif
#ifndef MAX_SEQUENCES
#define MAX_SEQUENCES (1u << 14)  // per piece; every block that has any takes one more
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef short i16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;

enum {
    BLOCK_LIMIT = 128 << 10,            // RFC 3.1.1.2.4: no block is larger, in the source or decoded
    HEADROOM = BLOCK_LIMIT + 3 + 61,    // a block and its header, and what aligns it
    HUFFMAN_BITS = 11,                  // RFC 4.2.1: longest code
    HUFFMAN_ENTRIES = 1 << HUFFMAN_BITS,
    FSE_ENTRIES = 512 + 256 + 512,      // RFC 3.1.1.3.2.1: accuracy of at most 9, 8 and 9 bits
    KEPT = MAX_BLOCKS,                  // the slot of the tables that an earlier piece used last
    PREDEFINED = MAX_BLOCKS + 1,        // the slot of the predefined FSE tables
    NONE = MAX_BLOCKS + 2,              // no table yet
};

// Values of Status.error. In every case the host can still decode the frame by other means.
enum Error {
    OK = 0,
    // The frame is damaged, or is not what the host took it for:
    DAMAGED_MAGIC = 1,        // it does not begin like a zstd frame
    DAMAGED_HEADER = 2,       // a reserved bit of the frame header is set
    DAMAGED_BLOCK = 3,        // a block of reserved type, or larger than blocks may be
    DAMAGED_LITERALS = 4,     // a literals section that contradicts itself or its block
    DAMAGED_HUFFMAN = 5,      // a Huffman tree description that describes no tree
    DAMAGED_STREAM = 6,       // a Huffman stream that does not end with its last literal
    DAMAGED_SEQUENCES = 7,    // a sequences section that contradicts itself or its block
    DAMAGED_FSE = 8,          // an FSE table description that describes no table
    DAMAGED_REPEAT = 9,       // "the same table as before", and there is none before
    DAMAGED_OFFSET = 10,      // a match that begins before the output, or before the window
    DAMAGED_SIZE = 11,        // not as many bytes as the frame header says
    TRUNCATED = 12,           // the last piece ends before the frame
    NO_ROOM = 13,             // more bytes than the output has room for
    // The frame may be good, but this decoder cannot take it:
    UNSUPPORTED_DICTIONARY = 64,   // needs a dictionary
    UNSUPPORTED_SKIPPABLE = 65,    // a skippable frame (RFC 3.1.2)
    UNSUPPORTED_WINDOW = 66,       // a window above 2 GiB
    UNSUPPORTED_BLOCKS = 67,       // more than MAX_BLOCKS blocks in a piece
    UNSUPPORTED_SEQUENCES = 68,    // more than MAX_SEQUENCES sequences in a piece
    // There is no frame:
    IDLE = 96,
};

struct Order {           // what a lane is to do, by the host
    u8* piece;           // the next bytes of its frame
    u64 nbytes;          // how many; 0: there is nothing to do
    u8* out;             // with the first piece: where the frame goes
    u64 capacity;        // and the bytes that there is room for
    u64 flags;           // FIRST_PIECE, LAST_PIECE
};
enum { FIRST_PIECE = 1, LAST_PIECE = 2 };

struct Status {          // the beginning of a Workspace, for the host
    u32 error;           // enum Error; after an error no kernel does anything until another frame's first piece
    u32 finished;        // 1 after the frame's last byte
    u64 produced;        // bytes of output so far (valid after `execute`, if there is no error)
    u64 consumed;        // bytes of the frame so far: its header, whole blocks, its checksum
    u64 content_size;    // as the frame header has it; all ones if it does not say
    u64 blocks;          // so far
    u64 sequences;       // so far
    u32 has_checksum;    // 1: a checksum follows the last block. It is not verified
    u32 checksum;        // and this is it, once finished
    u64 window_size;
};

enum { STAGE_HEADER, STAGE_BLOCKS, STAGE_CHECKSUM, STAGE_DONE };
enum { BLOCK_RAW, BLOCK_RLE, BLOCK_COMPRESSED, BLOCK_RESERVED };            // RFC 3.1.1.2.2
enum { LITERALS_RAW, LITERALS_RLE, LITERALS_COMPRESSED, LITERALS_TREELESS };  // RFC 3.1.1.3.1.1
enum { MODE_PREDEFINED, MODE_RLE, MODE_FSE, MODE_REPEAT };                  // RFC 3.1.1.3.2.1
enum { LENGTHS, OFFSETS, MATCHES };  // the three FSE tables of a block: the order in the source

struct Block {
    const u8* source;      // what follows its header, in the staging memory
    u32 size;              // bytes there
    u32 type;
    u32 literals_type;     // a raw block is described as raw literals, an RLE block as RLE literals
    u32 literals_size;     // decoded
    u32 stream_count;      // 1 or 4 Huffman streams
    u32 stream_at[5];      // stream i is source[stream_at[i]] to source[stream_at[i + 1]]; raw and RLE
                           // literals begin at source[stream_at[0]]
    u32 sequences_at;      // where the sequences' bitstream begins; it ends with the block
};

struct Sequence {          // RFC 3.1.1.3.2; both lengths are differences to the next entry
    u32 literals_before;   // literals of the block that come before those of this sequence
    u32 output_before;     // bytes of the block that come before this sequence
    u32 offset_value;      // as coded: 1 to 3 are repeated offsets
};

struct Scratch {           // of the thread that parses a block
    u8 weights[256];
    u32 weights_table[64];
    i16 counts[64];
};

struct Workspace {
    Status status;

    // The state of the frame
    u8* out;
    u64 capacity;
    u32 stage;
    u32 carry_size;
    u32 block_limit;        // RFC 3.1.1.2.4: the smaller of the window and BLOCK_LIMIT
    u32 offsets[3];         // the repeated offsets (RFC 3.1.1.5)
    u32 huffman_used;       // the slots of the tables that were used last
    u32 fse_used[3];

    // The piece
    u32 block_count;
    Block blocks[MAX_BLOCKS];
    // What the kernels of one thread read and write, in arrays of its own so that it is near in caches
    u32 uses[MAX_BLOCKS];             // bits 0-1: 0 no Huffman table, 1 its own, 2 the one used last;
                                      // bits 2-3, 4-5, 6-7: the modes of its FSE tables
    u32 sequence_count[MAX_BLOCKS];
    u32 regenerated[MAX_BLOCKS];      // its size, decoded
    u32 huffman_slot[MAX_BLOCKS];
    u32 fse_slot[3][MAX_BLOCKS];
    u32 first_sequence[MAX_BLOCKS];   // in the pool
    u64 output_at[MAX_BLOCKS];

    // Tables, by slot: one for each block, and KEPT and PREDEFINED
    u32 huffman_bits[MAX_BLOCKS + 1];
    u32 fse_bits[3][MAX_BLOCKS + 2];
    alignas(16) u16 huffman[MAX_BLOCKS + 1][HUFFMAN_ENTRIES];  // symbol << 8 | bits
    alignas(16) u32 fse[MAX_BLOCKS + 2][FSE_ENTRIES];          // base << 16 | bits << 8 | symbol

    Scratch scratch[MAX_BLOCKS];
    Sequence sequences[MAX_SEQUENCES];
    alignas(16) u8 carry[BLOCK_LIMIT + 16];  // the source's last, incomplete block, for the next piece
};

// How much memory a lane takes. The host finds this in the PTX.
extern "C" { __device__ u64 workspace_bytes = sizeof(Workspace); }

// RFC 3.1.1.3.2.1.1: what a literal length code and a match length code stand for: the smallest
// length, and how many bits say how much more
static __constant__ const u32 LENGTH_BASE[36] = {
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 28, 32, 40, 48, 64, 128,
    256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536};
static __constant__ const u8 LENGTH_BITS[36] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  0,  0,
                                                0, 0, 0, 0, 1, 1, 1, 1, 2, 2,  3,  3,
                                                4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
static __constant__ const u32 MATCH_BASE[53] = {
    3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16,  17,  18,  19,   20,
    21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34,  35,  37,  39,   41,
    43, 47, 51, 59, 67, 83, 99, 131, 259, 515, 1027, 2051, 4099, 8195, 16387, 32771, 65539};
static __constant__ const u8 MATCH_BITS[53] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  0,  0,  0,  0,  0,
                                               0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  0,  1,  1,  1,  1,
                                               2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
// RFC 3.1.1.3.2.2: the predefined distributions, for an accuracy of 6, 5 and 6 bits
static __constant__ const signed char PREDEFINED_COUNTS[3][53] = {
    {4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1,
     -1, -1, -1, -1},
    {1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1},
    {1, 4, 3, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
     1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1}};
static __constant__ const u8 PREDEFINED_SYMBOLS[3] = {36, 29, 53};
static __constant__ const u8 PREDEFINED_BITS[3] = {6, 5, 6};
static __constant__ const u8 LARGEST_CODE[3] = {35, 31, 52};
static __constant__ const u8 LARGEST_ACCURACY[3] = {9, 8, 9};
static __constant__ const u16 FSE_AT[3] = {0, 512, 768};  // where in a slot each table begins

static __device__ u32 smaller(u32 a, u32 b) { return a < b ? a : b; }
static __device__ u32 highest_bit(u32 value) { return 31 - (u32)__clz((int)value); }  // value is not 0
static __device__ u32 little_endian(const u8* at, u32 bytes)
{
    u32 value = 0;
    for (u32 i = 0; i < bytes; i++) value |= (u32)at[i] << (8 * i);
    return value;
}
// Several threads may fail at the same time: it does not matter whose error stays.
static __device__ void fail(Workspace* w, u32 error) { w->status.error = error; }

// ---------------------------------------------------------------------------------------------------
// Copying, by several threads: this one is the lane-th of `lanes`. Stores are of aligned eight-byte
// words, as far as they go. Loads are of aligned words too, where a word may begin before the source,
// but none ends behind it.

static __device__ void copy(u8* to, const u8* from, u32 size, u32 lane, u32 lanes)
{
    const u32 head = smaller((u32)(0 - (u64)to) & 7, size);
    const u32 shift = 8 * (u32)((u64)(from + head) & 7);
    u32 words = (size - head) / 8;
    if (shift && words) words--;  // a word would need the next one, which may end behind the source
    for (u32 i = lane; i < head; i += lanes) to[i] = from[i];
    u64* to_words = (u64*)(to + head);
    const u64* from_words = (const u64*)(from + head - shift / 8);
    if (shift == 0) {
#pragma unroll 4
        for (u32 i = lane; i < words; i += lanes) to_words[i] = from_words[i];
    } else {
#pragma unroll 4
        for (u32 i = lane; i < words; i += lanes)
            to_words[i] = from_words[i] >> shift | from_words[i + 1] << (64 - shift);
    }
    for (u32 i = head + words * 8 + lane; i < size; i += lanes) to[i] = from[i];
}

static __device__ void fill(u8* to, u8 value, u32 size, u32 lane, u32 lanes)
{
    const u32 head = smaller((u32)(0 - (u64)to) & 7, size);
    const u32 words = (size - head) / 8;
    for (u32 i = lane; i < head; i += lanes) to[i] = value;
    u64* to_words = (u64*)(to + head);
    for (u32 i = lane; i < words; i += lanes) to_words[i] = value * 0x0101010101010101ull;
    for (u32 i = head + words * 8 + lane; i < size; i += lanes) to[i] = value;
}

// ---------------------------------------------------------------------------------------------------
// Bitstreams that are read backwards (RFC 4.1, 4.2.2): the last byte's highest set bit ends the stream
// and is no part of it, and what is written last comes first. Words are loaded one before they are
// needed. Behind the stream's beginning come bits that mean nothing: `left` tells.

struct Bits {
    u64 high, low;      // two words of the stream; `used` bits of `high` are behind us
    u64 ahead;          // the word after `low`
    const u64* next;    // where `ahead` is from
    const u64* first;   // the word with the stream's first byte: none before it is loaded
    u32 used;           // 0 to 63
    i32 left;           // bits of the stream: below 0 after reading more than there is
};

static __device__ void advance(Bits* bits, u32 count)  // up to 64
{
    bits->left -= (i32)count;
    bits->used += count;
    if (bits->used >= 64) {
        bits->used -= 64;
        bits->high = bits->low;
        bits->low = bits->ahead;
        if (bits->next > bits->first) bits->next--;
        bits->ahead = __ldg(bits->next);
    }
}

static __device__ bool start(Bits* bits, const u8* begin, const u8* end)
{
    if (begin >= end || end[-1] == 0) return false;
    const u32 last = (u32)((u64)(end - 1) & 7);  // which byte of its word the last one is
    const u64* word = (const u64*)(end - 1 - last);
    bits->first = (const u64*)(begin - ((u64)begin & 7));
    bits->high = __ldg(word);
    if (word > bits->first) word--;
    bits->low = __ldg(word);
    if (word > bits->first) word--;
    bits->ahead = __ldg(word);
    bits->next = word;
    bits->used = 0;
    const u32 padding = 8 - highest_bit(end[-1]);
    bits->left = (i32)(8 * (u32)(end - begin) + 8 * (7 - last));
    advance(bits, 8 * (7 - last) + padding);
    return true;
}

static __device__ u64 peek(const Bits* bits)  // the next 64 bits, the first of them on top
{
    return bits->high << bits->used | bits->low >> 1 >> (63 - bits->used);
}

static __device__ u32 take(Bits* bits, u32 count)  // up to 32
{
    const u32 value = (u32)(peek(bits) >> 1 >> (63 - count));
    advance(bits, count);
    return value;
}

// ---------------------------------------------------------------------------------------------------
// Tables

// RFC 4.1.1: reads the description of a distribution. Returns the bytes that it takes, or 0 if it is
// damaged. `counts` has room for largest + 1.
static __device__ u32 read_distribution(const u8* from, u32 size, u32 largest, u32 largest_accuracy,
                                        i16* counts, u32* symbols, u32* accuracy)
{
    if (size == 0) return 0;
    *accuracy = (from[0] & 15) + 5;
    if (*accuracy > largest_accuracy) return 0;
    u32 at = 4;                        // in bits
    u32 remaining = 1u << *accuracy;   // to be distributed
    u32 symbol = 0;
    while (remaining > 0) {
        if (symbol > largest || at > 8 * size) return 0;
        // A value of 0 to remaining + 1; the smallest `short_ones` values take a bit less.
        const u32 bits = highest_bit(remaining + 1) + 1;
        const u32 short_ones = (1u << bits) - 2 - remaining;
        const u32 low_mask = (1u << (bits - 1)) - 1;
        const u32 byte = at / 8;
        const u32 word = little_endian(from + byte, smaller(size - byte, 3)) >> (at & 7);
        u32 value = word & (2 * low_mask + 1);
        if ((value & low_mask) < short_ones) {
            value &= low_mask;
            at += bits - 1;
        } else {
            if (value > low_mask) value -= short_ones;
            at += bits;
        }
        counts[symbol++] = (i16)((i32)value - 1);
        remaining -= value == 0 ? 1 : value - 1;
        if (value != 1) continue;
        // After a probability of 0: two bits tell how many more such symbols follow, 3 that two more
        // bits follow.
        u32 zeros = 3;
        while (zeros == 3) {
            if (at + 2 > 8 * size) return 0;
            zeros = from[at / 8] >> (at & 7);
            if ((at & 7) == 7) zeros |= (u32)from[at / 8 + 1] << 1;
            zeros &= 3;
            at += 2;
            for (u32 i = 0; i < zeros; i++) {
                if (symbol > largest) return 0;
                counts[symbol++] = 0;
            }
        }
    }
    *symbols = symbol;
    return at <= 8 * size ? (at + 7) / 8 : 0;
}

// RFC 4.1.1: from a distribution to the decoding table. `counts` is used up.
static __device__ void build_fse(u32* table, u32 accuracy, i16* counts, u32 symbols)
{
    const u32 size = 1u << accuracy;
    u32 high = size;  // symbols less likely than 1 are at the table's end
    for (u32 symbol = 0; symbol < symbols; symbol++)
        if (counts[symbol] < 0) table[--high] = symbol;
    const u32 step = (size >> 1) + (size >> 3) + 3;
    u32 at = 0;
    for (u32 symbol = 0; symbol < symbols; symbol++) {
        for (i32 i = 0; i < counts[symbol]; i++) {
            table[at] = symbol;
            do at = (at + step) & (size - 1);  // reaches every place: the step is odd, `size` a power of 2
            while (at >= high);
        }
        if (counts[symbol] < 0) counts[symbol] = 1;
    }
    for (u32 state = 0; state < size; state++) {
        const u32 symbol = table[state];
        const u32 number = (u32)counts[symbol]++;
        const u32 bits = accuracy - highest_bit(number);
        table[state] = ((number << bits) - size) << 16 | bits << 8 | symbol;
    }
}

// RFC 4.2.1.2: Huffman weights, FSE-compressed by two states in turn. Returns how many, or 0.
static __device__ u32 decode_weights(const u8* from, u32 size, Scratch* scratch)
{
    u32 symbols, accuracy;
    const u32 used = read_distribution(from, size, HUFFMAN_BITS, 6, scratch->counts, &symbols, &accuracy);
    if (used == 0) return 0;
    u32* table = scratch->weights_table;
    build_fse(table, accuracy, scratch->counts, symbols);
    Bits bits;
    if (!start(&bits, from + used, from + size)) return 0;
    u32 state = take(&bits, accuracy);
    u32 other = take(&bits, accuracy);
    if (bits.left < 0) return 0;
    for (u32 count = 0; count < 254;) {
        const u32 entry = table[state];
        scratch->weights[count++] = (u8)entry;
        state = other;
        other = (entry >> 16) + take(&bits, entry >> 8 & 255);
        if (bits.left < 0) {  // the end: the other state has the last weight
            scratch->weights[count++] = (u8)table[state];
            return count;
        }
    }
    return 0;
}

// RFC 4.2.1: reads a tree description and builds the decoding table of a slot. Returns the bytes that
// it takes, or 0.
static __device__ u32 read_huffman(Workspace* w, u32 slot, const u8* from, u32 size)
{
    if (size == 0) return 0;
    Scratch* scratch = &w->scratch[slot];
    u8* weights = scratch->weights;
    u32 used, count;
    if (from[0] >= 128) {  // 4 bits each
        count = from[0] - 127u;
        used = 1 + (count + 1) / 2;
        if (used > size) return 0;
        for (u32 i = 0; i < count; i++) weights[i] = from[1 + i / 2] >> (i % 2 ? 0 : 4) & 15;
    } else {
        used = 1 + from[0];
        if (used > size) return 0;
        count = decode_weights(from + 1, used - 1, scratch);
        if (count == 0) return 0;
    }
    // The last weight is what is missing to a power of two.
    u32 sum = 0;
    i16* at = scratch->counts;  // by weight: how many symbols, then where in the table they begin
    for (u32 i = 0; i <= HUFFMAN_BITS; i++) at[i] = 0;
    for (u32 i = 0; i < count; i++) {
        if (weights[i] > HUFFMAN_BITS) return 0;
        sum += 1u << weights[i] >> 1;
        at[weights[i]]++;
    }
    if (sum == 0) return 0;
    const u32 bits = highest_bit(sum) + 1;
    if (bits > HUFFMAN_BITS) return 0;
    const u32 missing = (1u << bits) - sum;
    if (missing & (missing - 1)) return 0;
    weights[count] = (u8)(highest_bit(missing) + 1);
    at[weights[count]]++;
    count++;
    if (at[1] < 2) return 0;  // the longest codes come in pairs
    u32 begin = 0;
    for (u32 i = 1; i <= bits; i++) {
        const u32 symbols = (u32)at[i];
        at[i] = (i16)begin;
        begin += symbols << (i - 1);
    }
    // Codes of equal length are next to each other, the longest first, so that those of weight n begin
    // at a multiple of 2^(n - 1) and are filled by whole words.
    u16* table = w->huffman[slot];
    for (u32 symbol = 0; symbol < count; symbol++) {
        const u32 weight = weights[symbol];
        if (weight == 0) continue;
        const u32 entries = 1u << (weight - 1);
        const u32 entry = symbol << 8 | (bits + 1 - weight);
        const u32 to = (u32)at[weight];
        at[weight] = (i16)(to + entries);
        if (entries < 4) {
            for (u32 i = 0; i < entries; i++) table[to + i] = (u16)entry;
        } else {
            u64* words = (u64*)(table + to);
            for (u32 i = 0; i < entries / 4; i++) words[i] = entry * 0x0001000100010001ull;
        }
    }
    w->huffman_bits[slot] = bits;
    return used;
}

// ---------------------------------------------------------------------------------------------------
// The kernels

static __device__ void reset(Workspace* w, u8* out, u64 capacity)
{
    Status* status = &w->status;
    status->error = OK;
    status->finished = 0;
    status->produced = 0;
    status->consumed = 0;
    status->content_size = ~0ull;
    status->blocks = 0;
    status->sequences = 0;
    status->has_checksum = 0;
    status->checksum = 0;
    status->window_size = 0;
    w->out = out;
    w->capacity = capacity;
    w->stage = STAGE_HEADER;
    w->carry_size = 0;
    w->block_limit = 0;
    w->block_count = 0;
    w->offsets[0] = 1;  // RFC 3.1.1.5
    w->offsets[1] = 4;
    w->offsets[2] = 8;
    w->huffman_used = NONE;
    for (u32 kind = 0; kind < 3; kind++) {
        w->fse_used[kind] = NONE;
        i16* counts = w->scratch[0].counts;
        for (u32 i = 0; i < PREDEFINED_SYMBOLS[kind]; i++) counts[i] = PREDEFINED_COUNTS[kind][i];
        build_fse(w->fse[PREDEFINED] + FSE_AT[kind], PREDEFINED_BITS[kind], counts, PREDEFINED_SYMBOLS[kind]);
        w->fse_bits[kind][PREDEFINED] = PREDEFINED_BITS[kind];
    }
}

// RFC 3.1.1.1. Returns the bytes of the header; 0 if they are not all there, or it is not accepted.
static __device__ u32 read_frame_header(Workspace* w, const u8* from, u64 size)
{
    if (size < 5) return 0;
    const u32 magic = little_endian(from, 4);
    if (magic != 0xFD2FB528u) {
        fail(w, (magic & 0xFFFFFFF0u) == 0x184D2A50u ? UNSUPPORTED_SKIPPABLE : DAMAGED_MAGIC);
        return 0;
    }
    const u32 descriptor = from[4];
    const u32 single_segment = descriptor >> 5 & 1;
    const u32 dictionary_bytes = (1u << (descriptor & 3)) >> 1;
    u32 content_bytes = 1u << (descriptor >> 6);
    if (content_bytes == 1) content_bytes = single_segment;
    const u32 needed = 5 + (1 - single_segment) + dictionary_bytes + content_bytes;
    if (size < needed) return 0;
    if (descriptor & 8) {
        fail(w, DAMAGED_HEADER);
        return 0;
    }
    u64 window = 0;
    from += 5;
    if (!single_segment) {
        window = 1ull << (10 + (from[0] >> 3));
        window += (window >> 3) * (from[0] & 7);
        if (window > 1ull << 31) {
            fail(w, UNSUPPORTED_WINDOW);
            return 0;
        }
        from++;
    }
    if (little_endian(from, dictionary_bytes) != 0) {
        fail(w, UNSUPPORTED_DICTIONARY);
        return 0;
    }
    from += dictionary_bytes;
    u64 content = ~0ull;
    if (content_bytes) {
        content = little_endian(from, smaller(content_bytes, 4));
        if (content_bytes == 2) content += 256;
        if (content_bytes == 8) content |= (u64)little_endian(from + 4, 4) << 32;
        if (content > w->capacity) {
            fail(w, NO_ROOM);
            return 0;
        }
        if (single_segment) window = content;
    }
    w->status.content_size = content;
    w->status.window_size = window;
    w->status.has_checksum = descriptor >> 2 & 1;
    w->block_limit = window < BLOCK_LIMIT ? (u32)window : (u32)BLOCK_LIMIT;
    return needed;
}

// RFC 3.1.1.2: finds the blocks between `at` and `end`. Returns where the first incomplete one begins.
static __device__ const u8* walk_blocks(Workspace* w, const u8* at, const u8* end)
{
    const u32 block_limit = w->block_limit;
    u32 count = 0, last = 0;
    while (!last && end - at >= 3) {
        const u32 header = little_endian(at, 3);
        const u32 type = header >> 1 & 3;
        const u32 size = header >> 3;
        if (type == BLOCK_RESERVED || size > block_limit) {
            fail(w, DAMAGED_BLOCK);
            break;
        }
        const u32 bytes = type == BLOCK_RLE ? 1 : size;
        if (end - at < 3 + (long long)bytes) break;
        if (count == MAX_BLOCKS) {
            fail(w, UNSUPPORTED_BLOCKS);
            break;
        }
        Block* block = &w->blocks[count++];
        block->source = at + 3;
        block->size = size;
        block->type = type;
        at += 3 + bytes;
        last = header & 1;
    }
    w->block_count = count;
    w->status.blocks += count;
    if (last) w->stage = w->status.has_checksum ? STAGE_CHECKSUM : STAGE_DONE;
    return at;
}

extern "C" __global__ void zstd_walk(Workspace* workspaces, const Order* orders)
{
    if (blockIdx.x) return;
    Workspace* w = workspaces + blockIdx.y;
    const Order* order = orders + blockIdx.y;
    u8* piece = order->piece;
    const u64 nbytes = order->nbytes;
    if (threadIdx.x == 0) {
        if (order->flags & FIRST_PIECE) reset(w, order->out, order->capacity);
        if (!nbytes) fail(w, IDLE);
    }
    __syncthreads();
    if (!nbytes) return;
    // What the piece before left over goes in front of this one.
    const bool failed = w->status.error != OK;
    u8* begin = piece - w->carry_size;
    if (!failed) copy(begin, w->carry, w->carry_size, threadIdx.x, blockDim.x);
    __syncthreads();
    if (threadIdx.x == 0) {
        const u8* at = begin;
        const u8* end = piece + nbytes;
        w->block_count = 0;
        w->carry_size = 0;
        if (!failed) {
            if (w->stage == STAGE_HEADER) {
                const u32 used = read_frame_header(w, at, (u64)(end - at));
                if (used) w->stage = STAGE_BLOCKS;
                at += used;
            }
            if (w->stage == STAGE_BLOCKS) at = walk_blocks(w, at, end);
            if (w->stage == STAGE_CHECKSUM && end - at >= 4) {
                w->status.checksum = little_endian(at, 4);
                w->stage = STAGE_DONE;
                at += 4;
            }
            w->status.consumed += (u64)(at - begin);
            if (w->stage == STAGE_DONE) {
                w->status.finished = 1;
            } else if (w->status.error == OK) {
                if (order->flags & LAST_PIECE) fail(w, TRUNCATED);
                w->carry_size = (u32)(end - at);  // less than a block, or an error would be set
            }
        }
    }
    __syncthreads();
    const u32 carry_size = w->carry_size;
    copy(w->carry, piece + nbytes - carry_size, carry_size, threadIdx.x, blockDim.x);
}

// RFC 3.1.1.3.1.6: where the Huffman streams are that take from `at` to `end`
static __device__ bool find_streams(Block* block, u32 at, u32 end)
{
    if (block->stream_count == 1) {
        block->stream_at[0] = at;
        block->stream_at[1] = end;
        return at < end;
    }
    // Three streams' sizes come first, the fourth has the rest. With fewer than 6 literals the first
    // three would have more than all of them.
    if (block->literals_size < 6 || at + 6 >= end) return false;
    const u8* sizes = block->source + at;
    u32 stream = at + 6;
    for (u32 i = 0; i < 3; i++) {
        block->stream_at[i] = stream;
        stream += little_endian(sizes + 2 * i, 2);
    }
    block->stream_at[3] = stream;
    block->stream_at[4] = end;
    return stream < end;  // an empty one is refused where it is decoded
}

// RFC 3.1.1.3.1: reads the literals section; the sequences section begins at *at. Returns an error.
static __device__ u32 parse_literals(Workspace* w, u32 number, u32* at)
{
    Block* block = &w->blocks[number];
    const u8* from = block->source;
    const u32 size = block->size;
    if (size < 2) return DAMAGED_LITERALS;  // a byte for each section at least
    const u32 type = from[0] & 3;
    const u32 format = from[0] >> 2 & 3;
    const bool coded = type == LITERALS_COMPRESSED || type == LITERALS_TREELESS;
    const u32 header = coded ? (format < 2 ? 3 : format + 2) : (format == 1 ? 2 : format == 3 ? 3 : 1);
    if (header >= size) return DAMAGED_LITERALS;
    u64 fields = little_endian(from, smaller(header, 4));
    if (header == 5) fields |= (u64)from[4] << 32;
    u32 literals, bytes;
    if (coded) {
        const u32 bits = format < 2 ? 10 : format == 2 ? 14 : 18;
        const u32 mask = (1u << bits) - 1;
        literals = (u32)(fields >> 4) & mask;
        bytes = (u32)(fields >> (4 + bits)) & mask;
        if (literals == 0) return DAMAGED_LITERALS;
    } else {
        literals = (u32)fields >> (header == 1 ? 3 : 4);
        bytes = type == LITERALS_RLE ? 1 : literals;
    }
    const u32 end = header + bytes;
    if (literals > w->block_limit || end >= size) return DAMAGED_LITERALS;
    block->literals_type = type;
    block->literals_size = literals;
    block->stream_count = coded && format ? 4 : 1;
    block->stream_at[0] = header;
    *at = end;
    if (!coded) return OK;
    w->uses[number] = type == LITERALS_COMPRESSED ? 1 : 2;
    u32 used = 0;
    if (type == LITERALS_COMPRESSED) {
        used = read_huffman(w, number, from + header, bytes);
        if (used == 0) return DAMAGED_HUFFMAN;
    }
    return find_streams(block, header + used, end) ? OK : DAMAGED_LITERALS;
}

// RFC 3.1.1.3.2: the header of the sequences section and its tables. Returns an error.
static __device__ u32 parse_sequences(Workspace* w, u32 number, u32 at)
{
    Block* block = &w->blocks[number];
    const u8* from = block->source;
    const u32 size = block->size;  // above `at`
    u32 count = from[at++];
    if (count >= 128) {
        const u32 more = count == 255 ? 2 : 1;
        if (at + more > size) return DAMAGED_SEQUENCES;
        if (more == 2) count = 0x7F00 + little_endian(from + at, 2);
        else count = (count - 128) << 8 | from[at];
        at += more;
    }
    w->sequence_count[number] = count;
    if (count == 0) return at == size ? OK : DAMAGED_SEQUENCES;
    if (at >= size || from[at] & 3) return DAMAGED_SEQUENCES;
    const u32 modes = from[at++];
    for (u32 kind = 0; kind < 3; kind++) {
        const u32 mode = modes >> (6 - 2 * kind) & 3;
        w->uses[number] |= mode << (2 + 2 * kind);
        u32* table = w->fse[number] + FSE_AT[kind];
        u32 accuracy = 0;
        if (mode == MODE_RLE) {
            if (at >= size || from[at] > LARGEST_CODE[kind]) return DAMAGED_FSE;
            table[0] = from[at++];
        } else if (mode == MODE_FSE) {
            i16* counts = w->scratch[number].counts;
            u32 symbols;
            const u32 used = read_distribution(from + at, size - at, LARGEST_CODE[kind],
                                               LARGEST_ACCURACY[kind], counts, &symbols, &accuracy);
            if (used == 0) return DAMAGED_FSE;
            at += used;
            build_fse(table, accuracy, counts, symbols);
        }
        w->fse_bits[kind][number] = accuracy;
    }
    block->sequences_at = at;
    return at < size ? OK : DAMAGED_SEQUENCES;
}

extern "C" __global__ void zstd_parse(Workspace* workspaces, const Order* orders)
{
    Workspace* w = workspaces + blockIdx.y;
    if (w->status.error != OK) return;
    for (u32 number = blockIdx.x * blockDim.x + threadIdx.x; number < w->block_count;
         number += gridDim.x * blockDim.x) {
        Block* block = &w->blocks[number];
        w->uses[number] = 0;
        w->sequence_count[number] = 0;
        if (block->type != BLOCK_COMPRESSED) {
            block->literals_type = block->type == BLOCK_RLE ? LITERALS_RLE : LITERALS_RAW;
            block->literals_size = block->size;
            block->stream_at[0] = 0;
        } else {
            u32 at = 0;
            u32 error = parse_literals(w, number, &at);
            if (error == OK) error = parse_sequences(w, number, at);
            if (error != OK) {
                fail(w, error);
                return;
            }
        }
        w->regenerated[number] = block->literals_size;  // and the matches, which `sequences` adds
    }
}

extern "C" __global__ void zstd_link(Workspace* workspaces, const Order* orders)
{
    Workspace* w = workspaces + blockIdx.y;
    if (blockIdx.x || threadIdx.x || w->status.error != OK) return;
    const u32 block_count = w->block_count;
    u32 huffman = w->huffman_used;
    u32 used[3] = {w->fse_used[0], w->fse_used[1], w->fse_used[2]};
    u32 sequences = 0;
    u64 total = 0;
    u32 error = OK;
    for (u32 number = 0; number < block_count && error == OK; number++) {
        const u32 uses = w->uses[number];
        const u32 count = w->sequence_count[number];
        if ((uses & 3) == 1) huffman = number;
        if ((uses & 3) == 2 && huffman == NONE) error = DAMAGED_REPEAT;
        w->huffman_slot[number] = huffman;
        if (count == 0) continue;
#pragma unroll
        for (u32 kind = 0; kind < 3; kind++) {
            const u32 mode = uses >> (2 + 2 * kind) & 3;
            if (mode == MODE_PREDEFINED) used[kind] = PREDEFINED;
            else if (mode != MODE_REPEAT) used[kind] = number;
            if (used[kind] == NONE) error = DAMAGED_REPEAT;
            w->fse_slot[kind][number] = used[kind];
        }
        total += count;
        w->first_sequence[number] = sequences;
        if (count + 1 > MAX_SEQUENCES - sequences) error = UNSUPPORTED_SEQUENCES;
        sequences += count + 1;
    }
    w->huffman_used = huffman;
#pragma unroll
    for (u32 kind = 0; kind < 3; kind++) w->fse_used[kind] = used[kind];
    w->status.sequences += total;
    if (error != OK) fail(w, error);
}

// RFC 3.1.1.3.2.1.2 and 4.1: decodes a block's sequences to the pool; false if they are damaged
static __device__ bool decode_sequences(Workspace* w, u32 number)
{
    const Block* block = &w->blocks[number];
    const u32 count = w->sequence_count[number];
    const u32 literals_size = block->literals_size;
    const u32 block_limit = w->block_limit;
    const u32 length_slot = w->fse_slot[LENGTHS][number];
    const u32 offset_slot = w->fse_slot[OFFSETS][number];
    const u32 match_slot = w->fse_slot[MATCHES][number];
    const u32* lengths = w->fse[length_slot] + FSE_AT[LENGTHS];
    const u32* offsets = w->fse[offset_slot] + FSE_AT[OFFSETS];
    const u32* matches = w->fse[match_slot] + FSE_AT[MATCHES];
    Sequence* to = w->sequences + w->first_sequence[number];
    Bits bits;
    if (!start(&bits, block->source + block->sequences_at, block->source + block->size)) return false;
    u32 length_state = take(&bits, w->fse_bits[LENGTHS][length_slot]);
    u32 offset_state = take(&bits, w->fse_bits[OFFSETS][offset_slot]);
    u32 match_state = take(&bits, w->fse_bits[MATCHES][match_slot]);
    u32 literals = 0, output = 0;
    for (u32 i = 0; i < count; i++) {
        const u32 length_entry = __ldg(lengths + length_state);
        const u32 offset_entry = __ldg(offsets + offset_state);
        const u32 match_entry = __ldg(matches + match_state);
        const u32 offset_bits = offset_entry & 255;
        const u32 offset_value = (1u << offset_bits) + take(&bits, offset_bits);
        const u32 match = MATCH_BASE[match_entry & 255] + take(&bits, MATCH_BITS[match_entry & 255]);
        const u32 length = LENGTH_BASE[length_entry & 255] + take(&bits, LENGTH_BITS[length_entry & 255]);
        to[i].literals_before = literals;
        to[i].output_before = output;
        to[i].offset_value = offset_value;
        literals += length;
        output += length + match;
        if (literals > literals_size || output > block_limit) return false;
        if (i + 1 < count) {
            length_state = (length_entry >> 16) + take(&bits, length_entry >> 8 & 255);
            match_state = (match_entry >> 16) + take(&bits, match_entry >> 8 & 255);
            offset_state = (offset_entry >> 16) + take(&bits, offset_entry >> 8 & 255);
        }
        if (bits.left < 0) return false;
    }
    to[count].literals_before = literals;
    to[count].output_before = output;
    to[count].offset_value = 0;
    output += literals_size - literals;
    w->regenerated[number] = output;
    return bits.left == 0 && output <= block_limit;
}

extern "C" __global__ void zstd_sequences(Workspace* workspaces, const Order* orders)
{
    Workspace* w = workspaces + blockIdx.y;
    if (w->status.error != OK) return;
    for (u32 number = blockIdx.x * blockDim.x + threadIdx.x; number < w->block_count;
         number += gridDim.x * blockDim.x)
        if (w->sequence_count[number] && !decode_sequences(w, number)) fail(w, DAMAGED_SEQUENCES);
}

extern "C" __global__ void zstd_place(Workspace* workspaces, const Order* orders)
{
    Workspace* w = workspaces + blockIdx.y;
    if (blockIdx.x || threadIdx.x || w->status.error != OK) return;
    const u32 block_count = w->block_count;
    u64 at = w->status.produced;
    for (u32 number = 0; number < block_count; number++) {
        w->output_at[number] = at;
        at += w->regenerated[number];  // at most BLOCK_LIMIT
    }
    const u64 content_size = w->status.content_size;
    if (at > w->capacity) fail(w, NO_ROOM);
    else if (at > content_size || (w->status.finished && content_size != ~0ull && at != content_size))
        fail(w, DAMAGED_SIZE);
    else w->status.produced = at;
}

// Where a block's literals are decoded to. There is nothing before them if it has no sequences.
static __device__ u8* literals_of(Workspace* w, u32 number)
{
    return w->out + w->output_at[number] + (w->regenerated[number] - w->blocks[number].literals_size);
}

// A Huffman table in shared memory: of the code that the next 11 bits begin with its length, and the
// symbol. Each in an array of its own, whatever the longest code: the bits become an address by one
// instruction.
struct Codes {
    u8 lengths[HUFFMAN_ENTRIES];
    u8 symbols[HUFFMAN_ENTRIES];
};

static __device__ u32 next_code(u64 window) { return (u32)(window >> 32) >> (32 - HUFFMAN_BITS); }

static __device__ u8 decode_one(Bits* bits, const Codes* codes)
{
    const u32 index = next_code(peek(bits));
    advance(bits, codes->lengths[index]);
    return codes->symbols[index];
}

// Four symbols, of at most 11 bits each: they fit the window, and 20 bits are left, so that `index`,
// which is what comes next, is known before the window is full again.
static __device__ u32 decode_four(Bits* bits, u32* index, const Codes* codes)
{
    const u64 window = peek(bits);
    u32 high = (u32)(window >> 32), low = (u32)window;
    u32 symbols = 0, spent = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 length = codes->lengths[*index];
        symbols |= (u32)codes->symbols[*index] << (8 * i);
        high = __funnelshift_l(low, high, length);
        low <<= length;
        spent += length;
        *index = high >> (32 - HUFFMAN_BITS);
    }
    advance(bits, spent);
    return symbols;
}

static __device__ u64 decode_eight(Bits* bits, u32* index, const Codes* codes)
{
    const u64 symbols = decode_four(bits, index, codes);
    return symbols | (u64)decode_four(bits, index, codes) << 32;
}

// RFC 4.2.2: decodes a Huffman stream; false if it has more or fewer than `count` symbols. This is
// where nearly all the time goes: a chain of dependent steps for every symbol. Bits from behind the
// stream's beginning do no harm: only codes that end in time are accepted, and what follows a code
// does not change it.
static __device__ bool decode_stream(const Codes* codes, const u8* begin, const u8* end, u8* to, u32 count)
{
    Bits bits;
    if (!start(&bits, begin, end)) return false;
    const u32 total = count;
    u32 touched = 0;
    // One loop after the other, for all threads of a warp: if one of them came back from a later loop
    // to an earlier one, the others would wait for it, and streams be decoded one by one.
    u32 head = smaller((u32)(0 - (u64)to) & 7, count);
    count -= head;
    for (; head; head--) *to++ = decode_one(&bits, codes);
    u32 index = next_code(peek(&bits));
    while (count >= 32 && bits.left >= 32 * HUFFMAN_BITS) {
        // Brings what is needed four or more turns from now into the cache. A turn takes up to 44 bytes,
        // and the cache is filled by 32.
        const u32* far = (const u32*)(bits.next - bits.first > 28 ? bits.next - 28 : bits.first);
        const u32* near = (const u32*)(bits.next - bits.first > 24 ? bits.next - 24 : bits.first);
        const u32 far_word = __ldg(far);
        const u32 near_word = __ldg(near);
        u64* words = (u64*)to;
#pragma unroll 2
        for (u32 i = 0; i < 4; i++) words[i] = decode_eight(&bits, &index, codes);
        to += 32;
        count -= 32;
        touched |= far_word | near_word;
    }
    while (count >= 8 && bits.left >= 8 * HUFFMAN_BITS) {
        *(u64*)to = decode_eight(&bits, &index, codes);
        to += 8;
        count -= 8;
    }
    for (; count && bits.left >= 0; count--) *to++ = decode_one(&bits, codes);
    // No stream has that many symbols: the last part only keeps the compiler from leaving out the loads.
    return count == 0 && bits.left == 0 && (total != ~0u || touched != 0);
}

// A CTA for a block, of which each Huffman stream is a thread's work.
extern "C" __global__ void zstd_literals(Workspace* workspaces, const Order* orders)
{
    Workspace* w = workspaces + blockIdx.y;
    __shared__ Codes codes;
    const bool failed = w->status.error != OK;
    __syncthreads();  // nobody sets an error before all have looked
    if (failed) return;
    const u32 block_count = w->block_count;
    for (u32 number = blockIdx.x; number < block_count; number += gridDim.x) {
        const Block* block = &w->blocks[number];
        const u32 size = block->literals_size;
        u8* to = literals_of(w, number);
        if (block->literals_type == LITERALS_RAW || block->literals_type == LITERALS_RLE) {
            const u8* from = block->source + block->stream_at[0];
            if (w->sequence_count[number]) continue;  // `scatter` takes them from the source
            if (block->literals_type == LITERALS_RAW) copy(to, from, size, threadIdx.x, blockDim.x);
            else if (size) fill(to, *from, size, threadIdx.x, blockDim.x);
            continue;
        }
        const u32 slot = w->huffman_slot[number];
        const u32 shorter = HUFFMAN_BITS - w->huffman_bits[slot];
        __syncthreads();  // until here others may be decoding the block before
#pragma unroll 8
        for (u32 i = threadIdx.x; i < HUFFMAN_ENTRIES; i += blockDim.x) {
            const u32 entry = w->huffman[slot][i >> shorter];
            codes.lengths[i] = (u8)entry;
            codes.symbols[i] = (u8)(entry >> 8);
        }
        __syncthreads();
        const u32 part = block->stream_count == 1 ? size : (size + 3) / 4;
        for (u32 i = threadIdx.x; i < block->stream_count; i += blockDim.x)
            if (!decode_stream(&codes, block->source + block->stream_at[i], block->source + block->stream_at[i + 1],
                               to + i * part, i == 3 ? size - 3 * part : part))
                fail(w, DAMAGED_STREAM);
    }
}

extern "C" __global__ void zstd_scatter(Workspace* workspaces, const Order* orders)
{
    Workspace* w = workspaces + blockIdx.y;
    if (w->status.error != OK) return;
    for (u32 number = blockIdx.x; number < w->block_count; number += gridDim.x) {
        const u32 count = w->sequence_count[number];
        if (count == 0) continue;
        const Block* block = &w->blocks[number];
        const Sequence* sequences = w->sequences + w->first_sequence[number];
        const u32 size = block->literals_size;
        const bool same = block->literals_type == LITERALS_RLE;
        const bool raw = block->literals_type == LITERALS_RAW;
        const u8* from = raw || same ? block->source + block->stream_at[0] : literals_of(w, number);
        u8* to = w->out + w->output_at[number];
        // Eight literals for each thread at a time. Where they go, there may be literals of this or of
        // an earlier turn, which then have been read, but none of a later turn.
        for (u32 turn = 0; turn < size; turn += 8 * blockDim.x) {
            const u32 begin = turn + 8 * threadIdx.x;
            const u32 end = smaller(begin + 8, size);
            u64 literals = 0;
            for (u32 i = begin; i < end; i++) literals |= (u64)from[same ? 0 : i] << (8 * (i - begin));
            __syncthreads();
            if (begin >= end) continue;
            // The last sequence whose literals begin at `begin` or before
            u32 low = 0, high = count;
            while (low < high) {
                const u32 middle = (low + high + 1) / 2;
                if (sequences[middle].literals_before <= begin) low = middle;
                else high = middle - 1;
            }
            Sequence sequence = sequences[low];
            for (u32 i = begin; i < end; i++) {
                while (low < count && sequences[low + 1].literals_before <= i) sequence = sequences[++low];
                to[sequence.output_before + (i - sequence.literals_before)] = (u8)literals;
                literals >>= 8;
            }
        }
    }
}

// RFC 3.1.1.5: the offset that a sequence means. 0 is none.
static __device__ u32 resolve(u32 value, u32 length, u32* first, u32* second, u32* third)
{
    u32 offset;
    if (value > 3) {
        offset = value - 3;
    } else {
        const u32 which = length ? value : value + 1;  // without literals the first is not an option
        if (which == 1) return *first;
        offset = which == 2 ? *second : which == 3 ? *third : *first - 1;
        if (which == 2) {
            *second = *first;
            *first = offset;
            return offset;
        }
    }
    *third = *second;
    *second = *first;
    *first = offset;
    return offset;
}

// Copies a match, by all threads of the CTA. What is before `to` is there.
static __device__ void copy_match(u8* to, u32 offset, u32 size, bool by_words)
{
    const u8* from = to - offset;
    if (size < 256 || !by_words) {
        for (u32 i = threadIdx.x; i < size; i += blockDim.x) to[i] = from[offset < size ? i % offset : i];
        __syncthreads();
        return;
    }
    // An overlapping match repeats `offset` bytes: every turn copies all repetitions that are there.
    u32 done = 0;
    while (done < size) {
        const u32 turn = smaller(size - done, done + offset);
        copy(to + done, from, turn, threadIdx.x, blockDim.x);
        __syncthreads();
        done += turn;
    }
}

extern "C" __global__ void zstd_execute(Workspace* workspaces, const Order* orders)
{
    Workspace* w = workspaces + blockIdx.y;
    if (blockIdx.x) return;
    const bool failed = w->status.error != OK;
    __syncthreads();  // nobody sets an error before all have looked
    if (failed) return;
    const u32 block_count = w->block_count;
    const u64 window = w->status.window_size;
    u8* out = w->out;
    // copy() may load up to seven bytes before its source: not before the output
    const bool by_words = ((u64)out & 7) == 0;
    u32 first = w->offsets[0], second = w->offsets[1], third = w->offsets[2];
    bool good = true;
    for (u32 number = 0; number < block_count && good; number++) {
        const u32 count = w->sequence_count[number];
        if (count == 0) continue;
        const Sequence* sequences = w->sequences + w->first_sequence[number];
        const u64 at = w->output_at[number];
        Sequence next = sequences[0];
        for (u32 i = 0; i < count && good; i++) {  // every thread finds the same
            const Sequence sequence = next;
            next = sequences[i + 1];
            const u32 length = next.literals_before - sequence.literals_before;
            const u32 size = next.output_before - sequence.output_before - length;
            const u32 offset = resolve(sequence.offset_value, length, &first, &second, &third);
            const u64 to = at + sequence.output_before + length;
            good = offset != 0 && offset <= to && offset <= window;
            if (good) copy_match(out + to, offset, size, by_words);
        }
    }
    __syncthreads();
    // The tables that were used last stay for the next piece.
    const u32 huffman = w->huffman_used;
    if (huffman < KEPT) {
        const u32* from = (const u32*)w->huffman[huffman];
        u32* to = (u32*)w->huffman[KEPT];
        for (u32 i = threadIdx.x; i < HUFFMAN_ENTRIES / 2; i += blockDim.x) to[i] = from[i];
    }
    for (u32 kind = 0; kind < 3; kind++) {
        const u32 slot = w->fse_used[kind];
        if (slot >= KEPT) continue;
        const u32 begin = FSE_AT[kind], end = begin + (1u << w->fse_bits[kind][slot]);
        for (u32 i = begin + threadIdx.x; i < end; i += blockDim.x) w->fse[KEPT][i] = w->fse[slot][i];
    }
    __syncthreads();
    if (threadIdx.x) return;
    w->offsets[0] = first;
    w->offsets[1] = second;
    w->offsets[2] = third;
    if (huffman < KEPT) {
        w->huffman_bits[KEPT] = w->huffman_bits[huffman];
        w->huffman_used = KEPT;
    }
    for (u32 kind = 0; kind < 3; kind++) {
        const u32 slot = w->fse_used[kind];
        if (slot >= KEPT) continue;
        w->fse_bits[kind][KEPT] = w->fse_bits[kind][slot];
        w->fse_used[kind] = KEPT;
    }
    if (!good) fail(w, DAMAGED_OFFSET);
}
