// Raw-pointer entry points of the CPU kernels. No torch types: bindings.cpp checks and allocates.
// Every function works on tokens [begin, end), so that the caller decides how to spread them.
#pragma once

#include <cstdint>

namespace megatron_vopd::cpu {

// Per-rank top-k lists, each sorted by (value descending, id ascending; NaN first), of shape
// [num_ranks, num_tokens, list_size]; only the first lengths[r] entries of rank r are read.
struct TopkLists {
    const float* student;
    const float* teacher;
    const int64_t* lengths;
    int64_t num_ranks;
    int64_t num_tokens;
    int64_t list_size;
};

// The global list [num_tokens, topk] and how many entries came from each rank [num_tokens,
// num_ranks].
struct MergedTopk {
    float* student;
    float* teacher;
    int64_t* taken;
    int64_t topk;
};

// Stable k-way merge in rank order. Shards are contiguous, so rank order is id order and the result
// is the exact global answer. Requires sum(lengths) >= topk.
void merge_topk(const TopkLists& lists, const MergedTopk& merged, int64_t begin, int64_t end);

}  // namespace megatron_vopd::cpu
