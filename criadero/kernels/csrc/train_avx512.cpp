// Compiled with the flags of this instruction set.
#include "train_impl.h"
#include "train_product_impl.h"

namespace criadero {

const TrainKernels& train_avx512(Element type) { return tables[(int)type]; }
const ProductKernels& products_avx512() { return products; }

}  // namespace criadero
