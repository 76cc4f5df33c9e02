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
            int32_t total = 0;
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
                total += sums[0] + sums[1];
                if (b.fine) {
                    for (int h = 0; h < 2; ++h) b.fine[(slice / SLICE * 2 + h) * b.width + row] = -8 * sums[h];
                }
            }
            b.totals[span / SPAN * b.width + row] = -8 * total;
        }
    }
    for (int k = from; k < end; ++k) {
        const float value = k < to ? x[k - from] : 0.0f;
        const size_t place = ((size_t)(k / SLICE) * b.width + row) * SLICE + k % SLICE;
        if (b.bf16) b.bf16[place] = float_to_bf16(value);
        if (b.f32) b.f32[place] = value;
    }
}

// 16 rows of a tile for one row of activations: sums[r] over columns [from, from + count) of a span.
inline void dots(const Weights& w, const uint8_t* span, const int8_t* q, int width, int from, int count, int32_t* sums) {
    for (int r = 0; r < TILE; ++r) sums[r] = 0;
    for (int k = from; k < from + count; k += 4) {
        const int8_t* x = q + (size_t)(k / SLICE) * width * SLICE + k % SLICE;
        const uint8_t* v = w.kind == Kind::int8 ? span + k / 4 * 64 : span + k / 8 * 64;
        const int shift = k % 8 / 4 * 4;
        for (int r = 0; r < TILE; ++r) {
            for (int i = 0; i < 4; ++i) sums[r] += (w.kind == Kind::int8 ? v[4 * r + i] - 128 : (v[4 * r + i] >> shift) & 15) * x[i];
        }
    }
}

void dense(const Weights& w, const uint8_t* tile, const Block& b, int m, float* y) {
    for (int k = 0; k < w.padded; ++k) {
        const float x = b.f32[((size_t)(k / SLICE) * b.width + m) * SLICE + k % SLICE];
        for (int r = 0; r < TILE; ++r) {
            y[r] += x * (w.kind == Kind::f32 ? ((const float*)tile)[k * TILE + r] : bf16_to_float(((const uint16_t*)tile)[(k / 2 * TILE + r) * 2 + k % 2]));
        }
    }
}

void quantised(const Weights& w, const uint8_t* tile, const Block& b, int m, float* y) {
    for (int from = 0; from < w.padded; from += SPAN) {
        const int width = least(SPAN, w.padded - from), slice = from / SLICE;
        const uint8_t* span = tile + (size_t)(from / SPAN) * w.span_bytes;
        const uint16_t* scales = (const uint16_t*)(span + (size_t)width * (w.kind == Kind::int8 ? TILE : TILE / 2));
        const int8_t* q = b.q + ((size_t)slice * b.width + m) * SLICE;
        const float scale = b.scales[from / SPAN * b.width + m];
        const int step = w.group ? w.group : width;
        float f[TILE] = {0};
        for (int k = 0; k < width; k += step) {
            int32_t c[TILE];
            dots(w, span, q, b.width, k, step, c);
            int32_t offset = 0;  // -8 x the sum of the activations
            if (w.kind != Kind::int8) {
                for (int s = slice + k / SLICE; s < slice + (k + step) / SLICE; ++s) offset += b.sums[s * b.width + m];
            }
            for (int r = 0; r < TILE; ++r) {
                if (!w.group) {
                    f[r] = (float)c[r];
                    continue;
                }
                const int32_t sum = w.kind == Kind::int4 ? c[r] + offset : c[r];
                f[r] += (float)sum * half_to_float(scales[k / step * TILE + r]);
                if (w.kind == Kind::int4_mins) f[r] += (float)offset * (half_to_float(scales[(width / step + k / step) * TILE + r]) * 0.125f);
            }
        }
        for (int r = 0; r < TILE; ++r) y[r] += f[r] * scale;
    }
    const float* row_scales = (const float*)(tile + (size_t)w.padded * TILE);
    for (int r = 0; r < TILE; ++r) y[r] *= w.group ? w.unit : row_scales[r];
}

void tiles(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    for (int t = first; t < last; ++t) {
        const uint8_t* tile = w.data + (size_t)t * w.tile_bytes;
        for (int m = 0; m < b.rows; ++m) {
            float made[TILE] = {0};
            if (w.kind == Kind::f32 || w.kind == Kind::bf16) dense(w, tile, b, m, made);
            else quantised(w, tile, b, m, made);
            float* to = y + (size_t)m * stride + t * TILE;
            for (int r = 0; r < least(TILE, w.rows - t * TILE); ++r) to[r] = add ? to[r] + made[r] : made[r];
        }
    }
}

}  // namespace

const LinearKernels& linear_portable() {
    static const LinearKernels table{prepare_row, tiles, false};
    return table;
}

}  // namespace criadero
