// What this processor can do, and which of our code paths that means.
#pragma once
#include <string>
#include <vector>

namespace criadero {

enum class Level { portable, neon, avx2, avx512 };

struct Cpu {
    bool avx2 = false;         // AVX2, FMA and F16C
    bool avx_vnni = false;     // the 256-bit form of vpdpbusd
    bool avx512_vnni = false;  // AVX-512 F, BW, DQ, VL and VNNI
    bool avx512_bf16 = false;  // vdpbf16ps
    bool neon_dot = false;     // AArch64 with sdot
    bool amd = false;          // whose caches like other hints than Intel's
};

const Cpu& cpu();                // asked once
std::vector<Level> levels();     // those that this processor runs and this build holds, best last
Level best_level();              // the last of them
const char* name_of(Level level);
Level level_named(const std::string& name);  // throws std::invalid_argument for an unknown or impossible one

// The level that everything runs at: the best one, unless set. Set it before anything is computed, or in tests.
Level level();
void set_level(Level level);

int physical_cores();  // cores, not hyperthreads, that this process may use; at least 1

}  // namespace criadero
