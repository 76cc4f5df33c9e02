// How products are cut up and shared out among the threads: in f32 or whole numbers with the level's kernels (`compute`), and in bf16 where
// the processor multiplies it (`product_bf16`).
#include <algorithm>
#include <vector>

#include "linear.h"
#include "train.h"

namespace criadero {

const ProductKernels& product_kernels() {
    switch (level()) {
#if defined(__x86_64__)
        case Level::avx512: return products_avx512();
        case Level::avx2: return products_avx2();
#elif defined(__aarch64__)
        case Level::neon: return products_neon();
#endif
        default: return products_portable();
    }
}

bool own_products() { return level() == Level::avx512 || level() == Level::avx2; }  // NEON: not measured; PyTorch knows more of it

bool has_product_bf16() {
#if defined(__x86_64__)
    return level() == Level::avx512 && cpu().avx512_bf16;
#else
    return false;
#endif
}

namespace {

constexpr int DEPTH = 512;             // of a bit of b: with the columns of a panel it stays in the second-level cache
constexpr size_t HELD = 768u << 10;    // bytes of packed a, about, that a thread goes over all panels of b with: they stay there too
constexpr size_t PACKED = 16u << 20;   // bytes of packed b, about, at once
constexpr size_t ROWS_PACKED = 48u << 20;  // the same of packed a, where threads take columns
constexpr int DEEPEST = 16384;         // what is deeper is computed in parts of this depth
constexpr size_t TILES = 384u << 10;   // bytes of built tiles, about, that a thread goes over all rows with

size_t up(size_t n, size_t step) { return (n + step - 1) / step * step; }

bool same(const Term& x, const Term& y) { return x.a.data == y.a.data && x.a.stride == y.a.stride && x.a_across == y.a_across && x.depth() == y.depth(); }

// The different operands a of some products, and which of them each term reads.
struct Readers {
    std::vector<const Term*> different;
    std::vector<std::vector<int>> of;  // [product][term]
    explicit Readers(const std::vector<Product>& products) {
        for (const Product& p : products) {
            of.emplace_back();
            for (const Term& t : p.terms) {
                size_t i = 0;
                while (i < different.size() && !(same(*different[i], t) && different[i]->whole == t.whole)) ++i;
                if (i == different.size()) different.push_back(&t);
                of.back().push_back(static_cast<int>(i));
            }
        }
    }
};

// Columns [n, n + columns) of product `of`, rows [from, to).
struct Piece {
    int of, n, columns, from, to;
};

// Pieces of `width` columns; of rows too (a multiple of `step`) while there are fewer than four a thread.
std::vector<Piece> cut(const std::vector<Product>& products, int width, int rows, int step, int threads) {
    int columns = 0;
    for (const Product& p : products) columns += (p.n + width - 1) / width;
    const int steps = (rows + step - 1) / step, parts = std::max(1, std::min(steps, 4 * threads / std::max(1, columns)));
    const int each = (steps + parts - 1) / parts * step;
    std::vector<Piece> pieces;
    for (size_t i = 0; i < products.size(); ++i) {
        for (int n = 0; n < products[i].n; n += width) {
            for (int m = 0; m < rows; m += each) pieces.push_back({static_cast<int>(i), n, std::min(width, products[i].n - n), m, std::min(rows, m + each)});
        }
    }
    return pieces;
}

void finish_row(const ProductKernels& k, const Product& p, int m, int n, int columns, const float* sums) {
    const size_t size = p.type == Element::bf16 ? 2 : 4, row = static_cast<size_t>(m), at = static_cast<size_t>(n) * size;
    k.finish(sums, columns, p.type, p.out + row * p.out_stride + at, p.residual ? p.residual + row * p.residual_stride + at : nullptr, p.add);
}

// Few rows, [first, first + rows) of all products: a is packed once for all, then each thread takes columns, packs their b bit by bit of
// the depth, and goes over all rows with it, so that packed b never leaves its caches.
void compute_columns(Pool& pool, const std::vector<Product>& products, const Readers& readers, int first, int rows) {
    const ProductKernels& kernels = product_kernels();
    const int R = kernels.rows, N = kernels.columns, panels = (rows + R - 1) / R;
    constexpr int GROUP = 8;  // panels packed together
    std::vector<size_t> place;
    size_t size = 0;
    for (const Term* t : readers.different) {
        place.push_back(size);
        size += static_cast<size_t>(panels) * static_cast<size_t>(t->depth() * R);
    }
    const std::vector<Piece> pieces = cut(products, N, rows, R, pool.threads());
    size_t longest = 0;
    for (const Piece& p : pieces) longest = std::max(longest, up(static_cast<size_t>(p.to - p.from), static_cast<size_t>(R)));
    const size_t room = 16 * DEPTH;  // more than the rows of GROUP + 1 panels
    const size_t b_size = static_cast<size_t>(DEPTH * N), own = room + b_size + longest * static_cast<size_t>(N);
    static thread_local Buffer packed, rest;  // kept: a step asks for the same sizes again and again
    packed.reserve(size * 4);
    rest.reserve(own * static_cast<size_t>(pool.threads()) * 4);
    float *const a = packed.as<float>(), *const all = rest.as<float>();
    const int groups = (panels + GROUP - 1) / GROUP;
    pool.run([&](Worker& me) {
        float* const mine = all + own * static_cast<size_t>(me.index);
        for (int i = me.next(); i < groups * static_cast<int>(readers.different.size()); i = me.next()) {
            const Term& t = *readers.different[static_cast<size_t>(i / groups)];
            const int m = i % groups * GROUP * R;
            kernels.pack_a(t.a, t.a_across, first + m, std::min(GROUP * R, rows - m), 0, t.depth(),
                           a + place[static_cast<size_t>(i / groups)] + static_cast<size_t>(m) * static_cast<size_t>(t.depth()), mine);
        }
        me.barrier();
        float *const b = mine + room, *const sums = b + b_size;
        for (int i = me.next(); i < static_cast<int>(pieces.size()); i = me.next()) {
            const Piece& piece = pieces[static_cast<size_t>(i)];
            const Product& p = products[static_cast<size_t>(piece.of)];
            const int width = (piece.columns + kernels.vector - 1) / kernels.vector * kernels.vector;
            bool more = false;
            for (size_t j = 0; j < p.terms.size(); ++j) {
                const Term& t = p.terms[j];
                const float* from = a + place[static_cast<size_t>(readers.of[static_cast<size_t>(piece.of)][j])];
                for (int k = 0; k < t.depth(); k += DEPTH, more = true) {
                    const int count = std::min(DEPTH, t.depth() - k);
                    kernels.pack_b(t.b, t.b_across, piece.n, piece.columns, width, k, count, b, mine);
                    const size_t rs = t.a_across ? 1 : static_cast<size_t>(t.depth()), ks = t.a_across ? static_cast<size_t>(R) : 1;
                    for (int m = piece.from; m < piece.to; m += R) {
                        kernels.panel(from + static_cast<size_t>(m) * static_cast<size_t>(t.depth()) + static_cast<size_t>(k) * ks, rs, ks, b, count, width,
                                      sums + static_cast<size_t>(m - piece.from) * static_cast<size_t>(N), static_cast<size_t>(N), more);
                    }
                }
            }
            for (int m = piece.from; m < piece.to; ++m) {
                finish_row(kernels, p, first + m, piece.n, piece.columns, sums + static_cast<size_t>(m - piece.from) * static_cast<size_t>(N));
            }
        }
    });
}

// Pieces of about `most` rows, a multiple of `step`, as many as make all threads equally busy
int rows_a_piece(int rows, int threads, int step, int most) {
    const int rounds = std::max(1, (rows + threads * most - 1) / (threads * most));
    const int pieces = threads * rounds, each = (rows + pieces - 1) / pieces;
    return std::max(step, (each + step - 1) / step * step);
}

// Depth [k, k + count) of a reader, which is packed at once with others; `before`: their depths
struct Part {
    size_t reader;
    int k, count, before;
};

// Where some columns of a product lie in packed b, [depth of all terms][width]
struct Panel {
    const Product* product;
    size_t of;
    int n, columns, width;
    size_t place;
};

// What a product adds to its sums: depth [from, from + count) of a part, by packed b from `b_at` on
struct Bit {
    size_t part;
    int from, count, b_at;
    bool more, last;  // there are sums already; there is nothing to come
};

using Passes = std::vector<std::vector<Part>>;  // parts whose packed a stays in the second-level cache together
using Bits = std::vector<std::vector<Bit>>;     // of a product, pass by pass

// How pieces of rows go over the depth
struct Plan {
    int m, piece;
    Passes passes;
    std::vector<Bits> bits;  // [product]
};

Passes passes_of(const Readers& readers, int rows) {
    const int most = std::max(1, static_cast<int>(HELD / 4) / rows / DEPTH) * DEPTH;
    Passes passes(1);
    int depth = 0;
    for (size_t i = 0; i < readers.different.size(); ++i) {
        for (int k = 0, left = readers.different[i]->depth(); left > 0;) {
            if (depth + std::min(left, DEPTH) > most) {
                passes.emplace_back();
                depth = 0;
            }
            const int room = std::max(DEPTH, (most - depth) / DEPTH * DEPTH), count = std::min(left, room);
            passes.back().push_back({i, k, count, depth});
            depth += count;
            k += count;
            left -= count;
        }
    }
    return passes;
}

Bits bits_of(const Product& p, const std::vector<int>& reads, const Passes& passes) {
    Bits bits(passes.size());
    bool begun = false;
    for (size_t pass = 0; pass < passes.size(); ++pass) {
        for (size_t i = 0; i < passes[pass].size(); ++i) {
            const Part& part = passes[pass][i];
            int before = 0;
            for (size_t j = 0; j < p.terms.size(); before += p.terms[j].depth(), ++j) {
                if (static_cast<size_t>(reads[j]) != part.reader) continue;
                for (int k = 0; k < part.count; k += DEPTH) {
                    bits[pass].push_back({i, k, std::min(DEPTH, part.count - k), before + part.k + k, begun, false});
                    begun = true;
                }
            }
        }
    }
    for (size_t pass = passes.size(); pass-- > 0;) {
        if (bits[pass].empty()) continue;
        bits[pass].back().last = true;
        break;
    }
    return bits;
}

// Many rows: some panels of b are packed for all threads; then each thread takes rows, packs their a, and goes over the panels with it
// while it is in its caches.
void compute_panels(Pool& pool, const Readers& readers, const Plan& plan, const std::vector<Panel>& panels, size_t b_size) {
    const ProductKernels& kernels = product_kernels();
    const Passes& passes = plan.passes;
    const int m = plan.m, piece = plan.piece, R = kernels.rows, N = kernels.columns, pieces = (m + piece - 1) / piece;
    struct Packing {
        const Panel* panel;
        const Term* term;
        int k, at;
    };
    std::vector<Packing> packing;
    for (const Panel& panel : panels) {
        int before = 0;
        for (const Term& t : panel.product->terms) {
            for (int k = 0; k < t.depth(); k += DEPTH) packing.push_back({&panel, &t, k, before + k});
            before += t.depth();
        }
    }
    int deepest = 0;
    for (const auto& pass : passes) {
        if (!pass.empty()) deepest = std::max(deepest, pass.back().before + pass.back().count);
    }
    const size_t columns = passes.size() > 1 ? panels.size() * static_cast<size_t>(N) : static_cast<size_t>(N);
    const size_t room = std::max<size_t>(16 * DEPTH, 16 * static_cast<size_t>(piece)), a_size = up(static_cast<size_t>(deepest) * static_cast<size_t>(piece), 16);
    const size_t own = room + a_size + static_cast<size_t>(piece) * columns;
    static thread_local Buffer packed, rest;  // kept: a step asks for the same sizes again and again
    packed.reserve(std::max<size_t>(b_size, 16) * 4);
    rest.reserve(own * static_cast<size_t>(pool.threads()) * 4);
    float *const b = packed.as<float>(), *const all = rest.as<float>();
    pool.run([&](Worker& me) {
        float *const mine = all + own * static_cast<size_t>(me.index), *const a = mine + room, *const sums = a + a_size;
        for (int i = me.next(); i < static_cast<int>(packing.size()); i = me.next()) {
            const Packing& w = packing[static_cast<size_t>(i)];
            kernels.pack_b(w.term->b, w.term->b_across, w.panel->n, w.panel->columns, w.panel->width, w.k, std::min(DEPTH, w.term->depth() - w.k),
                           b + w.panel->place + static_cast<size_t>(w.at) * static_cast<size_t>(w.panel->width), mine);
        }
        me.barrier();
        for (int i = me.next(); i < pieces; i = me.next()) {
            const int first = i * piece, rows = std::min(piece, m - first);
            const size_t padded = up(static_cast<size_t>(rows), static_cast<size_t>(R));
            for (size_t pass = 0; pass < passes.size(); ++pass) {
                for (const Part& part : passes[pass]) {
                    const Term& t = *readers.different[part.reader];
                    kernels.pack_a(t.a, t.a_across, first, rows, part.k, part.count, a + static_cast<size_t>(part.before) * padded, mine);
                }
                for (size_t number = 0; number < panels.size(); ++number) {
                    const Panel& panel = panels[number];
                    const Product& p = *panel.product;
                    float* const here = sums + (passes.size() > 1 ? number * static_cast<size_t>(N) : 0);
                    for (const Bit& bit : plan.bits[panel.of][pass]) {
                        const Part& part = passes[pass][bit.part];
                        const bool across = readers.different[part.reader]->a_across;
                        const size_t depth = static_cast<size_t>(part.count), rs = across ? 1 : depth, ks = across ? static_cast<size_t>(R) : 1;
                        const float* const from = a + static_cast<size_t>(part.before) * padded + static_cast<size_t>(bit.from) * ks;
                        const float* const by = b + panel.place + static_cast<size_t>(bit.b_at) * static_cast<size_t>(panel.width);
                        for (int r = 0; r < rows; r += R) {
                            float* const to = here + static_cast<size_t>(r) * columns;
                            kernels.panel(from + static_cast<size_t>(r) * depth, rs, ks, by, bit.count, panel.width, to, columns, bit.more);
                            if (!bit.last) continue;
                            for (int j = r; j < std::min(r + R, rows); ++j) {
                                finish_row(kernels, p, first + j, panel.n, panel.columns, here + static_cast<size_t>(j) * columns);
                            }
                        }
                    }
                }
            }
        }
    });
}

// As many panels of columns at once as `PACKED` holds.
void compute_rows(Pool& pool, const std::vector<Product>& products, const Readers& readers) {
    const ProductKernels& kernels = product_kernels();
    const int m = products[0].m;
    int depth = 0;
    bool across = false;
    for (const Term* t : readers.different) {
        depth += t->depth();
        across = across || t->a_across;
    }
    // a that lies across is read along its rows, and as much of each as possible; else its whole depth is held, or of a deep one half
    const int most = across ? 384 : static_cast<size_t>(depth) * 192 * 4 <= HELD ? 192 : 96;
    const int piece = rows_a_piece(m, pool.threads(), kernels.rows, most);
    Plan plan{m, piece, passes_of(readers, piece), {}};
    std::vector<Panel> panels;
    size_t size = 0;
    for (size_t i = 0; i < products.size(); ++i) plan.bits.push_back(bits_of(products[i], readers.of[i], plan.passes));
    for (size_t i = 0; i < products.size(); ++i) {
        const Product& p = products[i];
        size_t deep = 0;
        for (const Term& t : p.terms) deep += static_cast<size_t>(t.depth());
        for (int n = 0; n < p.n; n += kernels.columns) {
            const int columns = std::min(kernels.columns, p.n - n), width = (columns + kernels.vector - 1) / kernels.vector * kernels.vector;
            const size_t more = deep * static_cast<size_t>(width);
            if (!panels.empty() && (size + more) * 4 > PACKED) {
                compute_panels(pool, readers, plan, panels, size);
                panels.clear();
                size = 0;
            }
            panels.push_back({&p, i, n, columns, width, size});
            size += more;
        }
    }
    compute_panels(pool, readers, plan, panels, size);
}

// Terms in whole numbers with the kernels of inference (linear.h): a is quantised once for all; each thread takes columns, builds their
// tiles from b as it lies, and goes over all rows with them. The other terms, which are thin, are added to the sums of 16 rows while these
// are in the first cache.
void compute_whole(Pool& pool, const std::vector<Product>& products, const Readers& readers, int rows) {
    const ProductKernels& kernels = product_kernels();
    const auto tiles = linear_kernels().tiles;
    const size_t padded_rows = up(static_cast<size_t>(rows), BLOCK);
    static thread_local std::vector<Activations> quantised;
    if (quantised.size() < readers.different.size()) quantised.resize(readers.different.size());
    std::vector<size_t> place;
    size_t size = 0, deepest = 0, tile_bytes = 0, thin = 0;
    for (size_t i = 0; i < readers.different.size(); ++i) {
        const Term& t = *readers.different[i];
        place.push_back(size);
        if (t.whole) quantised[i].resize(rows, t.depth(), FORM_INT8);
        else size += padded_rows * static_cast<size_t>(t.depth());
        deepest = std::max(deepest, static_cast<size_t>(t.depth()));
    }
    const auto tile_of = [](int depth) { return up(up(static_cast<size_t>(depth), SLICE) * TILE + (static_cast<size_t>(depth) + SPAN - 1) / SPAN * 32, 64); };
    int all_tiles = 0;
    for (const Product& p : products) {
        size_t bytes = 0, depth = 0;
        for (const Term& t : p.terms) (t.whole ? bytes : depth) += t.whole ? tile_of(t.depth()) : static_cast<size_t>(t.depth());
        tile_bytes = std::max(tile_bytes, bytes);
        thin = std::max(thin, depth);
        all_tiles += (p.n + TILE - 1) / TILE;
    }
    const int fair = std::max(1, all_tiles / (4 * pool.threads()));
    int each = std::max(1, std::min({std::max(4, static_cast<int>(TILES / tile_bytes)), fair, 8}));
    if (each > 4) each = each / 4 * 4;  // what is thin takes four vectors at a time
    const std::vector<Piece> pieces = cut(products, each * TILE, rows, BLOCK, pool.threads());
    const size_t columns = static_cast<size_t>(each * TILE);
    const size_t room = up(std::max({deepest, SPAN * columns, static_cast<size_t>(SPAN * TILE), 16 * thin}), 16);
    const size_t own = room + up(thin * columns, 16) + BLOCK * columns + up(tile_bytes * static_cast<size_t>(each), 64) / 4;
    static thread_local Buffer others, rest;
    others.reserve(std::max<size_t>(size, 16) * 4);
    rest.reserve(own * static_cast<size_t>(pool.threads()) * 4);
    float *const low = others.as<float>(), *const all = rest.as<float>();
    std::vector<Activations>& activations = quantised;  // the workers have a vector of their own by that name
    pool.run([&](Worker& me) {
        float* const mine = all + own * static_cast<size_t>(me.index);
        for (size_t i = 0; i < readers.different.size(); ++i) {
            const Term& t = *readers.different[i];
            for (int m = me.first(rows); m < me.last(rows); ++m) {
                float* const to = t.whole ? mine : low + place[i] + static_cast<size_t>(m) * static_cast<size_t>(t.depth());
                kernels.strip(t.a, m, 0, t.depth(), to);
                if (t.whole) prepare(activations[i], m, 0, t.depth(), to);
            }
            if (!t.whole && me.index == 0) {
                std::fill(low + place[i] + static_cast<size_t>(rows) * static_cast<size_t>(t.depth()),
                          low + place[i] + padded_rows * static_cast<size_t>(t.depth()), 0.0f);
            }
        }
        me.barrier();
        float *const flat = mine + room, *const y = flat + up(thin * columns, 16);
        uint8_t* const built = reinterpret_cast<uint8_t*>(y + BLOCK * columns);
        for (int number = me.next(); number < static_cast<int>(pieces.size()); number = me.next()) {
            const Piece& piece = pieces[static_cast<size_t>(number)];
            const Product& p = products[static_cast<size_t>(piece.of)];
            const std::vector<int>& reads = readers.of[static_cast<size_t>(piece.of)];
            const int width = static_cast<int>(up(static_cast<size_t>(piece.columns), TILE));
            std::vector<Weights> weights;
            uint8_t* tile = built;
            float* b = flat;
            for (const Term& t : p.terms) {
                if (!t.whole) {
                    kernels.pack_b(t.b, t.b_across, piece.n, piece.columns, width, 0, t.depth(), b, mine);
                    b += static_cast<size_t>(t.depth()) * static_cast<size_t>(width);
                    continue;
                }
                Weights w;
                w.kind = Kind::int8;
                w.rows = piece.columns;
                w.columns = t.depth();
                w.padded = static_cast<int>(up(static_cast<size_t>(t.depth()), SLICE));
                w.group = SPAN;
                w.tiles = width / TILE;
                w.tile_bytes = tile_of(t.depth());
                w.span_bytes = SPAN * TILE + 32;
                w.unit = TILE_UNIT;
                w.data = tile;
                kernels.build(t.b, t.b_across, piece.n, piece.columns, t.depth(), tile, w.tile_bytes, mine);
                tile += w.tile_bytes * static_cast<size_t>(w.tiles);
                weights.push_back(w);
            }
            for (int m = piece.from; m < piece.to; m += BLOCK) {
                for (size_t j = 0; j < weights.size(); ++j) {
                    Block block = activations[static_cast<size_t>(reads[j])].block(m / BLOCK);
                    block.keep = true;
                    const Weights& w = weights[j];
                    if (kernels.whole(w.data, w.tile_bytes, w.tiles, block, y, static_cast<size_t>(width), j > 0)) continue;
                    tiles(w, block, 0, w.tiles, y, static_cast<size_t>(width), j > 0);
                }
                b = flat;
                for (size_t j = weights.size(); j < p.terms.size(); ++j) {
                    const int depth = p.terms[j].depth();
                    kernels.thin(low + place[static_cast<size_t>(reads[j])] + static_cast<size_t>(m) * static_cast<size_t>(depth), b, depth, width, y);
                    b += static_cast<size_t>(depth) * static_cast<size_t>(width);
                }
                for (int r = 0; r < BLOCK && m + r < piece.to; ++r) finish_row(kernels, p, m + r, piece.n, piece.columns, y + static_cast<size_t>(r * width));
            }
        }
    });
}

// Depth [k, k + count) of a dense operand; `first`: the depth runs along its rows
Lying part_of(Lying w, bool first, int k, int count) {
    w.data += static_cast<size_t>(k) * (first ? w.stride : w.form == Form::f32 ? 4 : 2);
    (first ? w.rows : w.columns) = count;
    return w;
}

bool dense(const Lying& w) { return w.form == Form::f32 || w.form == Form::bf16; }

// A product so deep (the gradient of what the output layer reads: over the vocabulary) that a would have to be packed a few rows at a
// time, and b for each of these: part by part of the depth, summed up in f32.
void compute_deep(Pool& pool, const Product& whole) {
    static thread_local Buffer buffer;
    const size_t n = static_cast<size_t>(whole.n);
    buffer.reserve(static_cast<size_t>(whole.m) * n * 4);
    float* const sums = buffer.as<float>();
    const Term& t = whole.terms[0];
    for (int k = 0; k < t.depth(); k += DEEPEST) {
        const int count = std::min(DEEPEST, t.depth() - k);
        Product part;
        part.terms.push_back({part_of(t.a, t.a_across, k, count), part_of(t.b, !t.b_across, k, count), t.a_across, t.b_across, false});
        part.m = whole.m;
        part.n = whole.n;
        part.out = reinterpret_cast<uint8_t*>(sums);
        part.out_stride = n * 4;
        part.add = k > 0;
        compute(pool, {part});
    }
    pool.run([&](Worker& me) {
        for (int m = me.first(whole.m); m < me.last(whole.m); ++m) finish_row(product_kernels(), whole, m, 0, whole.n, sums + static_cast<size_t>(m) * n);
    });
}

}  // namespace

void compute(Pool& pool, const std::vector<Product>& products) {
    const int rows = products.empty() ? 0 : products[0].m;
    if (rows == 0) return;
    const Readers readers(products);
    for (const Term* t : readers.different) {
        if (t->whole) return compute_whole(pool, products, readers, rows);
    }
    if (products.size() == 1 && products[0].terms.size() == 1) {
        const Term& t = products[0].terms[0];
        if (t.depth() > DEEPEST && dense(t.a) && dense(t.b)) return compute_deep(pool, products[0]);
    }
    // Packed b is written to memory and read again, or packed a and the sums are: whichever is less. The factor is measured (docs/log.md).
    double depth = 0, columns = 0;
    for (const Term* t : readers.different) depth += t->depth();
    for (const Product& p : products) columns += p.n;
    if (depth == 0) {
        const std::vector<float> nothing(static_cast<size_t>(columns));
        for (const Product& p : products) {
            for (int m = 0; m < rows; ++m) finish_row(product_kernels(), p, m, 0, p.n, nothing.data());
        }
        return;
    }
    if (1.5 * depth * columns <= rows * (depth + columns)) return compute_rows(pool, products, readers);
    const int R = product_kernels().rows;
    const int most = static_cast<int>(std::max(ROWS_PACKED / (4 * std::max(depth, 1.0)), 32.0 * R)) / R * R;
    const int times = (rows + most - 1) / most, each = ((rows + times - 1) / times + R - 1) / R * R;
    for (int first = 0; first < rows; first += each) compute_columns(pool, products, readers, first, std::min(each, rows - first));
}

namespace {

#if defined(__x86_64__)
// A panel of a b of any form. What is not bf16 is rounded to it first, in `room`: two times pairs x 64 numbers, and as many in f32.
void pack_panel(const Term& t, int n, int n0, int k0, int pairs, uint16_t* to, float* room) {
    const Lying& b = t.b;
    if (b.form == Form::bf16) {
        avx512_bf16_pack_b(reinterpret_cast<const uint16_t*>(b.data), b.stride / 2, t.b_across, n, t.depth(), n0, k0, pairs, to);
        return;
    }
    const ProductKernels& kernels = product_kernels();
    const int depth = std::min(2 * pairs, t.depth() - k0), columns = std::min(PANEL_COLUMNS, n - n0);
    const int rows = t.b_across ? columns : depth, width = t.b_across ? depth : columns;
    const size_t stride = t.b_across ? 2 * static_cast<size_t>(pairs) : PANEL_COLUMNS;
    uint16_t* const narrow = reinterpret_cast<uint16_t*>(room + stride);
    for (int i = 0; i < rows; ++i) {
        kernels.strip(b, (t.b_across ? n0 : k0) + i, t.b_across ? k0 : n0, width, room);
        kernels.finish(room, width, Element::bf16, reinterpret_cast<uint8_t*>(narrow + static_cast<size_t>(i) * stride), nullptr, false);
    }
    avx512_bf16_pack_b(narrow, stride, t.b_across, columns, depth, 0, 0, pairs, to);
}
#endif

}  // namespace

void product_bf16(Pool& pool, const Product& p) {
#if defined(__x86_64__)
    // b is packed whole, in blocks of depth that keep a panel in the second-level cache; then each thread takes pieces of rows through all
    // blocks. With more than one block, the sums of a piece wait in f32.
    struct Step {
        const Term* term;
        int k, pairs;
    };
    std::vector<Step> steps;
    bool across = false, narrow = true;
    for (const Term& t : p.terms) {
        const int block = 2 * (t.a_across ? 256 : 1024);
        for (int k = 0; k < std::max(1, t.depth()); k += block) steps.push_back({&t, k, (std::min(block, t.depth() - k) + 1) / 2});
        across = across || t.a_across;
        narrow = narrow && t.b.form == Form::bf16;
    }
    size_t longest = 0;
    for (const Step& s : steps) longest = std::max(longest, static_cast<size_t>(s.pairs));
    const int blocks = static_cast<int>(steps.size()), panels = (p.n + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
    const int piece = rows_a_piece(p.m, pool.threads(), PANEL_ROWS, across ? 192 : 96), pieces = (p.m + piece - 1) / piece;
    const size_t panel_size = longest * PANEL_COLUMNS * 2;  // of all blocks; some may be shorter
    const size_t width = static_cast<size_t>(panels) * PANEL_COLUMNS;
    const size_t a_size = across ? static_cast<size_t>(piece) * longest * 2 : 0;
    const size_t sums_size = blocks > 1 ? static_cast<size_t>(piece) * width : 0;
    const size_t room_size = narrow ? 0 : up(2 * longest + PANEL_COLUMNS + longest * PANEL_COLUMNS, 16);
    static thread_local Buffer b_packed, rest;  // kept: a step asks for the same sizes again and again
    b_packed.reserve(static_cast<size_t>(blocks) * static_cast<size_t>(panels) * panel_size * 2);
    const size_t own = (a_size * 2 + (sums_size + room_size) * 4 + 127) / 64 * 64;
    rest.reserve(own * static_cast<size_t>(pool.threads()));
    uint16_t* const packed = b_packed.as<uint16_t>();
    uint8_t* const room = rest.as<uint8_t>();
    pool.run([&](Worker& me) {
        float* const sums = reinterpret_cast<float*>(room + own * static_cast<size_t>(me.index));
        for (int i = me.next(); i < blocks * panels; i = me.next()) {
            const Step& s = steps[static_cast<size_t>(i / panels)];
            pack_panel(*s.term, p.n, i % panels * PANEL_COLUMNS, s.k, s.pairs, packed + static_cast<size_t>(i) * panel_size, sums + sums_size);
        }
        me.barrier();
        uint16_t* const a_packed = reinterpret_cast<uint16_t*>(sums + sums_size + room_size);
        for (int i = me.next(); i < pieces; i = me.next()) {
            const int m0 = i * piece, rows = std::min(piece, p.m - m0);
            for (int kb = 0; kb < blocks; ++kb) {
                const Step& s = steps[static_cast<size_t>(kb)];
                const Term& of = *s.term;
                const uint16_t* const a = reinterpret_cast<const uint16_t*>(of.a.data);
                const size_t a_stride = of.a.stride / 2;
                if (of.a_across) avx512_bf16_pack_a(a, a_stride, m0, rows, of.depth(), s.k, s.pairs, a_packed);
                for (int n = 0; n < panels; ++n) {
                    PanelTask t;
                    t.b = packed + static_cast<size_t>(kb * panels + n) * panel_size;
                    t.pairs = s.pairs;
                    t.columns = std::min(PANEL_COLUMNS, p.n - n * PANEL_COLUMNS);
                    t.sums_stride = width;
                    t.more = kb > 0;
                    t.last = kb + 1 == blocks;
                    t.out_f32 = p.type == Element::f32;
                    t.add = p.add;
                    t.out_stride = p.out_stride / (t.out_f32 ? 4 : 2);
                    t.residual_stride = p.residual_stride / 2;
                    t.row_stride = of.a_across ? 2 : a_stride;
                    t.pair_stride = of.a_across ? 2 * PANEL_ROWS : 2;
                    const size_t column = static_cast<size_t>(n) * PANEL_COLUMNS;
                    for (int m = 0; m < rows; m += PANEL_ROWS) {
                        const size_t row = static_cast<size_t>(m0 + m);
                        t.rows = std::min(PANEL_ROWS, rows - m);
                        t.a = of.a_across ? a_packed + static_cast<size_t>(m) * static_cast<size_t>(s.pairs) * 2 : a + row * a_stride + static_cast<size_t>(s.k);
                        t.sums = sums + static_cast<size_t>(m) * width + column;
                        t.out = p.out + row * p.out_stride + column * (t.out_f32 ? 4 : 2);
                        t.residual = p.residual ? reinterpret_cast<const uint16_t*>(p.residual + row * p.residual_stride) + column : nullptr;
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
