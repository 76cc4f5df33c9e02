// What the machine can do at most, for benchmarks to stand beside: reading memory, and multiplying without reading any.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace criadero {

struct Probes {
    uint64_t (*read)(const uint8_t* p, size_t bytes);  // bytes: a multiple of 1024. Returns something that depends on all of them
    // Each does `rounds` rounds of independent multiply-adds in registers, and returns how many operations (a product and a sum are two).
    // nullptr: the instruction set has no such thing.
    double (*int8)(int rounds);
    double (*bf16)(int rounds);
    double (*f32)(int rounds);
};
Probes probes_avx512();
Probes probes_avx512_bf16();
Probes probes_avx2();

}  // namespace criadero
