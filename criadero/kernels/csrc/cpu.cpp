#include "cpu.h"

#include <atomic>
#include <cstdio>
#include <fstream>
#include <set>
#include <stdexcept>
#include <thread>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sched.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace criadero {

namespace {

Cpu detect() {
    Cpu has;
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    has.amd = __get_cpuid(0, &a, &b, &c, &d) && b == signature_AMD_ebx;
    auto bit = [](unsigned word, int n) { return ((word >> n) & 1) != 0; };
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return has;  // 27: the system saves the wide registers
    const bool fma = bit(c, 12), f16c = bit(c, 29);
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x06) == 0x06, zmm = (low & 0xe6) == 0xe6;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return has;
    const unsigned more = a;
    has.avx2 = ymm && fma && f16c && bit(b, 5);
    // F, DQ, BW, VL, VNNI
    has.avx512_vnni = has.avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11);
    if (more >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
        has.avx_vnni = has.avx2 && bit(a, 4);
        has.avx512_bf16 = has.avx512_vnni && bit(a, 5);
    }
#elif defined(__aarch64__) && defined(__APPLE__)
    has.neon_dot = true;  // every Apple M has it
#elif defined(__aarch64__) && defined(__linux__)
    has.neon_dot = (getauxval(AT_HWCAP) & (1UL << 20)) != 0;  // HWCAP_ASIMDDP
#endif
    return has;
}

std::atomic<int> current{-1};

// The processor time that a container may use, in cores; 0 if it is not limited.
int quota() {
    std::ifstream file("/sys/fs/cgroup/cpu.max");
    double allowed = 0, period = 0;
    if (!(file >> allowed >> period) || period <= 0) return 0;  // "max 100000" is no number
    const int cores = static_cast<int>(allowed / period + 0.5);
    return cores < 1 ? 1 : cores;
}

}  // namespace

const Cpu& cpu() {
    static const Cpu found = detect();
    return found;
}

std::vector<Level> levels() {
    std::vector<Level> all{Level::portable};
    if (cpu().neon_dot) all.push_back(Level::neon);
    if (cpu().avx2) all.push_back(Level::avx2);
    if (cpu().avx512_vnni) all.push_back(Level::avx512);
    return all;
}

Level best_level() { return levels().back(); }

const char* name_of(Level level) {
    switch (level) {
        case Level::neon: return "neon";
        case Level::avx2: return "avx2";
        case Level::avx512: return "avx512";
        default: return "portable";
    }
}

Level level_named(const std::string& name) {
    for (Level one : levels()) {
        if (name == name_of(one)) return one;
    }
    std::string all;
    for (Level one : levels()) all += (all.empty() ? "" : ", ") + std::string(name_of(one));
    throw std::invalid_argument("this processor has no level \"" + name + "\"; it has " + all);
}

Level level() {
    const int now = current.load(std::memory_order_relaxed);
    return now < 0 ? best_level() : static_cast<Level>(now);
}

void set_level(Level level) { current.store(static_cast<int>(level)); }

int physical_cores() {
    int cores = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
        std::set<std::string> siblings;  // one entry for each core: the list of the threads it runs
        for (int i = 0; i < CPU_SETSIZE; ++i) {
            if (!CPU_ISSET(i, &allowed)) continue;
            std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(i) + "/topology/thread_siblings_list");
            std::string line;
            if (!std::getline(file, line)) line = "cpu" + std::to_string(i);
            siblings.insert(line);
        }
        if (!siblings.empty()) cores = static_cast<int>(siblings.size());
    }
    const int limit = quota();
    if (limit > 0 && limit < cores) cores = limit;
#elif defined(__APPLE__)
    int fast = 0;
    size_t size = sizeof fast;
    // The performance cores: the others would be waited for at every barrier.
    if (sysctlbyname("hw.perflevel0.physicalcpu", &fast, &size, nullptr, 0) == 0 && fast > 0) cores = fast;
#endif
    return cores < 1 ? 1 : cores;
}

}  // namespace criadero
