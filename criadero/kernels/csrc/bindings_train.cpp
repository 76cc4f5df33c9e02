#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "train.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace criadero {

namespace {

using Rows = nb::ndarray<nb::device::cpu>;  // a matrix whose columns lie side by side
using Floats1 = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Longs1 = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void refuse(bool wrong, const std::string& what) {
    if (wrong) throw std::invalid_argument(what);
}

// What a matrix is: checked once, then used
struct Matrix {
    uint8_t* data;
    size_t rows, columns, stride;  // stride in elements
    Element type;
    size_t bytes() const { return stride * (type == Element::bf16 ? 2 : 4); }
    uint8_t* row(size_t i) const { return data + i * bytes(); }
};

Matrix matrix(const Rows& a, const char* name) {
    const bool narrow = a.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && a.dtype().bits == 16;
    const bool wide = a.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && a.dtype().bits == 32;
    refuse(a.ndim() != 2 || !(narrow || wide), std::string(name) + ": a float32 or bfloat16 matrix is needed");
    refuse(a.shape(0) > 1 && a.stride(0) < static_cast<int64_t>(a.shape(1)), std::string(name) + ": rows must not overlap");
    refuse(a.shape(1) > 1 && a.stride(1) != 1, std::string(name) + ": the columns must lie side by side");
    refuse(a.shape(0) >= size_t{1} << 30 || a.shape(1) >= size_t{1} << 30, std::string(name) + " is too large");
    const size_t stride = a.shape(0) > 1 ? static_cast<size_t>(a.stride(0)) : a.shape(1);
    return {static_cast<uint8_t*>(a.data()), a.shape(0), a.shape(1), stride, narrow ? Element::bf16 : Element::f32};
}

Matrix like(const Rows& a, const char* name, const Matrix& other, size_t columns) {
    const Matrix m = matrix(a, name);
    refuse(m.rows != other.rows || m.columns != columns || m.type != other.type,
           std::string(name) + ": [" + std::to_string(other.rows) + ", " + std::to_string(columns) + "] of the same type is needed");
    return m;
}
Matrix like(const Rows& a, const char* name, const Matrix& other) { return like(a, name, other, other.columns); }

void norm(const Rows& x_, const Floats1& weight, double eps, const Rows& y_, const Floats1& r, int threads) {
    const Matrix x = matrix(x_, "x"), y = like(y_, "y", x);
    refuse(weight.shape(0) != x.columns || r.shape(0) != x.rows, "weight: [D], and r: [T], are needed");
    const float* w = weight.data();
    float* factors = r.data();
    const auto fn = train_kernels(x.type).norm;
    nb::gil_scoped_release release;
    shared_pool(threads).run([&](Worker& me) {
        const int n = static_cast<int>(x.rows);
        for (int i = me.first(n); i < me.last(n); ++i) {
            const auto at = static_cast<size_t>(i);
            factors[at] = fn(x.row(at), w, static_cast<float>(eps), static_cast<int>(x.columns), y.row(at));
        }
    });
}

// The gradient of the weight is summed in so many parts, whatever the number of threads, so that it does not depend on it
constexpr int PARTS = 16;

void norm_backward(const Rows& dy_, const Rows& x_, const Floats1& weight, const Floats1& r, const std::optional<Rows>& dres_, const Rows& dx_,
                   const Floats1& dweight, int threads) {
    const Matrix x = matrix(x_, "x"), dy = like(dy_, "dy", x), dx = like(dx_, "dx", x);
    const std::optional<Matrix> dres = dres_ ? std::optional<Matrix>(like(*dres_, "dres", x)) : std::nullopt;
    refuse(weight.shape(0) != x.columns || r.shape(0) != x.rows || dweight.shape(0) != x.columns, "weight, dweight: [D], and r: [T], are needed");
    const float *w = weight.data(), *factors = r.data();
    float* dw = dweight.data();
    const auto fn = train_kernels(x.type).norm_backward;
    nb::gil_scoped_release release;
    std::vector<float> parts(PARTS * x.columns, 0.0f);
    shared_pool(threads).run([&](Worker& me) {
        for (int part = me.first(PARTS); part < me.last(PARTS); ++part) {
            const size_t first = x.rows * static_cast<size_t>(part) / PARTS, last = x.rows * static_cast<size_t>(part + 1) / PARTS;
            for (size_t i = first; i < last; ++i) {
                fn(dy.row(i), x.row(i), w, factors[i], dres ? dres->row(i) : nullptr, static_cast<int>(x.columns), dx.row(i),
                   parts.data() + static_cast<size_t>(part) * x.columns);
            }
        }
    });
    for (size_t d = 0; d < x.columns; ++d) {
        float total = 0;
        for (size_t part = 0; part < PARTS; ++part) total += parts[part * x.columns + d];
        dw[d] = total;
    }
}

void swiglu(const Rows& gate_up_, const Rows& y_, int threads) {
    const Matrix both = matrix(gate_up_, "gate_up"), y = like(y_, "y", both, both.columns / 2);
    refuse(both.columns % 2 != 0, "gate_up: [T, 2 F] is needed");
    const size_t up = y.columns * (y.type == Element::bf16 ? 2 : 4);
    const auto fn = train_kernels(y.type).swiglu;
    nb::gil_scoped_release release;
    shared_pool(threads).run([&](Worker& me) {
        const int n = static_cast<int>(y.rows);
        for (int i = me.first(n); i < me.last(n); ++i) {
            const auto at = static_cast<size_t>(i);
            fn(both.row(at), both.row(at) + up, static_cast<int>(y.columns), y.row(at));
        }
    });
}

void swiglu_backward(const Rows& dy_, const Rows& gate_up_, const Rows& dgate_up_, const Rows& y_, int threads) {
    const Matrix both = matrix(gate_up_, "gate_up"), y = like(y_, "y", both, both.columns / 2), dy = like(dy_, "dy", y);
    const Matrix dboth = like(dgate_up_, "dgate_up", both);
    refuse(both.columns % 2 != 0, "gate_up: [T, 2 F] is needed");
    const size_t up = y.columns * (y.type == Element::bf16 ? 2 : 4);
    const auto fn = train_kernels(y.type).swiglu_backward;
    nb::gil_scoped_release release;
    shared_pool(threads).run([&](Worker& me) {
        const int n = static_cast<int>(y.rows);
        for (int i = me.first(n); i < me.last(n); ++i) {
            const auto at = static_cast<size_t>(i);
            fn(dy.row(at), both.row(at), both.row(at) + up, static_cast<int>(y.columns), dboth.row(at), dboth.row(at) + up, y.row(at));
        }
    });
}

void cross_entropy(const Rows& logits_, const Longs1& targets, const Floats1& losses, bool backward, int threads) {
    const Matrix logits = matrix(logits_, "logits");
    refuse(targets.shape(0) != logits.rows || losses.shape(0) != logits.rows, "targets, losses: [T] are needed");
    const int64_t* aims = targets.data();
    float* to = losses.data();
    for (size_t i = 0; i < logits.rows; ++i) {
        refuse(aims[i] < 0 || aims[i] >= static_cast<int64_t>(logits.columns),
               "target " + std::to_string(aims[i]) + " is none of " + std::to_string(logits.columns) + " tokens");
    }
    const auto fn = train_kernels(logits.type).cross_entropy;
    nb::gil_scoped_release release;
    shared_pool(threads).run([&](Worker& me) {
        const int n = static_cast<int>(logits.rows);
        for (int i = me.first(n); i < me.last(n); ++i) {
            const auto at = static_cast<size_t>(i);
            to[at] = fn(logits.row(at), static_cast<int>(logits.columns), static_cast<int>(aims[at]), backward);
        }
    });
}

void attend(const Rows& qkv_, const Longs1& starts, int heads, int kv_heads, const Floats2& cosine, const Floats2& sine, const Rows& out_,
            const Floats2& lse, const std::optional<Rows>& d_out_, const std::optional<Rows>& d_qkv_, int threads) {
    const Matrix qkv = matrix(qkv_, "qkv");
    refuse(heads < 1 || kv_heads < 1 || heads % kv_heads != 0, "the key-value heads must divide the heads");
    const size_t all = static_cast<size_t>(heads) + 2 * static_cast<size_t>(kv_heads);
    refuse(qkv.columns % (2 * all) != 0 || qkv.stride != qkv.columns, "qkv: [T, (H + 2 K) Dh] is needed, whole, with an even Dh");
    const size_t dim = qkv.columns / all;
    const Matrix out = like(out_, "out", qkv, static_cast<size_t>(heads) * dim);
    refuse(out.stride != out.columns, "out must be whole");
    for (const Floats2* one : {&cosine, &sine}) refuse(one->shape(0) != qkv.rows || one->shape(1) != dim / 2, "cosine, sine: [T, Dh / 2] are needed");
    refuse(lse.shape(0) != static_cast<size_t>(heads) || lse.shape(1) != qkv.rows, "lse: [H, T] is needed");
    refuse(starts.shape(0) < 1 || starts.shape(0) > size_t{1} << 30 || starts.data()[0] != 0, "starts must begin with 0");
    for (size_t d = 1; d < starts.shape(0); ++d) refuse(starts.data()[d] < starts.data()[d - 1], "starts must not fall");
    refuse(starts.data()[starts.shape(0) - 1] != static_cast<int64_t>(qkv.rows), "starts must end with the number of tokens");
    AttendBatch b;
    b.qkv = qkv.data;
    b.out = out.data;
    if (d_out_) {
        const Matrix d_out = like(*d_out_, "d_out", out);
        refuse(!d_qkv_, "d_qkv is needed too");
        const Matrix d_qkv = like(*d_qkv_, "d_qkv", qkv);
        refuse(d_out.stride != d_out.columns || d_qkv.stride != d_qkv.columns, "d_out and d_qkv must be whole");
        b.d_out = d_out.data;
        b.d_qkv = d_qkv.data;
    }
    b.cosine = cosine.data();
    b.sine = sine.data();
    b.lse = lse.data();
    b.starts = starts.data();
    b.documents = static_cast<int>(starts.shape(0)) - 1;
    b.tokens = static_cast<int>(qkv.rows);
    b.heads = heads;
    b.kv_heads = kv_heads;
    b.head_dim = static_cast<int>(dim);
    b.type = qkv.type;
    const bool backward = d_out_.has_value();
    nb::gil_scoped_release release;
    attend_documents(shared_pool(threads), b, backward);
}

// The operands of a product, checked.
Lying lying(const Matrix& a) {
    Lying out;
    out.form = a.type == Element::bf16 ? Form::bf16 : Form::f32;
    out.data = a.data;
    out.stride = a.bytes();
    out.rows = static_cast<int>(a.rows);
    out.columns = static_cast<int>(a.columns);
    return out;
}

void check_term(const Term& t, size_t m, size_t n) {
    const size_t m2 = static_cast<size_t>(t.a_across ? t.a.columns : t.a.rows), n2 = static_cast<size_t>(t.b_across ? t.b.rows : t.b.columns);
    const int k = t.b_across ? t.b.columns : t.b.rows;
    refuse(t.depth() != k, "the operands do not fit: " + std::to_string(t.depth()) + " and " + std::to_string(k));
    refuse(m2 != m || n2 != n, "out: [" + std::to_string(m2) + ", " + std::to_string(n2) + "] is needed");
}

// In bf16 where the processor multiplies it and the operands allow it, else in f32.
void run_products(int threads, const std::vector<Product>& products) {
    Pool& pool = shared_pool(threads);
    if (products.empty() || products[0].m == 0) return;
    bool narrow = has_product_bf16();
    for (const Product& p : products) {
        for (const Term& t : p.terms) narrow = narrow && !t.whole && t.a.form == Form::bf16 && (t.a_across || t.depth() % 2 == 0);
        narrow = narrow && (!p.residual || p.type == Element::bf16);
    }
    if (!narrow) return compute(pool, products);
    for (const Product& p : products) {
        if (p.n > 0) product_bf16(pool, p);
    }
}

void set_residual(Product& p, const Rows& residual_, const Matrix& out) {
    const Matrix residual = like(residual_, "residual", out);
    p.residual = residual.data;
    p.residual_stride = residual.bytes();
}

Product product_into(const Matrix& out) {
    Product p;
    p.m = static_cast<int>(out.rows);
    p.n = static_cast<int>(out.columns);
    p.out = out.data;
    p.out_stride = out.bytes();
    p.type = out.type;
    return p;
}

void product(const Rows& a_, const Rows& b_, const Rows& out_, const std::optional<Rows>& residual_, bool a_across, bool b_across, bool add,
             int threads) {
    const Matrix out = matrix(out_, "out");
    Product p = product_into(out);
    Term t;
    t.a = lying(matrix(a_, "a"));
    t.b = lying(matrix(b_, "b"));
    t.a_across = a_across;
    t.b_across = b_across;
    check_term(t, out.rows, out.columns);
    refuse(add && out.type != Element::f32, "only a float32 out can be added to");
    p.add = add;
    if (residual_) set_residual(p, *residual_, out);
    p.terms.push_back(t);
    nb::gil_scoped_release release;
    run_products(threads, {p});
}

// A frozen weight as it lies, kept alive.
struct PyWeight {
    Lying w;
    std::vector<nb::ndarray<nb::device::cpu>> kept;
};

PyWeight weight_dense(const Rows& w_) { return {lying(matrix(w_, "weight")), {w_}}; }

using Bytes2 = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;

PyWeight weight_quant(const Bytes2& q, const Bytes2& scales, const std::optional<Bytes2>& mins, int bits, int group) {
    refuse(bits != 4 && bits != 8, std::to_string(bits) + " bits: 4 and 8 are known");
    const auto code = bits == 4 ? nb::dlpack::dtype_code::UInt : nb::dlpack::dtype_code::Int;
    refuse(q.dtype().code != static_cast<uint8_t>(code) || q.dtype().bits != 8, bits == 4 ? "q: uint8 [N, K / 2] is needed" : "q: int8 [N, K] is needed");
    refuse(q.shape(0) >= size_t{1} << 30 || q.shape(1) >= size_t{1} << 29, "q is too large");
    PyWeight out;
    out.w.form = bits == 4 ? Form::int4 : Form::int8;
    out.w.data = static_cast<const uint8_t*>(q.data());
    out.w.stride = q.shape(1);
    out.w.rows = static_cast<int>(q.shape(0));
    out.w.columns = static_cast<int>(q.shape(1)) * (bits == 4 ? 2 : 1);
    refuse(group < 1 || out.w.columns % group != 0 || (bits == 4 && group % 2 != 0), "groups of " + std::to_string(group) + " do not divide the columns");
    out.w.group = group;
    const auto table = [&](const Bytes2& a, const char* name) {
        const bool floating = a.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && (a.dtype().bits == 16 || a.dtype().bits == 32);
        refuse(!floating || a.shape(0) != q.shape(0) || a.shape(1) != static_cast<size_t>(out.w.columns / group),
               std::string(name) + ": float16 or float32 [N, K / group] is needed");
        out.kept.emplace_back(a);
        return a.data();
    };
    out.kept.emplace_back(q);
    out.w.scales = table(scales, "scales");
    out.w.half = scales.dtype().bits == 16;
    if (mins) {
        refuse(bits != 4 || mins->dtype().bits != scales.dtype().bits, "mins go with 4 bits, and are of the scales' type");
        out.w.mins = table(*mins, "mins");
    }
    return out;
}

using WeightList = std::vector<const PyWeight*>;
using PartList = std::vector<std::optional<Rows>>;

// out [T, sum of N]: beside each other, x w' + low up' of each weight w, and the residual
void frozen(const Rows& x_, const WeightList& weights, const PartList& lows, const PartList& ups, const Rows& out_, const std::optional<Rows>& residual_,
            bool whole, int threads) {
    const Matrix x = matrix(x_, "x"), out = matrix(out_, "out");
    refuse(weights.empty() || lows.size() != weights.size() || ups.size() != weights.size(), "a low and an up (or None) are needed for each weight");
    refuse(out.rows != x.rows || out.type != x.type, "out: the rows and the type of x are needed");
    std::vector<Product> products;
    size_t column = 0;
    const size_t size = out.type == Element::bf16 ? 2 : 4;
    for (size_t i = 0; i < weights.size(); ++i) {
        Product p = product_into(out);
        p.n = weights[i]->w.rows;
        p.out = out.data + column * size;
        refuse(column + static_cast<size_t>(p.n) > out.columns, "out has fewer columns than the weights have rows");
        if (residual_) {
            set_residual(p, *residual_, out);
            p.residual += column * size;
        }
        Term t;
        t.a = lying(x);
        t.b = weights[i]->w;
        t.b_across = true;
        t.whole = whole;
        check_term(t, x.rows, static_cast<size_t>(p.n));
        p.terms.push_back(t);
        refuse(lows[i].has_value() != ups[i].has_value(), "a low needs an up");
        if (lows[i]) {
            Term l;
            l.a = lying(matrix(*lows[i], "low"));
            l.b = lying(matrix(*ups[i], "up"));
            l.b_across = true;
            check_term(l, x.rows, static_cast<size_t>(p.n));
            p.terms.push_back(l);
        }
        products.push_back(p);
        column += static_cast<size_t>(p.n);
    }
    refuse(column != out.columns, "out: " + std::to_string(column) + " columns are needed");
    nb::gil_scoped_release release;
    run_products(threads, products);
}

// dx [T, K] = the sum of dy w of each weight w (dy of all beside each other), and low down
void frozen_backward(const Rows& dy_, const WeightList& weights, const std::optional<Rows>& low_, const std::optional<Rows>& down_, const Rows& dx_,
                     bool whole, int threads) {
    const Matrix dy = matrix(dy_, "dy"), dx = matrix(dx_, "dx");
    Product p = product_into(dx);
    size_t column = 0;
    for (const PyWeight* one : weights) {
        Matrix part = dy;
        part.columns = static_cast<size_t>(one->w.rows);
        refuse(column + part.columns > dy.columns, "dy has fewer columns than the weights have rows");
        part.data += column * (dy.type == Element::bf16 ? 2 : 4);
        Term t;
        t.a = lying(part);
        t.b = one->w;
        t.whole = whole;
        check_term(t, dx.rows, dx.columns);
        p.terms.push_back(t);
        column += part.columns;
    }
    refuse(weights.empty() || column != dy.columns, "dy: " + std::to_string(column) + " columns are needed");
    refuse(low_.has_value() != down_.has_value(), "a low needs a down");
    if (low_) {
        Term l;
        l.a = lying(matrix(*low_, "low"));
        l.b = lying(matrix(*down_, "down"));
        check_term(l, dx.rows, dx.columns);
        p.terms.push_back(l);
    }
    nb::gil_scoped_release release;
    run_products(threads, {p});
}

using FlatFloats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using FlatAny = nb::ndarray<nb::c_contig, nb::device::cpu>;

// The tensors of an optimizer, checked once: steps follow each other by the thousand
struct PyAdamW {
    std::vector<FlatFloats> masters, firsts, seconds, grads;  // kept alive
    std::vector<FlatAny> parameters;
    std::vector<AdamTensor> tensors;

