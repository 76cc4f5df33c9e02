// The linear kernels in plain C++: right on every processor, fast on none.
#include "linear.h"
#include "vec.h"

namespace criadero {

namespace {

inline int32_t round_to_even(float x) {  // |x| below 2^22
    return (int32_t)((x + 12582912.0f) - 12582912.0f);
}

void prepare_row(const Block& b, int row, int from, int to, int columns, const float* x) {
    const int end = to == columns ? b.padded : to;  // the last piece also writes the padding
    if (b.q) {
        for (int span = from; span < end; span += SPAN) {
            const int stop = least(span + SPAN, end);
            uint32_t top = 0;  // compared as bits, a NaN is the largest and makes the scale NaN: it is not hidden
            for (int k = span; k < least(stop, to); ++k) {
                const uint32_t bits = float_to_bits(x[k - from]) & 0x7fffffffu;
                if (bits > top) top = bits;
            }
            const float largest_of = bits_to_float(top);
            const bool tiny = largest_of < 1e-30f;
            const float scale = tiny ? 0.0f : largest_of / 127.0f, inverse = tiny ? 0.0f : 127.0f / largest_of;
            b.scales[span / SPAN * b.width + row] = scale;
            for (int slice = span; slice < stop; slice += SLICE) {
                int8_t* q = b.q + ((size_t)(slice / SLICE) * b.width + row) * SLICE;
                int32_t sums[2] = {0, 0};
                for (int k = 0; k < SLICE; ++k) {
                    const float value = slice + k < to ? x[slice + k - from] * inverse : 0.0f;
                    const int32_t n = value >= -127.0f && value <= 127.0f ? round_to_even(value) : value > 0 ? 127 : -127;
                    q[k] = (int8_t)n;
                    sums[k / 16] += n;
                }
                b.sums[slice / SLICE * b.width + row] = -8 * (sums[0] + sums[1]);
                if (b.fine) {
                    for (int h = 0; h < 2; ++h) b.fine[(slice / SLICE * 2 + h) * b.width + row] = -8 * sums[h];
                }
            }
        }
    }
    for (int k = from; k < end; ++k) {
        const float value = k < to ? x[k - from] : 0.0f;
        const size_t place = ((size_t)(k / SLICE) * b.width + row) * SLICE + k % SLICE;
        if (b.bf16) b.bf16[place] = float_to_bf16(value);
        if (b.f32) b.f32[place] = value;
    }
}

// The sum over columns [from, from + count) of weights of row r times q of row m, as integers
inline int32_t dot(const Weights& w, const uint8_t* tile, int r, const Block& b, int m, int from, int count) {
    int32_t sum = 0;
    for (int k = from; k < from + count; ++k) {
        const int x = b.q[((size_t)(k / SLICE) * b.width + m) * SLICE + k % SLICE];
        const int v = w.kind == Kind::int8 ? tile[k / 4 * 64 + r * 4 + k % 4] - 128 : (tile[k / 8 * 64 + r * 4 + k % 4] >> (k % 8 / 4 * 4)) & 15;
        sum += v * x;
    }
    return sum;
}

float product(const Weights& w, const uint8_t* tile, int r, const Block& b, int m) {
    float y = 0;
    if (w.kind == Kind::f32 || w.kind == Kind::bf16) {
        for (int k = 0; k < w.padded; ++k) {
            const float v = w.kind == Kind::f32 ? ((const float*)tile)[k * TILE + r] : bf16_to_float(((const uint16_t*)tile)[(k / 2 * TILE + r) * 2 + k % 2]);
            y += v * b.f32[((size_t)(k / SLICE) * b.width + m) * SLICE + k % SLICE];
        }
        return y;
    }
    const uint16_t* scales = (const uint16_t*)(tile + w.scale_bytes);
    const uint16_t* mins = scales + (size_t)w.padded / (w.group ? w.group : w.padded) * TILE;
    for (int span = 0; span < w.padded; span += SPAN) {
        const int stop = least(span + SPAN, w.padded);
        const float scale = b.scales[span / SPAN * b.width + m];
        if (!w.group) {
            y += (float)dot(w, tile, r, b, m, span, stop - span) * scale;
            continue;
        }
        float f = 0;
        for (int k = span; k < stop; k += w.group) {
            const int g = k / w.group;
            int32_t c = dot(w, tile, r, b, m, k, w.group);
            int32_t offset = 0;  // -8 x the sum of the activations
            if (w.kind != Kind::int8) {
                for (int s = k / SLICE; s < (k + w.group) / SLICE; ++s) offset += b.sums[s * b.width + m];
            }
            if (w.kind == Kind::int4) c += offset;
            f += (float)c * half_to_float(scales[g * TILE + r]);
            if (w.kind == Kind::int4_mins) f += (float)offset * (half_to_float(mins[g * TILE + r]) * 0.125f);
        }
        y += f * scale;
    }
    return w.group ? y * w.unit : y * ((const float*)(tile + w.scale_bytes))[r];
}

void tiles(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    for (int t = first; t < last; ++t) {
        const uint8_t* tile = w.data + (size_t)t * w.tile_bytes;
        for (int n = t * TILE; n < least(t * TILE + TILE, w.rows); ++n) {
            for (int m = 0; m < b.rows; ++m) {
                const float value = product(w, tile, n % TILE, b, m);
                float* to = y + (size_t)m * stride + n;
                *to = add ? *to + value : value;
            }
        }
    }
}

}  // namespace

const LinearKernels& linear_portable() {
    static const LinearKernels table{prepare_row, tiles, false};
    return table;
}

}  // namespace criadero
