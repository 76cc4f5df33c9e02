#include "linear_avx2_impl.h"

namespace criadero {

const LinearKernels& linear_avx2() {
    static const LinearKernels table{prepare_row, tiles, false, nullptr};
    return table;
}

}  // namespace criadero
