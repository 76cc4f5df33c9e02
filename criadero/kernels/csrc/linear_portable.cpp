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
            const int there = largest_of <= 3.4028235e38f ? to : span;  // of what is not finite only the scale says so, and the rest is zero
            const float scale = tiny ? 0.0f : largest_of / 127.0f, inverse = tiny ? 0.0f : 127.0f / largest_of;
            b.scales[span / SPAN * b.width + row] = scale;
            int32_t total = 0;
            for (int slice = span; slice < stop; slice += SLICE) {
                int8_t* q = b.q + ((size_t)(slice / SLICE) * b.width + row) * SLICE;
                int32_t sums[2] = {0, 0};
                for (int k = 0; k < SLICE; ++k) {
                    const int32_t n = slice + k < there ? round_to_even(x[slice + k - from] * inverse) : 0;
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

// The numbers of one span as floats [width][16]. What is summed up of them within a group stays below 2^24, so floats are exact, and the
// baseline instruction sets multiply them faster than integers.
void unpack(const Weights& w, const uint8_t* span, int width, float* out) {
    if (w.kind == Kind::f32) {
        memcpy(out, span, (size_t)width * TILE * sizeof(float));
    } else if (w.kind == Kind::bf16) {
        const uint16_t* pairs = (const uint16_t*)span;
        for (int k = 0; k < width; ++k) {
            for (int r = 0; r < TILE; ++r) out[k * TILE + r] = bf16_to_float(pairs[(k / 2 * TILE + r) * 2 + k % 2]);
        }
    } else if (w.kind == Kind::int8) {
        for (int k = 0; k < width; k += 4, span += 64) {
            for (int i = 0; i < 4; ++i) {
                for (int r = 0; r < TILE; ++r) out[(k + i) * TILE + r] = (float)(span[r * 4 + i] - 128);
            }
        }
    } else {
        const int zero = w.kind == Kind::int4 ? 8 : 0;
        for (int k = 0; k < width; k += 8, span += 64) {
            for (int i = 0; i < 4; ++i) {
                for (int r = 0; r < TILE; ++r) {
                    out[(k + i) * TILE + r] = (float)((span[r * 4 + i] & 15) - zero);
                    out[(k + i + 4) * TILE + r] = (float)((span[r * 4 + i] >> 4) - zero);
                }
            }
        }
    }
}

// Four floats: what the baseline of every 64-bit processor has, and compilers turn into plain code elsewhere.
typedef float quad __attribute__((vector_size(16)));

// sums[r] += products of `count` columns of 16 outputs
inline void multiply(const float* w, const float* x, int count, float* sums) {
    quad c[4], v[4];
    memcpy(c, sums, sizeof c);
    for (int k = 0; k < count; ++k) {
        memcpy(v, w + k * TILE, sizeof v);
        const quad same = {x[k], x[k], x[k], x[k]};
        for (int i = 0; i < 4; ++i) c[i] += v[i] * same;
    }
    memcpy(sums, c, sizeof c);
}

// What one span of quantised weights adds to row m's sums.
void quantised(const Weights& w, const uint8_t* span, const float* unpacked, int from, int width, const Block& b, int m, float* y) {
    const int slice = from / SLICE, groups = w.group ? most(1, width / w.group) : 1, step = width / groups;  // the last span may be short
    const uint16_t* scales = (const uint16_t*)(span + (size_t)width * (w.kind == Kind::int8 ? TILE : TILE / 2));
    const uint16_t* mins = scales + groups * TILE;
    const float scale = b.scales[from / SPAN * b.width + m];
    float x[SPAN], f[TILE] = {0};
    for (int k = 0; k < width; ++k) x[k] = (float)b.q[((size_t)(slice + k / SLICE) * b.width + m) * SLICE + k % SLICE];
    for (int g = 0; g < groups; ++g) {
        if (!w.group) {
            multiply(unpacked, x, width, f);
            break;
        }
        float c[TILE] = {0};
        multiply(unpacked + (size_t)g * step * TILE, x + g * step, step, c);
        for (int r = 0; r < TILE; ++r) f[r] += c[r] * half_to_float(scales[g * TILE + r]);
        if (w.kind != Kind::int4_mins) continue;
        float sum = 0;
        for (int k = g * step; k < g * step + step; ++k) sum += x[k];
        for (int r = 0; r < TILE; ++r) f[r] -= sum * half_to_float(mins[g * TILE + r]);
    }
    for (int r = 0; r < TILE; ++r) y[r] += f[r] * scale;
}

void tiles(const Weights& w, const Block& b, int first, int last, float* y, size_t stride, bool add) {
    const bool whole = w.kind == Kind::f32 || w.kind == Kind::bf16;
    for (int t = first; t < last; ++t) {
        const uint8_t* tile = w.data + (size_t)t * w.tile_bytes;
        float made[BLOCK][TILE] = {{0}}, unpacked[SPAN * TILE];
        for (int from = 0; from < w.padded; from += SPAN) {
            const int width = least(SPAN, w.padded - from);
            const uint8_t* span = tile + (size_t)(from / SPAN) * w.span_bytes;
            unpack(w, span, width, unpacked);
            for (int m = 0; m < b.rows; ++m) {
                if (!whole) {
                    quantised(w, span, unpacked, from, width, b, m, made[m]);
                    continue;
                }
                for (int k = 0; k < width; k += SLICE) {
                    multiply(unpacked + k * TILE, b.f32 + ((size_t)((from + k) / SLICE) * b.width + m) * SLICE, SLICE, made[m]);
                }
            }
        }
        const float* row_scales = (const float*)(tile + (size_t)w.padded * TILE);  // int8 with one scale a row
        for (int m = 0; m < b.rows; ++m) {
            float* to = y + (size_t)m * stride + (size_t)t * TILE;
            for (int r = 0; r < least(TILE, w.rows - t * TILE); ++r) {
                const float value = whole ? made[m][r] : made[m][r] * (w.group ? w.unit : row_scales[r]);
                to[r] = add ? to[r] + value : value;
            }
        }
    }
}

}  // namespace

const LinearKernels& linear_portable() {
    static const LinearKernels table{prepare_row, tiles, false, nullptr};
    return table;
}

}  // namespace criadero
