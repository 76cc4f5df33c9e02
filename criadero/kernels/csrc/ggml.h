// GGUF's blocks as the separate numbers and scales of a QuantTensor: number for number, by all threads. The slow twin, and the meaning of
// each format, is criadero/checkpoints/ggml_quantised.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "pool.h"

namespace criadero {

struct GgmlFormat {
    int bits, group;     // of the result
    int block, size;     // weights and bytes of a block
    bool wide, mins;     // scales (and mins) in f32, else f16; with mins
};
GgmlFormat ggml_format(const std::string& kind);  // Q4_0, Q8_0, Q4_K, Q6_K; throws std::invalid_argument for others

// A matrix in such blocks, row by row: raw [rows, columns / block * size]. With heads, rows are taken from the order that rotates neighbours
// into that which rotates halves (criadero/checkpoints/layout.py). Throws std::invalid_argument where sizes do not fit together.
struct GgmlMatrix {
    GgmlMatrix(const std::string& kind, const uint8_t* raw, int rows, int columns, int heads);
    void numbers(int row, uint8_t* q) const;                     // columns * bits / 8 bytes
    void tables(int row, void* scales, float* mins) const;       // columns / group numbers each

    GgmlFormat format;

   private:
    const uint8_t* row_at(int row) const;
    const uint8_t* raw_;
    int size_, half_;  // rows of a head and its half, or 0
    size_t blocks_;
    char digit_;       // of the format's name
    bool k_;
};

// raw [rows, columns / block * size] -> q [rows, columns * bits / 8], scales and mins [rows, columns / group].
void repack_ggml(Pool& pool, const std::string& kind, const uint8_t* raw, int rows, int columns, int heads, uint8_t* q, void* scales, float* mins);

}  // namespace criadero