    PyAdamW(std::vector<FlatFloats> masters_, std::vector<FlatFloats> firsts_, std::vector<FlatFloats> seconds_, std::vector<FlatFloats> grads_,
            std::vector<FlatAny> parameters_)
        : masters(std::move(masters_)), firsts(std::move(firsts_)), seconds(std::move(seconds_)), grads(std::move(grads_)),
          parameters(std::move(parameters_)) {
        const size_t n = masters.size();
        refuse(firsts.size() != n || seconds.size() != n || grads.size() != n || parameters.size() != n, "as many of each are needed");
        for (size_t i = 0; i < n; ++i) {
            const auto type = parameters[i].dtype();
            const bool narrow = type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16;
            const bool wide = type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && type.bits == 32;
            refuse(!narrow && !wide, "parameters: float32 or bfloat16 is needed");
            const size_t size = masters[i].size();
            refuse(firsts[i].size() != size || seconds[i].size() != size || grads[i].size() != size || parameters[i].size() != size,
                   "the sizes of one tensor differ");
            tensors.push_back({masters[i].data(), firsts[i].data(), seconds[i].data(), grads[i].data(), static_cast<uint8_t*>(parameters[i].data()),
                               narrow ? Element::bf16 : Element::f32, size});
        }
    }

    double norm(int threads) const {
        nb::gil_scoped_release release;
        return gradient_norm(shared_pool(threads), tensors);
    }

