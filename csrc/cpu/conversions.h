// Single elements to and from fp32, and the exponential's polynomial. Included inside the anonymous
// namespace of each kernels_*.cpp.

inline float to_float(float value) { return value; }

inline float to_float(Bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof(out));
    return out;
}

inline void from_float(float value, float* to) { *to = value; }

// Round to nearest even; NaN stays NaN.
inline void from_float(float value, Bf16* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    if (value != value) {
        to->bits = static_cast<uint16_t>(bits >> 16 | 0x40);
        return;
    }
    to->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// 2^r on [-1/2, 1/2], highest power first: least largest relative error (2e-9) of degree 6.
constexpr int kExp2Degree = 6;
constexpr float kExp2[kExp2Degree + 1] = {0.0001534581242594868f,
                                          0.0013399930903688073f,
                                          0.009618489071726799f,
                                          0.05550328642129898f,
                                          0.24022646248340607f,
                                          0.6931471824645996f,
                                          1.0f};
