// The algebra of the distillation statistics, shared by the CPU and CUDA kernels.
//
// A tuple holds, for a set of columns with student logits x and teacher logits y (both divided by
// the temperature) and two reference points m, n, with x^ = x - m, y^ = y - n, d^ = x^ - y^:
//
//     S = sum e^x^          N = sum e^y^         U = sum e^x^ x^       D = sum e^x^ d^
//     F = -sum e^y^ d^      C = sum e^2x^        Q = sum e^x^ d^^2     E = sum e^2x^ d^
//     G = sum e^y^ y^
//
// Moving the references by a, b >= 0 (k = a - b) is exact:
//
//     S' = e^-a S           N' = e^-b N          U' = e^-a (U - a S)   D' = e^-a (D - k S)
//     F' = e^-b (F + k N)   C' = e^-2a C         E' = e^-2a (E - k C)  G' = e^-b (G - b N)
//     Q' = e^-a (Q - k (2 D - k S))
//
// so tuples of blocks, threads and ranks merge by moving both to common references and adding. Any
// reference near the maximum will do. An operand without mass contributes nothing: its terms are
// set to 0 instead of being computed, because its references may make 0 * inf. One whose mass is
// NaN always contributes: a shard of NaNs has the references of an empty one.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define MEGATRON_VOPD_HD __host__ __device__ inline
#else
#define MEGATRON_VOPD_HD inline
#endif

