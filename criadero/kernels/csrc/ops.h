// What a step of the model does besides products with weights: norms, rotary embedding, SwiGLU, adapters, the cache's pages, attention.
// One table of functions an instruction set; ops_*.cpp have one each. Sizes are the caller's to check.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu.h"

namespace criadero {

enum class KvType : uint8_t { f32, f16, bf16, int8 };

constexpr int UNIT = 16;      // positions whose keys stand side by side; pages are a multiple of it
constexpr int SEGMENT = 256;  // positions that one softmax spans; segments are aligned to position 0 and merged in order
constexpr int ROWS = 64;      // query rows (token, head) that one task takes at most

// One layer of a cache. A block holds one page of one key-value head: keys as [head_dim][page], so that the vector lanes are positions,
// values as [page][padded], padded = head_dim rounded up to UNIT. Block number = page number * kv_heads + head.
struct KvLayer {
    KvType type = KvType::f32;
    int page = 0, kv_heads = 0, head_dim = 0, padded = 0;
    uint8_t *keys = nullptr, *values = nullptr;
    size_t key_block = 0, value_block = 0;                  // bytes from one block to the next
    float *key_scales = nullptr, *value_scales = nullptr;   // int8 only: one a position, [blocks][page]
};

// Query rows of one request and one key-value head. Flat row f stands for token f / group of the request and query head f % group of the
// group; its position is `position + f / group`, and it sees the keys of positions 0 to its own.
struct AttendTask {
    const float* q = nullptr;      // token 0, first head of the group; heads are head_dim apart
    float* out = nullptr;          // the same for the result
    const float *cosine = nullptr, *sine = nullptr;  // of token 0, [tokens][head_dim / 2]: q is rotated on the way
    const int32_t* table = nullptr;  // the request's pages
    float* partial = nullptr;      // not null: unmerged results, [row - first_row][segments][padded + UNIT], and no `out`
    size_t q_stride = 0, out_stride = 0;  // from token to token
    int kv_head = 0, group = 0, position = 0;
    int first_row = 0, rows = 0;   // rows <= ROWS
    int first_segment = 0, last_segment = 0;  // [first, last); all that the rows can see, unless `partial`
    int segments = 0;              // of `partial`
};

struct OpsKernels {
    // y = x / sqrt(mean(x^2) + eps) * w (arXiv 1910.07467)
    void (*rmsnorm)(const float* x, const float* w, float eps, int n, float* y);
    // rotate-half (arXiv 2104.09864) of heads that stand side by side
    void (*rotate)(float* x, int heads, int head_dim, const float* cosine, const float* sine);
    // y = silu(gate) * up (arXiv 2002.05202)
    void (*swiglu)(const float* gate, const float* up, int n, float* y);
    // u[i] = sum_k a[i][k] x[k], i < rank
    void (*lora_down)(const float* x, const float* a, int rank, int columns, float* u);
    // y[n] += sum_i u[i] b[i][n] for n in [first, last); b is B transposed, [rank][stride]
    void (*lora_up)(const float* u, const float* b, int rank, size_t stride, int first, int last, float* y);
    // Key (rotated already) and value of one head to position `offset` of block `block`
    void (*write_kv)(const KvLayer& kv, size_t block, int offset, const float* key, const float* value);
    void (*attend)(const KvLayer& kv, const AttendTask& task, float* scratch);
    // Results of all segments of a row, put together in their order: out[head_dim]
    void (*merge)(const KvLayer& kv, const float* partial, int segments, float* out, float* scratch);
};

size_t attend_scratch(int head_dim);  // floats that `attend` and `merge` need, for each thread, aligned to 64 bytes

const OpsKernels& ops_portable();
const OpsKernels& ops_avx2();
const OpsKernels& ops_avx512();
const OpsKernels& ops_neon();
const OpsKernels& ops_kernels();  // of the current level

}  // namespace criadero
