// Exact top-k of one row by block-max pruning. Included like row_stats.h, after it.
//
// theta, the k-th largest block maximum, is at most the true k-th value, so only blocks whose
// maximum reaches it can hold entries. Candidates x >= theta are collected in id order; when there
// are too many of them (ties, ascending rows), theta is raised to the k-th value seen so far, and
// from then on only x > theta can displace anything, because later ids lose ties. Values compare as
// numbers, so -0.0 equals +0.0; a row with NaN takes the slow path, where NaN sorts first.

struct TopkScratch {
    std::vector<float> block_max;
    std::vector<int32_t> keys;
    std::vector<float> values;
    std::vector<int32_t> ids;
    std::vector<uint64_t> order;
};

// Integers in the order of the floats; equal for equal numbers; NaN above all.
inline int32_t order_key(float value) {
    const float canonical = value + 0.0f;
    if (canonical != canonical) {
        return std::numeric_limits<int32_t>::max();
    }
    int32_t bits;
    std::memcpy(&bits, &canonical, sizeof(bits));
    return bits >= 0 ? bits : bits ^ 0x7fffffff;
}

inline float key_value(int32_t key) {
    const int32_t bits = key >= 0 ? key : key ^ 0x7fffffff;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// The k-th largest key, by bisection on its bits: counting is a vector loop without branches.
inline int32_t kth_largest_key(const int32_t* keys, int64_t count, int64_t k) {
    int64_t low = std::numeric_limits<int32_t>::min();
    int64_t high = std::numeric_limits<int32_t>::max();
    while (low < high) {
        const int64_t middle = low + (high - low + 1) / 2;
        const int32_t pivot = static_cast<int32_t>(middle);
        int32_t above = 0;
        for (int64_t i = 0; i < count; ++i) {
            above += keys[i] >= pivot;
        }
        if (above >= k) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return static_cast<int32_t>(low);
}

inline float kth_largest(TopkScratch& scratch, const float* values, int64_t count, int64_t k) {
    scratch.keys.resize(count);
    for (int64_t i = 0; i < count; ++i) {
        scratch.keys[i] = order_key(values[i]);
    }
    return key_value(kth_largest_key(scratch.keys.data(), count, k));
}

// Keeps the k best candidates (all above the k-th value, the first ones equal to it), in id order;
// returns the k-th value.
inline float compact(TopkScratch& scratch, int64_t k) {
    const int64_t count = static_cast<int64_t>(scratch.values.size());
    const float bound = kth_largest(scratch, scratch.values.data(), count, k);
    int64_t above = 0;
    for (int64_t i = 0; i < count; ++i) {
        above += scratch.values[i] > bound;
    }
    int64_t ties = k - above, kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        const float value = scratch.values[i];
        if (value > bound || (value == bound && ties-- > 0)) {
            scratch.values[kept] = value;
            scratch.ids[kept++] = scratch.ids[i];
        }
    }
    scratch.values.resize(kept);
    scratch.ids.resize(kept);
    return bound;
}

// A bound from the few blocks with the largest maxima: tight where the top is concentrated, as in
// an ascending row, where pruning by block maxima alone admits almost everything.
template <typename T>
float concentrated_bound(TopkScratch& scratch, const T* x, int64_t num_valid, int64_t k) {
    const int64_t num_blocks = static_cast<int64_t>(scratch.block_max.size());
    const int64_t wanted = std::min(num_blocks, (k + kBlock - 1) / kBlock + 1);
    const float floor = kth_largest(scratch, scratch.block_max.data(), num_blocks, wanted);
    std::vector<float> sample;
    for (int64_t block = num_blocks - 1, used = 0; block >= 0 && used < wanted; --block) {
        if (scratch.block_max[block] >= floor) {
            const int64_t end = std::min(num_valid, (block + 1) * kBlock);
            for (int64_t j = block * kBlock; j < end; ++j) {
                sample.push_back(to_float(x[j]));
            }
            ++used;
        }
    }
    if (static_cast<int64_t>(sample.size()) < k) {
        return -std::numeric_limits<float>::infinity();
    }
    return kth_largest(scratch, sample.data(), static_cast<int64_t>(sample.size()), k);
}

// Candidates of columns [begin, end): a whole number of vectors, then single columns.
template <typename T>
inline void collect(TopkScratch& scratch, const T* x, int64_t begin, int64_t end, float bound,
                    bool strict) {
    int64_t j = begin;
    const auto limit = Simd::set1(bound);
    for (; j + Simd::width <= end; j += Simd::width) {
        const auto v = Simd::load(x + j);
        unsigned hits = strict ? Simd::mask_greater(v, limit) : Simd::mask_at_least(v, limit);
        while (hits) {
            const int64_t at = j + __builtin_ctz(hits);
            scratch.values.push_back(to_float(x[at]));
            scratch.ids.push_back(static_cast<int32_t>(at));
            hits &= hits - 1;
        }
    }
    for (; j < end; ++j) {
        const float value = to_float(x[j]);
        if (value > bound || (!strict && value == bound)) {
            scratch.values.push_back(value);
            scratch.ids.push_back(static_cast<int32_t>(j));
        }
    }
}

template <typename T>
void prune_and_collect(TopkScratch& scratch, const T* x, int64_t num_valid, int64_t k) {
    const int64_t num_blocks = static_cast<int64_t>(scratch.block_max.size());
    const float* block_max = scratch.block_max.data();
    float bound = num_blocks < k ? -std::numeric_limits<float>::infinity()
                                 : kth_largest(scratch, block_max, num_blocks, k);
    const size_t limit = static_cast<size_t>(2 * k + 512);
    bool strict = false, sampled = false;
    for (int64_t block = 0; block < num_blocks; ++block) {
        if (strict ? block_max[block] <= bound : block_max[block] < bound) {
            continue;
        }
        const int64_t begin = block * kBlock;
        collect(scratch, x, begin, std::min(num_valid, begin + kBlock), bound, strict);
        if (scratch.values.size() <= limit) {
            continue;
        }
        if (!sampled) {
            sampled = true;
            const float tighter = concentrated_bound(scratch, x, num_valid, k);
            if (tighter > bound) {
                // Not strict: the k-th value itself may still lie in later blocks.
                bound = tighter;
                strict = false;
                size_t kept = 0;
                for (size_t i = 0; i < scratch.values.size(); ++i) {
                    if (scratch.values[i] >= bound) {
                        scratch.values[kept] = scratch.values[i];
                        scratch.ids[kept++] = scratch.ids[i];
                    }
                }
                scratch.values.resize(kept);
                scratch.ids.resize(kept);
            }
        }
        if (scratch.values.size() > limit) {
            bound = compact(scratch, k);
            strict = true;
        }
    }
    if (static_cast<int64_t>(scratch.values.size()) > k) {
        compact(scratch, k);
    }
}

// Writes the sorted list of one row: student logits, teacher logits at the same ids, ids.
template <typename T>
void row_topk(TopkScratch& scratch, const T* x, const T* y, int64_t num_valid, int64_t k,
              bool has_nan, float* out_x, float* out_y, int64_t* out_ids) {
    scratch.values.clear();
    scratch.ids.clear();
    if (has_nan) {
        for (int64_t j = 0; j < num_valid; ++j) {
            scratch.values.push_back(to_float(x[j]));
            scratch.ids.push_back(static_cast<int32_t>(j));
        }
    } else {
        prune_and_collect(scratch, x, num_valid, k);
    }
    // One integer per candidate: key descending, then id ascending.
    const size_t count = scratch.values.size();
    scratch.order.resize(count);
    for (size_t i = 0; i < count; ++i) {
        const uint32_t unsigned_key =
            static_cast<uint32_t>(order_key(scratch.values[i])) ^ 0x80000000u;
        scratch.order[i] =
            static_cast<uint64_t>(~unsigned_key) << 32 | static_cast<uint32_t>(scratch.ids[i]);
    }
    std::partial_sort(scratch.order.begin(), scratch.order.begin() + k, scratch.order.end());
    for (int64_t slot = 0; slot < k; ++slot) {
        const int64_t id = static_cast<int64_t>(scratch.order[slot] & 0xffffffffu);
        out_ids[slot] = id;
        out_x[slot] = to_float(x[id]);
        out_y[slot] = to_float(y[id]);
    }
}

template <typename T>
void stats_rows(const Logits<T>& logits, const LocalStats& out, int64_t begin, int64_t end) {
    TopkScratch scratch;
    scratch.block_max.resize((logits.num_valid + kBlock - 1) / kBlock);
    for (int64_t t = begin; t < end; ++t) {
        const T* x = logits.student + t * logits.student_stride;
        const T* y = logits.teacher + t * logits.teacher_stride;
        double* packed = out.packed + t * kTupleSize;
        if (out.topk == 0) {
            row_stats<false>(x, y, logits.labels[t], logits.num_valid, logits.temperature, nullptr,
                             packed);
            continue;
        }
        row_stats<true>(x, y, logits.labels[t], logits.num_valid, logits.temperature,
                        scratch.block_max.data(), packed);
        const int64_t at = t * out.topk;
        // S is NaN when, and only when, a student logit is NaN or +inf.
        row_topk(scratch, x, y, logits.num_valid, out.topk, packed[2] != packed[2],
                 out.topk_student + at, out.topk_teacher + at, out.topk_ids + at);
    }
}
