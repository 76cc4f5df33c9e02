// What training computes besides products with weights, forward and backward, and bf16 products with all their operands dense.
//
// Rows of activations are f32 or bf16 (`Element`); sums, softmax and norms are always computed in f32. One table of functions an
// instruction set and element type; train_*.cpp have them. Sizes are the caller's to check (bindings_train.cpp).
#pragma once
#include <cstddef>
#include <cstdint>

#include "pool.h"

namespace criadero {

enum class Element : uint8_t { f32, bf16 };

// Attention of some query heads over one document: token i of it sees tokens 0 to i.
struct AttendDocument {
    const void* qkv = nullptr;   // the document's first token; a token is [heads | kv_heads | kv_heads][head_dim], not rotated yet
    const void* out = nullptr;   // forward: written; backward: read. A token is [heads][head_dim]
    const void* d_out = nullptr; // backward only, as `out`
    void* d_qkv = nullptr;       // backward only, as `qkv`
    const float *cosine = nullptr, *sine = nullptr;  // of the first token, [tokens][head_dim / 2]
    float* lse = nullptr;        // log2 of the softmax's sums in [heads][lse_stride], at the first token
    size_t lse_stride = 0;
    int tokens = 0, heads = 0, kv_heads = 0, head_dim = 0;
    int kv_head = 0;
    int first = 0, last = 0;     // query heads of this group: [first, last), counted over all heads; backward takes the whole group
};

struct TrainKernels {
    // y = x * r * w, r = 1 / sqrt(mean(x^2) + eps), which is returned (arXiv 1910.07467)
    float (*norm)(const void* x, const float* w, float eps, int n, void* y);
    // dx = dres + the gradient through `norm` (dres may be null); dw is added to
    void (*norm_backward)(const void* dy, const void* x, const float* w, float r, const void* dres, int n, void* dx, float* dw);
    // y = silu(gate) * up (arXiv 2002.05202)
    void (*swiglu)(const void* gate, const void* up, int n, void* y);
    // dgate and dup from dy; y once more, so that it need not be kept
    void (*swiglu_backward)(const void* dy, const void* gate, const void* up, int n, void* dgate, void* dup, void* y);
    // The loss of one row of logits in nats; with `backward` its gradient, softmax - onehot, takes the logits' place
    float (*cross_entropy)(void* logits, int n, int target, bool backward);
    void (*attend)(const AttendDocument& task, float* room);
    void (*attend_backward)(const AttendDocument& task, float* room);
};

size_t train_attend_room(int tokens, int head_dim, bool backward);  // floats

const TrainKernels& train_portable(Element type);
const TrainKernels& train_avx2(Element type);
const TrainKernels& train_avx512(Element type);
const TrainKernels& train_neon(Element type);
// train_attend_avx512_bf16.cpp: bf16 only
void avx512_bf16_attend(const AttendDocument& task, float* room);
void avx512_bf16_attend_backward(const AttendDocument& task, float* room);
const TrainKernels& train_kernels(Element type);  // of the current level

// --- attention over packed documents ---

struct AttendBatch {
    const void* qkv = nullptr;
    const void* out = nullptr;
    const void* d_out = nullptr;
    void* d_qkv = nullptr;
    const float *cosine = nullptr, *sine = nullptr;
    float* lse = nullptr;
    const int64_t* starts = nullptr;  // [documents + 1]: document d is tokens starts[d] to starts[d + 1]
    int documents = 0, tokens = 0, heads = 0, kv_heads = 0, head_dim = 0;
    Element type = Element::f32;
};
void attend_documents(Pool& pool, const AttendBatch& batch, bool backward);

// --- bf16 products ---

// out[m][n] (+)= sum over k of a(m, k) * b(k, n), with f32 sums. A transposed operand is given as it lies in memory.
struct Product {
    const uint16_t *a = nullptr, *b = nullptr;
    size_t a_stride = 0, b_stride = 0;    // elements from row to row
    bool a_across = false;  // a lies as [K, M] (else [M, K])
    bool b_across = false;  // b lies as [N, K] (else [K, N])
    int m = 0, n = 0, k = 0;
    void* out = nullptr;  // [M, N]
    size_t out_stride = 0;
    bool out_f32 = false, add = false;      // add: to what `out` holds (f32 only)
    const uint16_t* residual = nullptr;     // bf16 [M, N], added before rounding
    size_t residual_stride = 0;
};
bool has_product_bf16();  // at this level, on this processor
void product_bf16(Pool& pool, const Product& p);  // sums run in an order that depends on K alone

// train_avx512_bf16.cpp. Panels: of b 64 columns in [K / 2][64][2], of a 6 rows in [K / 2][6][2], zeros beyond the edges.
constexpr int PANEL_ROWS = 6, PANEL_COLUMNS = 64;
struct PanelTask {
    const uint16_t* a = nullptr;
    size_t row_stride = 0, pair_stride = 0;  // in elements: from row to row, from one pair of k to the next
    const uint16_t* b = nullptr;
    size_t b_step = 2 * PANEL_COLUMNS;     // elements from one pair of k to the next
    int pairs = 0, rows = 0, columns = 0;  // rows <= 6, columns <= 64
    float* sums = nullptr;  // [6][sums_stride], columns rounded up to 16; read when `more`; `rows` of them written unless `last`
    size_t sums_stride = 0;
    bool more = false, last = false;
    void* out = nullptr;
    size_t out_stride = 0;
    bool out_f32 = false, add = false;
    const uint16_t* residual = nullptr;
    size_t residual_stride = 0;
};
void avx512_bf16_panel(const PanelTask& t);
// k from k0 on, `pairs` pairs, of columns [n0, n0 + 64) of b; beyond [0, k) and [0, n) zeros
void avx512_bf16_pack_b(const uint16_t* b, size_t stride, bool across, int n, int k, int n0, int k0, int pairs, uint16_t* to);
// rows m0.. of an a that lies across, `rows` of them, as panels of 6
void avx512_bf16_pack_a(const uint16_t* a, size_t stride, int m0, int rows, int k, int k0, int pairs, uint16_t* to);

}  // namespace criadero
