// A linear map of the patches of a map whose grid begins anywhere: some rows of patches at a time are moved into the
// cache and multiplied there. Maps lie as planes (c, h, w) or as tokens (h, w, c), and so do the weights of a channel.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "native.h"

// Of one map, without gaps.
struct Shape {
    long c, h, w;
    bool tokens;
    long count() const { return c * h * w; }
};

// A group of patches times a block of channels adds up in registers: PATCHES x WIDE of them, the weights in WIDE more.
#if defined(__AVX512F__)
constexpr long BYTES = 64, PATCHES = 7, WIDE = 4;
#elif defined(__AVX__)
constexpr long BYTES = 32, PATCHES = 6, WIDE = 2;
#else
constexpr long BYTES = 16, PATCHES = 6, WIDE = 2;
#endif
constexpr long FLOATS = BYTES / sizeof(float), BLOCK = WIDE * FLOATS, CACHED = 1 << 17;  // numbers
typedef float Vector __attribute__((vector_size(BYTES), may_alias));
typedef float Unaligned __attribute__((vector_size(BYTES), may_alias, aligned(sizeof(float))));

// The lines of numbers that make a row of patches; `chunk` of each belong to one patch.
struct Lines {
    const float* begin;
    long count, length, chunk;
};

struct Out {
    float* begin;
    long stride, channels;
};

#pragma GCC push_options
#pragma GCC optimize("fp-contract=fast")
template <long T, long W>
void multiply(Lines lines, const Vector* weight, const Vector* bias, Out out) {
#ifdef __clang__
#pragma clang fp contract(fast)
#endif
    Vector sum[T][W];
    for (long t = 0; t < T; ++t)
        for (long i = 0; i < W; ++i) sum[t][i] = bias[i];
    for (long l = 0; l < lines.count; ++l, lines.begin += lines.length)
        for (long j = 0; j < lines.chunk; ++j, weight += WIDE)
            for (long t = 0; t < T; ++t)
                for (long i = 0; i < W; ++i) sum[t][i] += lines.begin[t * lines.chunk + j] * weight[i];
    for (long t = 0; t < T; ++t, out.begin += out.stride)
        if (out.channels < W * FLOATS)
            std::memcpy(out.begin, sum[t], out.channels * sizeof(float));
        else
            for (long i = 0; i < W; ++i) *(Unaligned*)(out.begin + i * FLOATS) = sum[t][i];
}
#pragma GCC pop_options

// The first patches of these lines, at most PATCHES, times a block of channels.
template <long T = PATCHES>
void multiply(long patches, Lines lines, const Vector* weight, const Vector* bias, Out out) {
    if constexpr (T > 1)
        if (patches < T) return multiply<T - 1>(patches, lines, weight, bias, out);
    if (out.channels > BLOCK / 2)
        multiply<T, WIDE>(lines, weight, bias, out);
    else
        multiply<T, WIDE / 2>(lines, weight, bias, out);
}

// Up to BLOCK rows of k floats, turned: the j-th of all rows come to place(j).
template <class Place>
void turn(const float* x, long rows, long k, float* out, Place place) {
    for (long r = 0; r < rows; r += FLOATS)
        for (long j = 0; j < k; j += FLOATS) {
            float tile[FLOATS][FLOATS] = {};
            const long down = std::min(FLOATS, rows - r), right = std::min(FLOATS, k - j);
            const auto fill = [&](long down, long right) {
                for (long a = 0; a < down; ++a)
                    for (long b = 0; b < right; ++b) tile[b][a] = x[(r + a) * k + j + b];
            };
            down == FLOATS && right == FLOATS ? fill(FLOATS, FLOATS) : fill(down, right);  // a known size: in registers
            for (long b = 0; b < right; ++b) std::memcpy(out + place(j + b) * BLOCK + r, tile[b], BYTES);
        }
}

// The weights (dim, c, p, p) or (dim, p, p, c) of patches in the order in which those of a map come.
class Patches {
   public:
    Patches(Shape s, long p, long dim, const float* weight, const float* bias, bool weight_tokens, long threads)
        : s(s), p(p), dim(dim), k(s.c * p * p), blocks((dim + BLOCK - 1) / BLOCK) {
        static thread_local std::vector<Vector> kept;  // fresh memory would cost as much as the work on it
        kept.resize(std::max<long>(kept.size(), blocks * (k + 1) * WIDE));
        weights = kept.data(), biases = weights + blocks * k * WIDE;
        std::copy_n(bias, dim, (float*)biases);
        const long inner = weight_tokens ? s.c : p * p, other = s.tokens != weight_tokens;
        spread(blocks, threads, [=](long b) {
            turn(weight + b * BLOCK * k, std::min(BLOCK, dim - b * BLOCK), k, (float*)(weights + b * k * WIDE),
                 [=](long j) { return other ? j % inner * (k / inner) + j / inner : j; });
        });
    }

    // Rows [from, to) of patches: (to - from, w / p, dim).
    void embed(const float* x, long below, long right, long from, long to, float* out) const {
        const long planes = s.tokens ? 1 : s.c, unit = s.tokens ? s.c : 1;
        const long lines = planes * p, length = s.w * unit, turn = right * unit;
        // Weights that stay in the cache are read again for every row, others for as many rows as fit beside them.
        const long some = blocks * k * BLOCK < CACHED ? 1 : std::max(1L, CACHED / (lines * length));
        const std::unique_ptr<float[]> moved(new float[some * lines * length]);
        for (long count; from < to; from += count, out += count * (s.w / p) * dim) {
            count = std::min(some, to - from);
            for (long i = 0; i < count * lines; ++i) {
                const long y = (from + i / lines) * p + i % p + below;
                const float* line = x + (i % lines / p * s.h + y % s.h) * length;
                float* end = moved.get() + (i + 1) * length - turn;
                std::memcpy(end - length + turn, line + turn, (length - turn) * sizeof(float));
                std::memcpy(end, line, turn * sizeof(float));
            }
            for (long b = 0; b < blocks; ++b)
                for (long i = 0; i < count; ++i)
                    for (long v = 0; v < s.w / p; v += PATCHES)
                        multiply(std::min(PATCHES, s.w / p - v),
                                 {moved.get() + i * lines * length + v * p * unit, lines, length, p * unit},
                                 weights + b * k * WIDE, biases + b * WIDE,
                                 {out + (i * (s.w / p) + v) * dim + b * BLOCK, dim, dim - b * BLOCK});
        }
    }

   private:
    Shape s;
    long p, dim, k, blocks;
    Vector *weights, *biases;
};
