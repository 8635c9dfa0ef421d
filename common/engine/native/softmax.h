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
    WideInt lanes;
    for (int i = 0; i < WIDE; i++) lanes[i] = i;
    const auto seen = [&](int s, WideVec v, float otherwise) {
        if (s >= low && s + WIDE <= high) return v;
        const WideInt at = lanes + s;
        return (at >= low) & (at < high) ? v : WideVec{} + otherwise;
    };
    WideVec tops = WideVec{} + row.top, sum = {};
    for (int s = 0; s < high; s += WIDE) {
        const WideVec scores = seen(s, load_wide(line + s), UNSEEN);
        tops = scores > tops ? scores : tops;
    }
    const float above = reduce(tops, [](WideVec a, WideVec b) { return a > b ? a : b; });
    for (int s = 0; s < high; s += WIDE) {
        const WideVec below = load_wide(line + s) * scale - above * scale;
        const WideVec weight = seen(s, exp2_negative_of<WideVec, WideInt>(below), 0.0f);
        store_weights(weights + s, weight);
        sum += weight;
    }
    for (int s = (high + WIDE - 1) / WIDE * WIDE; s < count; s += WIDE)
        store_weights(weights + s, WideVec{});
    row.shrink = above == row.top ? 1.0f : exp2_negative(splat((row.top - above) * scale))[0];
    row.top = above;
    row.total = row.total * row.shrink + reduce(sum, [](WideVec a, WideVec b) { return a + b; });
}
