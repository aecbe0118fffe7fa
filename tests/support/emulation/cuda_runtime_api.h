// Just enough CUDA for the kernels to run on a CPU: the threads of a block are fibers of one host
// thread, which switch at barriers and warp operations; blocks run one after the other. Correctness
// of indices, merges and selections is tested this way; races, alignment faults and speed are not.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct dim3 {
    unsigned x;
    dim3(unsigned value = 1) : x(value) {}
};
struct float4 {
    float x, y, z, w;
};
struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

struct Group {
    int size = 0, arrived = 0;
    long generation = 0;
    double slots[1024];
};

struct Block {
    std::vector<std::unique_ptr<std::vector<char>>> stacks;
    std::vector<ucontext_t> fibers;
    std::vector<bool> done;
    ucontext_t scheduler;
    Group all;
    std::vector<Group> warps;
    std::vector<char> shared;
    std::function<void()> body;
    int current = 0;
};

inline Block* block = nullptr;
// 0: threads run in order, each up to its next barrier. Else in an order drawn from it, and for
// stretches of time only one warp runs, so that it gets as far ahead as barriers let it.
inline uint32_t shuffle_seed = 0;

struct Schedule {
    std::vector<int> order;
    uint32_t state;
    int only = -1, stretch = 0;

    Schedule(int threads, unsigned block) : order(threads), state(shuffle_seed + block) {
        std::iota(order.begin(), order.end(), 0);
    }

    uint32_t draw(uint32_t below) {
        state = state * 1664525u + 1013904223u;
        return (state >> 8) % below;
    }

    void next() {
        if (shuffle_seed == 0) {
            return;
        }
        for (size_t i = order.size() - 1; i > 0; --i) {
            std::swap(order[i], order[draw(i + 1)]);
        }
        if (--stretch < 0) {
            stretch = static_cast<int>(draw(24));
            only = static_cast<int>(draw(order.size() / 32 + 1)) - 1;
        }
    }

    bool runs(int thread) const { return only < 0 || thread / 32 == only; }
};

inline void yield() {
    swapcontext(&block->fibers[block->current], &block->scheduler);
}

// Waits until every thread of the group is here.
inline void meet(Group& group) {
    const long generation = group.generation;
    if (++group.arrived == group.size) {
        group.arrived = 0;
        ++group.generation;
    }
    while (group.generation == generation) {
        yield();
    }
}

inline void entry() {
    block->body();
    block->done[block->current] = true;
    yield();
}

}  // namespace emulation

struct ThreadIndex {
    struct {
        operator int() const { return emulation::block->current; }
    } x;
};
struct BlockIndex {
    int64_t x;
};
inline ThreadIndex threadIdx;
inline BlockIndex blockIdx;

namespace emulation {

inline void launch(dim3 grid, int threads, size_t shared_bytes, void*, std::function<void()> body) {
    for (unsigned b = 0; b < grid.x; ++b) {
        Block here;
        block = &here;
        blockIdx.x = b;
        here.body = body;
        here.shared.resize(shared_bytes + 64);
        here.fibers.resize(threads);
        here.done.assign(threads, false);
        here.all.size = threads;
        here.warps.resize(threads / 32);
        for (auto& warp : here.warps) {
            warp.size = 32;
        }
        for (int t = 0; t < threads; ++t) {
            here.stacks.push_back(std::make_unique<std::vector<char>>(65536));
            getcontext(&here.fibers[t]);
            here.fibers[t].uc_stack.ss_sp = here.stacks[t]->data();
            here.fibers[t].uc_stack.ss_size = here.stacks[t]->size();
            here.fibers[t].uc_link = &here.scheduler;
            makecontext(&here.fibers[t], entry, 0);
        }
        Schedule schedule(threads, b);
        for (int left = threads; left > 0;) {
            schedule.next();
            for (const int t : schedule.order) {
                if (!here.done[t] && schedule.runs(t)) {
                    here.current = t;
                    swapcontext(&here.scheduler, &here.fibers[t]);
                    left -= here.done[t];
                }
            }
        }
    }
}

template <typename T>
T* dynamic_shared() {
    const auto at = reinterpret_cast<uintptr_t>(block->shared.data());
    return reinterpret_cast<T*>((at + 63) / 64 * 64);
}

// Every lane's value, then a value of all of them.
template <typename Combine>
auto exchange(Group& group, int at, double value, Combine combine) {
    group.slots[at] = value;
    meet(group);
    const auto result = combine(group.slots);
    meet(group);
    return result;
}

inline int lane() { return block->current % 32; }
inline Group& warp() { return block->warps[block->current / 32]; }

}  // namespace emulation

inline void __syncthreads() { emulation::meet(emulation::block->all); }

inline int __syncthreads_or(int value) {
    auto& all = emulation::block->all;
    return emulation::exchange(all, emulation::block->current, value, [&](double* slots) {
        int any = 0;
        for (int t = 0; t < all.size; ++t) {
            any |= slots[t] != 0;
        }
        return any;
    });
}

template <typename Combine>
auto over_warp(double value, Combine combine) {
    return emulation::exchange(emulation::warp(), emulation::lane(), value, combine);
}

inline int __reduce_max_sync(unsigned, int value) {
    return over_warp(value, [](double* s) {
        double most = s[0];
        for (int i = 1; i < 32; ++i) {
            most = s[i] > most ? s[i] : most;
        }
        return static_cast<int>(most);
    });
}

inline int __reduce_add_sync(unsigned, int value) {
    return over_warp(value, [](double* s) {
        double total = 0;
        for (int i = 0; i < 32; ++i) {
            total += s[i];
        }
        return static_cast<int>(total);
    });
}

inline unsigned __ballot_sync(unsigned, bool value) {
    return over_warp(value, [](double* s) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) {
            bits |= static_cast<unsigned>(s[i] != 0) << i;
        }
        return bits;
    });
}

template <typename T>
T __shfl_down_sync(unsigned, T value, int offset) {
    const int lane = emulation::lane();
    return over_warp(value, [=](double* s) {
        return static_cast<T>(s[lane + offset < 32 ? lane + offset : lane]);
    });
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
    const int lane = emulation::lane();
    return over_warp(value, [=](double* s) { return static_cast<T>(s[lane ^ offset]); });
}

inline int atomicAdd(int* at, int value) {
    const int before = *at;
    *at += value;
    return before;
}

inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <typename To, typename From>
To bits_as(From value) {
    To out;
    std::memcpy(&out, &value, sizeof(out));
    return out;
}
inline int __float_as_int(float value) { return bits_as<int>(value); }
inline float __uint_as_float(uint32_t value) { return bits_as<float>(value); }

template <typename T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
    return a < b ? b : a;
}
