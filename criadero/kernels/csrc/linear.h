// y = x W^T for weights in 4 or 8 bits, bf16 or f32, and activations in f32 that are turned, once a row, into what the weights need.
//
//   Activations a;                                       one for each distinct width, kept between calls
//   a.resize(M, K, needs(wq) | needs(wk) | needs(wv));   by one thread, before a barrier
//   prepare(a, row, 0, K, x + row * K);                  by any thread, any row; then a barrier
//   Job jobs[] = {{&wq, q, Nq}, {&wk, k, Nk}, {&wv, v, Nv}};
//   run_jobs(worker, jobs, 3, a);                        by every thread of the region; then a barrier
//
// Every output is the result of the same float operations in the same order whatever M is and whoever computes it: rows are independent, to
// the bit. Integer sums are exact; the float part runs over groups of columns from left to right.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "cpu.h"
#include "pool.h"

namespace criadero {

constexpr int TILE = 16;   // output rows whose weights lie interleaved
constexpr int SLICE = 32;  // columns: the unit of padding
constexpr int BLOCK = 16;  // activation rows that lie interleaved, at most

// Columns of activations that share one scale. One scale for a whole row lets a single large column, which trained models have, take the
// precision of all others: the error of down_proj's output in the bundled model is 2.5 % with one scale a row, 1.4 % with one for 128
// columns and 0.8 % with one for 32 (llama.cpp takes 32 for Q4_0 and Q8_0, 256 for Q4_K); with four columns of 2048 sixty times as large as
// the rest 7.7, 2.4 and 1.2 %. Rounding weights to 4 bits costs some 8 %. A scale for each 32 would cost one multiplication more for each
// 8 vpdpbusd, a tenth of the time of long prompts; for each 128 it costs a thirtieth.
constexpr int SPAN = 128;

// 64-byte aligned memory, of huge pages where the system grants them. Zeroed on request only.
struct Buffer {
    Buffer() = default;
    explicit Buffer(size_t bytes);
    ~Buffer();
    Buffer(Buffer&& other) noexcept;
    Buffer& operator=(Buffer&& other) noexcept;
    // At least so many bytes; what was there may be lost.
    void reserve(size_t bytes);
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data);
    }
    uint8_t* data = nullptr;
    size_t size = 0;
};

enum class Kind : uint8_t { int4, int4_mins, int8, bf16, f32 };

// Forms of activations that a Linear can need; an Activations holds any set of them.
constexpr unsigned FORM_INT8 = 1;   // int8 with one scale for each SPAN columns
constexpr unsigned FORM_FINE = 2;   // with it, sums for each 16 columns (weights in groups of 16)
constexpr unsigned FORM_BF16 = 4;
constexpr unsigned FORM_F32 = 8;

// The packed weights as the kernels see them. Tile t holds rows 16 t .. 16 t + 15; it starts on a cache line. Within it, for each span of 128
// columns (the last may be shorter): the numbers, then the f16 scales [groups][16], then the mins [groups][16], so that one stream is read
// from memory. Order of the numbers, for each 16 rows:
//   int4  8 columns in 64 bytes: byte 4 r + i is row r, column i in the low nibble and i + 4 in the high one
//   int8  4 columns in 64 bytes: byte 4 r + i is row r, column i, plus 128
//   bf16  2 columns in 64 bytes; f32  1 column
// With group 0 there are only numbers, and the 16 scales in f32 follow the last.
struct Weights {
    Kind kind = Kind::f32;
    int rows = 0;           // N, the outputs
    int columns = 0;        // K, the inputs
    int padded = 0;         // K rounded up to SLICE; columns beyond K are zero
    int group = 0;          // columns sharing one scale: 16, 32 or 128; 0 = one a row
    int tiles = 0;          // ceil(N / TILE)
    size_t tile_bytes = 0;  // from one tile to the next
    size_t span_bytes = 0;  // from one span to the next
    float unit = 1;         // the power of two that stored f16 scales and mins are to be multiplied by
    const uint8_t* data = nullptr;
    // Rows left as they lie in a mapped file (map_rows); `data` is null then, and the sizes above are those that packed tiles would have
    const uint8_t* mapped = nullptr;
    size_t row_bytes = 0;
    int head = 0;           // rows of a head whose neighbours are to be rotated as halves (ggml.h), or 0
};

struct Linear : Weights {
    Buffer buffer;
    std::shared_ptr<const void> owner;  // keeps the mapped rows
    size_t bytes() const { return mapped ? row_bytes * static_cast<size_t>(rows) : buffer.size; }
};

