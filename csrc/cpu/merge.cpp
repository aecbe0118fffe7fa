#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/kernels.h"

namespace megatron_vopd::cpu {
namespace {

// Order of the lists: NaN above everything (it must propagate), -0.0 equal to +0.0.
bool precedes(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

}  // namespace

void merge_topk(const TopkLists& lists, const MergedTopk& merged, int64_t begin, int64_t end) {
    std::vector<int64_t> cursor(lists.num_ranks);
    for (int64_t token = begin; token < end; ++token) {
        std::fill(cursor.begin(), cursor.end(), 0);
        for (int64_t slot = 0; slot < merged.topk; ++slot) {
            int64_t best_rank = -1;
            int64_t best_at = 0;
            for (int64_t rank = 0; rank < lists.num_ranks; ++rank) {
                if (cursor[rank] >= lists.lengths[rank]) {
                    continue;
                }
                const int64_t at =
                    (rank * lists.num_tokens + token) * lists.list_size + cursor[rank];
                // Strictly greater only: on a tie the lower rank, that is the lower id, stays.
                if (best_rank < 0 || precedes(lists.student[at], lists.student[best_at])) {
                    best_rank = rank;
                    best_at = at;
                }
            }
            merged.student[token * merged.topk + slot] = lists.student[best_at];
            merged.teacher[token * merged.topk + slot] = lists.teacher[best_at];
            ++cursor[best_rank];
        }
        std::copy(cursor.begin(), cursor.end(), merged.taken + token * lists.num_ranks);
    }
}

}  // namespace megatron_vopd::cpu
