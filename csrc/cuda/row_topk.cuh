// Exact top-k of one row by one CTA, from the order keys of the block maxima. As in
// cpu/row_topk.h: a bound that is at most the k-th value prunes blocks; what is above it is
// collected. Atomics only count and place candidates, whose order is then fixed by a sort on
// (key descending, id ascending), so results do not depend on timing.
#pragma once

#include "cuda/device.cuh"

namespace megatron_vopd::cuda {

constexpr int kCandidates = 4096;
constexpr int kLowestKey = static_cast<int>(0x80000000);

// Larger is better: key first, then the smaller id.
__device__ inline unsigned long long composite(int key, int64_t id) {
    return static_cast<unsigned long long>(static_cast<unsigned>(key) ^ 0x80000000u) << 32 |
           (0xffffffffu - static_cast<unsigned>(id));
}

__device__ inline int64_t composite_id(unsigned long long entry) {
    return static_cast<int64_t>(0xffffffffu - static_cast<unsigned>(entry));
}

// Sum over the CTA, on every thread.
__device__ inline int cta_count(int value, int* scratch) {
    value = __reduce_add_sync(0xffffffffu, value);
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = value;
    }
    __syncthreads();
    int total = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
        total += scratch[warp];
    }
    __syncthreads();
    return total;
}

// The largest key of which at least k elements are not below it; count(pivot) is this thread's
// number of elements at or above the pivot.
template <typename Count>
__device__ int kth_largest(int64_t k, int* scratch, Count count) {
    int64_t low = kLowestKey, high = 0x7fffffff;
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        if (cta_count(count(static_cast<int>(middle)), scratch) >= k) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return static_cast<int>(low);
}

template <typename T>
struct TopkRow {
    const T* x;
    Blocks blocks;
    const int* block_keys;

    // Calls visit(key, column) for this lane's columns of a block.
    template <typename Visit>
    __device__ void visit_block(int block, Visit visit) const {
        float values[kGroup];
        const int lane = threadIdx.x % 32;
        load_group(x, blocks, block, lane, true, 0.0f, values);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            const int column = group_column<T>(block, blocks.shift, lane, i);
            if (column >= 0 && column < blocks.num_valid) {
                visit(order_key(values[i]), column);
            }
        }
    }

    // The same for all blocks whose maximum is at least `bound`, spread over the warps.
    template <typename Visit>
    __device__ void visit_from(int bound, Visit visit) const {
        for (int block = threadIdx.x / 32; block < blocks.count; block += kWarps) {
            if (block_keys[block] >= bound) {
                visit_block(block, visit);
            }
        }
    }
};

// A lower bound of the k-th key: the k-th block maximum, or better the k-th element of the few
// blocks with the largest maxima, which is exact where the top is concentrated (ascending rows).
template <typename T>
__device__ int lower_bound(const TopkRow<T>& row, int64_t k, int* sample, int* counter,
                           int* scratch) {
    auto among_blocks = [&](int pivot) {
        int above = 0;
        for (int block = threadIdx.x; block < row.blocks.count; block += kThreads) {
            above += row.block_keys[block] >= pivot;
        }
        return above;
    };
    int bound = row.blocks.count < k ? kLowestKey : kth_largest(k, scratch, among_blocks);
    const int64_t few = min(static_cast<int64_t>(row.blocks.count), (k + kBlock - 1) / kBlock + 2);
    const int floor = kth_largest(few, scratch, among_blocks);
    if (threadIdx.x == 0) {
        *counter = 0;
    }
    __syncthreads();
    // Any `few` blocks of those that reach the floor will do; a full sample stops the rest.
    row.visit_from(floor, [&](int key, int64_t) {
        const int at = atomicAdd(counter, 1);
        if (at < 2 * kCandidates) {
            sample[at] = key;
        }
    });
    __syncthreads();
    const int size = min(*counter, 2 * kCandidates);
    if (*counter <= 2 * kCandidates && size >= k) {
        const int tighter = kth_largest(k, scratch, [&](int pivot) {
            int above = 0;
            for (int i = threadIdx.x; i < size; i += kThreads) {
                above += sample[i] >= pivot;
            }
            return above;
        });
        bound = max(bound, tighter);
    }
    __syncthreads();
    return bound;
}

