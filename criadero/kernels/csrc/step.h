// A Llama's forward pass over a batch of requests, as one call: the native twin of criadero.model.Llama over a paged cache.
//
// A step is one parallel region of the pool; the threads meet at barriers between the parts of a layer. Memory for activations is kept
// from step to step. Each row is computed by the same operations in the same order whatever else is in the batch.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cache.h"
#include "linear.h"
#include "ops.h"
#include "pool.h"

namespace criadero {

enum Slot { Q, K, V, O, GATE, UP, DOWN, SLOTS };
Slot slot_named(const std::string& name);  // throws std::invalid_argument
const char* name_of(Slot slot);

struct Shape {
    int hidden = 0, intermediate = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0, vocab = 0;
    float eps = 0;
    int inputs(Slot slot) const;   // K of a layer's matrix
    int outputs(Slot slot) const;  // N
};

// A vocabulary's rows, in memory that somebody else holds (it may be a mapped file, of which only the rows in use are read).
struct Embedding {
    enum class Form { none, f32, f16, bf16, quant, linear } form = Form::none;
    const void* data = nullptr;                     // [V, D], or of quantised rows the numbers as in pack_quant
    int bits = 0, group = 0;                        // quant
    Floats scales, mins;                            // quant, [V, D / group]
    std::shared_ptr<const void> owner;              // keeps the memory
    std::shared_ptr<const Linear> linear;           // a packed matrix: the output layer's, where the two are tied
};

// Arrays of a step; see StepBatch in criadero/engine/runner.py. T rows, R requests, L rows wanted.
struct StepInput {
    const int32_t *ids = nullptr, *positions = nullptr;  // [T]
    const int32_t *starts = nullptr;                     // [R + 1]
    const int32_t *lengths = nullptr;                    // [R]
    const int32_t *tables = nullptr;                     // [R, P]
    const int32_t *adapters = nullptr;                   // [R], -1 for none; or null
    const int32_t *logit_rows = nullptr;                 // [L], increasing
    int rows = 0, requests = 0, table_width = 0, wanted = 0;
    float* logits = nullptr;  // [L, V], or null
    float* hidden = nullptr;  // [L, D], after the last norm; or null
};

class Model {
   public:
    Model(const Shape& shape, int threads);

    // Parts of the model, each checked for its size. Pointers must stay good as long as the model, arrays are copied.
    void set_embedding(const Embedding& embedding);
    void set_norm(int layer, const std::string& which, const float* w, size_t count);  // "input", "post"; "final" of any layer
    void set_rope(const float* frequencies, size_t count, float factor);
    void set_linear(int layer, Slot slot, std::shared_ptr<const Linear> w);
    void set_head(std::shared_ptr<const Linear> w);
    // A [rank, K], B [N, rank] with the adapter's scale in it (arXiv 2106.09685)
    void set_adapter(int index, int layer, Slot slot, const float* a, const float* b, int rank, int columns, int rows);
    void drop_adapter(int index);

    // Checks everything (std::invalid_argument, with nothing written), then computes.
    void step(Cache& cache, const StepInput& in);

    const Shape& shape() const { return shape_; }
    int threads() const { return pool_.threads(); }
    // Seconds by part since the last call, and from now on if `on`
    std::vector<std::pair<std::string, double>> profile(bool on);

   private:
    struct Lora {
        int rank = 0;             // 0: the base is left as it is
        std::vector<float> a, b;  // a [rank, K]; b transposed, [rank, N]
    };
    using Adapter = std::vector<Lora>;  // [layers * SLOTS]
    struct Layer {
        std::shared_ptr<const Linear> w[SLOTS];
        std::vector<float> input_norm, post_norm;
    };
    struct Run;  // a chunk of a step on its way through the layers

    void check_complete() const;
    void check(const Cache& cache, const StepInput& in);
    void embed(int id, float* to) const;

    Shape shape_;
    Pool& pool_;
    std::vector<Layer> layers_;
    std::vector<float> final_norm_, frequencies_;
    float rope_factor_ = 1;
    Embedding embedding_;
    std::shared_ptr<const Linear> head_;
    std::map<int, Adapter> adapters_;

    // Workspace, grown as needed
    Buffer x_, normed_, own_, qkv_, attended_, mlp_, cosine_, sine_, low_, partial_, scratch_;
    struct Inputs {
        Activations hidden, heads, mlp, head;
    };
    std::vector<Inputs> inputs_;  // of the products: one for all threads, or, of few rows, one for each
    std::vector<uint64_t> page_step_;  // the step that last wrote a page ...
    std::vector<int32_t> page_owner_;  // ... and for which request
    std::mutex busy_;
    uint64_t step_number_ = 0;
    bool profiling_ = false;
    std::vector<std::pair<std::string, double>> times_;
};

}  // namespace criadero
