#include "ggml.h"

#include <cstring>
#include <stdexcept>

#include "vec.h"

namespace criadero {

namespace {

typedef uint16_t pairs8 __attribute__((vector_size(16)));  // 16 neighbouring bytes
typedef uint8_t bytes8 __attribute__((vector_size(8)));

// n bytes whose low halves are columns 0..n-1 and high halves n..2n-1
void split(const uint8_t* from, int n, uint8_t* to) {
    for (int i = 0; i < n; i += 16) {
        pairs8 x;
        std::memcpy(&x, from + i, 16);
        const bytes8 low = __builtin_convertvector((x & 0x0f) | (x >> 4 & 0xf0), bytes8);
        const bytes8 high = __builtin_convertvector((x >> 4 & 0x0f) | (x >> 8 & 0xf0), bytes8);
        std::memcpy(to + i / 2, &low, 8);
        std::memcpy(to + (n + i) / 2, &high, 8);
    }
}

float half_at(const uint8_t* from) {
    uint16_t h;
    std::memcpy(&h, from, 2);
    return half_to_float(h);
}

void q4_k_tables(const uint8_t* from, float* scales, float* mins) {
    const float d = half_at(from), least = half_at(from + 2);
    const uint8_t* s = from + 4;  // 8 scales and 8 mins of 6 bits
    for (int i = 0; i < 4; ++i) {
        scales[i] = d * static_cast<float>(s[i] & 63);
        mins[i] = least * static_cast<float>(s[4 + i] & 63);
        scales[4 + i] = d * static_cast<float>((s[8 + i] & 15) | (s[i] >> 6 << 4));
        mins[4 + i] = least * static_cast<float>((s[8 + i] >> 4) | (s[4 + i] >> 6 << 4));
    }
}

void q6_k_numbers(const uint8_t* from, uint8_t* q) {
    for (int part = 0; part < 2; ++part) {  // 128 numbers: 64 bytes of their low halves, 32 of the two bits above
        const uint8_t *low = from + part * 64, *high = from + 128 + part * 32;
        for (int i = 0; i < 64; ++i) {
            const int above = high[i % 32];
            q[part * 128 + i] = static_cast<uint8_t>(((low[i] & 15) | (above >> (i / 32 * 2) & 3) << 4) - 32);
            q[part * 128 + 64 + i] = static_cast<uint8_t>(((low[i] >> 4) | (above >> (4 + i / 32 * 2) & 3) << 4) - 32);
        }
    }
}

void q6_k_tables(const uint8_t* from, float* scales) {
    const float d = half_at(from + 208);
    for (int i = 0; i < 16; ++i) scales[i] = d * static_cast<float>(static_cast<int8_t>(from[192 + i]));
}

}  // namespace

GgmlFormat ggml_format(const std::string& kind) {
    if (kind == "Q4_0") return {4, 32, 32, 18, false, false};
    if (kind == "Q8_0") return {8, 32, 32, 34, false, false};
    if (kind == "Q4_K") return {4, 32, 256, 144, true, true};
    if (kind == "Q6_K") return {8, 16, 256, 210, true, false};
    throw std::invalid_argument("format \"" + kind + "\": Q4_0, Q8_0, Q4_K and Q6_K are known");
}

GgmlMatrix::GgmlMatrix(const std::string& kind, const uint8_t* raw, int rows, int columns, int heads)
    : format(ggml_format(kind)), raw_(raw), size_(0), half_(0), digit_(kind[1]), k_(kind[3] == 'K') {
    if (rows < 1 || columns < 1 || columns % format.block) throw std::invalid_argument("rows of " + std::to_string(columns) + " are no whole blocks of " + kind);
    if (heads < 0 || (heads && rows % (2 * heads))) throw std::invalid_argument(std::to_string(heads) + " heads do not share " + std::to_string(rows) + " rows");
    if (heads) size_ = rows / heads;
    half_ = size_ / 2;
    blocks_ = static_cast<size_t>(columns / format.block);
}

const uint8_t* GgmlMatrix::row_at(int row) const {
    if (half_) row = row / size_ * size_ + row % half_ * 2 + row % size_ / half_;
    return raw_ + static_cast<size_t>(row) * blocks_ * static_cast<size_t>(format.size);
}

void GgmlMatrix::numbers(int row, uint8_t* q) const {
    const uint8_t* from = row_at(row);
    const size_t bytes = static_cast<size_t>(format.block) * static_cast<size_t>(format.bits) / 8;
    for (size_t b = 0; b < blocks_; ++b, from += format.size, q += bytes) {
        if (digit_ == '4' && !k_) split(from + 2, 16, q);
        else if (digit_ == '8') std::memcpy(q, from + 2, 32);
        else if (digit_ == '4') for (int run = 0; run < 4; ++run) split(from + 16 + run * 32, 32, q + run * 32);
        else q6_k_numbers(from, q);
    }
}

void GgmlMatrix::tables(int row, void* scales, float* mins) const {
    const uint8_t* from = row_at(row);
    for (size_t b = 0; b < blocks_; ++b, from += format.size) {
        if (!k_) std::memcpy(static_cast<uint16_t*>(scales) + b, from, 2);
        else if (digit_ == '4') q4_k_tables(from, static_cast<float*>(scales) + b * 8, mins + b * 8);
        else q6_k_tables(from, static_cast<float*>(scales) + b * 16);
    }
}

void repack_ggml(Pool& pool, const std::string& kind, const uint8_t* raw, int rows, int columns, int heads, uint8_t* q, void* scales,
                 float* mins) {
    const GgmlMatrix matrix(kind, raw, rows, columns, heads);
    const GgmlFormat& f = matrix.format;
    const size_t groups = static_cast<size_t>(columns / f.group), width = static_cast<size_t>(columns) * static_cast<size_t>(f.bits) / 8;
    pool.run([&](Worker& me) {
        for (int row = me.first(rows); row < me.last(rows); ++row) {
            const size_t place = static_cast<size_t>(row) * groups;
            matrix.numbers(row, q + static_cast<size_t>(row) * width);
            matrix.tables(row, static_cast<uint8_t*>(scales) + place * (f.wide ? 4 : 2), mins ? mins + place : nullptr);
        }
    });
}

}  // namespace criadero
