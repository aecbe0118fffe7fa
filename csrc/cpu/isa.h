// Which instruction set the CPU kernels use: found once at run time, and settable by the tests.
#pragma once

namespace megatron_vopd::cpu {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

// The best set that this machine runs.
Isa detected_isa();

// The set in use: detected_isa() unless set_isa() chose a lesser one.
Isa current_isa();

// Selects a set for every later call in this process; false when the machine does not have it.
bool set_isa(Isa isa);

const char* isa_name(Isa isa);

}  // namespace megatron_vopd::cpu
