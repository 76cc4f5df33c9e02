// Compiled with the flags of this instruction set.
#include "train_impl.h"
#include "train_product_impl.h"

namespace criadero {

const TrainKernels& train_portable(Element type) { return tables[(int)type]; }
const ProductKernels& products_portable() { return products; }

}  // namespace criadero
