#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "ggml.h"
#include "step.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace criadero {

namespace {

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Floats1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Ints1 = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints2 = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Out2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void refuse(bool wrong, const std::string& what) {
    if (wrong) throw std::invalid_argument(what);
}

std::shared_ptr<const Linear> linear_of(const std::shared_ptr<PyLinear>& held) { return {held, &held->w}; }

bool is(const Array& a, nb::dlpack::dtype_code code, int bits) {
    return a.dtype().code == static_cast<uint8_t>(code) && a.dtype().bits == bits && a.dtype().lanes == 1;
}

void check_matrix(const Array& a, const char* name, size_t rows, size_t columns) {
    refuse(a.ndim() != 2 || a.shape(0) != rows || a.shape(1) != columns,
           std::string(name) + ": [" + std::to_string(rows) + ", " + std::to_string(columns) + "] is needed");
}

void set_embedding(Model& model, const Array& table) {
    Embedding e;
    check_matrix(table, "embedding", static_cast<size_t>(model.shape().vocab), static_cast<size_t>(model.shape().hidden));
    if (is(table, nb::dlpack::dtype_code::Float, 32)) e.form = Embedding::Form::f32;
    else if (is(table, nb::dlpack::dtype_code::Float, 16)) e.form = Embedding::Form::f16;
    else if (is(table, nb::dlpack::dtype_code::UInt, 16)) e.form = Embedding::Form::bf16;
    else throw std::invalid_argument("embedding: float32, float16 or uint16 (bfloat16) is needed");
    e.data = table.data();
    e.owner = std::make_shared<Array>(table);
    model.set_embedding(e);
}

Floats floats_of(const Array& a, const char* name, size_t rows, size_t groups) {
    const bool half = is(a, nb::dlpack::dtype_code::Float, 16);
    refuse(!half && !is(a, nb::dlpack::dtype_code::Float, 32), std::string(name) + ": float16 or float32 is needed");
    check_matrix(a, name, rows, groups);
    return {a.data(), half};
}

void set_embedding_quant(Model& model, const Array& q, const Array& scales, const std::optional<Array>& mins, int bits, int group) {
    const size_t rows = static_cast<size_t>(model.shape().vocab), columns = static_cast<size_t>(model.shape().hidden);
    refuse(bits != 4 && bits != 8, std::to_string(bits) + " bits: 4 and 8 are known");
    refuse(mins && bits != 4, "mins: only 4-bit rows have them");
    refuse(group < 1 || columns % static_cast<size_t>(group), "groups of " + std::to_string(group) + " do not divide the columns");
    refuse(bits == 4 && columns % 2, "an odd number of columns in 4 bits");
    refuse(!is(q, bits == 4 ? nb::dlpack::dtype_code::UInt : nb::dlpack::dtype_code::Int, 8), bits == 4 ? "q: uint8 is needed" : "q: int8 is needed");
    check_matrix(q, "q", rows, bits == 4 ? columns / 2 : columns);
    Embedding e;
    e.form = Embedding::Form::quant;
    e.data = q.data();
    e.bits = bits;
    e.group = group;
    e.scales = floats_of(scales, "scales", rows, columns / static_cast<size_t>(group));
    if (mins) e.mins = floats_of(*mins, "mins", rows, columns / static_cast<size_t>(group));
    e.owner = std::make_shared<std::vector<Array>>(mins ? std::vector<Array>{q, scales, *mins} : std::vector<Array>{q, scales});
    model.set_embedding(e);
}

void step(Model& model, Cache& cache, const Ints1& ids, const Ints1& positions, const Ints1& starts, const Ints1& lengths,
          const Ints2& tables, const std::optional<Ints1>& adapters, const Ints1& logit_rows, const std::optional<Out2>& logits,
          const std::optional<Out2>& hidden) {
    const size_t rows = ids.shape(0), requests = lengths.shape(0), wanted = logit_rows.shape(0);
    auto same = [](size_t got, size_t need, const char* name) {
        refuse(got != need, std::string(name) + ": " + std::to_string(got) + " entries, " + std::to_string(need) + " are needed");
    };
    refuse(rows > size_t{1} << 24 || requests > rows, "a step of " + std::to_string(rows) + " rows and " + std::to_string(requests) + " requests");
    same(positions.shape(0), rows, "positions");
    same(starts.shape(0), requests + 1, "starts");
    same(tables.shape(0), requests, "tables");
    refuse(tables.shape(1) > size_t{1} << 24, "tables: too wide");
    if (adapters) same(adapters->shape(0), requests, "adapters");
    refuse(wanted > rows, "logit_rows: more than there are rows");
    auto out = [&](const std::optional<Out2>& a, int columns, const char* name) -> float* {
        if (!a) return nullptr;
        refuse(a->shape(0) != wanted || a->shape(1) != static_cast<size_t>(columns),
               std::string(name) + ": [" + std::to_string(wanted) + ", " + std::to_string(columns) + "] is needed");
        return a->data();
    };
    StepInput in;
    in.ids = ids.data();
    in.positions = positions.data();
    in.starts = starts.data();
    in.lengths = lengths.data();
    in.tables = tables.data();
    in.adapters = adapters ? adapters->data() : nullptr;
    in.logit_rows = logit_rows.data();
    in.rows = static_cast<int>(rows);
    in.requests = static_cast<int>(requests);
    in.table_width = static_cast<int>(tables.shape(1));
    in.wanted = static_cast<int>(wanted);
    in.logits = out(logits, model.shape().vocab, "logits");
    in.hidden = out(hidden, model.shape().hidden, "hidden");
    nb::gil_scoped_release release;
    model.step(cache, in);
}

// Fills q, scales and mins of a QuantTensor, whose memory the caller may use again for the next matrix
void repack(const std::string& kind, const Array& raw, int rows, int columns, int heads, int threads, const Out& q, const Out& scales,
            const std::optional<Out>& mins) {
    const GgmlFormat format = ggml_format(kind);
    refuse(rows < 1 || columns < 1 || columns % format.block, kind + ": " + std::to_string(columns) + " columns are no whole blocks");
    const size_t n = static_cast<size_t>(rows), k = static_cast<size_t>(columns), groups = k / static_cast<size_t>(format.group);
    const size_t needed = n * (k / static_cast<size_t>(format.block)) * static_cast<size_t>(format.size);
    refuse(!is(raw, nb::dlpack::dtype_code::UInt, 8) || raw.ndim() != 1 || raw.shape(0) != needed, "raw: " + std::to_string(needed) + " bytes are needed");
    auto check = [&](const Out& out, const char* name, size_t width, nb::dlpack::dtype_code code, int bits) {
        refuse(out.dtype().code != static_cast<uint8_t>(code) || out.dtype().bits != bits || out.dtype().lanes != 1 || out.shape(0) != n ||
                   out.shape(1) != width,
               std::string(name) + ": [" + std::to_string(n) + ", " + std::to_string(width) + "] of " + std::to_string(bits) + " bits is needed");
    };
    check(q, "q", k * static_cast<size_t>(format.bits) / 8, format.bits == 4 ? nb::dlpack::dtype_code::UInt : nb::dlpack::dtype_code::Int, 8);
    check(scales, "scales", groups, nb::dlpack::dtype_code::Float, format.wide ? 32 : 16);
    refuse(format.mins != mins.has_value(), kind + (format.mins ? ": mins are needed" : ": there are no mins, none are needed"));
    if (mins) check(*mins, "mins", groups, nb::dlpack::dtype_code::Float, 32);
    nb::gil_scoped_release release;
    repack_ggml(shared_pool(threads), kind, static_cast<const uint8_t*>(raw.data()), rows, columns, heads, static_cast<uint8_t*>(q.data()),
                scales.data(), mins ? static_cast<float*>(mins->data()) : nullptr);
}

}  // namespace

