#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "ggml.h"

namespace nb = nanobind;

namespace criadero {

namespace {

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

void refuse(bool wrong, const std::string& what) {
    if (wrong) throw std::invalid_argument(what);
}

bool is(const Array& a, nb::dlpack::dtype_code code, int bits) {
    return a.dtype().code == static_cast<uint8_t>(code) && a.dtype().bits == bits && a.dtype().lanes == 1;
}

Floats floats(const Array& a, const char* name, size_t rows, size_t groups) {
    const bool half = is(a, nb::dlpack::dtype_code::Float, 16);
    refuse(!half && !is(a, nb::dlpack::dtype_code::Float, 32), std::string(name) + ": float16 or float32 is needed");
    refuse(a.ndim() != 2 || a.shape(0) != rows || a.shape(1) != groups,
           std::string(name) + ": [" + std::to_string(rows) + ", " + std::to_string(groups) + "] is needed");
    return {a.data(), half};
}

PyLinear from_quant(const Array& q, const Array& scales, const std::optional<Array>& mins, int bits, int group, int threads) {
    refuse(bits != 4 && bits != 8, std::to_string(bits) + " bits: 4 and 8 are known");
    const auto code = bits == 4 ? nb::dlpack::dtype_code::UInt : nb::dlpack::dtype_code::Int;
    refuse(q.ndim() != 2 || !is(q, code, 8), bits == 4 ? "q: uint8 [N, K / 2] is needed" : "q: int8 [N, K] is needed");
    const size_t rows = q.shape(0), columns = q.shape(1) * (bits == 4 ? 2 : 1);
    refuse(rows >= size_t{1} << 30 || columns >= size_t{1} << 30, "q is too large");
    refuse(group <= 0 || columns % static_cast<size_t>(group) != 0,
           "groups of " + std::to_string(group) + " do not divide " + std::to_string(columns) + " columns");
    const size_t groups = columns / static_cast<size_t>(group);
    const Floats s = floats(scales, "scales", rows, groups);
    const Floats m = mins ? floats(*mins, "mins", rows, groups) : Floats{};
    nb::gil_scoped_release release;
    return {pack_quant(shared_pool(threads), static_cast<int>(rows), static_cast<int>(columns), bits, group, q.data(), s, m)};
}

PyLinear from_dense(const Array& w, const std::string& kind, int threads) {
    refuse(w.ndim() != 2 || w.shape(0) >= size_t{1} << 30 || w.shape(1) >= size_t{1} << 30, "weights: a matrix is needed");
    const int rows = static_cast<int>(w.shape(0)), columns = static_cast<int>(w.shape(1));
    if (kind == "f32") {
        refuse(!is(w, nb::dlpack::dtype_code::Float, 32), "f32 weights: float32 is needed");
        nb::gil_scoped_release release;
        return {pack_f32(shared_pool(threads), rows, columns, static_cast<const float*>(w.data()))};
    }
    refuse(kind != "bf16", "\"" + kind + "\": f32 and bf16 are known");
    refuse(!is(w, nb::dlpack::dtype_code::UInt, 16), "bf16 weights: their bits as uint16 are needed");
    nb::gil_scoped_release release;
    return {pack_bf16(shared_pool(threads), rows, columns, static_cast<const uint16_t*>(w.data()))};
}

PyLinear py_pack_ggml(const std::string& kind, const Array& raw, int rows, int columns, int heads, int threads) {
    const GgmlFormat format = ggml_format(kind);
    refuse(rows < 1 || columns < 1 || columns % format.block, kind + ": " + std::to_string(columns) + " columns are no whole blocks");
    const size_t needed = static_cast<size_t>(rows) * static_cast<size_t>(columns / format.block) * static_cast<size_t>(format.size);
    refuse(!is(raw, nb::dlpack::dtype_code::UInt, 8) || raw.ndim() != 1 || raw.shape(0) != needed, "raw: " + std::to_string(needed) + " bytes are needed");
    nb::gil_scoped_release release;
    return {pack_ggml(shared_pool(threads), kind, static_cast<const uint8_t*>(raw.data()), rows, columns, heads)};
}

PyLinear py_map_rows(const std::string& kind, const Array& raw, int rows, int columns, int heads) {
    const int most = 1 << 30;
    refuse(rows < 1 || columns < 1 || rows > most || columns > most, "a matrix of " + std::to_string(rows) + " x " + std::to_string(columns) + " cannot be used");
    Linear w = map_rows(kind, static_cast<const uint8_t*>(raw.data()), rows, columns, heads);
    refuse(!is(raw, nb::dlpack::dtype_code::UInt, 8) || raw.ndim() != 1 || raw.shape(0) != w.bytes(), "raw: " + std::to_string(w.bytes()) + " bytes are needed");
    w.owner = std::make_shared<Array>(raw);
    return {std::move(w)};
}

nb::ndarray<nb::numpy, float> new_floats(size_t rows, size_t columns) {
    float* data = new float[rows * columns];
    nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    const size_t shape[2] = {rows, columns};
    return nb::ndarray<nb::numpy, float>(data, 2, shape, owner);
}

void prepare_all(Worker& me, const Activations& a, const float* x) {
    for (int m = me.first(a.rows); m < me.last(a.rows); ++m) {
        prepare(a, m, 0, a.columns, x + static_cast<size_t>(m) * static_cast<size_t>(a.columns));
    }
}

nb::ndarray<nb::numpy, float> apply(const PyLinear& self, const Array& x, int threads) {
    const Linear& w = self.w;
    refuse(x.ndim() != 2 || !is(x, nb::dlpack::dtype_code::Float, 32), "x: float32 [M, K] is needed");
    refuse(x.shape(1) != static_cast<size_t>(w.columns),
           "x: " + std::to_string(x.shape(1)) + " columns; the weights have " + std::to_string(w.columns));
    refuse(x.shape(0) >= size_t{1} << 24, "x: too many rows");
    const int rows = static_cast<int>(x.shape(0));
    auto out = new_floats(x.shape(0), static_cast<size_t>(w.rows));
    if (rows == 0) return out;
    const float* from = static_cast<const float*>(x.data());
    float* y = out.data();
    nb::gil_scoped_release release;
    Activations a;
    a.resize(rows, w.columns, needs(w));
    const Job job{&w, y, static_cast<size_t>(w.rows)};
    shared_pool(threads).run([&](Worker& me) {
        prepare_all(me, a, from);
        me.barrier();
        run_jobs(me, &job, 1, a);
    });
    return out;
}

// Seconds for one product with each of the matrices (all K wide), from f32 rows to f32 results, in one region: for benchmarks.
double time_products(const nb::list& matrices, const Array& x, int threads) {
    std::vector<const Linear*> all;
    for (nb::handle one : matrices) all.push_back(&nb::cast<const PyLinear&>(one).w);
    refuse(all.empty() || x.ndim() != 2 || !is(x, nb::dlpack::dtype_code::Float, 32), "x: float32 [M, K] is needed");
    const int rows = static_cast<int>(x.shape(0));
    refuse(rows < 1, "x: no rows");
    size_t widest = 0;
    for (const Linear* w : all) {
        refuse(x.shape(1) != static_cast<size_t>(w->columns), "x does not have the weights' columns");
        widest = std::max(widest, static_cast<size_t>(w->rows));
    }
    Buffer y(x.shape(0) * widest * 4);
    Activations a;
    a.resize(rows, static_cast<int>(x.shape(1)), FORM_INT8 | FORM_FINE | FORM_BF16 | FORM_F32);  // room for each
    const float* from = static_cast<const float*>(x.data());
    double seconds = 0;
    nb::gil_scoped_release release;
    shared_pool(threads).run([&](Worker& me) {
        for (int round = 0; round < 2; ++round) {  // the first wakes the threads and maps the memory
            me.barrier();
            const auto began = std::chrono::steady_clock::now();
            for (const Linear* w : all) {
                if (me.index == 0) a.resize(rows, w->columns, needs(*w));
                me.barrier();
                prepare_all(me, a, from);
                me.barrier();
                const Job job{w, y.as<float>(), static_cast<size_t>(w->rows)};
                run_jobs(me, &job, 1, a);
                me.barrier();
            }
            if (me.index == 0) seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        }
    });
    return seconds;
}

// Passes `regions` regions of `barriers` barriers through a pool and counts what went wrong: for tests.
int test_pool(int threads, int regions, int barriers) {
    nb::gil_scoped_release release;
    Pool pool(threads);
    int wrong = 0;
    std::vector<int> seen(static_cast<size_t>(pool.threads()));
    std::atomic<int> taken{0}, errors{0};
    for (int region = 0; region < regions; ++region) {
        pool.run([&](Worker& me) {
            for (int step = 0; step < barriers; ++step) {
                seen[static_cast<size_t>(me.index)] = region * barriers + step;
                taken.fetch_add(me.next() >= 0, std::memory_order_relaxed);
                me.barrier();
                for (int value : seen) errors.fetch_add(value != region * barriers + step, std::memory_order_relaxed);
                if (me.index == 0 && step + 1 == barriers) errors.fetch_add(me.next() != 0, std::memory_order_relaxed);
                me.barrier();
            }
        });
        // now and then let the workers fall asleep
        if (region % 64 == 63) std::this_thread::sleep_for(std::chrono::milliseconds(3));
    }
    wrong = errors.load();
    if (taken.load() != pool.threads() * regions * barriers) ++wrong;
    return wrong;
}

}  // namespace

void bind_linear(nb::module_& m) {
    nb::class_<PyLinear>(m, "Linear", "Packed weights [N, K]; see csrc/linear.h.")
        .def_static("pack_quant", &from_quant, nb::arg("q"), nb::arg("scales"), nb::arg("mins").none(), nb::arg("bits"), nb::arg("group"),
                    nb::arg("threads"))
        .def_static("pack_ggml", &py_pack_ggml, nb::arg("kind"), nb::arg("raw"), nb::arg("rows"), nb::arg("columns"), nb::arg("heads"),
                    nb::arg("threads"), "GGUF's blocks, packed; see csrc/ggml.h.")
        .def_static("map_rows", &py_map_rows, nb::arg("kind"), nb::arg("raw").noconvert(), nb::arg("rows"), nb::arg("columns"), nb::arg("heads"),
                    "BF16 or GGUF's Q8_0, read where it lies: kept, not copied.")
        .def_static("pack_dense", &from_dense, nb::arg("w"), nb::arg("kind"), nb::arg("threads"))
        .def("apply", &apply, nb::arg("x"), nb::arg("threads"), "x f32 [M, K] -> f32 [M, N].")
        .def("row",
             [](const PyLinear& self, int n) {
                 auto out = new_floats(1, static_cast<size_t>(self.w.columns));
                 unpack_row(self.w, n, out.data());
                 return out;
             })
        .def_prop_ro("rows", [](const PyLinear& self) { return self.w.rows; })
        .def_prop_ro("columns", [](const PyLinear& self) { return self.w.columns; })
        .def_prop_ro("nbytes", [](const PyLinear& self) { return self.w.bytes(); });
    m.def("maps_rows", &maps_rows, "Whether the current level's kernels read rows where they lie about as fast as packed.");
    m.def("time_products", &time_products, nb::arg("matrices"), nb::arg("x"), nb::arg("threads"));
    m.def("test_pool", &test_pool, nb::arg("threads"), nb::arg("regions"), nb::arg("barriers"));
}

}  // namespace criadero
