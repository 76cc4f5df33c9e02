// Compiled with the flags of this instruction set.
#include "train_impl.h"
#include "train_product_impl.h"

namespace criadero {

const TrainKernels& train_avx2(Element type) { return tables[(int)type]; }
const ProductKernels& products_avx2() { return products; }

}  // namespace criadero
