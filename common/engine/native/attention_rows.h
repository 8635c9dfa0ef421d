// Attention of few queries: keys and values are read where they lie, each once for all the rows of a
// tile, which are the queries and the heads that share a KV head.
#pragma once

#include <vector>

#include "own.h"
#include "softmax.h"

constexpr int PAIR = 2 * WIDE;    // numbers of a row that are taken at once
constexpr int FETCHES_A_ROW = 4;  // while a row of scores is softened
constexpr int DIRECT_ROWS = 8;    // up to here keys are widened on the fly, above once per tile
#if defined(__AVX512VL__) || defined(__aarch64__)
constexpr int MOST = 4;           // rows at once, by how many registers there are
constexpr int WIDEST = 4;         // vectors of sums for each of them
#else
constexpr int MOST = 2;
constexpr int WIDEST = 2;
#endif

// PAIR numbers as two vectors. bfloat16 is the upper half of a float, so a vector of them splits into
// its even and its odd numbers by a shift and a mask; `place` gives the order that makes.
struct WidePair {
    WideVec first, second;
};
inline WidePair load_pair(const float* p) { return {load_wide(p), load_wide(p + WIDE)}; }
inline WidePair load_pair(const BFloat16* p) {
    const WideInt both = load_wide(p);
    return {reinterpret_cast<WideVec>(both << 16),
            reinterpret_cast<WideVec>(both & int32_t(0xffff0000))};
}
inline WidePair load_pair(const int8_t* p) { return {load_numbers(p), load_numbers(p + WIDE)}; }
inline int place(const float*, int d) { return d; }
inline int place(const int8_t*, int d) { return d; }
inline int place(const BFloat16*, int d) {
    return (d & ~(PAIR - 1)) + (d & 1) * WIDE + (d >> 1 & (WIDE - 1));
}

// sums[r] gains the products of PAIR numbers of query r and a key, lane by lane.
template <int R, typename K>
inline void add_products(WideVec (&sums)[R], const float* queries, int width, const K* key) {
    const WidePair pair = load_pair(key);
    for (int r = 0; r < R; r++) {
        sums[r] += load_wide(queries + r * width) * pair.first;
        sums[r] += load_wide(queries + r * width + WIDE) * pair.second;
    }
}

// OF_VALUES<O> rows of values are taken at once.
template <typename O>
constexpr int OF_VALUES = std::is_same_v<O, BFloat16> ? 2 : 1;

template <typename V>
inline WidePair load_values(const float*, const V* const* values, int d) {
    return load_pair(values[0] + d);
}
inline WideVec add_weighted(WideVec sum, WideVec values, const float* weight) {
    return sum + values * *weight;
}

#if BFLOAT16_PRODUCTS
// Two products go to each lane: of neighbouring dimensions for keys, and, once two rows are
// interleaved, of neighbouring positions for values.
template <int R>
inline void add_products(WideVec (&sums)[R], const BFloat16* queries, int width, const BFloat16* key) {
    const WideInt pairs = load_wide(key);
    for (int r = 0; r < R; r++) sums[r] = add_pairs(sums[r], load_wide(queries + r * width), pairs);
}
struct WideIntPair {
    WideInt first, second;
};
inline WideIntPair load_values(const BFloat16*, const BFloat16* const* values, int d) {
    const auto row = [&](int i) { return _mm512_loadu_si512(values[i] + d); };
    return {reinterpret_cast<WideInt>(_mm512_unpacklo_epi16(row(0), row(1))),
            reinterpret_cast<WideInt>(_mm512_unpackhi_epi16(row(0), row(1)))};
}
inline WideVec add_weighted(WideVec sum, WideInt values, const BFloat16* weights) {
    int32_t both;
    std::memcpy(&both, weights, 4);
    return add_pairs(sum, values, WideInt{} + both);
}
#endif

