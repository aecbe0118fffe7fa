// Merges over ranks: tuples by one thread per token, top-k lists by one warp per token.
#include "cuda/device.cuh"

namespace megatron_vopd::cuda {
namespace {

constexpr int kMergeThreads = 128;

__global__ void merge_stats_kernel(const double* packed, int64_t num_ranks, int64_t num_tokens,
                                   double optimal_floor, double* out) {
    const int64_t t = blockIdx.x * static_cast<int64_t>(kMergeThreads) + threadIdx.x;
    if (t < num_tokens) {
        merge_and_finalize(packed + t * kTupleSize, num_ranks, num_tokens * kTupleSize,
                           optimal_floor, out + t * kFinalSize);
    }
}

// Lane r holds the head of rank r's list. Every output is the best head; on a tie the lowest rank,
// that is the lowest id.
__global__ void merge_topk_kernel(const float* student, const float* teacher,
                                  const int64_t* lengths, int64_t num_ranks, int64_t num_tokens,
                                  int64_t list_size, int64_t topk, float* out_student,
                                  float* out_teacher, int64_t* taken) {
    constexpr unsigned kAll = 0xffffffffu;
    const int lane = threadIdx.x % 32;
    const int64_t t = (blockIdx.x * static_cast<int64_t>(kMergeThreads) + threadIdx.x) / 32;
    if (t >= num_tokens) {
        return;
    }
    const bool mine = lane < num_ranks;
    const int64_t length = mine ? lengths[lane] : 0;
    const int64_t base = mine ? (lane * num_tokens + t) * list_size : 0;
    int64_t cursor = 0;
    int key = 0;
    if (length > 0) {
        key = order_key(student[base]);
    }
    for (int64_t slot = 0; slot < topk; ++slot) {
        const bool open = cursor < length;
        const unsigned contenders = __ballot_sync(kAll, open);
        const int best = __reduce_max_sync(kAll, open ? key : static_cast<int>(0x80000000));
        const unsigned winners = __ballot_sync(kAll, open && key == best) & contenders;
        if (lane == __ffs(winners) - 1) {
            out_student[t * topk + slot] = student[base + cursor];
            out_teacher[t * topk + slot] = teacher[base + cursor];
            ++cursor;
            if (cursor < length) {
                key = order_key(student[base + cursor]);
            }
        }
    }
    if (mine) {
        taken[t * num_ranks + lane] = cursor;
    }
}

unsigned grid_of(int64_t threads) {
    return static_cast<unsigned>((threads + kMergeThreads - 1) / kMergeThreads);
}

}  // namespace

cudaError_t merge_stats(const double* packed, int64_t num_ranks, int64_t num_tokens,
                        double optimal_floor, double* out, cudaStream_t stream) {
    if (num_tokens == 0) {
        return cudaSuccess;
    }
    merge_stats_kernel<<<grid_of(num_tokens), kMergeThreads, 0, stream>>>(
        packed, num_ranks, num_tokens, optimal_floor, out);
    return cudaGetLastError();
}

cudaError_t merge_topk(const TopkLists& lists, const MergedTopk& merged, cudaStream_t stream) {
    if (lists.num_tokens == 0) {
        return cudaSuccess;
    }
    merge_topk_kernel<<<grid_of(lists.num_tokens * 32), kMergeThreads, 0, stream>>>(
        lists.student, lists.teacher, lists.lengths, lists.num_ranks, lists.num_tokens,
        lists.list_size, merged.topk, merged.student, merged.teacher, merged.taken);
    return cudaGetLastError();
}

}  // namespace megatron_vopd::cuda
