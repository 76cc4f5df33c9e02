// Compiled with the flags of this instruction set.
#include "ops_impl.h"

namespace criadero {

const OpsKernels& ops_portable() { return table; }

}  // namespace criadero
