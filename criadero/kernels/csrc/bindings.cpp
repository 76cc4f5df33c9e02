#include "bindings.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace nb = nanobind;
using namespace criadero;

NB_MODULE(_native, m) {
    m.doc() = "Criadero's compiled kernels. Use criadero.kernels, which says where they are missing.";
    m.def("levels", [] {
        std::vector<std::string> names;
        for (Level one : levels()) names.emplace_back(name_of(one));
        return names;
    });
    m.def("level", [] { return std::string(name_of(level())); });
    m.def("set_level", [](const std::string& name) { set_level(level_named(name)); });
    m.def("physical_cores", &physical_cores);
    m.def("features", [] {
        std::vector<std::string> names;
        if (cpu().avx2) names.emplace_back("avx2");
        if (cpu().avx_vnni) names.emplace_back("avx_vnni");
        if (cpu().avx512_vnni) names.emplace_back("avx512_vnni");
        if (cpu().avx512_bf16) names.emplace_back("avx512_bf16");
        if (cpu().neon_dot) names.emplace_back("neon_dot");
        return names;
    });
    bind_linear(m);
    bind_probes(m);
    bind_train(m);
#if CRIADERO_MODEL
    bind_model(m);
#endif
}
