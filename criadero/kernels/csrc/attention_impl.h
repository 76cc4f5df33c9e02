// Attention over paged keys and values, included by ops_*.cpp (see vec.h on linkage).
//
// Each (token, query head) is a row; rows that read the same key-value head share every load of it. A row's result is, whatever else is
// computed with it: for each segment of SEGMENT positions, from position 0, scores = the sum over head_dim from left to right (one lane a
// key), their maximum, p = 2^(score - maximum), the sum of p over keys, lane by lane, and the sum of p * value over each CHUNK of keys from
// left to right, the chunks then added up; and at last the segments merged from left to right. Tiles of rows and chunks of keys only say which of these sums run side by side.
// Online softmax: arXiv 1805.02867; in segments: arXiv 2205.14135.
#pragma once
#include "ops.h"
#include "vec.h"

namespace criadero {
namespace {

constexpr int U = UNIT / W;                // vectors in a unit of positions
constexpr int S_STRIDE = SEGMENT + UNIT;   // not a power of two: rows of scores must not fall on the same cache sets
constexpr int CHUNK = 64;                  // positions whose values are summed up at a time; and converted to f32, when many rows use them
#if VEC_AVX512
constexpr int ACCUMULATORS = 16, TILE_ROWS = 8;
#elif VEC_NEON
constexpr int ACCUMULATORS = 16, TILE_ROWS = 4;
#else
constexpr int ACCUMULATORS = 8, TILE_ROWS = 4;
#endif
// Units and vectors that a tile of so many rows takes side by side: powers of two, so that halves of them take what is left
constexpr int capped(int n) { return n < 1 ? 1 : n > 8 ? 8 : n; }
constexpr int units_for(int rows) { return capped(ACCUMULATORS / rows / U); }
constexpr int vectors_for(int rows) { return capped(ACCUMULATORS / rows); }

struct F32 { using T = float; static vf get(const T* p) { return load(p); } };
struct F16 { using T = uint16_t; static vf get(const T* p) { return load_half(p); } };
struct Bf16 { using T = uint16_t; static vf get(const T* p) { return load_bf16(p); } };
struct Int8 { using T = int8_t; static vf get(const T* p) { return load_i8(p); } };  // without its scale, which comes later

// s[r][c * UNIT ..] = sum over d of q[r][d] * k[c][d * stride ..]
// With `ahead`, the keys of the units there and the values of these units, v, are asked for meanwhile: pages lie anywhere, and the
// processor's own prefetching does not look beyond one.
template <class K, int R, int C>
inline void score_tile(const float* q, int head_dim, const typename K::T* const* k, size_t stride, const typename K::T* const* ahead,
                       const typename K::T* const* v, float* s) {
    vf sums[R][C * U];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < C * U; ++c) sums[r][c] = zero();
    for (int d = 0; d < head_dim; ++d) {
        vf key[C * U];
#pragma GCC unroll 16
        for (int c = 0; c < C * U; ++c) key[c] = K::get(k[c / U] + d * stride + c % U * W);
        if (ahead) {
#pragma GCC unroll 16
            for (int c = 0; c < C; ++c) {
                __builtin_prefetch(ahead[c] + d * stride);
                __builtin_prefetch(v[c] + d * UNIT);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const vf one = set1(q[r * head_dim + d]);
#pragma GCC unroll 16
            for (int c = 0; c < C * U; ++c) sums[r][c] = fma(one, key[c], sums[r][c]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int c = 0; c < C * U; ++c) store(s + r * S_STRIDE + c * W, sums[r][c]);
}

template <class K, int R, int C = units_for(R)>
inline void score_units(const float* q, int head_dim, const typename K::T* const* k, size_t stride, int units, const typename K::T* const* v,
                        float* s) {
    int u = 0;
    for (; u + C <= units; u += C) {
        const typename K::T* const* ahead = v ? k + (u + 2 * C <= units ? u + C : u) : nullptr;
        score_tile<K, R, C>(q, head_dim, k + u, stride, ahead, v ? v + u : nullptr, s + u * UNIT);
    }
    if constexpr (C > 1) {
        if (u < units) score_units<K, R, C / 2>(q, head_dim, k + u, stride, units - u, v ? v + u : nullptr, s + u * UNIT);
    }
}

// acc[r][..N vectors] = (fresh ? 0 : acc) + the sum over keys t < count <= CHUNK of p[r][t] * v[t / UNIT][(t % UNIT) * padded ..]
template <class V, int R, int N>
inline void value_tile(const float* p, const typename V::T* const* v, int column, int padded, int count, bool fresh, float* acc) {
    vf sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] = zero();
    for (int first = 0; first < count; first += UNIT) {
        const typename V::T* row = v[first / UNIT] + column;
        const int last = least(first + UNIT, count);
        for (int t = first; t < last; ++t, row += padded) {
            vf value[N];
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) value[n] = V::get(row + n * W);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const vf one = set1(p[r * S_STRIDE + t]);
#pragma GCC unroll 16
                for (int n = 0; n < N; ++n) sums[r][n] = fma(one, value[n], sums[r][n]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        float* to = acc + r * padded + column;
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) store(to + n * W, fresh ? sums[r][n] : add(load(to + n * W), sums[r][n]));
    }
}

template <class V, int R, int N = vectors_for(R)>
inline void value_columns(const float* p, const typename V::T* const* v, int column, int padded, int count, bool fresh, float* acc) {
    for (; column + N * W <= padded; column += N * W) value_tile<V, R, N>(p, v, column, padded, count, fresh, acc);
    if constexpr (N > 1) {
        if (column < padded) value_columns<V, R, N / 2>(p, v, column, padded, count, fresh, acc);
    }
}

// The same sums of one row, N vectors wide, for P whole chunks at once: alone, each of them would wait for its own last addition.
template <class V, int N, int P>
inline void value_chunks(const float* p, const typename V::T* const* v, int padded, bool fresh, float* acc) {
    vf sums[P][N];
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[i][n] = zero();
    for (int unit = 0; unit < CHUNK / UNIT; ++unit) {
        for (int t = 0; t < UNIT; ++t) {
#pragma GCC unroll 16
            for (int i = 0; i < P; ++i) {
                const vf one = set1(p[i * CHUNK + unit * UNIT + t]);
                const typename V::T* row = v[i * (CHUNK / UNIT) + unit] + (size_t)t * padded;
#pragma GCC unroll 16
                for (int n = 0; n < N; ++n) sums[i][n] = fma(one, V::get(row + n * W), sums[i][n]);
            }
        }
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
        vf all = fresh ? sums[0][n] : add(load(acc + n * W), sums[0][n]);
#pragma GCC unroll 16
        for (int i = 1; i < P; ++i) all = add(all, sums[i][n]);
        store(acc + n * W, all);
    }
}

template <class V, int N>
inline void value_row(const float* p, const typename V::T* const* v, int padded, int count, bool fresh, float* acc) {
    constexpr int P = ACCUMULATORS / N < 1 ? 1 : ACCUMULATORS / N > 4 ? 4 : ACCUMULATORS / N;
    constexpr int UNITS = CHUNK / UNIT;
    int chunk = 0;
    for (; (chunk + P) * CHUNK <= count; chunk += P) {
        value_chunks<V, N, P>(p + chunk * CHUNK, v + chunk * UNITS, padded, fresh && chunk == 0, acc);
    }
    if constexpr (P > 2) {
        for (; (chunk + 2) * CHUNK <= count; chunk += 2) {
            value_chunks<V, N, 2>(p + chunk * CHUNK, v + chunk * UNITS, padded, fresh && chunk == 0, acc);
        }
    }
    for (; chunk * CHUNK < count; ++chunk) {
        value_tile<V, 1, N>(p + chunk * CHUNK, v + chunk * UNITS, 0, padded, least(CHUNK, count - chunk * CHUNK), fresh && chunk == 0, acc);
    }
}

// The values' part of a segment, for a tile of rows
template <class V, int R>
inline void value_rows(const float* p, const typename V::T* const* v, int padded, int count, bool fresh, float* acc) {
    if constexpr (R == 1) {
        switch (padded / W) {
            case 1: return value_row<V, 1>(p, v, padded, count, fresh, acc);
            case 2: return value_row<V, 2>(p, v, padded, count, fresh, acc);
            case 3: return value_row<V, 3>(p, v, padded, count, fresh, acc);
            case 4: return value_row<V, 4>(p, v, padded, count, fresh, acc);
            case 6: return value_row<V, 6>(p, v, padded, count, fresh, acc);
            default: break;  // wide enough to keep the adders busy as it is
        }
    }
    for (int t = 0; t < count; t += CHUNK) {
        value_columns<V, R>(p + t, v + t / UNIT, 0, padded, least(CHUNK, count - t), fresh && t == 0, acc);
    }
}

// f(R as a constant, first row) for rows in tiles of TILE_ROWS, then of halves of it
template <int R = TILE_ROWS, class F>
inline void each_tile(int row, int rows, F&& f) {
    for (; row + R <= rows; row += R) f.template operator()<R>(row);
    if constexpr (R > 1) {
        if (row < rows) each_tile<R / 2>(row, rows, f);
    }
}

// A thread's scratch, cut up.
struct AttendRoom {
    float *q, *scores, *keys, *values, *sums, *total, *most, *weight;
    AttendRoom(float* at, int padded) {
        q = at, at += ROWS * padded;
        scores = at, at += ROWS * S_STRIDE;
        keys = at, at += CHUNK * padded;
        values = at, at += CHUNK * padded;
        sums = at, at += ROWS * padded;      // of one segment
        total = at, at += ROWS * padded;     // of the segments so far
        most = at, at += 2 * ROWS;           // the maximum of one segment, and of those so far
        weight = at;                         // the sum of p, the same
    }
};

// Segment `sums`, `most`, `weight` joined to what was before.
inline void join(const float* sums, float most_here, float weight_here, int padded, float* total, float* most_before, float* weight_before) {
    const float most_now = most_here > *most_before ? most_here : *most_before;
    float both[W];
    for (int i = 0; i < W; ++i) both[i] = i ? most_here : *most_before;
    store(both, exp2v(sub(load(both), set1(most_now))));
    const vf old = set1(both[0]), fresh = set1(both[1]);
    *weight_before = *weight_before * both[0] + weight_here * both[1];
    *most_before = most_now;
    for (int d = 0; d < padded; d += W) store(total + d, fma(load(total + d), old, mul(load(sums + d), fresh)));
}

template <class K>
struct ScoreRows {  // scores of a tile of rows and the units of a chunk
    const float* q;
    int head_dim;
    const typename K::T* const* k;
    size_t stride;
    const typename K::T* const* v;  // the values, when they are to be asked for; or null
    int unit, units;                // the chunk, in the segment
    const int* visible;             // keys that each row sees in the segment
    float* s;
    template <int R>
    void operator()(int row) const {
        const int seen = (visible[row + R - 1] + UNIT - 1) / UNIT - unit;  // the last row sees most
        if (seen > 0) {
            score_units<K, R>(q + row * head_dim, head_dim, k, stride, least(units, seen), row ? nullptr : v, s + row * S_STRIDE + unit * UNIT);
        }
    }
};

template <class V>
struct ValueRows {
    const float* p;
    const typename V::T* const* v;
    int unit, units, padded;
    const int* visible;
    float* acc;
    template <int R>
    void operator()(int row) const {
        const int seen = visible[row + R - 1] - unit * UNIT;
        if (seen > 0) {
            value_rows<V, R>(p + row * S_STRIDE + unit * UNIT, v, padded, least(units * UNIT, seen), unit == 0, acc + row * padded);
        }
    }
};

// p = 2^(s - max) of one row, zeros after the keys it sees up to `filled`; int8 values get their scales here. The scores' sum.
inline float softmax_row(float* s, int visible, int filled, const float* key_scale, const float* value_scale, float* most_out) {
    vf top = set1(-INFINITY);
    for (int t = 0; t < visible; t += W) {
        vf x = load(s + t);
        if (key_scale) {
            x = mul(x, load(key_scale + t));
            store(s + t, x);
        }
        top = maximum(visible - t < W ? keep_first(x, visible - t, -INFINITY) : x, top);
    }
    const float high = largest(top);
    vf total = zero();
    for (int t = 0; t < visible; t += W) {
        vf p = exp2v(sub(load(s + t), set1(high)));
        if (visible - t < W) p = keep_first(p, visible - t, 0.0f);
        total = add(total, p);
        store(s + t, value_scale ? mul(p, load(value_scale + t)) : p);
    }
    for (int t = (visible + W - 1) / W * W; t < filled; t += W) store(s + t, zero());
    *most_out = high;
    return sum(total);
}

template <class K>
inline void attend_as(const KvLayer& kv, const AttendTask& task, const AttendRoom& room) {
    using T = typename K::T;
    const int dim = kv.head_dim, padded = kv.padded, half = dim / 2;
    // 1 / sqrt(head_dim), and log2(e) for 2^x in place of e^x
    const float scale = 1.44269504f / sqrtf((float)dim);
    for (int r = 0; r < task.rows; ++r) {
        const int token = (task.first_row + r) / task.group, head = (task.first_row + r) % task.group;
        const float* x = task.q + token * task.q_stride + (size_t)head * dim;
        const float *c = task.cosine + (size_t)token * half, *s = task.sine + (size_t)token * half;
        float* to = room.q + r * dim;
        for (int d = 0; d < half; d += W) {
            const int n = least(W, half - d);
            const vf a = load_first(x + d, n, 0.0f), b = load_first(x + d + half, n, 0.0f);
            const vf cosine = load_first(c + d, n, 0.0f), sine = load_first(s + d, n, 0.0f);
            store_first(to + d, n, mul(sub(mul(a, cosine), mul(b, sine)), set1(scale)));
            store_first(to + d + half, n, mul(add(mul(b, cosine), mul(a, sine)), set1(scale)));
        }
    }
    const bool convert = sizeof(T) < 4 && task.rows >= 2 * TILE_ROWS;
    for (int segment = task.first_segment; segment < task.last_segment; ++segment) {
        const int start = segment * SEGMENT;
        int visible[ROWS] = {0};
        for (int r = 0; r < task.rows; ++r) {
            visible[r] = most(0, least(SEGMENT, task.position + (task.first_row + r) / task.group + 1 - start));
        }
        const int keys = visible[task.rows - 1];
        const int units = (keys + UNIT - 1) / UNIT;
        const T *key[SEGMENT / UNIT], *value[SEGMENT / UNIT];
        float key_scale[SEGMENT], value_scale[SEGMENT];
        for (int u = 0; u < units; ++u) {
            const int position = start + u * UNIT, offset = position % kv.page;
            const size_t block = (size_t)task.table[position / kv.page] * kv.kv_heads + task.kv_head;
            key[u] = (const T*)(kv.keys + block * kv.key_block) + offset;
            value[u] = (const T*)(kv.values + block * kv.value_block) + (size_t)offset * padded;
            if (kv.type == KvType::int8) {
                memcpy(key_scale + u * UNIT, kv.key_scales + block * kv.page + offset, UNIT * sizeof(float));
                memcpy(value_scale + u * UNIT, kv.value_scales + block * kv.page + offset, UNIT * sizeof(float));
            }
        }
        const int step = task.rows >= 2 * TILE_ROWS ? CHUNK / UNIT : SEGMENT / UNIT;  // many rows: keys stay in the first-level cache
        for (int u = 0; u < units; u += step) {
            const int here = least(step, units - u);
            if (convert) {  // exact: the same numbers as converted in the tile
                const float* wide[CHUNK / UNIT];
                for (int i = 0; i < here; ++i) {
                    for (int d = 0; d < dim; ++d)
                        for (int w = 0; w < UNIT; w += W) {
                            store(room.keys + d * CHUNK + i * UNIT + w, K::get(key[u + i] + (size_t)d * kv.page + w));
                        }
                    wide[i] = room.keys + i * UNIT;
                }
                each_tile(0, task.rows, ScoreRows<F32>{room.q, dim, wide, CHUNK, nullptr, u, here, visible, room.scores});
            } else {
                each_tile(0, task.rows, ScoreRows<K>{room.q, dim, key + u, (size_t)kv.page, value + u, u, here, visible, room.scores});
            }
        }
        float *most_here = room.most, *weight_here = room.weight;
        for (int r = 0; r < task.rows; ++r) {
            if (visible[r] == 0) continue;
            const bool scaled = kv.type == KvType::int8;
            weight_here[r] = softmax_row(room.scores + r * S_STRIDE, visible[r], units * UNIT, scaled ? key_scale : nullptr,
                                         scaled ? value_scale : nullptr, most_here + r);
        }
        // rows that see nothing of this segment may share a tile with rows that do: zeros for them
        for (int r = 0; r < task.rows && visible[r] == 0; ++r) {
            for (int t = 0; t < units * UNIT; t += W) store(room.scores + r * S_STRIDE + t, zero());
        }
        const bool alone = task.partial == nullptr && segment == task.first_segment;
        float* sums = alone ? room.total : room.sums;
        for (int u = 0; u < units; u += step) {
            const int here = least(step, units - u);
            if (convert) {
                const float* wide[CHUNK / UNIT];
                for (int i = 0; i < here; ++i) {
                    for (int j = 0; j < UNIT * padded; j += W) store(room.values + i * UNIT * padded + j, K::get(value[u + i] + j));
                    wide[i] = room.values + i * UNIT * padded;
                }
                each_tile(0, task.rows, ValueRows<F32>{room.scores, wide, u, here, padded, visible, sums});
            } else {
                each_tile(0, task.rows, ValueRows<K>{room.scores, value + u, u, here, padded, visible, sums});
            }
        }
        for (int r = 0; r < task.rows; ++r) {
            if (visible[r] == 0) continue;
            if (task.partial) {
                float* to = task.partial + ((size_t)r * task.segments + segment) * (padded + UNIT);
                memcpy(to, sums + r * padded, padded * sizeof(float));
                to[padded] = most_here[r];
                to[padded + 1] = weight_here[r];
            } else if (alone) {
                room.most[ROWS + r] = most_here[r];
                room.weight[ROWS + r] = weight_here[r];
            } else {
                join(sums + r * padded, most_here[r], weight_here[r], padded, room.total + r * padded, room.most + ROWS + r,
                     room.weight + ROWS + r);
            }
        }
    }
    if (task.partial) return;
    for (int r = 0; r < task.rows; ++r) {
        const int token = (task.first_row + r) / task.group, head = (task.first_row + r) % task.group;
        float* out = task.out + token * task.out_stride + (size_t)head * dim;
        const vf weight = set1(room.weight[ROWS + r]);
        for (int d = 0; d < dim; d += W) store_first(out + d, least(W, dim - d), divide(load(room.total + r * padded + d), weight));
    }
}

void attend(const KvLayer& kv, const AttendTask& task, float* scratch) {
    const AttendRoom room(scratch, kv.padded);
    switch (kv.type) {
        case KvType::f32: return attend_as<F32>(kv, task, room);
        case KvType::f16: return attend_as<F16>(kv, task, room);
        case KvType::bf16: return attend_as<Bf16>(kv, task, room);
        case KvType::int8: return attend_as<Int8>(kv, task, room);
    }
}

void merge(const KvLayer& kv, const float* partial, int segments, float* out, float* scratch) {
    const int padded = kv.padded, dim = kv.head_dim;
    const AttendRoom room(scratch, padded);
    memcpy(room.total, partial, padded * sizeof(float));
    float high = partial[padded], weight = partial[padded + 1];
    for (int i = 1; i < segments; ++i) {
        const float* next = partial + (size_t)i * (padded + UNIT);
        join(next, next[padded], next[padded + 1], padded, room.total, &high, &weight);
    }
    const vf all = set1(weight);
    for (int d = 0; d < dim; d += W) store_first(out + d, least(W, dim - d), divide(load(room.total + d), all));
}

void write_kv(const KvLayer& kv, size_t block, int offset, const float* key, const float* value) {
    const int dim = kv.head_dim;
    const size_t page = kv.page;
    uint8_t* keys = kv.keys + block * kv.key_block;
    uint8_t* values = kv.values + block * kv.value_block;
    if (kv.type == KvType::f32) {
        float *k = (float*)keys + offset, *v = (float*)values + (size_t)offset * kv.padded;
        for (int d = 0; d < dim; ++d) k[d * page] = key[d];
        memcpy(v, value, dim * sizeof(float));
    } else if (kv.type == KvType::int8) {
        int8_t *k = (int8_t*)keys + offset, *v = (int8_t*)values + (size_t)offset * kv.padded;
        float high = 0, top = 0;
        for (int d = 0; d < dim; ++d) high = fabsf(key[d]) > high ? fabsf(key[d]) : high, top = fabsf(value[d]) > top ? fabsf(value[d]) : top;
        const float to_key = high > 0 ? 127.0f / high : 0.0f, to_value = top > 0 ? 127.0f / top : 0.0f;
        for (int d = 0; d < dim; ++d) k[d * page] = (int8_t)nearbyintf(key[d] * to_key);
        for (int d = 0; d < dim; ++d) v[d] = (int8_t)nearbyintf(value[d] * to_value);
        kv.key_scales[block * page + offset] = high / 127.0f;
        kv.value_scales[block * page + offset] = top / 127.0f;
    } else {
        uint16_t *k = (uint16_t*)keys + offset, *v = (uint16_t*)values + (size_t)offset * kv.padded;
        for (int d = 0; d < dim; d += W) {
            const int n = least(W, dim - d);
            uint16_t both[2][W];
            if (kv.type == KvType::f16) {
                store_half(both[0], load_first(key + d, n, 0.0f));
                store_half(both[1], load_first(value + d, n, 0.0f));
            } else {
                for (int i = 0; i < n; ++i) both[0][i] = float_to_bf16(key[d + i]), both[1][i] = float_to_bf16(value[d + i]);
            }
            for (int i = 0; i < n; ++i) k[(d + i) * page] = both[0][i];
            memcpy(v + d, both[1], n * sizeof(uint16_t));
        }
    }
}

}  // namespace
}  // namespace criadero
