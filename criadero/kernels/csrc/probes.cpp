#include <nanobind/nanobind.h>

#include "bindings.h"

namespace criadero {
void bind_probes(nanobind::module_&) {}
}  // namespace criadero
