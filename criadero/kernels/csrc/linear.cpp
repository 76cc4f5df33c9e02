// Packing, activations' memory and sharing out: what does not depend on the instruction set.
#include "linear.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

#include "ggml.h"
#include "mapped.h"
#include "vec.h"

namespace criadero {

// --- memory

namespace {

constexpr size_t HUGE_PAGE = size_t{2} << 20;

uint8_t* allocate(size_t& bytes) {
    const bool large = bytes >= HUGE_PAGE;
    const size_t unit = large ? HUGE_PAGE : 64;
    // Weights end on a 4 KiB boundary at the finest: rounding every tensor to 2 MiB would add up in a small model
    const size_t step = large ? 4096 : 64;
    bytes = (bytes + step - 1) / step * step;
    void* memory = nullptr;
    if (posix_memalign(&memory, unit, bytes) != 0) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (large) madvise(memory, bytes, MADV_HUGEPAGE);  // only advice: a refusal costs speed
#endif
    return static_cast<uint8_t*>(memory);
}

}  // namespace

Buffer::Buffer(size_t bytes) { reserve(bytes); }
Buffer::~Buffer() { std::free(data); }
Buffer::Buffer(Buffer&& other) noexcept : data(std::exchange(other.data, nullptr)), size(std::exchange(other.size, 0)) {}
Buffer& Buffer::operator=(Buffer&& other) noexcept {
    std::swap(data, other.data);
    std::swap(size, other.size);
    return *this;
}
void Buffer::reserve(size_t bytes) {
    if (bytes <= size) return;
    std::free(data);
    data = nullptr;
    size = 0;
    data = allocate(bytes);
    size = bytes;
}

// --- packing

namespace {

void refuse(bool wrong, const std::string& what) {
    if (wrong) throw std::invalid_argument(what);
}

int round_up(int n, int step) { return (n + step - 1) / step * step; }

size_t bits_of(Kind kind) { return kind == Kind::f32 ? 32 : kind == Kind::bf16 ? 16 : kind == Kind::int8 ? 8 : 4; }

// Bytes of so many columns of a tile, scales and mins included.
size_t stretch(const Weights& w, int columns) {
    const size_t numbers = static_cast<size_t>(columns) * TILE * bits_of(w.kind) / 8;
    const size_t tables = w.group ? static_cast<size_t>(columns / w.group) * TILE * 2 * (w.kind == Kind::int4_mins ? 2 : 1) : 0;
    return numbers + tables;
}

// Sizes, without memory.
Linear sized(Kind kind, int rows, int columns, int group) {
    refuse(rows <= 0 || columns <= 0, "a matrix of " + std::to_string(rows) + " x " + std::to_string(columns) + " cannot be packed");
    Linear w;
    w.kind = kind;
    w.rows = rows;
    w.columns = columns;
    w.padded = round_up(columns, SLICE);
    w.group = group;
    w.tiles = (rows + TILE - 1) / TILE;
    w.span_bytes = stretch(w, SPAN);
    const size_t row_scales = kind == Kind::int8 && !group ? TILE * 4 : 0;
    const int rest = w.padded % SPAN;
    w.tile_bytes = (static_cast<size_t>(w.padded / SPAN) * w.span_bytes + stretch(w, rest) + row_scales + 63) / 64 * 64;
    return w;
}

// Sizes and an empty buffer.
Linear layout(Kind kind, int rows, int columns, int group) {
    Linear w = sized(kind, rows, columns, group);
    w.buffer = Buffer(w.tile_bytes * static_cast<size_t>(w.tiles));
    w.data = w.buffer.data;
    return w;
}

float at(const Floats& table, size_t i) {
    return table.half ? half_to_float(static_cast<const uint16_t*>(table.data)[i]) : static_cast<const float*>(table.data)[i];
}

// The largest magnitude of a part of a table; infinite if a number is not finite.
float largest(const Floats& table, size_t from, size_t to) {
    uint32_t top = 0;  // of positive numbers the bits have the numbers' order
    if (table.half) {
        const uint16_t* halves = static_cast<const uint16_t*>(table.data);
        uint16_t most_of = 0;
        for (size_t i = from; i < to; ++i) most_of = std::max<uint16_t>(most_of, halves[i] & 0x7fff);
        return most_of >= 0x7c00 ? INFINITY : half_to_float(most_of);
    }
    const float* floats = static_cast<const float*>(table.data);
    for (size_t i = from; i < to; ++i) top = std::max(top, float_to_bits(floats[i]) & 0x7fffffffu);
    return top >= 0x7f800000u ? INFINITY : bits_to_float(top);
}

// The power of two that brings the largest of the tables' numbers (of the largest of its parts) to the top of f16's range, so that the small
// ones do not become subnormal. It multiplies f16 input exactly.
int exponent_of(const std::vector<float>& tops) {
    const float top = *std::max_element(tops.begin(), tops.end());
    refuse(!std::isfinite(top), "scales: a number that is not finite");
    if (top == 0) return 0;
    int exponent;
    std::frexp(top, &exponent);  // top < 2^exponent
    return 15 - exponent;
}

int exponent_of(Pool& pool, const Floats& scales, const Floats& mins, size_t count) {
    std::vector<float> tops(static_cast<size_t>(pool.threads()), 0.0f);
    pool.run([&](Worker& me) {
        const size_t from = count * static_cast<size_t>(me.index) / static_cast<size_t>(me.count);
        const size_t to = count * static_cast<size_t>(me.index + 1) / static_cast<size_t>(me.count);
        float top = largest(scales, from, to);
        if (mins.data) top = std::max(top, largest(mins, from, to));
        tops[static_cast<size_t>(me.index)] = top;
    });
    return exponent_of(tops);
}

// Number i of a table times 2^up as f16.
inline uint16_t stored_half(const Floats& table, size_t i, int up, float factor) {
    if (table.half) {
        const uint16_t h = static_cast<const uint16_t*>(table.data)[i];
        const int field = (h >> 10) & 31;
        if (field > 0 && field + up > 0) return static_cast<uint16_t>(h + up * 1024);  // a normal number that stays one
        return float_to_half(half_to_float(h) * factor);
    }
    return float_to_half(static_cast<const float*>(table.data)[i] * factor);
}

typedef uint32_t words4 __attribute__((vector_size(16)));  // four words at a time

// Of each word the nibbles of 8 columns c0..c7, c0 lowest -> c0 c4 c1 c5 c2 c6 c3 c7: byte i then holds column i low and i + 4 high.
inline words4 shuffle_nibbles(words4 x) {
    // a perfect shuffle of the eight nibbles, in two exchanges
    words4 t = (x ^ (x >> 8)) & 0x0000ff00u;
    x ^= t ^ (t << 8);
    t = (x ^ (x >> 4)) & 0x00f000f0u;
    return x ^ t ^ (t << 4);
}

// Four rows of a span, of which `there` exist (the others are zeros): 8 columns in each word, 16 words further each time.
void pack_int4(uint32_t* to, const uint8_t* from, size_t row_bytes, int there, int width) {
    for (int k = 0; k < width / 8; k += 4) {
        words4 rows[4];
        for (int r = 0; r < 4; ++r) {
            if (r < there) std::memcpy(&rows[r], from + static_cast<size_t>(r) * row_bytes + 4 * k, 16);
            else rows[r] = words4{0x88888888u, 0x88888888u, 0x88888888u, 0x88888888u};
            rows[r] = shuffle_nibbles(rows[r]);
        }
        for (int i = 0; i < 4; ++i) {
            const words4 column = {rows[0][i], rows[1][i], rows[2][i], rows[3][i]};
            std::memcpy(to + (k + i) * TILE, &column, 16);
        }
    }
}

// One row of a span: 4 columns in each word. No source: zeros.
void pack_int8(uint32_t* to, const uint8_t* from, int width, int there) {
    const int whole = from ? least(width, there) / 4 : 0;
    for (int k = 0; k < width / 4; ++k, to += TILE) {
        uint32_t word = 0;
        if (k < whole) std::memcpy(&word, from + 4 * k, 4);
        else if (from && there > 4 * k) std::memcpy(&word, from + 4 * k, static_cast<size_t>(there - 4 * k));
        *to = word ^ 0x80808080u;  // -128..127 as 0..255
    }
}

// What the tables' numbers are multiplied by to be stored as f16.
struct Unit {
    int exponent;
    float factor;
};

// One tile from `filled` rows of numbers, scales and mins in a QuantTensor's order.
void pack_tile(const Linear& w, uint8_t* tile, int filled, int bits, int group, const uint8_t* q, const Floats& scales, const Floats& mins, Unit unit) {
    const size_t row_bytes = static_cast<size_t>(w.columns) * static_cast<size_t>(bits) / 8, groups = static_cast<size_t>(w.columns / group);
    for (int from = 0; from < w.padded; from += SPAN) {
        const int width = least(SPAN, w.padded - from);
        uint8_t* to = tile + static_cast<size_t>(from / SPAN) * w.span_bytes;
        uint32_t* words = reinterpret_cast<uint32_t*>(to);
        if (bits == 4) {
            for (int r = 0; r < TILE; r += 4) {
                pack_int4(words + r, r < filled ? q + static_cast<size_t>(r) * row_bytes + from / 2 : nullptr, row_bytes, filled - r, width);
            }
        } else {
            for (int r = 0; r < TILE; ++r) {
                pack_int8(words + r, r < filled ? q + static_cast<size_t>(r) * row_bytes + from : nullptr, width, w.columns - from);
            }
        }
        if (!w.group) continue;
        uint16_t* halves = reinterpret_cast<uint16_t*>(to + static_cast<size_t>(width) * TILE * static_cast<size_t>(bits) / 8);
        for (const Floats* table : {&scales, &mins}) {
            if (!table->data) continue;
            for (int k = from; k < from + width; k += w.group) {
                for (int r = 0; r < TILE; ++r) {
                    const bool there = r < filled && k < w.columns;
                    const size_t place = static_cast<size_t>(r) * groups + static_cast<size_t>(k / group);
                    *halves++ = there ? stored_half(*table, place, unit.exponent, unit.factor) : 0;
                }
            }
        }
    }
    if (w.group) return;
    float* to = reinterpret_cast<float*>(tile + stretch(w, w.padded));
    for (int r = 0; r < TILE; ++r) to[r] = r < filled ? at(scales, static_cast<size_t>(r)) : 0.0f;
}

Floats from(const Floats& table, size_t place) {
    if (!table.data) return table;
    return {static_cast<const uint8_t*>(table.data) + place * (table.half ? 2 : 4), table.half};
}

}  // namespace

Linear pack_quant(Pool& pool, int rows, int columns, int bits, int group, const void* q, Floats scales, Floats mins) {
    refuse(bits != 4 && bits != 8, std::to_string(bits) + " bits: 4 and 8 are known");
    refuse(!q || !scales.data, "no weights or no scales");
    refuse(mins.data && bits != 4, "mins go with 4 bits");
    refuse(rows <= 0 || columns <= 0, "a matrix of " + std::to_string(rows) + " x " + std::to_string(columns) + " cannot be packed");
    const bool known = group > 0 && columns % group == 0 && (group % 32 == 0 || (bits == 8 && (group == 16 || group == columns)));
    refuse(!known, "groups of " + std::to_string(group) + " in " + std::to_string(columns) + " columns: a multiple of 32 that divides them" +
                       (bits == 8 ? ", 16, or all columns" : "") + " is needed");
    const bool per_row = bits == 8 && group == columns;
    // Groups that the kernels know: scales of larger ones are repeated. 64 as two of 32: it is too rare for code of its own.
    const int common = std::gcd(group, SPAN);
    const int inner = per_row ? 0 : common == 64 ? 32 : common;
    const Kind kind = bits == 8 ? Kind::int8 : mins.data ? Kind::int4_mins : Kind::int4;
    Linear w = layout(kind, rows, columns, inner);
    const int groups = columns / group;
    const int exponent = per_row ? 0 : exponent_of(pool, scales, mins, static_cast<size_t>(rows) * static_cast<size_t>(groups));
    w.unit = std::ldexp(1.0f, -exponent);
    const Unit unit = {exponent, std::ldexp(1.0f, exponent)};
    const size_t row_bytes = static_cast<size_t>(columns) * static_cast<size_t>(bits) / 8;

    pool.run([&](Worker& me) {
        for (int t = me.first(w.tiles); t < me.last(w.tiles); ++t) {
            const size_t row = static_cast<size_t>(t) * TILE, place = row * static_cast<size_t>(groups);
            pack_tile(w, w.buffer.data + static_cast<size_t>(t) * w.tile_bytes, least(rows - t * TILE, TILE), bits, group,
                      static_cast<const uint8_t*>(q) + row * row_bytes, from(scales, place), from(mins, place), unit);
        }
    });
    return w;
}

Linear pack_ggml(Pool& pool, const std::string& kind, const uint8_t* raw, int rows, int columns, int heads) {
    const GgmlMatrix matrix(kind, raw, rows, columns, heads);
    const GgmlFormat& f = matrix.format;
    Linear w = layout(f.bits == 8 ? Kind::int8 : f.mins ? Kind::int4_mins : Kind::int4, rows, columns, f.group);
    const size_t groups = static_cast<size_t>(columns / f.group), row_bytes = static_cast<size_t>(columns) * static_cast<size_t>(f.bits) / 8;
    // Tile by tile, so that what lies between the file and the packed matrix stays in a core's cache
    struct Room {
        std::vector<uint8_t> q;
        std::vector<float> scales, mins;  // or f16 in half of it
    };
    std::vector<Room> rooms(static_cast<size_t>(pool.threads()), Room{std::vector<uint8_t>(row_bytes * TILE), std::vector<float>(groups * TILE),
                                                                      std::vector<float>(f.mins ? groups * TILE : 0)});
    std::vector<float> tops(static_cast<size_t>(pool.threads()), 0.0f);
    auto largest_of = [&](const Room& room, int count) {
        const size_t n = groups * static_cast<size_t>(count);
        const float top = largest({room.scales.data(), !f.wide}, 0, n);
        return f.mins ? std::max(top, largest({room.mins.data(), false}, 0, n)) : top;
    };
    pool.run([&](Worker& me) {
        Room& room = rooms[static_cast<size_t>(me.index)];
        float top = 0;
        for (int row = me.first(rows); row < me.last(rows); ++row) {
            matrix.tables(row, room.scales.data(), room.mins.data());
            top = std::max(top, largest_of(room, 1));
        }
        tops[static_cast<size_t>(me.index)] = top;
    });
    const int exponent = exponent_of(tops);
    w.unit = std::ldexp(1.0f, -exponent);
    const Unit unit = {exponent, std::ldexp(1.0f, exponent)};
    pool.run([&](Worker& me) {
        Room& room = rooms[static_cast<size_t>(me.index)];
        for (int t = me.first(w.tiles); t < me.last(w.tiles); ++t) {
            const int filled = least(rows - t * TILE, TILE);
            for (int r = 0; r < filled; ++r) {
                const size_t place = static_cast<size_t>(r) * groups;
                matrix.numbers(t * TILE + r, room.q.data() + static_cast<size_t>(r) * row_bytes);
                matrix.tables(t * TILE + r, reinterpret_cast<uint8_t*>(room.scales.data()) + place * (f.wide ? 4 : 2), room.mins.data() + (f.mins ? place : 0));
            }
            pack_tile(w, w.buffer.data + static_cast<size_t>(t) * w.tile_bytes, filled, f.bits, f.group, room.q.data(), {room.scales.data(), !f.wide},
                      {f.mins ? room.mins.data() : nullptr, false}, unit);
        }
    });
    return w;
}

namespace {

// Words of 16 rows, a word of each after the other: to[k * TILE + r] = rows[r][k]. `count` is a multiple of 4.
void interleave(uint32_t* to, const uint8_t* const* rows, int count) {
    for (int r = 0; r < TILE; r += 4) {
        for (int k = 0; k < count; k += 4) {
            words4 some[4];
            for (int i = 0; i < 4; ++i) std::memcpy(&some[i], rows[r + i] + 4 * k, 16);
            for (int i = 0; i < 4; ++i) {
                const words4 column = {some[0][i], some[1][i], some[2][i], some[3][i]};
                std::memcpy(to + (k + i) * TILE + r, &column, 16);
            }
        }
    }
}

// A tile of f32 or bf16, in words of one column or two, from its rows (null: beyond the last): a slice of columns at a time, so that what is
// written stays in the first cache.
void pack_dense_tile(const Weights& w, const uint8_t* const* rows, uint8_t* tile) {
    const size_t size = bits_of(w.kind) / 8;
    uint8_t spare[TILE][SLICE * 4];  // for what is beyond the last row or column
    for (int slice = 0; slice < w.padded; slice += SLICE) {
        const int there = least(SLICE, w.columns - slice);
        const uint8_t* parts[TILE];
        for (int r = 0; r < TILE; ++r) {
            const uint8_t* from = rows[r] ? rows[r] + static_cast<size_t>(slice) * size : nullptr;
            parts[r] = from;
            if (from && there == SLICE) continue;
            std::memset(spare[r], 0, sizeof spare[r]);
            if (from) std::memcpy(spare[r], from, static_cast<size_t>(there) * size);
            parts[r] = spare[r];
        }
        interleave(reinterpret_cast<uint32_t*>(tile + static_cast<size_t>(slice) * TILE * size), parts, SLICE * static_cast<int>(size) / 4);
    }
}

Linear pack_dense(Pool& pool, Kind kind, int rows, int columns, const void* from) {
    Linear w = layout(kind, rows, columns, 0);
    const size_t row_bytes = static_cast<size_t>(columns) * bits_of(kind) / 8;
    pool.run([&](Worker& me) {
        for (int t = me.first(w.tiles); t < me.last(w.tiles); ++t) {
            const uint8_t* parts[TILE];
            for (int r = 0; r < TILE; ++r) {
                const int n = t * TILE + r;
                parts[r] = n < rows ? static_cast<const uint8_t*>(from) + static_cast<size_t>(n) * row_bytes : nullptr;
            }
            pack_dense_tile(w, parts, w.buffer.data + static_cast<size_t>(t) * w.tile_bytes);
        }
    });
    return w;
}

}  // namespace

Linear pack_f32(Pool& pool, int rows, int columns, const float* w) { return pack_dense(pool, Kind::f32, rows, columns, w); }

Linear pack_bf16(Pool& pool, int rows, int columns, const uint16_t* w) { return pack_dense(pool, Kind::bf16, rows, columns, w); }

// --- rows left where they lie

Linear map_rows(const std::string& kind, const uint8_t* raw, int rows, int columns, int heads) {
    refuse(kind != "BF16" && kind != "Q8_0", "rows in " + kind + ": BF16 and Q8_0 can stay as they are");
    refuse(!raw, "no weights");
    Linear w = kind == "BF16" ? sized(Kind::bf16, rows, columns, 0) : sized(Kind::int8, rows, columns, 32);
    refuse(w.group && columns % w.group, "rows of " + std::to_string(columns) + " are no whole blocks of " + kind);
    refuse(heads < 0 || (heads && rows % (2 * heads)), std::to_string(heads) + " heads do not share " + std::to_string(rows) + " rows");
    w.mapped = raw;
    w.row_bytes = w.group ? static_cast<size_t>(columns) / 32 * Q8_BYTES : static_cast<size_t>(columns) * 2;
    w.head = heads ? rows / heads : 0;
    return w;
}

bool maps_rows() { return linear_kernels().mapped; }

namespace {

// A tile of mapped rows, packed.
void pack_mapped_tile(const Weights& w, int t, uint8_t* tile) {
    const uint8_t* rows[TILE];
    for (int r = 0; r < TILE; ++r) rows[r] = t * TILE + r < w.rows ? mapped_row(w, t * TILE + r) : nullptr;
    if (w.kind == Kind::bf16) return pack_dense_tile(w, rows, tile);
    for (int block = 0; block < w.columns / 32; ++block) {
        const int span = block / (SPAN / 32), inner = block % (SPAN / 32), width = least(SPAN, w.padded - span * SPAN);
        uint8_t* to = tile + static_cast<size_t>(span) * w.span_bytes;
        uint8_t* scales = to + width * TILE + inner * TILE * 2;
        for (int r = 0; r < TILE; ++r) {
            const uint8_t* from = rows[r] ? rows[r] + static_cast<size_t>(block) * Q8_BYTES : nullptr;
            pack_int8(reinterpret_cast<uint32_t*>(to + inner * 32 * TILE) + r, from ? from + 2 : nullptr, 32, 32);
            if (from) std::memcpy(scales + 2 * r, from, 2);
            else std::memset(scales + 2 * r, 0, 2);
        }
    }
}

}  // namespace

void unpack_row(const Linear& w, int n, float* out) {
    refuse(n < 0 || n >= w.rows, "row " + std::to_string(n) + " of " + std::to_string(w.rows));
    if (w.mapped) {
        const uint8_t* from = mapped_row(w, n);
        uint16_t half;
        for (int k = 0; !w.group && k < w.columns; ++k, from += 2) {
            std::memcpy(&half, from, 2);
            out[k] = bf16_to_float(half);
        }
        for (int k = 0; w.group && k < w.columns; k += 32, from += Q8_BYTES) {
            std::memcpy(&half, from, 2);
            const float scale = half_to_float(half);
            for (int i = 0; i < 32; ++i) out[k + i] = static_cast<float>(static_cast<int8_t>(from[2 + i])) * scale;
        }
        return;
    }
    const uint8_t* tile = w.data + static_cast<size_t>(n / TILE) * w.tile_bytes;
    const int r = n % TILE;
    for (int k = 0; k < w.columns; ++k) {
        const int from = k / SPAN * SPAN, i = k - from;  // i: column within the span
        const uint8_t* span = tile + static_cast<size_t>(k / SPAN) * w.span_bytes;
        const int width = least(SPAN, w.padded - from);
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(span + static_cast<size_t>(width) * TILE * bits_of(w.kind) / 8);
        if (w.kind == Kind::f32) {
            out[k] = reinterpret_cast<const float*>(span)[i * TILE + r];
        } else if (w.kind == Kind::bf16) {
            out[k] = bf16_to_float(reinterpret_cast<const uint16_t*>(span)[(i / 2 * TILE + r) * 2 + i % 2]);
        } else if (w.kind == Kind::int8) {
            const float v = static_cast<float>(span[i / 4 * 64 + r * 4 + i % 4] - 128);
            const float scale = w.group ? half_to_float(scales[i / w.group * TILE + r]) * w.unit
                                        : reinterpret_cast<const float*>(tile + stretch(w, w.padded))[r];
            out[k] = v * scale;
        } else {
            const int u = (span[i / 8 * 64 + r * 4 + i % 4] >> (i % 8 / 4 * 4)) & 15;
            const float scale = half_to_float(scales[i / w.group * TILE + r]) * w.unit;
            if (w.kind == Kind::int4) out[k] = static_cast<float>(u - 8) * scale;
            else out[k] = static_cast<float>(u) * scale - half_to_float(scales[(width / w.group + i / w.group) * TILE + r]) * w.unit;
        }
    }
}

// --- activations

namespace {

int width_for(int rows) {
    for (int width : {1, 2, 4, 6, 8, 12}) {
        if (rows <= width) return width;
    }
    return BLOCK;
}

}  // namespace

unsigned needs(const Linear& w) {
    switch (w.kind) {
        case Kind::f32: return FORM_F32;
        case Kind::bf16: return linear_kernels().bf16 ? FORM_BF16 : FORM_F32;
        case Kind::int8: return w.group == 16 ? FORM_INT8 | FORM_FINE : FORM_INT8;
        default: return FORM_INT8;
    }
}

int Activations::blocks() const { return (rows + BLOCK - 1) / BLOCK; }

void Activations::resize(int m, int k, unsigned wanted) {
    refuse(m <= 0 || k <= 0, "activations of " + std::to_string(m) + " x " + std::to_string(k));
    rows = m;
    columns = k;
    padded = round_up(k, SLICE);
    forms = wanted;
    const size_t spans = static_cast<size_t>((padded + SPAN - 1) / SPAN);
    const size_t places = static_cast<size_t>(blocks()) * BLOCK * static_cast<size_t>(padded);
    if (forms & (FORM_INT8 | FORM_FINE)) {
        q_.reserve(places);
        scales_.reserve(static_cast<size_t>(blocks()) * BLOCK * spans * 4);
        sums_.reserve(places / SLICE * 4);
        totals_.reserve(static_cast<size_t>(blocks()) * BLOCK * spans * 4);
    }
    if (forms & FORM_FINE) fine_.reserve(places / SLICE * 8);
    if (forms & FORM_BF16) bf16_.reserve(places * 2);
    if (forms & FORM_F32) f32_.reserve(places * 4);
    const Block last = block(blocks() - 1);
    if (last.width == last.rows) return;
    const size_t count = static_cast<size_t>(last.width) * static_cast<size_t>(padded);
    if (last.q) {
        std::memset(last.q, 0, count);
        std::memset(last.scales, 0, static_cast<size_t>(last.width) * spans * 4);
        std::memset(last.sums, 0, count / SLICE * 4);
        std::memset(last.totals, 0, static_cast<size_t>(last.width) * spans * 4);
    }
    if (last.fine) std::memset(last.fine, 0, count / SLICE * 8);
    if (last.bf16) std::memset(last.bf16, 0, count * 2);
    if (last.f32) std::memset(last.f32, 0, count * 4);
}

Block Activations::block(int index) const {
    Block b;
    b.rows = rows - index * BLOCK < BLOCK ? rows - index * BLOCK : BLOCK;
    b.width = width_for(b.rows);
    b.padded = padded;
    b.forms = forms;
    const size_t spans = static_cast<size_t>((padded + SPAN - 1) / SPAN);
    const size_t place = static_cast<size_t>(index) * BLOCK * static_cast<size_t>(padded);
    if (forms & (FORM_INT8 | FORM_FINE)) {
        b.q = q_.as<int8_t>() + place;
        b.scales = scales_.as<float>() + static_cast<size_t>(index) * BLOCK * spans;
        b.totals = totals_.as<int32_t>() + static_cast<size_t>(index) * BLOCK * spans;
        b.sums = sums_.as<int32_t>() + place / SLICE;
    }
    if (forms & FORM_FINE) b.fine = fine_.as<int32_t>() + place / SLICE * 2;
    if (forms & FORM_BF16) b.bf16 = bf16_.as<uint16_t>() + place;
    if (forms & FORM_F32) b.f32 = f32_.as<float>() + place;
    return b;
}

void prepare(const Activations& a, int row, int from, int to, const float* x) {
    linear_kernels().prepare(a.block(row / BLOCK), row % BLOCK, from, to, a.columns, x);
}

// --- sharing out

const LinearKernels& linear_kernels() {
    switch (level()) {
#if defined(__x86_64__)
        case Level::avx512: return cpu().avx512_bf16 ? linear_avx512_bf16() : linear_avx512();
        case Level::avx2: return cpu().avx_vnni ? linear_avx_vnni() : linear_avx2();
#elif defined(__aarch64__)
        case Level::neon: return linear_neon();
#endif
        default: return linear_portable();
    }
}

namespace {

// Tiles of all products of a call, one after the other, in pieces that become smaller: in each round every thread could have one, and a round
// is half of what is left. So few pieces begin somewhere else in memory, and threads still end together.
struct Cut {
    int tiles = 0, threads, rounds = 1;
    Cut(const Job* jobs, int count, int workers) : threads(workers) {
        constexpr size_t LEAST = 128 << 10;
        size_t bytes = 0;
        for (int j = 0; j < count; ++j) tiles += jobs[j].w->tiles, bytes += static_cast<size_t>(jobs[j].w->tiles) * jobs[j].w->tile_bytes;
        while (rounds < 20 && bytes >> rounds > LEAST * static_cast<size_t>(threads)) ++rounds;
    }
    int pieces() const { return rounds * threads; }
    int first(int piece) const {
        const int round = piece / threads;
        if (round == rounds) return tiles;
        const int from = tiles - (tiles >> round), to = round + 1 == rounds ? tiles : tiles - (tiles >> (round + 1));
        return from + static_cast<int>(static_cast<int64_t>(to - from) * (piece % threads) / threads);
    }
};

// f(job, first, last) for the tiles [from, to) of all products
template <class F>
void each_job(const Job* jobs, int from, int to, F&& f) {
    for (int before = 0; before < to; before += (jobs++)->w->tiles) {
        const int first = most(from - before, 0), last = least(to - before, jobs->w->tiles);
        if (first < last) f(*jobs, first, last);
    }
}

}  // namespace

void run_jobs(Worker& worker, const Job* jobs, int count, const Activations& a) {
    const LinearKernels& kernels = linear_kernels();
    static thread_local Buffer room, packed;
    // Mapped rows that are packed here: where the kernels do not take them, or would turn bf16 of them again for each of many blocks
    constexpr int AGAIN = 4;  // blocks that bf16 is turned for (64 rows: 0.89 of the speed of packed weights, 0.84 packed here)
    auto unpacked = [&](const Weights& w) { return w.mapped && (!kernels.mapped || (w.kind == Kind::bf16 && a.blocks() > AGAIN)); };
    auto each_part = [&](const Job& job, int first, int last, auto&& f) {
        if (!unpacked(*job.w)) return f(*job.w, first, last, job.y);
        for (int t = first; t < last; t += 2) {
            Weights w = *job.w;
            const int some = least(2, last - t);
            packed.reserve(static_cast<size_t>(some) * w.tile_bytes);
            for (int i = 0; i < some; ++i) pack_mapped_tile(w, t + i, packed.data + static_cast<size_t>(i) * w.tile_bytes);
            w.rows -= t * TILE;
            w.data = packed.data;
            w.mapped = nullptr;
            f(w, 0, some, job.y + t * TILE);
        }
    };
    if (a.blocks() == 1) {
        Block block = a.block(0);
        block.keep = !cpu().amd;
        const Cut cut(jobs, count, worker.count);
        for (int piece = worker.next(); piece < cut.pieces(); piece = worker.next()) {
            each_job(jobs, cut.first(piece), cut.first(piece + 1), [&](const Job& job, int first, int last) {
                each_part(job, first, last,
                          [&](const Weights& w, int from, int to, float* y) { kernels.tiles(w, block, from, to, y, job.stride, job.add); });
            });
        }
        return;
    }
    // Each product is in some sixteen pieces a thread, if it has as many tiles, so that the threads end together, and small enough to stay in a
    // core's second-level cache while block after block of rows goes over it.
    constexpr size_t PIECE = 128 << 10;
    int total = 0;
    auto tiles_of = [&](const Weights& w) {
        const int fair = (w.tiles + 16 * worker.count - 1) / (16 * worker.count);
        return round_up(least(most(1, static_cast<int>(PIECE / w.tile_bytes)), fair), 2);
    };
    std::vector<Block> blocks;
    for (int b = 0; b < a.blocks(); ++b) {
        blocks.push_back(a.block(b));
        blocks.back().keep = true;
    }
    auto pieces_of = [&](const Weights& w) { return (w.tiles + tiles_of(w) - 1) / tiles_of(w); };
    for (int j = 0; j < count; ++j) total += pieces_of(*jobs[j].w);
    for (int piece = worker.next(); piece < total; piece = worker.next()) {
        int rest = piece, j = 0;
        while (rest >= pieces_of(*jobs[j].w)) rest -= pieces_of(*jobs[j++].w);
        const Job& job = jobs[j];
        const int each = tiles_of(*job.w), begin = rest * each;
        each_part(job, begin, least(begin + each, job.w->tiles), [&](const Weights& w, int first, int last, float* y) {
            if (kernels.many && (w.kind == Kind::int8 || w.kind == Kind::int4 || w.kind == Kind::int4_mins)) {
                room.reserve(blocks.size() * BLOCK * static_cast<size_t>(last - first) * TILE * sizeof(float));
                kernels.many(w, blocks.data(), a.blocks(), first, last, room.as<float>(), y, job.stride, job.add);
                return;
            }
            for (int b = 0; b < a.blocks(); ++b) {
                kernels.tiles(w, blocks[static_cast<size_t>(b)], first, last, y + static_cast<size_t>(b) * BLOCK * job.stride, job.stride, job.add);
            }
        });
    }
}

}  // namespace criadero
