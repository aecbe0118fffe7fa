// The statistics of one row: one read of both logits, for any Simd (see kernels_*.cpp).
// Included inside the anonymous namespace of one translation unit per instruction set.
//
// Columns go in superblocks of 64 vectors, which stay in the first-level cache, made of groups of
// 8: chains of fp32 additions that short keep equal addends (ties) from drifting. The reference
// points stay where they are as long as no sum grows past kLimit, so that no maximum is computed on
// the way, except those of the top-k's blocks. After each superblock the fp32 sums are checked, and
// either added to the fp64 totals or thrown away and redone: with higher references, or, where a
// -inf made 0 * inf, with the careful loop, which drops terms of zero mass. Everything is in log2
// units until the end.

constexpr int64_t kBlock = 128;
constexpr int64_t kGroup = 8 * Simd::width;
constexpr int64_t kSuper = 8 * kGroup;
// Low enough that log S and U / S, whose difference is wanted, stay near their natural size.
constexpr float kLimit = 1.0e4f;
constexpr float kPadding = -1.0e30f;
constexpr int kSums = 9;
constexpr double kLn2 = 0.6931471805599453;

struct RowState {
    float scale;   // log2(e) / temperature
    float rx, ry;  // reference points
    bool careful;
    bool direct;  // differences from the logits (distill_stats.h: close_reference)
    alignas(64) double totals[kSums][Simd::width];  // S N U D F C Q E G
};

struct Sums {
    Simd::F S, N, U, D, F, C, Q, E, G;
};

template <bool careful>
inline void accumulate(Sums& s, Simd::F tx, Simd::F ty, Simd::F d) {
    const auto e = Simd::exp2(tx), f = Simd::exp2(ty);
    auto dq = d;
    if constexpr (careful) {
        dq = Simd::zero_where_zero(d, f);
        d = Simd::zero_where_zero(d, e);
        tx = Simd::zero_where_zero(tx, e);
        ty = Simd::zero_where_zero(ty, f);
    }
    const auto w = Simd::mul(e, d);
    s.S = Simd::add(s.S, e);
    s.N = Simd::add(s.N, f);
    s.U = Simd::fma(e, tx, s.U);
    s.D = Simd::add(s.D, w);
    s.F = Simd::fma(f, dq, s.F);
    s.C = Simd::fma(e, e, s.C);
    s.Q = Simd::fma(w, d, s.Q);
    s.E = Simd::fma(e, w, s.E);
    s.G = Simd::fma(f, ty, s.G);
}

inline void add_sums(Sums& s, const Sums& part) {
    s.S = Simd::add(s.S, part.S);
    s.N = Simd::add(s.N, part.N);
    s.U = Simd::add(s.U, part.U);
    s.D = Simd::add(s.D, part.D);
    s.F = Simd::add(s.F, part.F);
    s.C = Simd::add(s.C, part.C);
    s.Q = Simd::add(s.Q, part.Q);
    s.E = Simd::add(s.E, part.E);
    s.G = Simd::add(s.G, part.G);
}

// Adds the sums to the totals; false, and nothing added, where they left the safe range.
template <bool careful>
inline bool flush(RowState& row, const Sums& s) {
    if constexpr (!careful) {
        const auto most = Simd::max(s.S, s.N);
        const auto all = Simd::add(Simd::add(Simd::add(s.U, s.D), Simd::add(s.F, s.C)),
                                   Simd::add(Simd::add(s.Q, s.E), s.G));
        if (!Simd::all_below(most, kLimit) || !Simd::all_finite(all)) {
            return false;
        }
    }
    const Simd::F parts[kSums] = {s.S, s.N, s.U, s.D, s.F, s.C, s.Q, s.E, s.G};
    for (int i = 0; i < kSums; ++i) {
        Simd::add_to_double(row.totals[i], parts[i]);
    }
    return true;
}

// `count` columns, a multiple of the vector width; block maxima to `block_max` unless it is null.
template <bool careful, bool with_max, bool direct, typename T>
bool sum_columns(RowState& row, const T* x, const T* y, int64_t count, float* block_max) {
    const auto zero = Simd::set1(0.0f);
    Sums s{zero, zero, zero, zero, zero, zero, zero, zero, zero};
    const auto scale = Simd::set1(row.scale);
    const auto rx = Simd::set1(-row.rx), ry = Simd::set1(-row.ry);
    const auto rd = Simd::set1(row.ry - row.rx);
    for (int64_t base = 0; base < count; base += kBlock) {
        const int64_t end = base + kBlock < count ? base + kBlock : count;
        auto most = Simd::load(x + base);
        for (int64_t group = base; group < end; group += kGroup) {
            const int64_t group_end = group + kGroup < end ? group + kGroup : end;
            Sums part{zero, zero, zero, zero, zero, zero, zero, zero, zero};
            for (int64_t j = group; j < group_end; j += Simd::width) {
                const auto vx = Simd::load(x + j), vy = Simd::load(y + j);
                if constexpr (with_max) {
                    most = Simd::max(most, vx);
                }
                const auto tx = Simd::affine(vx, scale, rx), ty = Simd::affine(vy, scale, ry);
                const auto d =
                    direct ? Simd::affine(Simd::sub(vx, vy), scale, rd) : Simd::sub(tx, ty);
                accumulate<careful>(part, tx, ty, d);
            }
            add_sums(s, part);
        }
        if constexpr (with_max) {
            block_max[base / kBlock] = Simd::horizontal_max(most);
        }
    }
    return flush<careful>(row, s);
}

template <bool careful, bool with_max, typename T>
bool superblock(RowState& row, const T* x, const T* y, int64_t count, float* block_max) {
    return row.direct ? sum_columns<careful, with_max, true>(row, x, y, count, block_max)
                      : sum_columns<careful, with_max, false>(row, x, y, count, block_max);
}

