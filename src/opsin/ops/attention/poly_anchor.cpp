// Polyphase anchoring of n maps (see poly_anchor_vit.py): the energies of all phases in one pass, the moved copy or the
// embedded patches in another. Maps lie as planes (c, h, w) or as tokens (h, w, c).
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "native.h"
#include "poly_patches.h"

namespace {

// Squares of all channels at the w places of a row. Their order is the same everywhere, so that shifts change nothing.
template <long PIXEL>
void three(const float* a, const float* b, const float* c, long w, float* e) {
    for (long j = 0; j < w * PIXEL; j += PIXEL) *e++ = a[j] * a[j] + b[j] * b[j] + c[j] * c[j];
}

void energies(const float* x, Shape s, long u, float* e) {
    const long plane = s.h * s.w;
    x += u * s.w * (s.tokens ? s.c : 1);
    if (s.c == 3) return s.tokens ? three<3>(x, x + 1, x + 2, s.w, e) : three<1>(x, x + plane, x + 2 * plane, s.w, e);
    if (!s.tokens) {
        std::fill(e, e + s.w, 0.0f);
        for (long k = 0; k < s.c; ++k)
            for (long j = 0; j < s.w; ++j) e[j] += x[k * plane + j] * x[k * plane + j];
        return;
    }
    for (long j = 0; j < s.w; ++j, x += s.c) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long k = 0; k < s.c; ++k) sum += x[k] * x[k];
        e[j] = sum;
    }
}

// Calls work(map, threads) for n maps: a thread for each while there are enough, all of them for every one of the rest.
template <class Work>
void each(long n, Shape s, long threads, Work work) {
    if (n * s.count() < 2 * 3 * 128 * 128) threads = 1;  // not worth waking anybody
    const long shared = n / threads * threads;
    spread(shared, threads, [&](long i) { work(i, 1); });
    for (long i = shared; i < n; ++i) work(i, threads);
}

// A phase, row by row, and the sum of its energies.
struct Phase {
    long number;
    double energy;
    void meet(Phase other) {  // the stronger one; the first where they tie
        if (other.energy > energy || (other.energy == energy && other.number < number)) *this = other;
    }
};

// A row of an image adds up in registers where places that are LANES apart belong to the same phase.
constexpr long LANES = 16;

void three_added(const float* a, const float* b, const float* c, long w, double* into) {
    double sum[LANES];
    std::copy_n(into, LANES, sum);
    for (long i = 0; i < w; i += LANES)
        for (long j = 0; j < LANES; ++j) sum[j] += a[i + j] * a[i + j] + b[i + j] * b[i + j] + c[i + j] * c[i + j];
    std::copy_n(sum, LANES, into);
}

// The strongest phase of those whose first row is `part`, or any number of `parts` further down.
Phase strongest(const float* x, Shape s, long rows, long columns, long part, long parts) {
    const bool lanes = !s.tokens && s.c == 3 && s.w % LANES == 0 && LANES % columns == 0;
    const long width = lanes ? LANES : s.w, plane = s.h * s.w;
    std::vector<float> e(s.w);
    std::vector<double> total(rows * width, 0.0);
    for (long u = 0; u < s.h; ++u) {
        if (u % rows % parts != part) continue;
        double* into = total.data() + u % rows * width;
        if (lanes) {
            const float* row = x + u * s.w;
            three_added(row, row + plane, row + 2 * plane, s.w, into);
        } else {
            energies(x, s, u, e.data());
            for (long j = 0; j < s.w; ++j) into[j] += e[j];
        }
    }
    Phase best{0, -1.0};
    for (long i = part; i < rows; i += parts) {
        std::vector<double> sum(columns, 0.0);
        for (const double* row = total.data() + i * width, *end = row + width; row < end; row += columns)
            for (long j = 0; j < columns; ++j) sum[j] += row[j];
        for (long j = 0; j < columns; ++j) best.meet({i * columns + j, sum[j]});
    }
    return best;
}

long strongest(const float* x, Shape s, long rows, long columns, long threads) {
    std::vector<Phase> found(threads);
    spread(threads, threads, [&](long i) { found[i] = strongest(x, s, rows, columns, i, threads); });
    for (const Phase& phase : found) found[0].meet(phase);
    return found[0].number;
}

// Rows [from, to) of a plane of h rows of w units of `unit` floats, moved up and left: many rows at once as if they were
// one, so that what comes to the ends of rows is from the rows below, then these ends.
void roll(const float* x, float* out, long h, long w, long unit, long down, long right, long from, long to) {
    const long row = w * unit, end = right * unit, turn = std::clamp(h - down, from, to);
    for (auto [a, b] : {std::pair(from, turn), std::pair(turn, to)})
        if (a < b) std::memcpy(out + a * row, x + (a + down) % h * row + end, ((b - a) * row - end) * sizeof(float));
    for (long u = from; u < to; ++u)
        std::memcpy(out + (u + 1) * row - end, x + (u + down) % h * row, end * sizeof(float));
}

}  // namespace

extern "C" {

void strongest_phases(const float* x, long* best, long n, long c, long h, long w, long rows, long columns, long tokens,
                      long threads) {
    const Shape s{c, h, w, bool(tokens)};
    each(n, s, threads, [=](long i, long inside) {
        best[i] = strongest(x + i * s.count(), s, rows, columns, inside);
    });
}

void anchored(const float* x, float* out, long n, long c, long h, long w, long rows, long columns, long tokens,
              long threads) {
    const Shape s{c, h, w, bool(tokens)};
    each(n, s, threads, [=](long i, long inside) {
        const float* from = x + i * s.count();
        float* to = out + i * s.count();
        const long best = strongest(from, s, rows, columns, inside);
        const long down = best / columns, right = best % columns;
        spread(inside, inside, [=](long part) {
            const long first = part * h / inside, last = (part + 1) * h / inside;
            if (tokens)
                roll(from, to, h, w, c, down, right, first, last);
            else
                for (long k = 0; k < c * h * w; k += h * w) roll(from + k, to + k, h, w, 1, down, right, first, last);
        });
    });
}

// Patches of p x p: (n, h / p, w / p, dim).
void embedded(const float* x, const float* weight, const float* bias, float* out, long n, long c, long h, long w,
              long p, long dim, long tokens, long weight_tokens, long threads) {
    const Shape s{c, h, w, bool(tokens)};
    const Patches patches(s, p, dim, weight, bias, weight_tokens, threads);
    each(n, s, threads, [=, &patches](long i, long inside) {
        const float* map = x + i * s.count();
        float* to = out + i * (h / p) * (w / p) * dim;
        const long best = strongest(map, s, p, p, inside);
        spread(inside, inside, [=, &patches](long part) {
            const long first = part * (h / p) / inside, last = (part + 1) * (h / p) / inside;
            patches.embed(map, best / p, best % p, first, last, to + first * (w / p) * dim);
        });
    });
}
}
