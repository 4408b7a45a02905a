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

// Squares of all channels at the places of row u. Their order is the same at every place, so that shifts change nothing.
void energies(const float* x, Size s, bool tokens, long u, float* e) {
    if (!tokens) {
        std::fill(e, e + s.w, 0.0f);
        for (long k = 0; k < s.c; ++k) {
            const float* row = x + (k * s.h + u) * s.w;
            for (long j = 0; j < s.w; ++j) e[j] += row[j] * row[j];
        }
        return;
    }
    const float* token = x + u * s.w * s.c;
    if (s.c == 3) {
        for (long j = 0; j < s.w; ++j, token += 3)
            e[j] = token[0] * token[0] + token[1] * token[1] + token[2] * token[2];
        return;
    }
    for (long j = 0; j < s.w; ++j, token += s.c) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long k = 0; k < s.c; ++k) sum += token[k] * token[k];
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
    for (long i = 0; i < rows; ++i)
        for (long j = 0; j < columns; ++j) {
            double sum = 0.0;
            for (long v = j; v < s.w; v += columns) sum += total[i * s.w + v];
            if (sum > most) most = sum, best = i * columns + j;
        }
    return best;
}

// Rows of w units of `unit` floats, `planes` times h of them, moved up and left.
void roll(const float* x, float* out, long planes, long h, long w, long unit, long down, long right) {
    const long head = (w - right) * unit, tail = right * unit;
    for (long k = 0; k < planes; ++k)
        for (long u = 0; u < h; ++u) {
            const float* from = x + (k * h + (u + down) % h) * w * unit;
            float* to = out + (k * h + u) * w * unit;
            std::memcpy(to, from + tail, head * sizeof(float));
            std::memcpy(to + head, from, tail * sizeof(float));
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