// Where dimension d of a query, and of the weighted sums of values, is kept.
template <typename K>
inline int query_place(int d) {
    return std::is_same_v<Operand<K>, BFloat16> ? d : place(static_cast<const K*>(nullptr), d);
}
template <typename K>
inline int sum_place(int d) {
    if (std::is_same_v<Operand<K>, float>) return place(static_cast<const K*>(nullptr), d);
    return (d & ~(PAIR - 1)) + (d >> 2 & 1) * WIDE + (d >> 3 & 3) * 4 + (d & 3);  // unpacklo, -hi
}

// The keys and values that will be wanted next, of some heads. They are asked for in the order in which
// they lie, a block's keys of one head after another and then its values, a row's bytes at a time.
template <typename K>
class Ahead {
  public:
    // Positions [begin, end) of a block table; `head` is the first of num_heads.
    void set(const Problem& p, const int32_t* table, const K* head, int num_heads, int64_t begin,
             int64_t end) {
        stride = row_stride<K>(p.head_dim), head_size = p.block_size * stride;
        block_stride = p.block_stride, value_offset = p.value_offset, block_size = p.block_size;
        heads = num_heads, keys = head, left = end - begin;
        blocks = table + begin / block_size, offset = begin % block_size;
        lines = int(stride * int64_t(sizeof(K)) + 63) / 64;
        run = 0, at = stop = nullptr;
    }
    void clear() { left = 0, at = stop = nullptr; }
    void fetch() {
        if (at >= stop && !find_run()) return;
        for (int i = 0; i < lines; i++, at += 64) __builtin_prefetch(at, 0, 2);
    }

  private:
    const K* keys;
    const int32_t* blocks;
    int64_t stride, head_size, block_stride, value_offset, block_size, offset, left = 0;
    int heads, lines, run;  // of a block: keys of each head, values of each head
    const char *at = nullptr, *stop = nullptr;

    bool find_run() {
        if (left <= 0) return false;
        const int64_t count = std::min(block_size - offset, left);
        const K* first = keys + *blocks * block_stride + run / heads * value_offset + run % heads * head_size;
        at = reinterpret_cast<const char*>(first + offset * stride);
        stop = reinterpret_cast<const char*>(first + (offset + count) * stride);
        if (++run == 2 * heads) run = 0, blocks++, left -= count, offset = 0;
        return true;
    }
};

// Scores of R rows for `count` keys.
template <int R, typename O, typename K, typename Width, typename A>
void score_span(const O* queries, Width width, const K* const* keys, int count, float* scores,
                A& ahead) {
    for (int s = 0; s < count; s += WIDE) {
        WideVec fours[R][WIDE / 4];
        for (int i = 0; i < WIDE; i += 4) {
            WideVec sums[4][R] = {};
#pragma GCC unroll 4
            for (int key = 0; key < 4; key++) {
                ahead.fetch();
                for (int d = 0; d < width; d += PAIR)
                    add_products<R>(sums[key], queries + d, width, keys[s + i + key] + d);
            }
            for (int r = 0; r < R; r++)
                fours[r][i / 4] = add_crosswise<4>(add_crosswise<2>(sums[0][r], sums[1][r]),
                                                   add_crosswise<2>(sums[2][r], sums[3][r]));
        }
        for (int r = 0; r < R; r++) store_wide(scores + r * SPAN + s, sum_fours(fours[r]));
    }
}

