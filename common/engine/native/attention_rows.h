// Attention of few queries: keys and values are read where they lie, each once for all the rows of a
// tile, which are the queries and the heads that share a KV head.
#pragma once

#include <vector>

#include "own.h"
#include "row_products.h"

constexpr int DIRECT_ROWS = 8;    // up to here keys are widened on the fly, above once per tile
constexpr int FETCHES_A_ROW = 4;  // while a row of scores is softened

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
            return (first_row + row % rows / groups) * stride +
                   int64_t(item.kv_head * groups + head) * p.head_dim;
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
            for (int d = 0; d < p.head_dim; d++)
                convert(line[sum_place<K>(d)] / running[r].total, target + d);
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
        const int padded = (at.count + LANES - 1) / LANES * LANES;
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

    // The widths of most models are constants to the compiler, which is a third faster.
    template <typename F>
    void with_width(F&& part) {
        if (width == 64) return part(Number<64>{});
        if (width == 128) return part(Number<128>{});
        part(width);
    }

    template <typename F>
    void each(F&& part) {
        int row = 0;
        for (; row + MOST <= rows; row += MOST) part(Number<MOST>{}, row);
        if (rows - row == 3) part(Number<3>{}, row);
        if (rows - row == 2) part(Number<2>{}, row);
        if (rows - row == 1) part(Number<1>{}, row);
    }
};