namespace megatron_vopd {

// References of an empty set. Finite: differences of references must stay numbers.
constexpr double kEmptyReference = -1e30;
constexpr int kTupleSize = 13;
constexpr int kFinalSize = 10;
constexpr int kCoefficients = 5;
constexpr int kTopkSummary = 6;

// The order in memory is `fields.TUPLE` in Python.
struct Tuple {
    double m, n, S, N, U, D, F, C, Q, E, G, x_a, y_a;
};

MEGATRON_VOPD_HD Tuple empty_tuple() {
    return {kEmptyReference, kEmptyReference, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0};
}

MEGATRON_VOPD_HD bool contributes(double factor, double mass) {
    return mass != mass || (factor != 0 && mass != 0);
}

// The sums of `t` against the references (m, n), both at or above its own; a = e^-(m - t.m) and
// b = e^-(n - t.n), or powers of 2 where logarithms in the tuple are to base 2.
MEGATRON_VOPD_HD Tuple shifted_by(const Tuple& t, double m, double n, double a, double b) {
    const double alpha = m - t.m, beta = n - t.n, kappa = alpha - beta;
    Tuple out = empty_tuple();
    out.m = m;
    out.n = n;
    if (contributes(a, t.S)) {
        out.S = a * t.S;
        out.U = a * (t.U - alpha * t.S);
        out.D = a * (t.D - kappa * t.S);
        out.C = a * a * t.C;
        out.Q = a * (t.Q - kappa * (2 * t.D - kappa * t.S));
        out.E = a * a * (t.E - kappa * t.C);
    }
    if (contributes(b, t.N)) {
        out.N = b * t.N;
        out.F = b * (t.F + kappa * t.N);
        out.G = b * (t.G - beta * t.N);
    }
    // The label's logits come from its owner; every other operand holds 0.
    out.x_a = t.x_a;
    out.y_a = t.y_a;
    return out;
}

MEGATRON_VOPD_HD Tuple shifted(const Tuple& t, double m, double n) {
    return shifted_by(t, m, n, exp(-(m - t.m)), exp(-(n - t.n)));
}

MEGATRON_VOPD_HD Tuple added(const Tuple& p, const Tuple& q) {
    return {p.m,       p.n,       p.S + q.S, p.N + q.N, p.U + q.U,     p.D + q.D,    p.F + q.F,
            p.C + q.C, p.Q + q.Q, p.E + q.E, p.G + q.G, p.x_a + q.x_a, p.y_a + q.y_a};
}

// NaN references (a NaN or +inf logit) must survive: fmax would drop them.
MEGATRON_VOPD_HD double upper(double a, double b) { return (a != a || a > b) ? a : b; }

// Writes the 10 statistics of `fields.FINAL`; `optimal_floor`: see merge_stats in ops/reference.py.
MEGATRON_VOPD_HD void finalize(const Tuple& t, double optimal_floor, double* out) {
    const double log_s = log(t.S), log_n = log(t.N), mean = t.D / t.S;
    const double reverse_kl = mean - log_s + log_n;
    const double collision = t.C / (t.S * t.S);
    const double tilt = t.E / (t.S * t.S) - (log_s - log_n) * collision;
    out[0] = t.m + log_s;
    out[1] = t.n + log_n;
    out[2] = t.x_a - t.m - log_s;
    out[3] = t.y_a - t.n - log_n;
    out[4] = reverse_kl;
    out[5] = t.F / t.N - log_n + log_s;
    out[6] = log_s - t.U / t.S;
    out[7] = log_n - t.G / t.N;
    out[8] = t.Q / t.S - mean * mean;
    out[9] = 1 - collision < optimal_floor
                 ? -reverse_kl
                 : ((1 + collision) * -reverse_kl + 2 * tilt) / (1 - collision);
}

// Merges the tuples of one token over ranks (stride in doubles between ranks), in rank order.
MEGATRON_VOPD_HD void merge_and_finalize(const double* packed, int64_t num_ranks, int64_t stride,
                                         double optimal_floor, double* out) {
    double m = packed[0], n = packed[1];
    for (int64_t rank = 1; rank < num_ranks; ++rank) {
        m = upper(packed[rank * stride], m);
        n = upper(packed[rank * stride + 1], n);
    }
    Tuple total = empty_tuple();
    total.m = m;
    total.n = n;
    for (int64_t rank = 0; rank < num_ranks; ++rank) {
        const double* v = packed + rank * stride;
        const Tuple part = {v[0], v[1], v[2], v[3],  v[4],  v[5], v[6],
                            v[7], v[8], v[9], v[10], v[11], v[12]};
        total = added(total, shifted(part, m, n));
    }
    finalize(total, optimal_floor, out);
}

// d^ can be taken as (x - y) - (m - n), which has no error to speak of where the two models nearly
// agree, or as x^ - y^, which has less where a large offset is between them. The first needs
// references that are close and whose difference is exact: `n` is moved by a rounding error.
MEGATRON_VOPD_HD float close_reference(float m, float n) {
    const float moved = m + (n - m);
    return fabsf(moved - m) < 1.0f ? moved : n;
}

MEGATRON_VOPD_HD bool are_close(float m, float n) {
    const float difference = n - m;
    return fabsf(difference) < 1.0f &&
           static_cast<double>(n) - static_cast<double>(m) == static_cast<double>(difference);
}

// Per-token constants of the gradient, shared by the kernels. With p_j = s 2^tx, tx = (x_j - mx) c
// (mx an fp32 reference near the lse in units of the logits, s the exact remainder) and the same
// for q:
//
//     dz_j = e (k0 + kh tx + kr v) + (kp e - kq f),   e = 2^tx, f = 2^ty
//     v = log2(p_j / q_j) - RKL,   w = log2(p_j / q_j),   kp e - kq f = kp e (1 - 2^-w)
//
// which is kernels.md section 2 with every factor that does not depend on j folded into k0..kq.
// Where p and q are close both v and 1 - 2^-w are small differences of large numbers. Both are
// therefore formed from x_j - y_j with its rounding error, c (x_j - y_j) plus a constant in two
// parts; and close to 0 the last form of the forward term is taken, by a polynomial in w.
struct GradientRow {
    float scale;  // c = log2(e) / temperature
    float mx, my;
    float k0, kh, kr, kp, kq;
    float v_high, v_low, w_high, w_low;
    double inverse_temperature;
};

// Below it 1 - 2^-w comes from the polynomial w sum_n c_n w^n, c_n = -(-ln 2)^(n+1) / (n+1)!.
constexpr float kSmallRatio = 0.5f;
constexpr int kRatioDegree = 6;

MEGATRON_VOPD_HD constexpr float ratio_coefficient(int n) {
    double value = -1;
    for (int factor = 1; factor <= n + 1; ++factor) {
        value *= -0.6931471805599453 / factor;
    }
    return static_cast<float>(value);
}

MEGATRON_VOPD_HD GradientRow gradient_row(const double* final_stats, const double* coefficients,
                                          double temperature) {
    constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
    const double policy = coefficients[0], reverse = coefficients[1], forward = coefficients[2],
                 entropy = coefficients[3];
    GradientRow row;
    row.scale = static_cast<float>(kLog2e / temperature);
    const double unit = row.scale * kLn2;
    row.mx = static_cast<float>(final_stats[0] / unit);
    row.my = static_cast<float>(final_stats[1] / unit);
    const double rest_x = row.mx * unit - final_stats[0];
    const double rest_y = row.my * unit - final_stats[1];
    const double s = exp(rest_x) / temperature;
    // A zero coefficient removes its term: 0 * inf must not appear.
    double constant = policy;
    if (entropy != 0) {
        constant -= entropy * (rest_x + final_stats[6]);
    }
    const double w = (final_stats[1] - final_stats[0]) * kLog2e;
    const double v = w - final_stats[4] * kLog2e;
    row.v_high = static_cast<float>(v);
    row.v_low = static_cast<float>(v - row.v_high);
    row.w_high = static_cast<float>(w);
    row.w_low = static_cast<float>(w - row.w_high);
    row.k0 = static_cast<float>(s * constant);
    row.kh = static_cast<float>(-entropy * s * kLn2);
    row.kr = static_cast<float>(reverse * s * kLn2);
    row.kp = static_cast<float>(forward * s);
    row.kq = static_cast<float>(forward * exp(rest_y) / temperature);
    row.inverse_temperature = 1 / temperature;
    return row;
}

// One element in double: the label (is_label), whose p - 1 needs expm1, and the top-k entries.
MEGATRON_VOPD_HD double gradient_element(double x, double y, bool is_label, const double* f,
                                         const double* c, const GradientRow& row) {
    // The same effective temperature as the lse: log2(e) / tau rounded to fp32.
    const double unit = row.scale * 0.6931471805599453;
    const double log_p = x * unit - f[0], log_q = y * unit - f[1];
    const double p = exp(log_p), q = exp(log_q);
    double value = is_label ? c[0] * expm1(log_p) : c[0] * p;
    if (p != 0) {
        value += p * (c[2] + (c[1] != 0 ? c[1] * (log_p - log_q - f[4]) : 0.0) -
                      (c[3] != 0 ? c[3] * (log_p + f[6]) : 0.0));
    }
    return (value - c[2] * q) * row.inverse_temperature;
}

// The top-k term g p (d - R) / tau of one entry; summary: `fields.TOPK`.
MEGATRON_VOPD_HD double topk_element(double x, double y, const double* summary, double coefficient,
                                     double temperature) {
    const double log_p = x / temperature - summary[0], log_q = y / temperature - summary[1];
    const double p = exp(log_p);
    if (p == 0 || coefficient == 0) {
        return 0;
    }
    return coefficient / temperature * p * (log_p - log_q - summary[2]);
}

}  // namespace megatron_vopd
