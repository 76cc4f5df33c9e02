// Rows that stay as they lie in a mapped file (map_rows in linear.h): where each is. Internal linkage, for the reason given in vec.h.
#pragma once
#include "linear.h"

namespace criadero {
namespace {

constexpr size_t Q8_BYTES = 34;  // GGUF's Q8_0: an f16 scale and 32 numbers

inline const uint8_t* mapped_row(const Weights& w, int n) {
    if (w.head) n = n / w.head * w.head + n % w.head % (w.head / 2) * 2 + n % w.head / (w.head / 2);
    return w.mapped + (size_t)n * w.row_bytes;
}

}  // namespace
}  // namespace criadero
