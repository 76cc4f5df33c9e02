// The pieces of the Python module `criadero.kernels._native`; bindings.cpp joins them.
#pragma once
#include <nanobind/nanobind.h>

#include "linear.h"

namespace criadero {

// What Python holds as `Linear`.
struct PyLinear {
    Linear w;
};

void bind_linear(nanobind::module_& m);
void bind_probes(nanobind::module_& m);
void bind_train(nanobind::module_& m);
#if CRIADERO_MODEL
void bind_model(nanobind::module_& m);  // bindings_model.cpp
#endif

}  // namespace criadero
