#include "cpu/isa.h"

#include <atomic>

namespace megatron_vopd::cpu {
namespace {

Isa probe() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return Isa::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return Isa::avx2;
    }
#endif
    return Isa::portable;
}

std::atomic<Isa>& selected() {
    static std::atomic<Isa> isa{detected_isa()};
    return isa;
}

}  // namespace

Isa detected_isa() {
    static const Isa isa = probe();
    return isa;
}

Isa current_isa() { return selected().load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
    if (isa > detected_isa()) {
        return false;
    }
    selected().store(isa, std::memory_order_relaxed);
    return true;
}

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "portable";
    }
}

}  // namespace megatron_vopd::cpu