// sums[r] = sums[r] * shrink + weights[r][0..count) . values[0..count) for R rows and the W vectors
// from `d` on.
template <typename O, typename V, int R, int W, typename A>
void add_values(const O* weights, const Running* rows, int width, const V* const* values, int count,
                float* sums, int d, A& ahead) {
    WideVec acc[R][W];
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++)
            acc[r][w] = load_wide(sums + r * width + d + w * WIDE) * rows[r].shrink;
    for (int s = 0; s < count; s += OF_VALUES<O>) {
        ahead.fetch();
        for (int w = 0; w < W; w += 2) {
            const auto pair = load_values(weights, values + s, d + w * WIDE);
            for (int r = 0; r < R; r++) {
                acc[r][w] = add_weighted(acc[r][w], pair.first, weights + r * SPAN + s);
                acc[r][w + 1] = add_weighted(acc[r][w + 1], pair.second, weights + r * SPAN + s);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) store_wide(sums + r * width + d + w * WIDE, acc[r][w]);
}

template <int R, typename O, typename V, typename A>
void add_span(const O* weights, const Running* rows, int width, const V* const* values, int count,
              float* sums, A& ahead) {
    int d = 0;
    for (; d + WIDEST * WIDE <= width; d += WIDEST * WIDE)
        add_values<O, V, R, WIDEST>(weights, rows, width, values, count, sums, d, ahead);
    if constexpr (WIDEST > 2)
        if (d < width) add_values<O, V, R, 2>(weights, rows, width, values, count, sums, d, ahead);
}

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
            const WidePair pair = load_pair(rows[s] + d);
            store_wide(line + d, pair.first);
            store_wide(line + d + WIDE, pair.second);
        }
        for (; d < head_dim; d++) line[place(rows[s], d)] = widen(rows[s][d]);
    }
}
[[maybe_unused]] inline void copy_rows(const BFloat16* const* rows, int count, int head_dim, int width,
                                       BFloat16* out, const BFloat16** copies) {
    for (int s = 0; s < SPAN; s++) {
        copies[s] = out + s * width;
        if (s < count) std::memcpy(out + s * width, rows[s], head_dim * sizeof(BFloat16));
    }
}

// Queries [first, first + count) of a sequence, under `heads` KV heads from kv_head on.
struct Item {
    int sequence, first, count, kv_head, heads;
};

template <typename K>
class RowTile {
  public:
    // `following`, if it is not null, is what comes next: its first keys are asked for.
    template <typename T>
    void attend(const Problem& p, const T* queries, const K* keys, T* out, const Item& item,
                const Item* following) {
        start(p, item);
        const int64_t first_row = p.row_starts[item.sequence] + item.first;
        const auto of_row = [&](int row, int64_t stride) {
            const int head = row / rows * groups + row % groups;
            return (first_row + row % rows / groups) * stride + int64_t(item.kv_head * groups + head) * p.head_dim;
        };
        for (int r = 0; r < rows * item.heads; r++) {
            const T* query = queries + of_row(r, p.query_stride);
            O* line = &operands[size_t(r) * width];
            for (int d = 0; d < p.head_dim; d++) convert(query[d], line + query_place<K>(d));
        }
        walk(p, keys, item, following);
        for (int r = 0; r < rows * item.heads; r++) {
            T* target = out + of_row(r, p.out_stride);
            const float* line = &sums[size_t(r) * width];
            for (int d = 0; d < p.head_dim; d++) convert(line[sum_place<K>(d)] / running[r].total, target + d);
        }
    }

  private:
    using O = Operand<K>;

    int rows, groups, width;  // rows of one KV head; width is head_dim rounded up to whole pairs
    float scale;              // of scores, with the factor that turns exp2 into exp
    Scales<K> scales;         // of the span
    Ahead<K> ahead;
    Rows<K> at;
    Buffer<O> operand_rows, weight_rows, key_copies, value_copies;
    Buffer<float> sum_rows, score_rows;
    O *operands, *weights;
    float *sums, *scores;
    std::vector<Running> running;

    void start(const Problem& p, const Item& item) {
        groups = p.num_heads / p.num_kv_heads;
        rows = item.count * groups;
        width = (p.head_dim + PAIR - 1) / PAIR * PAIR;
        scale = p.scale * LOG2_E;
        operands = operand_rows.zeros(int64_t(rows) * item.heads * width);
        weights = weight_rows.of(int64_t(rows) * SPAN);
        sums = sum_rows.zeros(int64_t(rows) * item.heads * width);
        scores = score_rows.of(int64_t(rows) * SPAN);
        running.assign(rows * item.heads, Running{});
    }

    static int64_t first_span(const Problem& p, const Item& item) {
        const int64_t position = p.starts[item.sequence] + item.first;
        return (p.window && position >= p.window ? position - p.window + 1 : 0) / SPAN * SPAN;
    }

