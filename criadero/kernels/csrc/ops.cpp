#include "ops.h"

namespace criadero {

size_t attend_scratch(int head_dim) {
    const size_t padded = static_cast<size_t>((head_dim + UNIT - 1) / UNIT * UNIT);
    return 3 * ROWS * padded + ROWS * (SEGMENT + UNIT) + 2 * 64 * padded + 4 * ROWS;  // as AttendRoom cuts it up
}

const OpsKernels& ops_kernels() {
    switch (level()) {
#if defined(__x86_64__)
        case Level::avx512: return ops_avx512();
        case Level::avx2: return ops_avx2();
#elif defined(__aarch64__)
        case Level::neon: return ops_neon();
#endif
        default: return ops_portable();
    }
}

}  // namespace criadero
