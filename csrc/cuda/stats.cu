// Statistics and top-k of a shard: one CTA per token, no workspace in global memory.
#include "cuda/row_stats.cuh"
#include "cuda/row_topk.cuh"

namespace megatron_vopd::cuda {
namespace {

// A row without columns contributes the empty tuple.
__device__ void write_empty(double* packed) {
    if (threadIdx.x == 0) {
        packed[0] = packed[1] = kEmptyReference;
        for (int i = 2; i < kTupleSize; ++i) {
            packed[i] = 0;
        }
    }
}

// What a top-k over the largest shard takes of the 48 KiB that need no permission.
static_assert(kScratch * sizeof(double) + sizeof(int) + kCandidates * sizeof(unsigned long long) +
                  (kMaxColumns / kBlock + 2) * sizeof(int) <=
              49152);

template <typename T, bool with_topk>
__global__ void __launch_bounds__(kThreads, kCtas) stats_kernel(Logits logits, LocalStats out) {
    extern __shared__ unsigned long long entries[];
    __shared__ double scratch[kScratch];
    __shared__ int counter;
    const int64_t t = blockIdx.x;
    const T* x = static_cast<const T*>(logits.student) + t * logits.student_stride;
    const T* y = static_cast<const T*>(logits.teacher) + t * logits.teacher_stride;
    double* packed = out.packed + t * kTupleSize;
    if (logits.num_valid == 0) {
        write_empty(packed);
        return;
    }
    int* const block_keys = reinterpret_cast<int*>(entries + kCandidates);
    const Blocks blocks(logits.num_valid, misalignment(x));
    row_stats<with_topk>(x, y, logits.labels + t, blocks, logits.temperature, block_keys, scratch,
                         packed);
    if constexpr (with_topk) {
        const TopkRow<T> row = {x, blocks, block_keys};
        const int64_t at = t * out.topk;
        row_topk(row, y, out.topk, entries, &counter, reinterpret_cast<int*>(scratch),
                 out.topk_student + at, out.topk_teacher + at, out.topk_ids + at);
    }
}

template <typename T>
void launch_stats(const Logits& logits, const LocalStats& out, int64_t num_tokens,
                  cudaStream_t stream) {
    const dim3 grid(static_cast<unsigned>(num_tokens));
    if (out.topk > 0) {
        // One block more than the columns need, for a row that starts off a boundary.
        const size_t shared = kCandidates * sizeof(unsigned long long) +
                              (logits.num_valid / kBlock + 2) * sizeof(int);
        stats_kernel<T, true><<<grid, kThreads, shared, stream>>>(logits, out);
    } else {
        stats_kernel<T, false><<<grid, kThreads, 0, stream>>>(logits, out);
    }
}

}  // namespace

cudaError_t local_stats(const Logits& logits, const LocalStats& out, int64_t num_tokens,
                        cudaStream_t stream) {
    if (num_tokens == 0) {
        return cudaSuccess;
    }
    if (logits.dtype == Dtype::f32) {
        launch_stats<float>(logits, out, num_tokens, stream);
    } else {
        launch_stats<__nv_bfloat16>(logits, out, num_tokens, stream);
    }
    return cudaGetLastError();
}

}  // namespace megatron_vopd::cuda