    // The span from `begin` on is wanted next; there may be none.
    void fetch_span(const Problem& p, const K* keys, const Item& item, int64_t begin) {
        const int64_t end = p.starts[item.sequence] + item.first + item.count;
        const int64_t head_size = p.block_size * row_stride<K>(p.head_dim);
        ahead.set(p, p.tables + item.sequence * p.table_stride, keys + item.kv_head * head_size, item.heads,
                  begin, std::min<int64_t>(begin + SPAN, end));
    }

    // All the spans that the queries see.
    void walk(const Problem& p, const K* keys, const Item& item, const Item* following) {
        const int64_t position = p.starts[item.sequence] + item.first, end = position + item.count;
        const bool copies = p.head_dim % PAIR || (std::is_same_v<O, float> && rows > DIRECT_ROWS);
        O* const wide_keys = key_copies.zeros(copies ? int64_t(SPAN) * width : 0);
        O* const wide_values = value_copies.zeros(copies ? int64_t(SPAN) * width : 0);
        const int32_t* table = p.tables + item.sequence * p.table_stride;
        const int64_t head_size = p.block_size * row_stride<K>(p.head_dim);
        for (int64_t begin = first_span(p, item); begin < end; begin += SPAN) {
            find_rows(p, table, keys + item.kv_head * head_size, begin, end, &at);
            if (begin + SPAN < end)
                fetch_span(p, keys, item, begin + SPAN);
            else if (following)
                fetch_span(p, keys, *following, first_span(p, *following));
            else
                ahead.clear();
            for (int head = 0; head < item.heads; head++) {
                scales.read(at, p.head_dim);
                if (copies) {
                    Rows<O> wide;
                    copy_rows(at.keys, at.count, p.head_dim, width, wide_keys, wide.keys);
                    copy_rows(at.values, at.count, p.head_dim, width, wide_values, wide.values);
                    wide.count = at.count;
                    span(wide, head, begin, position, p.window);
                } else {
                    span(at, head, begin, position, p.window);
                }
                for (int s = 0; s < SPAN; s++) at.keys[s] += head_size, at.values[s] += head_size;
            }
        }
    }

    template <typename R>
    void span(const R& at, int head, int64_t begin, int64_t position, int window) {
        const int padded = (at.count + WIDE - 1) / WIDE * WIDE;
        const size_t first = size_t(head) * rows;
        each([&](auto r, int row) {
            with_width([&](auto of_row) {
                score_span<r()>(&operands[(first + row) * width], of_row, at.keys, padded,
                                &scores[size_t(row) * SPAN], ahead);
            });
        });
        for (int row = 0; row < rows; row++) {
            const int64_t end_seen = position + row / groups + 1 - begin;
            float* const line = &scores[size_t(row) * SPAN];
            O* const softened = &weights[size_t(row) * SPAN];
            for (int i = 0; i < FETCHES_A_ROW; i++) ahead.fetch();
            scales.apply_to_scores(line);
            soften<SPAN>(line, softened, end_seen, window, SPAN, scale, running[first + row]);
            scales.apply_to_weights(softened);
        }
        each([&](auto r, int row) {
            add_span<r()>(&weights[size_t(row) * SPAN], &running[first + row], width, at.values, at.count,
                          &sums[(first + row) * width], ahead);
        });
    }

    template <int R>
    struct Count {
        constexpr int operator()() const { return R; }
        constexpr operator int() const { return R; }
    };

    // The widths of most models are constants to the compiler, which is a third faster.
    template <typename F>
    void with_width(F&& part) {
        if (width == 64) return part(Count<64>{});
        if (width == 128) return part(Count<128>{});
        part(width);
    }

    template <typename F>
    void each(F&& part) {
        int row = 0;
        for (; row + MOST <= rows; row += MOST) part(Count<MOST>{}, row);
        if (rows - row == 3) part(Count<3>{}, row);
        if (rows - row == 2) part(Count<2>{}, row);
        if (rows - row == 1) part(Count<1>{}, row);
    }
};
