// Paged causal attention for the CPU: block tables are walked in place, nothing is gathered.
//
// Online softmax over spans of 64 positions at absolute multiples of 64, in fp32 (FlashAttention-2,
// algorithm 1; the paging is PagedAttention's); where the processor multiplies bfloat16, products are
// of bfloat16, softmax weights included. All query heads of a KV head go through each loaded key and
// value together. Whatever the tile a row is in, its own sums are formed in one fixed order,
// so its bits depend on its sequence alone: fully masked spans multiply by one and add zero.
//
// Plain C ABI, no headers but the standard library's.
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention_panels.h"

namespace {

constexpr int TILE_QUERIES = 16;
constexpr int FEWEST_PANEL_ROWS = 2 * TILE_ROWS;
constexpr int DIRECT_ROWS = 8;  // up to here keys are widened on the fly, above once per tile
#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int MOST = 4;  // rows at once, by how many registers there are
#else
constexpr int MOST = 2;
#endif
// scores[r][0..LANES) = queries[r] . keys[0..LANES) for R rows.
template <typename O, typename K, int R>
void dot_rows(const O* queries, int width, const K* const* keys, float* scores) {
    Vec quads[R][QUADS];
    for (int group = 0; group < QUADS; group++) {
        Vec sums[R][4] = {};
        for (int d = 0; d < width; d += PAIR)
            for (int k = 0; k < 4; k++)
                for (int r = 0; r < R; r++)
                    sums[r][k] = add_products(sums[r][k], queries + r * width + d,
                                              keys[4 * group + k] + d);
        for (int r = 0; r < R; r++)
            quads[r][group] = sum_quads(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    }
    for (int r = 0; r < R; r++) store(scores + r * SPAN, sum_lanes(quads[r]));
}

template <typename T>
void prefetch(const T* row, int head_dim) {
    for (int d = 0; d < head_dim; d += 64 / int(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}
void prefetch(const int8_t* row, int head_dim) {
    for (int d = 0; d < head_dim; d += 64) __builtin_prefetch(row + d, 0, 2);
    __builtin_prefetch(row + head_dim, 0, 2);  // its scale
}

// Scores of R rows for `count` keys. Blocks lie anywhere, so `next` is asked for while this is done.
template <typename O, typename K, int R>
void dot_span(const O* queries, int width, const K* const* keys, int count, float* scores,
              const K* const* next) {
    for (int s = 0; s < count; s += LANES) {
        if (next)
            for (int i = 0; i < LANES; i++) prefetch(next[s + i], width);
        dot_rows<O, K, R>(queries, width, keys + s, scores + s);
    }
}

// sums[r] = sums[r] * shrink[r] + weights[r][0..count) . values[0..count) for R rows and the W
// vectors from `d` on.
template <typename O, typename V, int R, int W>
void add_values(const O* weights, const float* shrink, int width, const V* const* values, int count,
                float* sums, int d, const V* const* next) {
    Vec acc[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++)
            acc[r][w] = load(sums + r * width + d + w * LANES) * shrink[r];
    for (int s = 0; s < count; s += ROWS<O>) {
        if (next)
            for (int i = 0; i < ROWS<O>; i++) prefetch(next[s + i], width);
        for (int w = 0; w < W; w += 2) {
            const auto pair = load_values(weights, values + s, d + w * LANES);
            for (int r = 0; r < R; r++) {
                acc[r][w] = add_weighted(acc[r][w], pair.first, weights + r * SPAN + s);
                acc[r][w + 1] = add_weighted(acc[r][w + 1], pair.second, weights + r * SPAN + s);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) store(sums + r * width + d + w * LANES, acc[r][w]);
}

template <typename O, typename V, int R>
void add_span(const O* weights, const float* shrink, int width, const V* const* values, int count,
              float* sums, const V* const* next) {
    int d = 0;
    for (; d + 2 * PAIR <= width; d += 2 * PAIR)
        add_values<O, V, R, 4>(weights, shrink, width, values, count, sums, d, d ? nullptr : next);
    for (; d < width; d += PAIR)
        add_values<O, V, R, 2>(weights, shrink, width, values, count, sums, d, d ? nullptr : next);
}

// One sequence's tile of queries under one KV head: rows are (query, head of the group).
template <typename K>
struct Tile {
    using O = Operand<K>;
    int rows, groups, width;  // width is head_dim rounded up to whole pairs
    float scale;              // of scores, with the factor that turns exp2 into exp
    Scales<K> scales;         // of the span
    std::vector<O> queries, weights, keys, values;
    std::vector<float> sums, scores, top, total, shrink;

    void reset(int num_queries, int num_groups, int head_dim) {
        groups = num_groups;
        rows = num_queries * num_groups;
        width = (head_dim + PAIR - 1) / PAIR * PAIR;
        queries.assign(size_t(rows) * width, O{});
        weights.resize(size_t(rows) * SPAN);
        sums.assign(size_t(rows) * width, 0.0f);
        scores.resize(size_t(rows) * SPAN);
        top.assign(rows, UNSEEN);
        total.assign(rows, 0.0f);
        shrink.assign(rows, 1.0f);
    }

    // Scores of one span become weights; the running maximum and total move on.
    void soften(int row, int64_t begin, int64_t first_seen, int64_t end_seen) {
        const float* line = scores.data() + size_t(row) * SPAN;
        const IntVec lanes = PER_QUAD(0, 1, 2, 3);
        const int low = int(first_seen > begin ? first_seen - begin : 0);
        const int high = int(end_seen - begin > SPAN ? SPAN : end_seen - begin);
        Vec tops = splat(top[row]), scaled[SPAN / LANES];
        IntVec seen[SPAN / LANES];
        for (int v = 0; v < SPAN / LANES; v++) {
            const IntVec at = lanes + v * LANES;
            seen[v] = (at >= low) & (at < high);
            scaled[v] = pick(seen[v], load(line + v * LANES) * scale, splat(UNSEEN));
            tops = pick(scaled[v] > tops, scaled[v], tops);
        }
        const float above = max_all(tops);
        Vec sum = {};
        for (int v = 0; v < SPAN / LANES; v++) {
            const Vec weight = pick(seen[v], exp2_negative(scaled[v] - above), Vec{});
            store_weights(&weights[size_t(row) * SPAN + v * LANES], weight);
            sum += weight;
        }
        shrink[row] = above == top[row] ? 1.0f : exp2_negative(splat(top[row] - above))[0];
        top[row] = above;
        total[row] = total[row] * shrink[row] + sum_all(sum);
    }

    // `next` is the span that will follow, or null.
    template <typename T>
    void span(const Rows<T>& at, const Rows<T>* next, int64_t begin, int64_t position, int window) {
        const int padded = (at.count + LANES - 1) / LANES * LANES;
        each([&](auto r, int row) {
            dot_span<O, T, r()>(&queries[size_t(row) * width], width, at.keys, padded,
                                &scores[size_t(row) * SPAN], row == 0 && next ? next->keys : nullptr);
        });
        for (int row = 0; row < rows; row++) {
            const int64_t end_seen = position + row / groups + 1;
            scales.apply_to_scores(&scores[size_t(row) * SPAN]);
            soften(row, begin, window ? end_seen - window : 0, end_seen);
            scales.apply_to_weights(&weights[size_t(row) * SPAN]);
        }
        each([&](auto r, int row) {
            add_span<O, T, r()>(&weights[size_t(row) * SPAN], &shrink[row], width, at.values, at.count,
                                &sums[size_t(row) * width], row == 0 && next ? next->values : nullptr);
        });
    }

    template <int R>
    struct Count {
        constexpr int operator()() const { return R; }
    };

    template <typename F>
    void each(F&& part) {
        int row = 0;
        for (; row + MOST <= rows; row += MOST) part(Count<MOST>{}, row);
        if (rows - row == 3) part(Count<3>{}, row);
        if (rows - row == 2) part(Count<2>{}, row);
        if (rows - row == 1) part(Count<1>{}, row);
    }
};

// Rows as operands, each `width` long, in the order that load_pair makes.
template <typename T>
void copy_rows(const T* const* rows, int count, int head_dim, int width, float* out,
               const float** copies) {
    for (int s = 0; s < SPAN; s++) {
        float* line = out + s * width;
        copies[s] = line;
        if (s >= count) continue;
        int d = 0;
        for (; d + PAIR <= head_dim; d += PAIR) {
            const VecPair pair = load_pair(rows[s] + d);
            store(line + d, pair.first);
            store(line + d + LANES, pair.second);
        }
        for (; d < head_dim; d++) line[place(rows[s], d)] = widen(rows[s][d]);
    }
}
[[maybe_unused]] void copy_rows(const BFloat16* const* rows, int count, int head_dim, int width,
                                BFloat16* out, const BFloat16** copies) {
    for (int s = 0; s < SPAN; s++) {
        copies[s] = out + s * width;
        if (s < count) std::memcpy(out + s * width, rows[s], head_dim * sizeof(BFloat16));
    }
}

template <typename T, typename K>
void attend_tile(const Problem& p, const T* queries, const K* keys, T* out, int sequence,
                 int first_query, int num_queries, int kv_head, Tile<K>& tile) {
    using O = Operand<K>;
    const int64_t row = p.row_starts[sequence] + first_query;
    const int groups = p.num_heads / p.num_kv_heads;
    tile.reset(num_queries, groups, p.head_dim);
    tile.scale = p.scale * LOG2_E;
    const auto of_row = [&](int r, int64_t stride) {
        return (row + r / groups) * stride + int64_t(kv_head * groups + r % groups) * p.head_dim;
    };
    for (int r = 0; r < tile.rows; r++) {
        const T* query = queries + of_row(r, p.query_stride);
        O* line = &tile.queries[size_t(r) * tile.width];
        for (int d = 0; d < p.head_dim; d++) convert(query[d], line + query_place<K>(d));
    }
    const int64_t position = p.starts[sequence] + first_query;
    const int64_t end = position + num_queries;
    const int64_t lowest = p.window && position >= p.window ? position - p.window + 1 : 0;
    const bool widens = std::is_same_v<O, float> && tile.rows > DIRECT_ROWS;
    const bool copies = widens || p.head_dim % PAIR;
    if (copies) {
        tile.keys.assign(size_t(SPAN) * tile.width, O{});
        tile.values.assign(size_t(SPAN) * tile.width, O{});
    }
    const int32_t* table = p.tables + sequence * p.table_stride;
    const int64_t head_size = p.block_size * row_stride<K>(p.head_dim);
    const K* head = keys + kv_head * head_size;
    const K* next_head = kv_head + 1 < p.num_kv_heads ? head + head_size : head;
    const int64_t first = lowest / SPAN * SPAN;
    Rows<K> now, next;
    find_rows(p, table, head, first, end, &next);
    for (int64_t begin = first; begin < end; begin += SPAN) {
        now = next;
        if (begin + SPAN < end)
            find_rows(p, table, head, begin + SPAN, end, &next);
        else  // the last span is followed by the next head's first
            find_rows(p, table, next_head, first, end, &next);
        tile.scales.read(now, p.head_dim);
        if (copies) {
            Rows<O> wide;
            copy_rows(now.keys, now.count, p.head_dim, tile.width, tile.keys.data(), wide.keys);
            copy_rows(now.values, now.count, p.head_dim, tile.width, tile.values.data(), wide.values);
            wide.count = now.count;
            tile.span(wide, static_cast<const Rows<O>*>(nullptr), begin, position, p.window);
        } else {
            tile.span(now, &next, begin, position, p.window);
        }
    }
    for (int r = 0; r < tile.rows; r++) {
        T* target = out + of_row(r, p.out_stride);
        const float* line = &tile.sums[size_t(r) * tile.width];
        for (int d = 0; d < p.head_dim; d++) convert(line[sum_place<K>(d)] / tile.total[r], target + d);
    }
}

// Queries [first, first + count) of a sequence, under one KV head.
struct Item {
    int sequence, first, count, kv_head;
};

// What the threads share out. With `fixed_order` a row goes the same way whatever is beside it.
std::vector<Item> items_of(const Problem& p) {
    const int groups = p.num_heads / p.num_kv_heads;
    std::vector<Item> items;
    for (int sequence = 0; sequence < p.num_sequences; sequence++) {
        const int rows = p.row_starts[sequence + 1] - p.row_starts[sequence];
        const bool panels = !p.fixed_order && rows * groups >= FEWEST_PANEL_ROWS;
        const int tile = panels ? std::max(PANEL_ROWS / groups, 1) : TILE_QUERIES;
        for (int first = 0; first < rows; first += tile)
            for (int kv_head = 0; kv_head < p.num_kv_heads; kv_head++)
                items.push_back({sequence, first, std::min(tile, rows - first), kv_head});
    }
    return items;
}

}  // namespace

template <typename T, typename K>
void attend(const Problem& p, const T* queries, const K* keys, T* out) {
    const std::vector<Item> items = items_of(p);
    auto& tile = own<Tile<K>>();
    auto& panels = own<PanelTile<T>>();
    const int groups = p.num_heads / p.num_kv_heads;
#pragma omp for schedule(dynamic)
    for (size_t index = 0; index < items.size(); index++) {
        const Item& item = items[index];
        if (!p.fixed_order && item.count * groups >= FEWEST_PANEL_ROWS)
            panels.attend(p, queries, keys, out, item.sequence, item.first, item.count, item.kv_head);
        else
            attend_tile(p, queries, keys, out, item.sequence, item.first, item.count, item.kv_head, tile);
    }
}

template void attend(const Problem&, const float*, const float*, float*);
template void attend(const Problem&, const float*, const int8_t*, float*);
template void attend(const Problem&, const BFloat16*, const BFloat16*, BFloat16*);
template void attend(const Problem&, const BFloat16*, const int8_t*, BFloat16*);

extern "C" void kvbaton_attend(const Problem* problem, const void* queries, const void* keys,
                               void* out, int32_t bfloat16, int32_t int8_kv, int32_t threads) {
#ifndef _OPENMP
    (void)threads;
#endif
    const auto run = [&](auto* result) {
        using T = std::remove_pointer_t<decltype(result)>;
        const auto asked = static_cast<const T*>(queries);
        if (int8_kv)
            attend(*problem, asked, static_cast<const int8_t*>(keys), result);
        else
            attend(*problem, asked, static_cast<const T*>(keys), result);
    };
#pragma omp parallel num_threads(threads) if (threads > 1)
    if (bfloat16)
        run(static_cast<BFloat16*>(out));
    else
        run(static_cast<float*>(out));
}
