// Conversions of single elements, and the headers that the row kernels need. Included before any
// target pragma, so that nothing of the standard library is compiled for one instruction set only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "distill_stats.h"
