#define LINEAR_VNNI 1
#ifdef __AVXVNNI__
#define DPBUSD _mm256_dpbusd_avx_epi32
#else  // a test build for processors that have the AVX-512 form of it alone
#define DPBUSD _mm256_dpbusd_epi32
#endif
#include "linear_avx2_impl.h"

namespace criadero {

const LinearKernels& linear_avx_vnni() {
    static const LinearKernels table{prepare_row, tiles, false, nullptr};
    return table;
}

}  // namespace criadero
