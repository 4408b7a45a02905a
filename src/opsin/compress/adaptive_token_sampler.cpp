// Scores and inverse transform sampling of n images, as the functions of these names in adaptive_token_sampler.py do them
// with PyTorch's operators.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <numeric>
#include <vector>

#include "native.h"

namespace {

float dot(const float* a, const float* b, long n) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; ++i) sum += a[i] * b[i];
    return sum;
}

// With the same roundings as there; of equal scores the first comes first, and before all what does not exist.
void choose(const float* scores, const bool* exists, bool* chosen, long patches, long tokens) {
    std::vector<long> order(patches);
    std::vector<float> key(patches), total(patches);
    for (long j = 0; j < patches; ++j) key[j] = exists[j] ? scores[j] : -1.0f;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](long a, long b) { return key[a] < key[b]; });
    double sum = 0.0;
    float least = INFINITY;
    for (long j = 0; j < patches; ++j) {
        total[j] = sum += std::max(key[order[j]], 0.0f);
        if (exists[j]) least = std::min(least, scores[j]);
    }
    const float most = total[patches - 1];
    const auto above = std::find_if(total.begin(), total.end() - 1, [=](float t) { return t > least; });
    const float start = std::min(most, *above);
    const float span = std::max(most - start, FLT_MIN);
    float before = -1.0f;
    for (long j = 0; j < patches; ++j) {
        const bool last = j + 1 == patches;
        const float midway = last ? 0.0f : (total[j + 1] + total[j]) / 2;
        const float point = last ? INFINITY : std::floor((midway - start) / span * (tokens - 2));
        const float passed = exists[order[j]] ? point : -1.0f;
        chosen[order[j]] = passed > before;
        before = std::max(before, passed);
    }
}

}  // namespace

extern "C" {

// Of n images with t tokens in h heads of d channels, where the strides of q, k and v are the same. Null: all exist.
void significance(const float* q, const float* k, const float* v, const bool* exists, float* scores, long n, long h,
                  long t, long d, long image, long head, long token, long exists_stride, long with_values, float scale,
                  long threads) {
    std::vector<float> logits(n * h * t), length(n * t);
    spread(n * t, threads, [&](long row) {
        const long i = row / t, j = row % t, at = i * image + j * token;
        const bool here = !exists || exists[i * exists_stride + j];
        for (long m = 0; m < h; ++m) {
            const float logit = scale * dot(q + i * image + m * head, k + at + m * head, d);
            logits[(i * h + m) * t + j] = here ? logit : -INFINITY;
        }
        for (long m = 0; with_values && m < h; ++m) {
            const float* value = v + at + m * head;
            length[row] += dot(value, value, d);
        }
    });
    spread(n, threads, [&](long i) {
        std::vector<float> read(t, 0.0f);
        for (long m = 0; m < h; ++m) {
            float sum = 0.0f, *first = logits.data() + (i * h + m) * t, *end = first + t;
            const float most = *std::max_element(first, end);
            for (float* logit = first; logit < end; ++logit) sum += *logit = std::exp(*logit - most);
            for (long j = 0; j < t; ++j) read[j] += first[j] / sum;
        }
        for (long j = 1; j < t; ++j)
            scores[i * (t - 1) + j - 1] = with_values ? read[j] * std::sqrt(length[i * t + j]) : read[j];
    });
}

void inverse_transform(const float* scores, const bool* exists, bool* chosen, long n, long patches, long scores_stride,
                       long exists_stride, long tokens, long threads) {
    spread(patches ? n : 0, threads, [&](long i) {
        choose(scores + i * scores_stride, exists + i * exists_stride, chosen + i * patches, patches, tokens);
    });
}
}
