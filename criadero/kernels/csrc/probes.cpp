#include "probes.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"

namespace nb = nanobind;

namespace criadero {

namespace {

uint64_t read_words(const uint8_t* p, size_t bytes) {
    uint64_t sums[8] = {0};
    for (size_t at = 0; at < bytes; at += 64) {
        uint64_t words[8];
        std::memcpy(words, p + at, 64);
        for (int i = 0; i < 8; ++i) sums[i] += words[i];
    }
    uint64_t all = 0;
    for (uint64_t sum : sums) all += sum;
    return all;
}

Probes probes() {
    Probes p{read_words, nullptr, nullptr, nullptr};
#if defined(__x86_64__)
    if (level() == Level::avx512) {
        p = probes_avx512();
        if (cpu().avx512_bf16) p.bf16 = probes_avx512_bf16().bf16;
    } else if (level() == Level::avx2) {
        p = probes_avx2();
    }
#endif
    return p;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Operations a second of one kind, by all threads at once, for about `seconds`; 0 where the processor has none.
double peak(const std::string& kind, int threads, double seconds) {
    const Probes p = probes();
    auto* work = kind == "int8" ? p.int8 : kind == "bf16" ? p.bf16 : kind == "f32" ? p.f32 : nullptr;
    if (!work) return 0;
    nb::gil_scoped_release release;
    std::vector<double> rates(static_cast<size_t>(threads));
    shared_pool(threads).run([&](Worker& me) {
        work(100000);
        me.barrier();
        const double began = now();
        double done = 0;
        while (now() - began < seconds) done += work(100000);
        rates[static_cast<size_t>(me.index)] = done / (now() - began);
    });
    double sum = 0;
    for (double rate : rates) sum += rate;
    return sum;
}

// Bytes a second, reading `bytes` (much more than the caches hold) over and over for about `seconds`: the best pass.
double bandwidth(size_t bytes, int threads, double seconds) {
    if (threads < 1 || bytes < (size_t{1} << 20)) throw std::invalid_argument("at least one thread and a MiB are needed");
    const Probes p = probes();
    nb::gil_scoped_release release;
    const size_t piece = (size_t{256} << 10);
    const int pieces = static_cast<int>(bytes / piece);
    Buffer memory(static_cast<size_t>(pieces) * piece + 65536);
    double best = 0;
    std::atomic<uint64_t> sink{0};
    shared_pool(threads).run([&](Worker& me) {
        for (int i = me.first(pieces); i < me.last(pieces); ++i) std::memset(memory.data + static_cast<size_t>(i) * piece, i, piece);
        me.barrier();
        const double started = now();
        for (bool more = true; more;) {
            me.barrier();
            const double began = now();
            uint64_t sum = 0;
            for (int i = me.next(); i < pieces; i = me.next()) sum += p.read(memory.data + static_cast<size_t>(i) * piece, piece);
            sink.fetch_add(sum);
            me.barrier();
            const double ended = now();
            if (me.index == 0) best = std::max(best, static_cast<double>(pieces) * static_cast<double>(piece) / (ended - began));
            if (me.index == 0) sink.store(ended - started < seconds ? 1 : 0);  // thread 0 decides for all
            me.barrier();
            more = sink.load() != 0;
        }
    });
    return best;
}

}  // namespace

void bind_probes(nb::module_& m) {
    m.def("peak", &peak, nb::arg("kind"), nb::arg("threads"), nb::arg("seconds"));
    m.def("bandwidth", &bandwidth, nb::arg("bytes"), nb::arg("threads"), nb::arg("seconds"));
}

}  // namespace criadero
