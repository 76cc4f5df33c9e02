#include "step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "vec.h"

namespace criadero {

namespace {

// More rows than this go through the layers in turns: the activations of a turn then stay in the last-level cache, and a long prompt
// needs no more memory than a short one. Rows do not depend on each other's turn, so the result is the same.
constexpr int TURN = 512;

const char* const SLOT_NAMES[SLOTS] = {"q", "k", "v", "o", "gate", "up", "down"};

enum Part { EMBED, NORM, QKV, KEYS, ATTEND, OUTPUT, GATE_UP, SWIGLU, DOWN_PROJ, ADAPTERS, HEAD, PARTS };
const char* const PART_NAMES[PARTS] = {"embed", "norm", "qkv", "keys", "attend", "o", "gate_up", "swiglu", "down", "adapters", "head"};

std::string text(int64_t n) { return std::to_string(n); }

// A macro, so that what is said is put together only when it is said
#define REFUSE(wrong, what) \
    do { \
        if (wrong) throw std::invalid_argument(what); \
    } while (0)

size_t count_of(int rows, int columns) { return static_cast<size_t>(rows) * static_cast<size_t>(columns); }

// Up to so many rows, without adapters, every thread computes norms, SwiGLU and whole numbers of all rows for itself: that takes less time
// than to wait for the other threads' parts and to fetch them from their caches.
constexpr int FEW = 2;

// f(row, from, to) for all columns of all rows, shared out by rows, or, where they are few, by pieces of rows that `prepare` takes.
template <class F>
void share_rows(const Worker& me, int rows, int columns, F&& f) {
    if (rows >= me.count) {
        for (int row = me.first(rows); row < me.last(rows); ++row) f(row, 0, columns);
        return;
    }
    const int piece = ((columns + me.count - 1) / me.count + SPAN - 1) / SPAN * SPAN, pieces = (columns + piece - 1) / piece;
    for (int i = me.first(rows * pieces); i < me.last(rows * pieces); ++i) {
        const int from = i % pieces * piece;
        f(i / pieces, from, std::min(columns, from + piece));
    }
}

}  // namespace

Slot slot_named(const std::string& name) {
    for (int slot = 0; slot < SLOTS; ++slot) {
        if (name == SLOT_NAMES[slot]) return static_cast<Slot>(slot);
    }
    throw std::invalid_argument("slot \"" + name + "\": q, k, v, o, gate, up and down are known");
}

const char* name_of(Slot slot) { return SLOT_NAMES[slot]; }

int Shape::inputs(Slot slot) const { return slot == O ? heads * head_dim : slot == DOWN ? intermediate : hidden; }

int Shape::outputs(Slot slot) const {
    switch (slot) {
        case Q: return heads * head_dim;
        case K:
        case V: return kv_heads * head_dim;
        case GATE:
        case UP: return intermediate;
        default: return hidden;
    }
}

// --- the parts of a model

Model::Model(const Shape& shape, int threads) : shape_(shape), pool_(shared_pool(threads)) {
    auto within = [](int value, int most, const char* name) {
        REFUSE(value < 1 || value > most, std::string(name) + ": " + text(value) + " is not between 1 and " + text(most));
    };
    within(shape.hidden, 1 << 20, "hidden");
    within(shape.intermediate, 1 << 20, "intermediate");
    within(shape.layers, 1 << 12, "layers");
    within(shape.heads, 1 << 12, "heads");
    within(shape.kv_heads, 1 << 12, "kv_heads");
    within(shape.head_dim, 1 << 12, "head_dim");
    within(shape.vocab, 1 << 28, "vocab");
    within(threads, 1024, "threads");
    REFUSE(shape.heads % shape.kv_heads != 0, "heads: " + text(shape.heads) + " are not a multiple of " + text(shape.kv_heads) + " kv_heads");
    REFUSE(shape.head_dim % 2 != 0, "head_dim: " + text(shape.head_dim) + " is odd");
    REFUSE(count_of(shape.heads, shape.head_dim) > size_t{1} << 20, "heads x head_dim is more than 1048576");
    REFUSE(!(shape.eps > 0 && shape.eps < 1), "eps: must lie between 0 and 1");
    layers_.resize(static_cast<size_t>(shape.layers));
}

void Model::set_embedding(const Embedding& embedding) {
    if (embedding.form == Embedding::Form::linear) {
        const Linear& w = *embedding.linear;
        REFUSE(w.rows != shape_.vocab || w.columns != shape_.hidden,
               "embedding: [" + text(w.rows) + ", " + text(w.columns) + "], [" + text(shape_.vocab) + ", " + text(shape_.hidden) + "] is needed");
    }
    embedding_ = embedding;
}

void Model::set_norm(int layer, const std::string& which, const float* w, size_t count) {
    REFUSE(count != static_cast<size_t>(shape_.hidden), "norm \"" + which + "\": " + text(static_cast<int64_t>(count)) + " weights, " +
                                                            text(shape_.hidden) + " are needed");
    if (which == "final") {
        final_norm_.assign(w, w + count);
        return;
    }
    REFUSE(layer < 0 || layer >= shape_.layers, "layer " + text(layer) + " of " + text(shape_.layers));
    REFUSE(which != "input" && which != "post", "norm \"" + which + "\": input, post and final are known");
    auto& norm = which == "input" ? layers_[static_cast<size_t>(layer)].input_norm : layers_[static_cast<size_t>(layer)].post_norm;
    norm.assign(w, w + count);
}

void Model::set_rope(const float* frequencies, size_t count, float factor) {
    REFUSE(count != static_cast<size_t>(shape_.head_dim / 2), "rope: " + text(static_cast<int64_t>(count)) + " frequencies, " +
                                                                  text(shape_.head_dim / 2) + " are needed");
    REFUSE(!std::isfinite(factor), "rope: the factor is not finite");
    frequencies_.assign(frequencies, frequencies + count);
    rope_factor_ = factor;
}

void Model::set_linear(int layer, Slot slot, std::shared_ptr<const Linear> w) {
    REFUSE(layer < 0 || layer >= shape_.layers, "layer " + text(layer) + " of " + text(shape_.layers));
    REFUSE(w->rows != shape_.outputs(slot) || w->columns != shape_.inputs(slot),
           "layer " + text(layer) + " " + name_of(slot) + ": [" + text(w->rows) + ", " + text(w->columns) + "], [" +
               text(shape_.outputs(slot)) + ", " + text(shape_.inputs(slot)) + "] is needed");
    layers_[static_cast<size_t>(layer)].w[slot] = std::move(w);
}

void Model::set_head(std::shared_ptr<const Linear> w) {
    REFUSE(w->rows != shape_.vocab || w->columns != shape_.hidden,
           "head: [" + text(w->rows) + ", " + text(w->columns) + "], [" + text(shape_.vocab) + ", " + text(shape_.hidden) + "] is needed");
    head_ = std::move(w);
}

void Model::set_adapter(int index, int layer, Slot slot, const float* a, const float* b, int rank, int columns, int rows) {
    const std::string what = "adapter " + text(index) + ", layer " + text(layer) + " " + name_of(slot) + ": ";
    REFUSE(index < 0, "adapter " + text(index) + ": numbers start at 0");
    REFUSE(layer < 0 || layer >= shape_.layers, what + "there are " + text(shape_.layers) + " layers");
    REFUSE(columns != shape_.inputs(slot) || rows != shape_.outputs(slot),
           what + "A with " + text(columns) + " columns and B with " + text(rows) + " rows, " + text(shape_.inputs(slot)) + " and " +
               text(shape_.outputs(slot)) + " are needed");
    REFUSE(rank < 1 || rank > std::min(rows, columns), what + "rank " + text(rank) + " is not between 1 and " + text(std::min(rows, columns)));
    std::lock_guard<std::mutex> lock(busy_);
    Adapter& adapter = adapters_[index];
    adapter.resize(layers_.size() * SLOTS);
    Lora& lora = adapter[static_cast<size_t>(layer) * SLOTS + slot];
    lora.rank = rank;
    lora.a.assign(a, a + count_of(rank, columns));
    lora.b.resize(count_of(rank, rows));
    for (int n = 0; n < rows; ++n)
        for (int r = 0; r < rank; ++r) lora.b[count_of(r, rows) + n] = b[count_of(n, rank) + r];
}

void Model::drop_adapter(int index) {
    std::lock_guard<std::mutex> lock(busy_);
    REFUSE(adapters_.erase(index) == 0, "adapter " + text(index) + " is not there");
}

std::vector<std::pair<std::string, double>> Model::profile(bool on) {
    std::lock_guard<std::mutex> lock(busy_);
    auto times = times_;
    times_.clear();
    for (const char* name : PART_NAMES) times_.emplace_back(name, 0.0);
    profiling_ = on;
    return times;
}

void Model::embed(int id, float* to) const {
    const size_t columns = static_cast<size_t>(shape_.hidden), at = static_cast<size_t>(id) * columns;
    switch (embedding_.form) {
        case Embedding::Form::none: return;
        case Embedding::Form::linear: return unpack_row(*embedding_.linear, id, to);
        case Embedding::Form::f32: std::memcpy(to, static_cast<const float*>(embedding_.data) + at, columns * 4); return;
        case Embedding::Form::f16:
            for (size_t k = 0; k < columns; ++k) to[k] = half_to_float(static_cast<const uint16_t*>(embedding_.data)[at + k]);
            return;
        case Embedding::Form::bf16:
            for (size_t k = 0; k < columns; ++k) to[k] = bf16_to_float(static_cast<const uint16_t*>(embedding_.data)[at + k]);
            return;
        case Embedding::Form::quant: break;
    }
    const size_t group = static_cast<size_t>(embedding_.group), groups = columns / group;
    auto get = [](const Floats& from, size_t i) {
        return from.half ? half_to_float(static_cast<const uint16_t*>(from.data)[i]) : static_cast<const float*>(from.data)[i];
    };
    for (size_t g = 0; g < groups; ++g) {
        const float scale = get(embedding_.scales, static_cast<size_t>(id) * groups + g);
        const float least = embedding_.mins.data ? get(embedding_.mins, static_cast<size_t>(id) * groups + g) : 0.0f;
        for (size_t k = g * group; k < (g + 1) * group; ++k) {
            if (embedding_.bits == 8) {
                to[k] = static_cast<float>(static_cast<const int8_t*>(embedding_.data)[at + k]) * scale;
                continue;
            }
            const int u = static_cast<const uint8_t*>(embedding_.data)[(at + k) / 2] >> (k % 2 * 4) & 15;
            to[k] = embedding_.mins.data ? static_cast<float>(u) * scale - least : static_cast<float>(u - 8) * scale;
        }
    }
}

// --- checks, before anything is written

void Model::check_complete() const {
    for (int i = 0; i < shape_.layers; ++i) {
        const Layer& layer = layers_[static_cast<size_t>(i)];
        for (int slot = 0; slot < SLOTS; ++slot) REFUSE(!layer.w[slot], "layer " + text(i) + " has no " + SLOT_NAMES[slot]);
        REFUSE(layer.input_norm.empty(), "layer " + text(i) + " has no input norm");
        REFUSE(layer.post_norm.empty(), "layer " + text(i) + " has no post norm");
    }
    REFUSE(final_norm_.empty(), "the model has no final norm");
    REFUSE(frequencies_.empty(), "the model has no rope frequencies");
    REFUSE(embedding_.form == Embedding::Form::none, "the model has no embedding");
    REFUSE(!head_, "the model has no head");
}

void Model::check(const Cache& cache, const StepInput& in) {
    check_complete();
    REFUSE(cache.layers != shape_.layers || cache.kv_heads != shape_.kv_heads || cache.head_dim != shape_.head_dim,
           "cache: " + text(cache.layers) + " layers of " + text(cache.kv_heads) + " x " + text(cache.head_dim) + ", the model has " +
               text(shape_.layers) + " of " + text(shape_.kv_heads) + " x " + text(shape_.head_dim));
    REFUSE(in.rows < 1 || in.requests < 1, "a step of no rows");
    REFUSE(in.starts[0] != 0 || in.starts[in.requests] != in.rows,
           "starts: must go from 0 to " + text(in.rows) + ", not from " + text(in.starts[0]) + " to " + text(in.starts[in.requests]));
    for (int t = 0; t < in.rows; ++t) {
        REFUSE(in.ids[t] < 0 || in.ids[t] >= shape_.vocab,
               "ids[" + text(t) + "]: " + text(in.ids[t]) + " is not below the vocabulary's " + text(shape_.vocab));
    }
    for (int r = 0; r < in.requests; ++r) {  // all of them, before they are used as bounds
        REFUSE(in.starts[r + 1] <= in.starts[r] || in.starts[r + 1] > in.rows, "starts[" + text(r + 1) + "]: " + text(in.starts[r + 1]) +
                                                                                  " does not follow " + text(in.starts[r]));
    }
    page_step_.resize(static_cast<size_t>(cache.pages));
    page_owner_.resize(static_cast<size_t>(cache.pages));
    ++step_number_;
    for (int r = 0; r < in.requests; ++r) {
        const int first = in.starts[r], count = in.starts[r + 1] - first, length = in.lengths[r];
        REFUSE(length < count, "request " + text(r) + ": " + "a length of " + text(length) + " with " + text(count) + " new rows");
        REFUSE((static_cast<int64_t>(length) + cache.page - 1) / cache.page > in.table_width,
               "request " + text(r) + ": " + "a length of " + text(length) + ", but its table holds " + text(in.table_width) + " pages of " + text(cache.page));
        for (int t = 0; t < count; ++t) {
            REFUSE(in.positions[first + t] != length - count + t, "request " + text(r) + ": " + "row " + text(first + t) + " is at position " +
                                                                      text(in.positions[first + t]) + ", not " + text(length - count + t));
        }
        const int32_t* table = in.tables + count_of(r, in.table_width);
        for (int i = 0; i <= (length - 1) / cache.page; ++i) {
            REFUSE(table[i] < 0 || table[i] >= cache.pages,
                   "request " + text(r) + ": " + "page " + text(table[i]) + " of a cache of " + text(cache.pages));
        }
        for (int i = (length - count) / cache.page; i <= (length - 1) / cache.page; ++i) {
            const size_t page = static_cast<size_t>(table[i]);
            REFUSE(page_step_[page] == step_number_, "request " + text(r) + ": " + "page " + text(table[i]) + " is written to twice in a step");
            page_step_[page] = step_number_;
            page_owner_[page] = r;
        }
        if (in.adapters && in.adapters[r] != -1) {
            REFUSE(!adapters_.count(in.adapters[r]), "request " + text(r) + ": " + "adapter " + text(in.adapters[r]) + " is not there");
        }
    }
    for (int r = 0; r < in.requests; ++r) {
        const int32_t* table = in.tables + count_of(r, in.table_width);
        for (int i = 0; i <= (in.lengths[r] - 1) / cache.page; ++i) {
            const size_t page = static_cast<size_t>(table[i]);
            REFUSE(page_step_[page] == step_number_ && page_owner_[page] != r,
                   "request " + text(r) + ": page " + text(table[i]) + " is written to by request " + text(page_owner_[page]));
        }
    }
    for (int i = 0; i < in.wanted; ++i) {
        REFUSE(in.logit_rows[i] < (i ? in.logit_rows[i - 1] + 1 : 0) || in.logit_rows[i] >= in.rows,
               "logit_rows[" + text(i) + "]: " + text(in.logit_rows[i]) + "; they must rise and stay below " + text(in.rows));
    }
}

// --- the computation

// Rows [first, first + rows) of a step, from ids to logits.
struct Model::Run {
    Model& m;
    const Shape& s;
    const StepInput& in;
    const OpsKernels& ops;
    const int first, rows;
    const int wanted_first, wanted;  // of logit_rows
    const int width;                 // of a row of qkv: the query heads, the key heads, the value heads
    const int keys_at, values_at;
    std::vector<KvLayer> kv;
    std::vector<AttendTask> tasks;
    std::vector<int> task_row;   // where, in this turn, the task's request begins
    std::vector<int> row_page, row_offset;
    std::vector<const Adapter*> adapter;  // of each row; empty when nobody has one
    int low_stride = 0;
    bool few = false;    // see FEW
    bool split = false;  // attention over pieces of the context
    bool single = true;  // one row a request, and a key-value head's rows in one task, which may then write its key itself
    size_t scratch = 0;
    std::chrono::steady_clock::time_point since;

