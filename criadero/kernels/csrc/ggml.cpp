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

void q4_0(const uint8_t* from, uint8_t* q, uint16_t* scale) {
    std::memcpy(scale, from, 2);
    split(from + 2, 16, q);
}

void q8_0(const uint8_t* from, uint8_t* q, uint16_t* scale) {
    std::memcpy(scale, from, 2);
    std::memcpy(q, from + 2, 32);
}

void q4_k(const uint8_t* from, uint8_t* q, float* scales, float* mins) {
    const float d = half_at(from), least = half_at(from + 2);
    const uint8_t* s = from + 4;  // 8 scales and 8 mins of 6 bits
    for (int i = 0; i < 4; ++i) {
        scales[i] = d * static_cast<float>(s[i] & 63);
        mins[i] = least * static_cast<float>(s[4 + i] & 63);
        scales[4 + i] = d * static_cast<float>((s[8 + i] & 15) | (s[i] >> 6 << 4));
        mins[4 + i] = least * static_cast<float>((s[8 + i] >> 4) | (s[4 + i] >> 6 << 4));
    }
    for (int run = 0; run < 4; ++run) split(from + 16 + run * 32, 32, q + run * 32);
}

void q6_k(const uint8_t* from, uint8_t* q, float* scales) {
    const float d = half_at(from + 208);
    for (int i = 0; i < 16; ++i) scales[i] = d * static_cast<float>(static_cast<int8_t>(from[192 + i]));
    for (int part = 0; part < 2; ++part) {  // 128 numbers: 64 bytes of their low halves, 32 of the two bits above
        const uint8_t *low = from + part * 64, *high = from + 128 + part * 32;
        for (int i = 0; i < 64; ++i) {
            const int above = high[i % 32];
            q[part * 128 + i] = static_cast<uint8_t>(((low[i] & 15) | (above >> (i / 32 * 2) & 3) << 4) - 32);
            q[part * 128 + 64 + i] = static_cast<uint8_t>(((low[i] >> 4) | (above >> (4 + i / 32 * 2) & 3) << 4) - 32);
        }
    }
}

}  // namespace

GgmlFormat ggml_format(const std::string& kind) {
    if (kind == "Q4_0") return {4, 32, 32, 18, false, false};
    if (kind == "Q8_0") return {8, 32, 32, 34, false, false};
    if (kind == "Q4_K") return {4, 32, 256, 144, true, true};
    if (kind == "Q6_K") return {8, 16, 256, 210, true, false};
    throw std::invalid_argument("format \"" + kind + "\": Q4_0, Q8_0, Q4_K and Q6_K are known");
}

void repack_ggml(Pool& pool, const std::string& kind, const uint8_t* raw, int rows, int columns, int heads, uint8_t* q, void* scales,
                 float* mins) {
    const GgmlFormat format = ggml_format(kind);
    if (rows < 1 || columns < 1 || columns % format.block) throw std::invalid_argument("rows of " + std::to_string(columns) + " are no whole blocks of " + kind);
    if (heads < 0 || (heads && rows % (2 * heads))) throw std::invalid_argument(std::to_string(heads) + " heads do not share " + std::to_string(rows) + " rows");
    const size_t blocks = static_cast<size_t>(columns / format.block), groups = static_cast<size_t>(columns / format.group);
    const size_t width = static_cast<size_t>(columns) * static_cast<size_t>(format.bits) / 8;
    const int size = heads ? rows / heads : 0, half = size / 2;
    const char letter = kind[1], k = kind[3];
    pool.run([&](Worker& me) {
        for (int row = me.first(rows); row < me.last(rows); ++row) {
            int to = row;
            if (heads) to = row / size * size + row % size / 2 + row % 2 * half;
            const uint8_t* from = raw + static_cast<size_t>(row) * blocks * static_cast<size_t>(format.size);
            uint8_t* numbers = q + static_cast<size_t>(to) * width;
            const size_t at = static_cast<size_t>(to) * groups;
            for (size_t b = 0; b < blocks; ++b, from += format.size) {
                if (letter == '4' && k == '0') q4_0(from, numbers + b * 16, static_cast<uint16_t*>(scales) + at + b);
                else if (letter == '8') q8_0(from, numbers + b * 32, static_cast<uint16_t*>(scales) + at + b);
                else if (letter == '4') q4_k(from, numbers + b * 128, static_cast<float*>(scales) + at + b * 8, mins + at + b * 8);
                else q6_k(from, numbers + b * 256, static_cast<float*>(scales) + at + b * 16);
            }
        }
    });
}

}  // namespace criadero