void bind_model(nb::module_& m) {
    m.def("repack_ggml", &repack, "kind"_a, "raw"_a.noconvert(), "rows"_a, "columns"_a, "heads"_a, "threads"_a,
          "q"_a.noconvert(), "scales"_a.noconvert(), "mins"_a.noconvert().none(), "GGUF's blocks -> the arrays of a QuantTensor; see csrc/ggml.h.");
    m.def("give_back_memory", [] {
#if defined(__GLIBC__)
        malloc_trim(0);  // what was freed between the packed matrices would stay ours
#endif
    });
    nb::class_<Cache>(m, "Cache", "Keys and values in pages; see csrc/cache.h.")
        .def("__init__",
             [](Cache* self, int layers, int pages, int page, int kv_heads, int head_dim, const std::string& type) {
                 new (self) Cache(layers, pages, page, kv_heads, head_dim, kv_type_named(type));
             },
             "layers"_a, "pages"_a, "page"_a, "kv_heads"_a, "head_dim"_a, "dtype"_a)
        .def_ro("pages", &Cache::pages)
        .def_ro("page", &Cache::page)
        .def_prop_ro("nbytes", &Cache::bytes);

    nb::class_<Model>(m, "Model", "A Llama; see csrc/step.h.")
        .def("__init__",
             [](Model* self, int hidden, int intermediate, int layers, int heads, int kv_heads, int head_dim, int vocab, float eps, int threads) {
                 new (self) Model({hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, eps}, threads);
             },
             "hidden"_a, "intermediate"_a, "layers"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "vocab"_a, "eps"_a, "threads"_a)
        .def("set_embedding", &set_embedding, "table"_a.noconvert(), "[V, D] float32, float16 or uint16 (bfloat16); kept, not copied.")
        .def("set_embedding_quant", &set_embedding_quant, "q"_a.noconvert(), "scales"_a.noconvert(), "mins"_a.noconvert().none(), "bits"_a, "group"_a,
             "The arrays of a QuantTensor [V, D]; kept, not copied.")
        .def("set_embedding_linear",
             [](Model& self, const std::shared_ptr<PyLinear>& w) {
                 Embedding e;
                 e.form = Embedding::Form::linear;
                 e.linear = linear_of(w);
                 self.set_embedding(e);
             },
             "w"_a, "The rows of a packed matrix.")
        .def("set_norm", [](Model& self, int layer, const std::string& which, const Floats1& w) { self.set_norm(layer, which, w.data(), w.shape(0)); },
             "layer"_a, "which"_a, "w"_a)
        .def("set_rope", [](Model& self, const Floats1& f, float factor) { self.set_rope(f.data(), f.shape(0), factor); }, "frequencies"_a, "factor"_a)
        .def("set_linear",
             [](Model& self, int layer, const std::string& slot, const std::shared_ptr<PyLinear>& w) {
                 self.set_linear(layer, slot_named(slot), linear_of(w));
             },
             "layer"_a, "slot"_a, "w"_a)
        .def("set_head", [](Model& self, const std::shared_ptr<PyLinear>& w) { self.set_head(linear_of(w)); }, "w"_a)
        .def("set_adapter",
             [](Model& self, int index, int layer, const std::string& slot, const Floats2& a, const Floats2& b) {
                 refuse(a.shape(0) != b.shape(1), "adapter " + std::to_string(index) + ": A has " + std::to_string(a.shape(0)) + " rows and B " +
                                                      std::to_string(b.shape(1)) + " columns");
                 refuse(a.shape(0) > 1 << 20 || a.shape(1) > 1 << 20 || b.shape(0) > 1 << 20, "adapter " + std::to_string(index) + ": too large");
                 self.set_adapter(index, layer, slot_named(slot), a.data(), b.data(), static_cast<int>(a.shape(0)), static_cast<int>(a.shape(1)),
                                  static_cast<int>(b.shape(0)));
             },
             "index"_a, "layer"_a, "slot"_a, "a"_a, "b"_a)
        .def("drop_adapter", &Model::drop_adapter, "index"_a)
        .def("step", &step, "cache"_a, "ids"_a.noconvert(), "positions"_a.noconvert(), "starts"_a.noconvert(), "lengths"_a.noconvert(),
             "tables"_a.noconvert(), "adapters"_a.noconvert().none(), "logit_rows"_a.noconvert(), "logits"_a.noconvert().none(),
             "hidden"_a.noconvert().none())
        .def("profile", &Model::profile, "on"_a, "Seconds by part since the last call.")
        .def_prop_ro("threads", &Model::threads);
}

}  // namespace criadero