    Run(Model& model, Cache& cache, const StepInput& input, int from, int to, int wanted_from, int wanted_to)
        : m(model), s(model.shape_), in(input), ops(ops_kernels()), first(from), rows(to - from), wanted_first(wanted_from),
          wanted(wanted_to - wanted_from), width((s.heads + 2 * s.kv_heads) * s.head_dim), keys_at(s.heads * s.head_dim),
          values_at(keys_at + s.kv_heads * s.head_dim) {
        for (int i = 0; i < s.layers; ++i) kv.push_back(cache.layer(i));
        plan(cache);
        reserve();
    }

    void plan(const Cache& cache) {
        const int group = s.heads / s.kv_heads;
        single = group <= ROWS;
        bool adapted = false;
        int longest = 0;
        for (int r = 0; r < in.requests; ++r) {
            const int begin = std::max(in.starts[r], first), end = std::min(in.starts[r + 1], first + rows);
            if (begin >= end) continue;
            const int32_t* table = in.tables + count_of(r, in.table_width);
            for (int t = begin; t < end; ++t) {
                row_page.push_back(table[in.positions[t] / cache.page]);
                row_offset.push_back(in.positions[t] % cache.page);
            }
            single = single && end - begin == 1;
            adapted = adapted || (in.adapters && in.adapters[r] != -1);
            longest = std::max(longest, in.positions[end - 1] + 1);
            for (int h = 0; h < s.kv_heads; ++h) {
                for (int row = 0; row < (end - begin) * group; row += ROWS) {
                    AttendTask task;
                    task.table = table;
                    task.q_stride = static_cast<size_t>(width);
                    task.out_stride = static_cast<size_t>(keys_at);
                    task.kv_head = h;
                    task.group = group;
                    task.position = in.positions[begin];
                    task.first_row = row;
                    task.rows = std::min(ROWS, (end - begin) * group - row);
                    task.last_segment = (task.position + (row + task.rows - 1) / group) / SEGMENT + 1;
                    task.segments = task.last_segment;
                    tasks.push_back(task);
                    task_row.push_back(begin - first);
                }
            }
        }
        if (adapted) {
            adapter.assign(static_cast<size_t>(rows), nullptr);
            for (int r = 0; r < in.requests; ++r) {
                if (in.adapters[r] == -1) continue;
                const Adapter& one = m.adapters_.at(in.adapters[r]);
                for (int t = std::max(in.starts[r], first); t < std::min(in.starts[r + 1], first + rows); ++t) {
                    adapter[static_cast<size_t>(t - first)] = &one;
                }
                for (const Lora& lora : one) low_stride = std::max(low_stride, lora.rank);
            }
        }
        few = rows <= FEW && !adapted && m.pool_.threads() > 1;
        cut(longest);
    }