// Places all columns above `bound` into entries; returns how many there are (maybe too many).
template <typename T>
__device__ int collect_above(const TopkRow<T>& row, int bound, unsigned long long* entries,
                             int* counter) {
    if (threadIdx.x == 0) {
        *counter = 0;
    }
    __syncthreads();
    row.visit_from(bound, [&](int key, int64_t column) {
        if (key > bound) {
            const int at = atomicAdd(counter, 1);
            if (at < kCandidates) {
                entries[at] = composite(key, column);
            }
        }
    });
    __syncthreads();
    return *counter;
}

// Appends the first `wanted` columns equal to `bound`, in id order: warp 0 walks the blocks.
template <typename T>
__device__ void append_ties(const TopkRow<T>& row, int bound, int wanted,
                            unsigned long long* entries, int filled) {
    if (threadIdx.x >= 32) {
        return;
    }
    for (int block = 0; block < row.blocks.count && wanted > 0; ++block) {
        if (row.block_keys[block] < bound) {
            continue;
        }
        const int base = block * kBlock - row.blocks.shift;
        for (int step = 0; step < kBlock / 32 && wanted > 0; ++step) {
            const int column = base + step * 32 + threadIdx.x;
            const bool hit = column >= 0 && column < row.blocks.num_valid &&
                             order_key(to_float(row.x[column])) == bound;
            const unsigned hits = __ballot_sync(0xffffffffu, hit);
            const int before = __popc(hits & ((1u << threadIdx.x) - 1));
            if (hit && before < wanted) {
                entries[filled + before] = composite(bound, column);
            }
            const int taken = min(__popc(hits), wanted);
            filled += taken;
            wanted -= taken;
        }
    }
}

// Bitonic sort, largest first; `size` a power of two.
__device__ inline void sort_descending(unsigned long long* entries, int size) {
    for (int width = 2; width <= size; width *= 2) {
        for (int step = width / 2; step > 0; step /= 2) {
            for (int i = threadIdx.x; i < size / 2; i += kThreads) {
                const int low = 2 * step * (i / step) + i % step;
                const bool descending = (low & width) == 0;
                const unsigned long long a = entries[low], b = entries[low + step];
                if ((a < b) == descending) {
                    entries[low] = b;
                    entries[low + step] = a;
                }
            }
            __syncthreads();
        }
    }
}

// All threads call it. entries (shared): kCandidates; counter, scratch (shared): 1 and kWarps.
template <typename T>
__device__ void row_topk(const TopkRow<T>& row, const T* y, int64_t k, unsigned long long* entries,
                         int* counter, int* scratch, float* out_x, float* out_y, int64_t* out_ids) {
    int bound = lower_bound(row, k, reinterpret_cast<int*>(entries), counter, scratch);
    int count = collect_above(row, bound, entries, counter);
    if (count > kCandidates) {
        // Rare: search the k-th key itself over the blocks that can hold it.
        const int floor = bound;
        bound = kth_largest(k, scratch, [&](int pivot) {
            int above = 0;
            row.visit_from(max(pivot, floor), [&](int key, int64_t) { above += key >= pivot; });
            return above;
        });
        count = collect_above(row, bound, entries, counter);
    }
    if (count < k) {
        append_ties(row, bound, static_cast<int>(k) - count, entries, count);
        count = static_cast<int>(k);
    }
    __syncthreads();
    int size = 2;
    while (size < count) {
        size *= 2;
    }
    for (int i = count + threadIdx.x; i < size; i += kThreads) {
        entries[i] = 0;
    }
    __syncthreads();
    sort_descending(entries, size);
    for (int64_t slot = threadIdx.x; slot < k; slot += kThreads) {
        const int64_t id = composite_id(entries[slot]);
        out_ids[slot] = id;
        out_x[slot] = to_float(row.x[id]);
        out_y[slot] = to_float(y[id]);
    }
    __syncthreads();
}

}  // namespace megatron_vopd::cuda
