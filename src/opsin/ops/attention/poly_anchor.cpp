// Polyphase anchoring of n maps (see poly_anchor_vit.py): the energies of all phases in one pass, the moved copy in
// another. Maps lie as planes (c, h, w) or as tokens (h, w, c).
#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct Size {
    long c, h, w;
    long count() const { return c * h * w; }
};

// Squares of all channels at the w places of a row. Their order is the same everywhere, so that shifts change nothing.
template <long PIXEL>
void three(const float* a, const float* b, const float* c, long w, float* e) {
    for (long j = 0; j < w * PIXEL; j += PIXEL) *e++ = a[j] * a[j] + b[j] * b[j] + c[j] * c[j];
}

void energies(const float* x, Size s, bool tokens, long u, float* e) {
    const long plane = s.h * s.w;
    x += u * s.w * (tokens ? s.c : 1);
    if (s.c == 3) return tokens ? three<3>(x, x + 1, x + 2, s.w, e) : three<1>(x, x + plane, x + 2 * plane, s.w, e);
    if (!tokens) {
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

// The number of the strongest phase, row by row; the first where they tie.
long strongest(const float* x, Size s, bool tokens, long rows, long columns) {
    std::vector<float> e(s.w);
    std::vector<double> total(rows * s.w, 0.0);
    for (long u = 0; u < s.h; ++u) {
        energies(x, s, tokens, u, e.data());
        double* into = total.data() + u % rows * s.w;
        for (long j = 0; j < s.w; ++j) into[j] += e[j];
    }
    long best = 0;
    double most = -1.0;
    for (long i = 0; i < rows; ++i) {
        std::vector<double> sum(columns, 0.0);
        for (const double* row = total.data() + i * s.w, *end = row + s.w; row < end; row += columns)
            for (long j = 0; j < columns; ++j) sum[j] += row[j];
        for (long j = 0; j < columns; ++j)
            if (sum[j] > most) most = sum[j], best = i * columns + j;
    }
    return best;
}

// Planes of h rows of w units of `unit` floats, moved up and left: a plane at once as if it were one row, so that what
// comes to the ends of its rows is from the rows below, then these ends.
void roll(const float* x, float* out, long planes, long h, long w, long unit, long down, long right) {
    const long row = w * unit, plane = h * row, end = right * unit, start = down * row + end;
    for (const float* last = x + planes * plane; x < last; x += plane, out += plane) {
        std::memcpy(out, x + start, (plane - start) * sizeof(float));
        std::memcpy(out + plane - start, x, start * sizeof(float));
        for (long u = 0; u < h; ++u)
            std::memcpy(out + (u + 1) * row - end, x + (u + down) % h * row, end * sizeof(float));
    }
}

// The same from planes to tokens.
template <long C>
void interleave(const float* x, float* out, long h, long w, long down, long right) {
    for (long u = 0; u < h; ++u) {
        const float* from = x + (u + down) % h * w;
        float* to = out + u * w * C;
        for (long j = 0; j < w - right; ++j)
            for (long k = 0; k < C; ++k) to[j * C + k] = from[k * h * w + j + right];
        for (long j = w - right; j < w; ++j)
            for (long k = 0; k < C; ++k) to[j * C + k] = from[k * h * w + j + right - w];
    }
}

// Maps of `size` floats over threads, none of which starts for less than an image of 128 x 128.
template <class Work>
void spread(long n, long size, long threads, Work work) {
    threads = std::min({n, threads, 1 + n * size / (3 * 128 * 128)});
    std::vector<std::thread> others;
    for (long t = 1; t < threads; ++t)
        others.emplace_back([=] { for (long i = t; i < n; i += threads) work(i); });
    for (long i = 0; i < n; i += threads) work(i);
    for (auto& other : others) other.join();
}

}  // namespace

extern "C" {

void strongest_phases(const float* x, long* best, long n, long c, long h, long w, long rows, long columns, long tokens,
                      long threads) {
    const Size s{c, h, w};
    spread(n, s.count(), threads, [=](long i) { best[i] = strongest(x + i * s.count(), s, tokens, rows, columns); });
}

// What comes as planes leaves as planes or, only where there are three, as tokens.
void anchored(const float* x, float* out, long n, long c, long h, long w, long rows, long columns, long tokens,
              long tokens_out, long threads) {
    const Size s{c, h, w};
    spread(n, s.count(), threads, [=](long i) {
        const float* from = x + i * s.count();
        float* to = out + i * s.count();
        const long best = strongest(from, s, tokens, rows, columns), down = best / columns, right = best % columns;
        if (tokens)
            roll(from, to, 1, h, w, c, down, right);
        else if (tokens_out)
            interleave<3>(from, to, h, w, down, right);
        else
            roll(from, to, c, h, w, 1, down, right);
    });
}
}
