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

// 2^r on [-1/2, 1/2], highest power first: least largest relative error of degree 5.
constexpr float kExp2[6] = {0.0013276472454890609f, 0.009675540961325169f, 0.05550713092088699f,
                            0.24022120237350464f,   0.6931469440460205f,   1.0000001192092896f};
