#include "train.h"

#include <algorithm>
#include <vector>

#include "linear.h"

namespace criadero {

const TrainKernels& train_kernels(Element type) {
    switch (level()) {
#if defined(__x86_64__)
        case Level::avx512: return train_avx512(type);
        case Level::avx2: return train_avx2(type);
#elif defined(__aarch64__)
        case Level::neon: return train_neon(type);
#endif
        default: return train_portable(type);
    }
}

size_t train_attend_room(int tokens, int head_dim, bool backward) {
    const size_t keys = (static_cast<size_t>(tokens) + 63) / 64 * 64, padded = (static_cast<size_t>(head_dim) + 15) / 16 * 16;
    // as `attend` and `attend_backward` cut it up, the bf16 ones with less per key but more parts; the last vector may be stored whole
    return backward ? 5 * padded * keys + 4 * 64 * padded + 2 * 64 * keys + padded + 512
                    : 2 * padded * keys + 3 * 64 * padded + 64 * keys + padded + 256;
}

void attend_documents(Pool& pool, const AttendBatch& b, bool backward) {
    auto* attend = train_kernels(b.type).attend;
    auto* attend_backward = train_kernels(b.type).attend_backward;
#if defined(__x86_64__)
    if (b.type == Element::bf16 && has_product_bf16()) {
        attend = avx512_bf16_attend;
        attend_backward = avx512_bf16_attend_backward;
    }
#endif
    const size_t size = b.type == Element::bf16 ? 2 : 4, half = static_cast<size_t>(b.head_dim / 2);
    const size_t token = static_cast<size_t>(b.heads + 2 * b.kv_heads) * static_cast<size_t>(b.head_dim) * size;
    const size_t out_token = static_cast<size_t>(b.heads) * static_cast<size_t>(b.head_dim) * size;
    // Longest documents first, so that no thread is left with one at the end
    std::vector<int> order(static_cast<size_t>(b.documents));
    int longest = 0;
    for (int d = 0; d < b.documents; ++d) {
        order[static_cast<size_t>(d)] = d;
        longest = std::max(longest, static_cast<int>(b.starts[d + 1] - b.starts[d]));
    }
    std::stable_sort(order.begin(), order.end(), [&](int x, int y) {
        return b.starts[x + 1] - b.starts[x] > b.starts[y + 1] - b.starts[y];
    });
    const int group = b.heads / b.kv_heads;
    // Forward, a group's heads may be shared out when there are few documents; backward they add to the same keys and values
    const bool split = !backward && b.documents * b.kv_heads < 4 * pool.threads();
    const int parts = split ? group : 1, tasks = b.documents * b.kv_heads * parts;
    const size_t own = (train_attend_room(longest, b.head_dim, backward) + 31) / 16 * 16;  // whole cache lines
    Buffer room(static_cast<size_t>(pool.threads()) * own * 4);
    pool.run([&](Worker& me) {
        float* mine = room.as<float>() + static_cast<size_t>(me.index) * own;
        for (int i = me.next(); i < tasks; i = me.next()) {
            const int d = order[static_cast<size_t>(i / (b.kv_heads * parts))], kv = i / parts % b.kv_heads, part = i % parts;
            const size_t at = static_cast<size_t>(b.starts[d]);
            AttendDocument t;
            t.qkv = static_cast<const uint8_t*>(b.qkv) + at * token;
            t.out = static_cast<const uint8_t*>(b.out) + at * out_token;
            if (backward) {
                t.d_out = static_cast<const uint8_t*>(b.d_out) + at * out_token;
                t.d_qkv = static_cast<uint8_t*>(b.d_qkv) + at * token;
            }
            t.cosine = b.cosine + at * half;
            t.sine = b.sine + at * half;
            t.lse = b.lse + at;
            t.lse_stride = static_cast<size_t>(b.tokens);
            t.tokens = static_cast<int>(b.starts[d + 1] - b.starts[d]);
            t.heads = b.heads;
            t.kv_heads = b.kv_heads;
            t.head_dim = b.head_dim;
            t.kv_head = kv;
            t.first = split ? kv * group + part : kv * group;
            t.last = split ? t.first + 1 : t.first + group;
            if (t.tokens == 0) continue;
            (backward ? attend_backward : attend)(t, mine);
        }
    });
}

bool has_product_bf16() {
#if defined(__x86_64__)
    return level() == Level::avx512 && cpu().avx512_bf16;
#else
    return false;
#endif
}

namespace {

// Pieces of about `most` rows, a multiple of six, as many as make all threads equally busy
int rows_a_piece(int rows, int threads, int most) {
    const int rounds = std::max(1, (rows + threads * most - 1) / (threads * most));
    const int pieces = threads * rounds, each = (rows + pieces - 1) / pieces;
    return std::max(PANEL_ROWS, (each + PANEL_ROWS - 1) / PANEL_ROWS * PANEL_ROWS);
}

}  // namespace

void product_bf16(Pool& pool, const Product& p) {
#if defined(__x86_64__)
    // b is packed whole, in blocks of k that keep a panel in the second-level cache; then each thread takes pieces of rows through all
    // blocks. With more than one block, the sums of a piece wait in f32.
    const int block = 2 * (p.a_across ? 256 : 1024);  // of k
    const int blocks = std::max(1, (p.k + block - 1) / block);
    const int panels = (p.n + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
    const int piece = rows_a_piece(p.m, pool.threads(), p.a_across ? 192 : 96), pieces = (p.m + piece - 1) / piece;
    const auto pairs_of = [&](int i) { return (std::min(block, p.k - i * block) + 1) / 2; };
    const size_t panel_size = static_cast<size_t>(pairs_of(0)) * PANEL_COLUMNS * 2;  // of all blocks; the last may be shorter
    const size_t width = static_cast<size_t>(panels) * PANEL_COLUMNS;
    const size_t a_size = p.a_across ? static_cast<size_t>(piece) * static_cast<size_t>(pairs_of(0)) * 2 : 0;
    const size_t sums_size = blocks > 1 ? static_cast<size_t>(piece) * width : 0;
    static thread_local Buffer b_packed, rest;  // kept: a step asks for the same sizes again and again
    b_packed.reserve(static_cast<size_t>(blocks) * static_cast<size_t>(panels) * panel_size * 2);
    const size_t own = (a_size * 2 + sums_size * 4 + 127) / 64 * 64;
    rest.reserve(own * static_cast<size_t>(pool.threads()));
    uint16_t* const packed = b_packed.as<uint16_t>();
    uint8_t* const room = rest.as<uint8_t>();
    pool.run([&](Worker& me) {
        for (int i = me.next(); i < blocks * panels; i = me.next()) {
            avx512_bf16_pack_b(p.b, p.b_stride, p.b_across, p.n, p.k, i % panels * PANEL_COLUMNS, i / panels * block, pairs_of(i / panels),
                               packed + static_cast<size_t>(i) * panel_size);
        }
        me.barrier();
        float* sums = reinterpret_cast<float*>(room + own * static_cast<size_t>(me.index));
        uint16_t* a_packed = reinterpret_cast<uint16_t*>(sums + sums_size);
        for (int i = me.next(); i < pieces; i = me.next()) {
            const int m0 = i * piece, rows = std::min(piece, p.m - m0);
            for (int kb = 0; kb < blocks; ++kb) {
                const int pairs = pairs_of(kb);
                if (p.a_across) avx512_bf16_pack_a(p.a, p.a_stride, m0, rows, p.k, kb * block, pairs, a_packed);
                for (int n = 0; n < panels; ++n) {
                    PanelTask t;
                    t.b = packed + static_cast<size_t>(kb * panels + n) * panel_size;
                    t.pairs = pairs;
                    t.columns = std::min(PANEL_COLUMNS, p.n - n * PANEL_COLUMNS);
                    t.sums_stride = width;
                    t.more = kb > 0;
                    t.last = kb + 1 == blocks;
                    t.out_f32 = p.out_f32;
                    t.add = p.add;
                    t.out_stride = p.out_stride;
                    t.residual_stride = p.residual_stride;
                    t.row_stride = p.a_across ? 2 : p.a_stride;
                    t.pair_stride = p.a_across ? 2 * PANEL_ROWS : 2;
                    const size_t column = static_cast<size_t>(n) * PANEL_COLUMNS;
                    for (int m = 0; m < rows; m += PANEL_ROWS) {
                        const size_t row = static_cast<size_t>(m0 + m);
                        t.rows = std::min(PANEL_ROWS, rows - m);
                        t.a = p.a_across ? a_packed + static_cast<size_t>(m) * static_cast<size_t>(pairs) * 2
                                         : p.a + row * p.a_stride + static_cast<size_t>(kb) * static_cast<size_t>(block);
                        t.sums = sums + static_cast<size_t>(m) * width + column;
                        t.out = static_cast<uint8_t*>(p.out) + (row * p.out_stride + column) * (p.out_f32 ? 4 : 2);
                        t.residual = p.residual ? p.residual + row * p.residual_stride + column : nullptr;
                        avx512_bf16_panel(t);
                    }
                }
            }
        }
    });
#else
    (void)pool;
    (void)p;
#endif
}

}  // namespace criadero