template <typename T>
float highest_reference(const T* z, int64_t count, float scale) {
    auto most = Simd::load(z);
    for (int64_t j = Simd::width; j < count; j += Simd::width) {
        most = Simd::max(most, Simd::load(z + j));
    }
    const float reference = Simd::horizontal_max(most) * scale;
    return reference < kPadding ? kPadding : reference;
}

// Moves the references up to cover this superblock (distill_stats.h in base 2).
template <typename T>
bool raise_references(RowState& row, const T* x, const T* y, int64_t count) {
    const float hx = highest_reference(x, count, row.scale);
    const float hy = highest_reference(y, count, row.scale);
    const float rx = hx > row.rx ? hx : row.rx;
    const float ry = close_reference(rx, hy > row.ry ? hy : row.ry);
    if (rx == row.rx && ry == row.ry) {
        return false;
    }
    for (int lane = 0; lane < Simd::width; ++lane) {
        auto* t = row.totals;
        const Tuple natural = {row.rx * kLn2,
                               row.ry * kLn2,
                               t[0][lane],
                               t[1][lane],
                               t[2][lane] * kLn2,
                               t[3][lane] * kLn2,
                               -t[4][lane] * kLn2,
                               t[5][lane],
                               t[6][lane] * kLn2 * kLn2,
                               t[7][lane] * kLn2,
                               t[8][lane] * kLn2,
                               0,
                               0};
        const Tuple moved = shifted(natural, rx * kLn2, ry * kLn2);
        const double back[kSums] = {
            moved.S,         moved.N, moved.U / kLn2,          moved.D / kLn2,
            -moved.F / kLn2, moved.C, moved.Q / (kLn2 * kLn2), moved.E / kLn2,
            moved.G / kLn2};
        for (int i = 0; i < kSums; ++i) {
            t[i][lane] = back[i];
        }
    }
    row.rx = rx;
    row.ry = ry;
    row.direct = are_close(rx, ry);
    return true;
}

template <bool with_max, typename T>
void checked_superblock(RowState& row, const T* x, const T* y, int64_t count, float* block_max) {
    if (!row.careful) {
        if (superblock<false, with_max>(row, x, y, count, block_max)) {
            return;
        }
        if (raise_references(row, x, y, count) &&
            superblock<false, with_max>(row, x, y, count, block_max)) {
            return;
        }
        // Stays careful to the end of the row: what was met once is usual in it.
        row.careful = true;
    } else {
        raise_references(row, x, y, count);
    }
    superblock<true, with_max>(row, x, y, count, block_max);
}

// The last columns, padded to whole vectors with logits that have no mass.
template <bool with_max, typename T>
void tail_superblock(RowState& row, const T* x, const T* y, int64_t count, float* block_max) {
    alignas(64) float padded_x[kSuper], padded_y[kSuper];
    const int64_t whole = (count + Simd::width - 1) / Simd::width * Simd::width;
    for (int64_t j = 0; j < whole; ++j) {
        padded_x[j] = j < count ? to_float(x[j]) : kPadding;
        padded_y[j] = j < count ? to_float(y[j]) : kPadding;
    }
    checked_superblock<with_max>(row, padded_x, padded_y, whole, block_max);
    if constexpr (with_max) {
        // The maximum of the last block, without the padding, which would beat a true -inf.
        const int64_t last = (count - 1) / kBlock;
        float most = -std::numeric_limits<float>::infinity();
        for (int64_t j = last * kBlock; j < count; ++j) {
            most = padded_x[j] > most ? padded_x[j] : most;
        }
        block_max[last] = most;
    }
}

inline void write_tuple(const RowState& row, double x_a, double y_a, double* packed) {
    double sum[kSums];
    for (int i = 0; i < kSums; ++i) {
        sum[i] = 0;
        for (int lane = 0; lane < Simd::width; ++lane) {
            sum[i] += row.totals[i][lane];
        }
    }
    const double out[kTupleSize] = {row.rx * kLn2,
                                    row.ry * kLn2,
                                    sum[0],
                                    sum[1],
                                    sum[2] * kLn2,
                                    sum[3] * kLn2,
                                    -sum[4] * kLn2,
                                    sum[5],
                                    sum[6] * kLn2 * kLn2,
                                    sum[7] * kLn2,
                                    sum[8] * kLn2,
                                    x_a,
                                    y_a};
    std::copy(out, out + kTupleSize, packed);
}

// Fills packed [13], and block_max (one per kBlock columns) when with_max.
template <bool with_max, typename T>
void row_stats(const T* x, const T* y, int64_t label, int64_t num_valid, double temperature,
               float* block_max, double* packed) {
    RowState row;
    row.scale = static_cast<float>(1.4426950408889634 / temperature);
    row.rx = row.ry = kPadding;
    row.careful = row.direct = false;
    std::fill(&row.totals[0][0], &row.totals[0][0] + kSums * Simd::width, 0.0);
    const int64_t whole = num_valid / kSuper * kSuper;
    if (whole > 0) {
        raise_references(row, x, y, kSuper);
    }
    for (int64_t j = 0; j < whole; j += kSuper) {
        checked_superblock<with_max>(row, x + j, y + j, kSuper,
                                     with_max ? block_max + j / kBlock : nullptr);
    }
    if (whole < num_valid) {
        tail_superblock<with_max>(row, x + whole, y + whole, num_valid - whole,
                                  with_max ? block_max + whole / kBlock : nullptr);
    }
    const bool owned = label >= 0 && label < num_valid;
    const double unit = static_cast<double>(row.scale) * kLn2;
    write_tuple(row, owned ? to_float(x[label]) * unit : 0.0,
                owned ? to_float(y[label]) * unit : 0.0, packed);
}
