// A row's softmax, span by span: FlashAttention-2, algorithm 1.
#pragma once

#include <algorithm>

#include "spans.h"
#include "wide.h"

// What the spans so far add up to: the highest score, the sum of the weights below it, and the
// factor by which the last span made the sums before it smaller.
struct Running {
    float top = UNSEEN, total = 0.0f, shrink = 1.0f;
};

// A line of scores of a span of N positions becomes weights: 0 but for those that the row sees, which
// are the `window` last before place `end` of the span (all, if it is 0); up to `count`, which is rounded
// up to whole vectors. `scale` has the factor that turns exp2 into exp.
template <int N, typename O>
void soften(const float* line, O* weights, int64_t end, int window, int count, float scale, Running& row) {
    const int low = int(std::max<int64_t>(window ? end - window : 0, 0));
    const int high = int(std::clamp<int64_t>(end, 0, N));
    IntVec lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    const auto seen = [&](int s, Vec v, float otherwise) {
        if (s >= low && s + LANES <= high) return v;
        const IntVec at = lanes + s;
        return (at >= low) & (at < high) ? v : Vec{} + otherwise;
    };
    Vec tops = Vec{} + row.top, sum = {};
    for (int s = 0; s < high; s += LANES) {
        const Vec scores = seen(s, load(line + s), UNSEEN);
        tops = scores > tops ? scores : tops;
    }
    const float above = reduce(tops, [](Vec a, Vec b) { return a > b ? a : b; });
    for (int s = 0; s < high; s += LANES) {
        const Vec below = load(line + s) * scale - above * scale;
        const Vec weight = seen(s, exp2_negative(below), 0.0f);
        store_weights(weights + s, weight);
        sum += weight;
    }
    for (int s = (high + LANES - 1) / LANES * LANES; s < count; s += LANES)
        store_weights(weights + s, Vec{});
    row.shrink = above == row.top ? 1.0f : exp2_negative(splat((row.top - above) * scale))[0];
    row.top = above;
    row.total = row.total * row.shrink + reduce(sum, [](Vec a, Vec b) { return a + b; });
}
