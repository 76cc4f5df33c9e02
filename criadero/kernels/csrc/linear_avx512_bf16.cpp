#include "linear.h"
namespace criadero {
const LinearKernels& linear_avx512_bf16() { return linear_portable(); }
}  // namespace criadero
