// The gradient at one row of student logits. Included like row_stats.h, after it.
//
// Which losses have a coefficient decides what is read: the student alone, both (reverse KL), or
// both with two exponentials (forward KL). The label and the top-k entries are written last, from
// double precision: p - 1 must not be a difference of rounded numbers, and a bf16 output must not
// be read back.

enum class Needs { student, ratio, teacher, both };

// 1 - 2^-w for |w| < kSmallRatio.
inline Simd::F ratio_below_one(Simd::F w) {
    auto p = Simd::set1(ratio_coefficient(kRatioDegree));
    for (int degree = kRatioDegree; degree-- > 0;) {
        p = Simd::fma(p, w, Simd::set1(ratio_coefficient(degree)));
    }
    return Simd::mul(p, w);
}

template <Needs needs>
inline Simd::F gradient_of(Simd::F vx, Simd::F vy, const GradientRow& row) {
    const auto scale = Simd::set1(row.scale);
    const auto tx = Simd::mul(Simd::sub(vx, Simd::set1(row.mx)), scale);
    const auto e = Simd::exp2(tx);
    auto inner = Simd::fma(Simd::set1(row.kh), tx, Simd::set1(row.k0));
    if constexpr (needs == Needs::student) {
        return Simd::zero_where_zero(Simd::mul(e, inner), e);
    }
    // d + rest = vx - vy without error.
    const auto d = Simd::sub(vx, vy), back = Simd::sub(vx, d);
    const auto rest = Simd::add(Simd::sub(vx, Simd::add(d, back)), Simd::sub(back, vy));
    if constexpr (needs == Needs::ratio || needs == Needs::both) {
        const auto v = Simd::add(Simd::affine(d, scale, Simd::set1(row.v_high)),
                                 Simd::fma(rest, scale, Simd::set1(row.v_low)));
        inner = Simd::fma(Simd::set1(row.kr), v, inner);
    }
    // Where p = 0 the bracket may be infinite: the product is 0.
    const auto value = Simd::zero_where_zero(Simd::mul(e, inner), e);
    if constexpr (needs == Needs::ratio) {
        return value;
    }
    const auto w = Simd::add(Simd::affine(d, scale, Simd::set1(row.w_high)),
                             Simd::fma(rest, scale, Simd::set1(row.w_low)));
    const auto p = Simd::mul(Simd::set1(row.kp), e);
    const auto f = Simd::exp2(Simd::mul(Simd::sub(vy, Simd::set1(row.my)), scale));
    const auto apart = Simd::fma(Simd::set1(-row.kq), f, p);
    return Simd::add(value, Simd::where_small(w, Simd::mul(p, ratio_below_one(w)), apart));
}

// Columns [begin, end) fewer than a vector, through padded copies.
template <Needs needs, typename T>
inline void gradient_edge(const T* x, const T* y, T* out, int64_t begin, int64_t end,
                          const GradientRow& row) {
    if (begin >= end) {
        return;
    }
    alignas(64) float padded_x[Simd::width], padded_y[Simd::width], result[Simd::width];
    for (int64_t i = 0; i < Simd::width; ++i) {
        const bool inside = begin + i < end;
        padded_x[i] = inside ? to_float(x[begin + i]) : kPadding;
        padded_y[i] = inside && needs != Needs::student ? to_float(y[begin + i]) : kPadding;
    }
    Simd::store(result, gradient_of<needs>(Simd::load(padded_x), Simd::load(padded_y), row));
    for (int64_t j = begin; j < end; ++j) {
        from_float(result[j - begin], out + j);
    }
}

template <Needs needs, bool stream, typename T>
void gradient_columns(const T* x, const T* y, T* out, int64_t num_valid, const GradientRow& row) {
    // Streaming stores need aligned addresses, and whole cache lines to be worth it.
    const auto misaligned = reinterpret_cast<uintptr_t>(out) % 64 / sizeof(T);
    const int64_t head =
        stream && misaligned ? std::min<int64_t>(num_valid, 64 / sizeof(T) - misaligned) : 0;
    for (int64_t j = 0; j < head; j += Simd::width) {
        gradient_edge<needs>(x, y, out, j, std::min<int64_t>(head, j + Simd::width), row);
    }
    int64_t j = head;
    for (; j + Simd::width <= num_valid; j += Simd::width) {
        const auto vx = Simd::load(x + j);
        const auto value =
            gradient_of<needs>(vx, needs == Needs::student ? vx : Simd::load(y + j), row);
        if constexpr (stream) {
            Simd::stream(out + j, value);
        } else {
            Simd::store(out + j, value);
        }
    }
    gradient_edge<needs>(x, y, out, j, num_valid, row);
}

template <bool stream, typename T>
void gradient_row_dispatch(const T* x, const T* y, T* out, int64_t num_valid,
                           const GradientRow& row) {
    // Not != 0: a NaN coefficient must reach the result.
    const bool ratio = !(row.kr == 0), forward = !(row.kp == 0 && row.kq == 0);
    if (ratio && forward) {
        gradient_columns<Needs::both, stream>(x, y, out, num_valid, row);
    } else if (ratio) {
        gradient_columns<Needs::ratio, stream>(x, y, out, num_valid, row);
    } else if (forward) {
        gradient_columns<Needs::teacher, stream>(x, y, out, num_valid, row);
    } else {
        gradient_columns<Needs::student, stream>(x, y, out, num_valid, row);
    }
}

// An element that is written apart, held until the row is done (out may be the student's row).
template <typename T>
void special_elements(const Logits<T>& logits, const GradientInputs& in, const GradientRow& row,
                      int64_t t, const T* x, const T* y,
                      std::vector<std::pair<int64_t, double>>& to) {
    const double* f = in.final_stats + t * kFinalSize;
    const double* c = in.coefficients + t * kCoefficients;
    const int64_t label = logits.labels[t];
    const bool owned = label >= 0 && label < logits.num_valid;
    if (owned) {
        to.emplace_back(label,
                        gradient_element(to_float(x[label]), to_float(y[label]), true, f, c, row));
    }
    if (in.topk == 0 || c[4] == 0) {
        return;
    }
    for (int64_t slot = 0; slot < in.topk_taken[t]; ++slot) {
        const int64_t id = in.topk_ids[t * in.topk + slot];
        const double xv = to_float(x[id]), yv = to_float(y[id]);
        to.emplace_back(id, gradient_element(xv, yv, id == label, f, c, row) +
                                topk_element(xv, yv, in.topk_summary + t * kTopkSummary, c[4],
                                             logits.temperature));
    }
}

template <typename T>
void gradient_rows(const Logits<T>& logits, const GradientInputs& in, const GradientOutput<T>& out,
                   int64_t begin, int64_t end) {
    std::vector<std::pair<int64_t, double>> special;
    for (int64_t t = begin; t < end; ++t) {
        const T* x = logits.student + t * logits.student_stride;
        const T* y = logits.teacher + t * logits.teacher_stride;
        T* to = out.data + t * out.stride;
        const GradientRow row =
            gradient_row(in.final_stats + t * kFinalSize, in.coefficients + t * kCoefficients,
                         logits.temperature);
        special.clear();
        special_elements(logits, in, row, t, x, y, special);
        if (out.stream) {
            gradient_row_dispatch<true>(x, y, to, logits.num_valid, row);
            Simd::fence();
        } else {
            gradient_row_dispatch<false>(x, y, to, logits.num_valid, row);
        }
        for (const auto& [id, value] : special) {
            from_float(static_cast<float>(value), to + id);
        }
        std::fill(to + logits.num_valid, to + out.width, T{});
    }
}
