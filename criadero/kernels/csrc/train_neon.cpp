// Compiled with the flags of this instruction set.
#include "train_impl.h"

namespace criadero {

const TrainKernels& train_neon(Element type) { return tables[(int)type]; }

}  // namespace criadero
