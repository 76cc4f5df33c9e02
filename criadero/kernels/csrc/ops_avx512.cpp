// Compiled with the flags of this instruction set.
#include "ops_impl.h"

namespace criadero {

const OpsKernels& ops_avx512() { return table; }

}  // namespace criadero
