#include "train.h"

#include <algorithm>
#include <cmath>
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
    double work = 0;  // in squares of tokens
    for (int d = 0; d < b.documents; ++d) {
        order[static_cast<size_t>(d)] = d;
        const int tokens = static_cast<int>(b.starts[d + 1] - b.starts[d]);
        longest = std::max(longest, tokens);
        work += static_cast<double>(tokens) * tokens;
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
    const auto task = [&](int i) {
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
        return t;
    };
    // A document's heads lie side by side: where none is much of the work, one thread computes them all, one after another; but the last
    // documents are shared out by heads.
    const bool small = static_cast<double>(longest) * longest * 4 * pool.threads() <= work;
    const int all = b.kv_heads * parts, whole = small ? std::max(0, b.documents - 2 * pool.threads()) : 0;
    const auto first_of = [&](int run) { return run < whole ? run * all : whole * all + (run - whole); };
    pool.run([&](Worker& me) {
        float* mine = room.as<float>() + static_cast<size_t>(me.index) * own;
        for (int run = me.next(); first_of(run) < tasks; run = me.next()) {
            for (int i = first_of(run); i < first_of(run + 1); ++i) {
                AttendDocument t = task(i), next;
                if (t.tokens == 0) continue;
                const int after = i + 1 < first_of(run + 1) ? i + 1 : first_of(run + pool.threads());  // a guess, where a run ends
                if (after < tasks) {
                    next = task(after);
                    t.next = &next;
                }
                (backward ? attend_backward : attend)(t, mine);
            }
        }
    });
}

namespace {

constexpr size_t SHARE = 16384;  // weights that a thread takes at once

struct Share {
    size_t tensor, from;
    int count;
};

std::vector<Share> shares_of(const std::vector<AdamTensor>& tensors) {
    std::vector<Share> shares;
    for (size_t i = 0; i < tensors.size(); ++i) {
        for (size_t from = 0; from < tensors[i].size; from += SHARE) shares.push_back({i, from, static_cast<int>(std::min(SHARE, tensors[i].size - from))});
    }
    return shares;
}

}  // namespace

void adamw(Pool& pool, const std::vector<AdamTensor>& tensors, const std::vector<AdamStep>& steps) {
    const std::vector<Share> shares = shares_of(tensors);
    pool.run([&](Worker& me) {
        for (int i = me.next(); i < static_cast<int>(shares.size()); i = me.next()) {
            const Share& share = shares[static_cast<size_t>(i)];
            const AdamTensor& t = tensors[share.tensor];
            train_kernels(t.type).adamw(t.master + share.from, t.first + share.from, t.second + share.from, t.grad + share.from,
                                        t.parameter + share.from * (t.type == Element::bf16 ? 2 : 4), share.count, steps[share.tensor]);
        }
    });
}

double gradient_norm(Pool& pool, const std::vector<AdamTensor>& tensors) {
    const std::vector<Share> shares = shares_of(tensors);
    std::vector<double> parts(shares.size());
    const auto squares = train_kernels(Element::f32).squares;
    pool.run([&](Worker& me) {
        for (int i = me.next(); i < static_cast<int>(shares.size()); i = me.next()) {
            const Share& share = shares[static_cast<size_t>(i)];
            parts[static_cast<size_t>(i)] = squares(tensors[share.tensor].grad + share.from, share.count);
        }
    });
    double total = 0;
    for (const double part : parts) total += part;
    return std::sqrt(total);
}

}  // namespace criadero