    void step(const std::vector<float>& rates, const std::vector<float>& decays, double factor, double beta1, double beta2, double eps, int steps,
              int threads) const {
        refuse(rates.size() != tensors.size() || decays.size() != tensors.size(), "a rate and a decay for each tensor are needed");
        AdamStep s;
        s.factor = static_cast<float>(factor);
        s.beta1 = static_cast<float>(beta1);
        s.beta2 = static_cast<float>(beta2);
        s.eps = static_cast<float>(eps);
        s.correct1 = static_cast<float>(1 - std::pow(beta1, steps));
        s.correct2 = static_cast<float>(1 - std::pow(beta2, steps));
        std::vector<AdamStep> all(tensors.size(), s);
        for (size_t i = 0; i < all.size(); ++i) {
            all[i].rate = rates[i];
            all[i].decay = decays[i];
        }
        nb::gil_scoped_release release;
        adamw(shared_pool(threads), tensors, all);
    }
};

}  // namespace

void bind_train(nb::module_& m) {
    nb::module_ t = m.def_submodule("train", "What training computes; criadero/kernels/reference.py says what each function does.");
    t.def("norm", &norm, "x"_a, "weight"_a, "eps"_a, "y"_a, "r"_a, "threads"_a);
    t.def("norm_backward", &norm_backward, "dy"_a, "x"_a, "weight"_a, "r"_a, "dres"_a.none(), "dx"_a, "dweight"_a, "threads"_a);
    t.def("swiglu", &swiglu, "gate_up"_a, "y"_a, "threads"_a);
    t.def("swiglu_backward", &swiglu_backward, "dy"_a, "gate_up"_a, "dgate_up"_a, "y"_a, "threads"_a);
    t.def("cross_entropy", &cross_entropy, "logits"_a, "targets"_a, "losses"_a, "backward"_a, "threads"_a);
    t.def("attend", &attend, "qkv"_a, "starts"_a, "heads"_a, "kv_heads"_a, "cosine"_a, "sine"_a, "out"_a, "lse"_a, "d_out"_a.none(),
          "d_qkv"_a.none(), "threads"_a);
    t.def("product", &product, "a"_a, "b"_a, "out"_a, "residual"_a.none(), "a_across"_a, "b_across"_a, "add"_a, "threads"_a);
    t.def("has_product", &own_products);
    // PyTorch's graphs hold weights too, and a process that ends with one is none of the user's concern
    nb::set_leak_warnings(false);
    nb::class_<PyWeight>(t, "Weight", "A frozen weight [N, K] as it lies; see Lying in csrc/train.h.")
        .def_static("dense", &weight_dense, "w"_a)
        .def_static("quant", &weight_quant, "q"_a, "scales"_a, "mins"_a.none(), "bits"_a, "group"_a);
    t.def("frozen", &frozen, "x"_a, "weights"_a, "lows"_a, "ups"_a, "out"_a, "residual"_a.none(), "whole"_a, "threads"_a);
    nb::class_<PyAdamW>(t, "AdamW", "AdamW over tensors that stay where they are.")
        .def(nb::init<std::vector<FlatFloats>, std::vector<FlatFloats>, std::vector<FlatFloats>, std::vector<FlatFloats>, std::vector<FlatAny>>(), "masters"_a,
             "firsts"_a, "seconds"_a, "grads"_a, "parameters"_a)
        .def("norm", &PyAdamW::norm, "threads"_a)
        .def("step", &PyAdamW::step, "rates"_a, "decays"_a, "factor"_a, "beta1"_a, "beta2"_a, "eps"_a, "steps"_a, "threads"_a);
    t.def("frozen_backward", &frozen_backward, "dy"_a, "weights"_a, "low"_a.none(), "down"_a.none(), "dx"_a, "whole"_a, "threads"_a);
}

}  // namespace criadero
