// GGUF's blocks as the separate numbers and scales of a QuantTensor: number for number, by all threads. The slow twin, and the meaning of
// each format, is criadero/checkpoints/ggml_quantised.py.
#pragma once
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

// raw [rows, columns / block * size] -> q [rows, columns * bits / 8], scales and mins [rows, columns / group]. With heads, rows are put from
// the order that rotates neighbours into that which rotates halves (criadero/checkpoints/layout.py).
void repack_ggml(Pool& pool, const std::string& kind, const uint8_t* raw, int rows, int columns, int heads, uint8_t* q, void* scales, float* mins);

}  // namespace criadero