// The weights, repacked by the threads of the pool. All throw std::invalid_argument when sizes do not fit together.
// q: bits 8, int8 [N, K]; bits 4, uint8 [N, K / 2], column 2j in the low nibble, u in 0..15.
// scales, mins: [N, K / group], f16 or f32. Without mins w = (u - 8) * scale or q * scale; with them (bits 4) w = u * scale - min.
// Group: K, 16 (bits 8 only) or a multiple of 32 that divides K. Scales of groups are kept as f16 under one power of two for the whole
// tensor: f16 input is kept exactly, f32 input to 2^-12 of each scale. One scale a row is kept as f32.
struct Floats {  // a view of [N, G] numbers in f16 or f32
    const void* data = nullptr;
    bool half = false;
};
Linear pack_quant(Pool& pool, int rows, int columns, int bits, int group, const void* q, Floats scales, Floats mins);
// A matrix of a GGUF file (ggml.h): the same bits as pack_quant of what repack_ggml makes, without the way over memory.
Linear pack_ggml(Pool& pool, const std::string& kind, const uint8_t* raw, int rows, int columns, int heads);
Linear pack_f32(Pool& pool, int rows, int columns, const float* w);
Linear pack_bf16(Pool& pool, int rows, int columns, const uint16_t* w);

// The same products, to the bit, of rows that are not repacked but read where they lie, BF16 or GGUF's Q8_0: nothing is copied or looked at
// before it is needed, so what is not finite is not refused here, and shows in the products. (To the bit: f16 scales are taken as they are,
// not under a common power of two, which makes no difference unless products are so small that f32 has no bits for them.) `raw` must stay.
Linear map_rows(const std::string& kind, const uint8_t* raw, int rows, int columns, int heads);
// Whether the current level's kernels read such rows about as fast as packed ones; elsewhere a tile is packed each time it is needed.
bool maps_rows();

// Row n (a word's embedding, where the head is tied to it) as f32 [K].
void unpack_row(const Linear& w, int n, float* out);

// The forms that this Linear needs at the current level.
unsigned needs(const Linear& w);

// Rows 16 b .. 16 b + 15 of the activations, as the kernels see them, `width` of them interleaved (1, 2, 4, 6, 8, 12 or 16; rows beyond
// `rows` are zero): slice by slice of 32 columns [width][32] numbers, and beside them scales and sums.
struct Block {
    int rows = 0;
    int width = 0;
    int padded = 0;             // columns, a multiple of SLICE
    unsigned forms = 0;         // those of the pointers below that are there
    bool keep = false;          // fetch weights ahead through the caches, not past them
    int8_t* q = nullptr;        // [slices][width][32]
    float* scales = nullptr;    // [spans][width]: x = q * scale
    int32_t* sums = nullptr;    // [slices][width]: -8 x the sum of the 32 numbers
    int32_t* totals = nullptr;  // [spans][width]: the same of each 128
    int32_t* fine = nullptr;    // [slices][2][width]: the same of each 16 numbers
    uint16_t* bf16 = nullptr;   // [slices][width][32]
    float* f32 = nullptr;       // [slices][width][32]
};

// M rows of activations in blocks: row m is row m % 16 of block m / 16.
struct Activations {
    int rows = 0;
    int columns = 0;
    int padded = 0;
    unsigned forms = 0;
    // Makes room; contents are undefined afterwards. By one thread, seen by the others after a barrier.
    void resize(int rows, int columns, unsigned forms);
    int blocks() const;
    Block block(int index) const;

   private:
    Buffer q_, scales_, sums_, totals_, fine_, bf16_, f32_;
};

// Columns [from, to) of row `row` from x[0 .. to - from). `from` is a multiple of SPAN; `to` is one too, or K. Different pieces may be
// prepared by different threads.
void prepare(const Activations& a, int row, int from, int to, const float* x);

// One product: y[m * stride + n], for all rows m of the activations. With `add`, added to what is there (a residual stream).
struct Job {
    const Linear* w;
    float* y;
    size_t stride;
    bool add = false;
};

// Products of the same activations, shared out among the threads in pieces that fit their caches. Called by every thread of the region,
// with the same arguments, once between two barriers (it uses Worker::next). Ends without a barrier.
void run_jobs(Worker& worker, const Job* jobs, int count, const Activations& a);

// What one instruction set provides; linear_*.cpp have one each. They are compiled with their own flags, so they must use nothing that the
// linker could take for other files too: no inline function of this header, no std:: template (see vec.h).
struct LinearKernels {
    // Columns [from, to) of row `row` of the block.
    void (*prepare)(const Block& block, int row, int from, int to, int columns, const float* x);
    // Tiles [first, last) for all rows of the block, whose first row goes to y.
    void (*tiles)(const Weights& w, const Block& block, int first, int last, float* y, size_t stride, bool add);
    bool bf16;  // bf16 weights take bf16 activations; else f32
    // The same, to the bit, for all blocks of a long prompt, with quantised weights; nullptr: block by block. `sums` is room for
    // [count * BLOCK][last - first][TILE] floats, aligned to a cache line.
    void (*many)(const Weights& w, const Block* blocks, int count, int first, int last, float* sums, float* y, size_t stride, bool add);
    bool mapped = false;  // `tiles` and `many` take mapped rows
};
const LinearKernels& linear_portable();
const LinearKernels& linear_avx2();
const LinearKernels& linear_avx_vnni();
const LinearKernels& linear_avx512();
const LinearKernels& linear_avx512_bf16();
const LinearKernels& linear_neon();
const LinearKernels& linear_kernels();  // of the current level

}  // namespace criadero
