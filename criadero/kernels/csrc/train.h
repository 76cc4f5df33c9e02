// What training computes, forward and backward: norms, SwiGLU, cross-entropy, attention, and products of operands as they lie in memory.
//
// Rows of activations are f32 or bf16 (`Element`); sums, softmax and norms are always computed in f32. One table of functions an
// instruction set and element type; train_*.cpp have them. Sizes are the caller's to check (bindings_train.cpp).
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

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
    const AttendDocument* next = nullptr;  // probably computed after this one, to be asked for ahead
};

// One step of AdamW (arXiv 1711.05101) for one tensor
struct AdamStep {
    float factor = 1, beta1 = 0, beta2 = 0, eps = 0;
    float correct1 = 1, correct2 = 1;  // 1 - beta^steps
    float rate = 0, decay = 0;
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
    // n weights: the master and its two averages by factor * grad, which becomes 0; the parameter is the master, rounded
    void (*adamw)(float* master, float* first, float* second, float* grad, void* parameter, int n, const AdamStep& s);
    double (*squares)(const float* x, int n);  // their sum
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

// --- the optimizer ---

struct AdamTensor {
    float *master = nullptr, *first = nullptr, *second = nullptr, *grad = nullptr;
    uint8_t* parameter = nullptr;
    Element type = Element::f32;  // of the parameter
    size_t size = 0;
};
void adamw(Pool& pool, const std::vector<AdamTensor>& tensors, const std::vector<AdamStep>& steps);
double gradient_norm(Pool& pool, const std::vector<AdamTensor>& tensors);  // of all together; the number of threads changes no bit

// --- products ---

struct Block;  // linear.h
enum class Form : uint8_t { f32, bf16, int8, int4 };

// A matrix as it lies: an operand of a product. The packed numbers of a frozen weight are as kernels/formats.py says.
struct Lying {
    Form form = Form::f32;
    const uint8_t* data = nullptr;
    size_t stride = 0;                             // bytes from row to row
    int rows = 0, columns = 0;
    int group = 0;                                 // of packed numbers: columns that share a scale
    const void *scales = nullptr, *mins = nullptr; // [rows][columns / group]; no mins: int4 counts from -8
    bool half = false;                             // scales and mins are f16, else f32
};

// a b: rows of the result times its columns. An operand that lies across is transposed: a as [K, M] (else [M, K]), b as [N, K] (else [K, N]).
struct Term {
    Lying a, b;
    bool a_across = false, b_across = false;
    bool whole = false;  // computed in whole numbers of 8 bits: a with a scale for each row and span of 128, b for each column and span
    int depth() const { return a_across ? a.rows : a.columns; }
};

// out [m, n] = the sum of the terms, and the residual, or what `out` held. f32 sums, in an order that depends on the depths alone.
struct Product {
    std::vector<Term> terms;
    int m = 0, n = 0;
    uint8_t* out = nullptr;
    size_t out_stride = 0;               // bytes
    Element type = Element::f32;         // of out and residual
    bool add = false;                    // f32 only
    const uint8_t* residual = nullptr;
    size_t residual_stride = 0;          // bytes
};

// Products of the same m and operands a, one beside the other. Terms in whole numbers must come first in each.
void compute(Pool& pool, const std::vector<Product>& products);
bool own_products();  // whether products at this level are meant to be computed here rather than by PyTorch

// What one instruction set provides for products; train_product_impl.h.
struct ProductKernels {
    int rows = 0, columns = 0, vector = 0;  // of the sums that are held in registers; columns in one of these
    // columns [from, from + count) of a row in f32
    void (*strip)(const Lying& w, int row, int from, int count, float* to);
    // rows [first, first + count) of an a, depth [k, k + depth): as rows, or, of one that lies across, as panels [depth][rows]; zeros up to
    // a multiple of `rows`. room: 8 x count
    void (*pack_a)(const Lying& a, bool across, int first, int count, int k, int depth, float* to, float* room);
    // [count][width] of b: columns [n, n + columns), zeros up to width; depth [k, k + count). room: 16 x count
    void (*pack_b)(const Lying& b, bool across, int n, int columns, int width, int k, int count, float* to, float* room);
    // sums [rows][width] (+)= a (rs from row to row, ks along the depth) x b [depth][width]; width: a multiple of `vector` up to `columns`
    void (*panel)(const float* a, size_t rs, size_t ks, const float* b, int depth, int width, float* sums, size_t stride, bool more);
    // c [16][width] += a [16][depth] x b [depth][width]
    void (*thin)(const float* a, const float* b, int depth, int width, float* c);
    // one row of results: rounded, with the residual
    void (*finish)(const float* sums, int n, Element type, uint8_t* out, const uint8_t* residual, bool add);
    // tiles of 16 columns [n, n + columns) of b over the whole depth, as linear.h has them (int8, groups of 128, `TILE_UNIT`).
    // room: 128 x columns, rounded up to 16, or 128 x 16
    void (*build)(const Lying& b, bool across, int n, int columns, int depth, uint8_t* to, size_t tile_bytes, float* room);
    // y [16][stride] (+)= a block of quantised rows x built tiles; false: not done, linear.h's kernels have to
    bool (*whole)(const uint8_t* tile, size_t tile_bytes, int tiles, const Block& block, float* y, size_t stride, bool add);
};
constexpr float TILE_UNIT = 1.0f / 4096;  // scales of built tiles in f16: from 1.5e-8 to 16
const ProductKernels& products_portable();
const ProductKernels& products_avx2();
const ProductKernels& products_avx512();
const ProductKernels& products_neon();
const ProductKernels& product_kernels();  // of the current level

bool has_product_bf16();  // AVX512_BF16, at this level, on this processor
void product_bf16(Pool& pool, const Product& p);  // of a in bf16, of even depth where it does not lie across

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