    // Few tasks with long contexts: cut them into pieces of the context, for all threads to have some. Later positions see more: they first.
    void cut(int longest) {
        const int threads = m.pool_.threads();
        int total = 0, all_rows = 0;
        for (const AttendTask& task : tasks) total += task.last_segment, all_rows += task.rows;
        split = threads > 1 && longest > 2 * SEGMENT && static_cast<int>(tasks.size()) < 2 * threads && all_rows <= 1024;
        if (!split) {
            std::vector<int> order(tasks.size());
            for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
            std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tasks[a].last_segment > tasks[b].last_segment; });
            std::vector<AttendTask> sorted;
            std::vector<int> sorted_row;
            for (int i : order) sorted.push_back(tasks[i]), sorted_row.push_back(task_row[i]);
            tasks.swap(sorted);
            task_row.swap(sorted_row);
            return;
        }
        single = false;
        const int piece = std::max(1, total / (4 * threads));
        std::vector<AttendTask> pieces;
        std::vector<int> piece_row;
        size_t at = 0;
        for (size_t i = 0; i < tasks.size(); ++i) {
            AttendTask task = tasks[i];
            task.partial = reinterpret_cast<float*>(at);  // an offset until the buffer is there
            at += static_cast<size_t>(task.rows) * static_cast<size_t>(task.segments) * static_cast<size_t>(kv[0].padded + UNIT);
            for (int from = 0; from < task.segments; from += piece) {
                task.first_segment = from;
                task.last_segment = std::min(from + piece, task.segments);
                pieces.push_back(task);
                piece_row.push_back(task_row[i]);
            }
        }
        m.partial_.reserve(at * sizeof(float));
        for (AttendTask& task : pieces) task.partial = m.partial_.as<float>() + reinterpret_cast<size_t>(task.partial);
        tasks.swap(pieces);
        task_row.swap(piece_row);
    }

    void reserve() {
        const size_t float_size = sizeof(float), half = static_cast<size_t>(s.head_dim / 2), n = static_cast<size_t>(rows);
        m.x_.reserve(count_of(rows, s.hidden) * float_size);
        m.normed_.reserve(adapter.empty() ? 0 : count_of(rows, s.hidden) * float_size);
        m.own_.reserve(count_of(m.pool_.threads(), std::max(s.hidden, s.intermediate)) * float_size);
        m.qkv_.reserve(count_of(rows, width) * float_size);
        m.attended_.reserve(count_of(rows, keys_at) * float_size);
        m.mlp_.reserve(count_of(rows, s.intermediate) * 2 * float_size);
        m.cosine_.reserve(n * half * float_size);
        m.sine_.reserve(n * half * float_size);
        m.low_.reserve(count_of(rows, low_stride) * 3 * float_size);
        scratch = (attend_scratch(s.head_dim) + 15) / 16 * 16;
        m.scratch_.reserve(scratch * static_cast<size_t>(m.pool_.threads()) * float_size);
        unsigned hidden = 0, heads = 0, mlp = 0;
        for (const Layer& layer : m.layers_) {
            for (Slot slot : {Q, K, V, GATE, UP}) hidden |= needs(*layer.w[slot]);
            heads |= needs(*layer.w[O]);
            mlp |= needs(*layer.w[DOWN]);
        }
        m.inputs_.resize(static_cast<size_t>(m.pool_.threads()));
        for (size_t i = 0; i < (few ? m.inputs_.size() : 1); ++i) {
            Inputs& one = m.inputs_[i];
            one.hidden.resize(rows, s.hidden, hidden);
            one.heads.resize(rows, keys_at, heads);
            one.mlp.resize(rows, s.intermediate, mlp);
            if (wanted && in.logits) one.head.resize(wanted, s.hidden, needs(*m.head_));
        }
    }

    float* x(int row) const { return m.x_.as<float>() + count_of(row, s.hidden); }
    float* normed(int row) const { return m.normed_.as<float>() + count_of(row, s.hidden); }
    float* qkv(int row) const { return m.qkv_.as<float>() + count_of(row, width); }
    float* attended(int row) const { return m.attended_.as<float>() + count_of(row, keys_at); }
    float* gate(int row) const { return m.mlp_.as<float>() + count_of(row, s.intermediate) * 2; }
    float* cosine(int row) const { return m.cosine_.as<float>() + count_of(row, s.head_dim / 2); }
    float* sine(int row) const { return m.sine_.as<float>() + count_of(row, s.head_dim / 2); }

    const Inputs& inputs(const Worker& me) const { return m.inputs_[few ? static_cast<size_t>(me.index) : 0]; }
    // Room for one row, where only whole numbers made from it are kept: adapters alone need the rows themselves later
    float* own(const Worker& me) const { return m.own_.as<float>() + count_of(me.index, std::max(s.hidden, s.intermediate)); }

    void mark(const Worker& me, Part part) {
        if (!m.profiling_ || me.index != 0) return;
        const auto now = std::chrono::steady_clock::now();
        m.times_[part].second += std::chrono::duration<double>(now - since).count();
        since = now;
    }
    void meet(Worker& me, Part part) {
        me.barrier();
        mark(me, part);
    }

    void begin_row(int row) {
        m.embed(in.ids[first + row], x(row));
        const float position = static_cast<float>(in.positions[first + row]);
        for (size_t i = 0; i < m.frequencies_.size(); ++i) {
            const double angle = position * m.frequencies_[i];  // rounded to f32, as the twin's
            cosine(row)[i] = static_cast<float>(std::cos(angle)) * m.rope_factor_;
            sine(row)[i] = static_cast<float>(std::sin(angle)) * m.rope_factor_;
        }
    }

    // What is made from the rows for the next products: f(row, from, to), for all columns of all rows
    template <class F>
    void make_inputs(const Worker& me, int columns, F&& f) {
        if (!few) return share_rows(me, rows, columns, f);
        for (int row = 0; row < rows; ++row) f(row, 0, columns);
    }
    // Until the threads have what make_inputs made
    void made(Worker& me, Part part) {
        if (few) mark(me, part);
        else meet(me, part);
    }

    void norm_rows(const Worker& me, const std::vector<float>& w) {
        for (int row = few ? 0 : me.first(rows); row < (few ? rows : me.last(rows)); ++row) {
            float* to = adapter.empty() ? own(me) : normed(row);
            ops.rmsnorm(x(row), w.data(), s.eps, s.hidden, to);
            prepare(inputs(me).hidden, row, 0, s.hidden, to);
        }
    }

    // Products of a layer with the same input
    struct Products {
        Part part;
        int layer, count;
        Slot slots[3];
        Job jobs[3];
        const Activations* a;
        const float* input;  // what `a` was prepared from, for adapters
        size_t stride;
    };
    Products products(const Worker& me, Part part, int index) const {
        const Inputs& from = inputs(me);
        const size_t wide = static_cast<size_t>(width), heads = static_cast<size_t>(keys_at), hidden = static_cast<size_t>(s.hidden);
        const size_t both = static_cast<size_t>(s.intermediate) * 2;
        auto job = [&](Slot slot, float* y, size_t stride, bool add) { return Job{m.layers_[static_cast<size_t>(index)].w[slot].get(), y, stride, add}; };
        switch (part) {
            case QKV:
                return {part, index, 3, {Q, K, V},
                        {job(Q, qkv(0), wide, false), job(K, qkv(0) + keys_at, wide, false), job(V, qkv(0) + values_at, wide, false)},
                        &from.hidden, normed(0), hidden};
            case OUTPUT: return {part, index, 1, {O}, {job(O, x(0), hidden, true)}, &from.heads, attended(0), heads};
            case GATE_UP:
                return {part, index, 2, {GATE, UP}, {job(GATE, gate(0), both, false), job(UP, gate(0) + s.intermediate, both, false)},
                        &from.hidden, normed(0), hidden};
            default: return {part, index, 1, {DOWN}, {job(DOWN, x(0), hidden, true)}, &from.mlp, gate(0), both};
        }
    }

    // All products of one input, with its adapters
    void multiply(Worker& me, const Products& p) {
        lower(me, p);
        run_jobs(me, p.jobs, p.count, *p.a);
        meet(me, p.part);
        raise(me, p);
    }

    // A x of the adapters of all rows. Before the products, and without a barrier after it.
    void lower(const Worker& me, const Products& p) {
        if (adapter.empty()) return;
        const int count = p.count;
        for (int i = me.first(rows * count); i < me.last(rows * count); ++i) {
            const int row = i / count, which = i % count;
            if (!adapter[row]) continue;
            const Lora& lora = (*adapter[row])[static_cast<size_t>(p.layer) * SLOTS + p.slots[which]];
            if (!lora.rank) continue;
            ops.lora_down(p.input + static_cast<size_t>(row) * p.stride, lora.a.data(), lora.rank, s.inputs(p.slots[which]),
                          m.low_.as<float>() + count_of(row * 3 + which, low_stride));
        }
    }

    // y += B (A x), where the products are
    void raise(Worker& me, const Products& p) {
        if (adapter.empty()) return;
        const int count = p.count;
        constexpr int PIECE = 512;
        int pieces = 0;
        for (int i = 0; i < count; ++i) pieces = std::max(pieces, (s.outputs(p.slots[i]) + PIECE - 1) / PIECE);
        for (int i = me.first(rows * count * pieces); i < me.last(rows * count * pieces); ++i) {
            const int row = i / (count * pieces), which = i / pieces % count, from = i % pieces * PIECE;
            const int n = s.outputs(p.slots[which]);
            if (!adapter[row] || from >= n) continue;
            const Lora& lora = (*adapter[row])[static_cast<size_t>(p.layer) * SLOTS + p.slots[which]];
            if (!lora.rank) continue;
            ops.lora_up(m.low_.as<float>() + count_of(row * 3 + which, low_stride), lora.b.data(), lora.rank, static_cast<size_t>(n), from,
                        std::min(n, from + PIECE), p.jobs[which].y + static_cast<size_t>(row) * p.jobs[which].stride);
        }
        meet(me, ADAPTERS);
    }

    void write_key(int layer, int row, int head) {
        float* key = qkv(row) + keys_at + head * s.head_dim;
        ops.rotate(key, 1, s.head_dim, cosine(row), sine(row));
        ops.write_kv(kv[layer], static_cast<size_t>(row_page[row]) * static_cast<size_t>(s.kv_heads) + static_cast<size_t>(head),
                     row_offset[row], key, qkv(row) + values_at + head * s.head_dim);
    }

    void attention(Worker& me, int layer) {
        float* mine = m.scratch_.as<float>() + scratch * static_cast<size_t>(me.index);
        if (!single) {
            const int n = rows * s.kv_heads;
            for (int i = me.first(n); i < me.last(n); ++i) write_key(layer, i / s.kv_heads, i % s.kv_heads);
            meet(me, KEYS);
        }
        for (int i = me.next(); i < static_cast<int>(tasks.size()); i = me.next()) {
            AttendTask task = tasks[i];
            const int row = task_row[i], at = task.kv_head * task.group * s.head_dim;
            if (single) write_key(layer, row, task.kv_head);
            task.q = qkv(row) + at;
            task.out = attended(row) + at;
            task.cosine = cosine(row);
            task.sine = sine(row);
            ops.attend(kv[layer], task, mine);
        }
        meet(me, ATTEND);
        if (!split) return;
        for (size_t i = 0; i < tasks.size(); ++i) {
            const AttendTask& task = tasks[i];
            if (task.first_segment) continue;
            for (int r = me.first(task.rows); r < me.last(task.rows); ++r) {
                const int token = (task.first_row + r) / task.group, head = task.kv_head * task.group + (task.first_row + r) % task.group;
                const float* partial = task.partial + count_of(r, task.segments) * static_cast<size_t>(kv[0].padded + UNIT);
                ops.merge(kv[layer], partial, (task.position + token) / SEGMENT + 1, attended(task_row[i] + token) + head * s.head_dim, mine);
            }
        }
        meet(me, ATTEND);
    }

    void block(Worker& me, int index) {
        const Layer& layer = m.layers_[static_cast<size_t>(index)];
        const Products attends = products(me, QKV, index), out = products(me, OUTPUT, index), gates = products(me, GATE_UP, index),
                       down = products(me, DOWN_PROJ, index);
        if (index) {
            norm_rows(me, layer.input_norm);
            made(me, NORM);
        }
        multiply(me, attends);

        attention(me, index);
        make_inputs(me, keys_at, [&](int row, int from, int to) { prepare(*out.a, row, from, to, attended(row) + from); });
        made(me, OUTPUT);
        multiply(me, out);

        norm_rows(me, layer.post_norm);
        made(me, NORM);
        multiply(me, gates);

        make_inputs(me, s.intermediate, [&](int row, int from, int to) {
            const float* g = gate(row) + from;
            float* y = (adapter.empty() ? own(me) : gate(row)) + from;
            ops.swiglu(g, g + s.intermediate, to - from, y);
            prepare(*down.a, row, from, to, y);
        });
        made(me, SWIGLU);
        multiply(me, down);
    }

    void operator()(Worker& me) {
        if (me.index == 0 && m.profiling_) since = std::chrono::steady_clock::now();
        for (int row = me.first(rows); row < me.last(rows); ++row) begin_row(row);
        if (few) meet(me, EMBED);
        norm_rows(me, m.layers_[0].input_norm);  // otherwise the same rows
        made(me, EMBED);
        for (int i = 0; i < s.layers; ++i) block(me, i);
        if (!wanted) return;
        for (int i = few ? 0 : me.first(wanted); i < (few ? wanted : me.last(wanted)); ++i) {
            ops.rmsnorm(x(in.logit_rows[wanted_first + i] - first), m.final_norm_.data(), s.eps, s.hidden, own(me));
            if (in.hidden && (!few || me.index == 0)) std::copy(own(me), own(me) + s.hidden, in.hidden + count_of(wanted_first + i, s.hidden));
            if (in.logits) prepare(inputs(me).head, i, 0, s.hidden, own(me));
        }
        if (!in.logits) return;
        made(me, HEAD);
        const Job head = {m.head_.get(), in.logits + count_of(wanted_first, s.vocab), static_cast<size_t>(s.vocab)};
        run_jobs(me, &head, 1, inputs(me).head);
        meet(me, HEAD);
    }
};

void Model::step(Cache& cache, const StepInput& in) {
    std::lock_guard<std::mutex> lock(busy_);
    check(cache, in);
    int wanted = 0;
    for (int first = 0; first < in.rows; first += TURN) {
        const int last = std::min(first + TURN, in.rows);
        int end = wanted;
        while (end < in.wanted && in.logit_rows[end] < last) ++end;
        Run run(*this, cache, in, first, last, wanted, end);
        pool_.run(run);
        wanted = end;
    }
}

}  // namespace criadero
