// Attention of many queries at once, as two matrix products: a span's keys and values are packed into
// panels like weights, once for all the queries of a tile, and go through product.h's kernel.
#pragma once

#include <vector>

#include "own.h"
#include "product.h"
#include "softmax.h"

constexpr int PANEL_ROWS = 192;  // of a tile, so that packing is a small part
constexpr int PANEL_SPAN = 2 * SPAN;
template <typename T>
using PanelRows = Rows<T, PANEL_SPAN>;

// Keys as a matrix [PANEL_SPAN, dim] whose products are scores. bfloat16 pairs and floats are both 4 bytes.
template <typename T>
void pack_keys(const PanelRows<T>& at, int dim, T* panels) {
    const int units = dim / DEPTH<T>;
    const auto out = reinterpret_cast<uint32_t*>(panels);
    for (int s = 0; s < at.count; s++) {
        uint32_t* column = out + s / PANEL * units * PANEL + s % PANEL;
        for (int d = 0; d < units; d++) std::memcpy(column + d * PANEL, at.keys[s] + d * DEPTH<T>, 4);
    }
}

// Values as a matrix [dim, PANEL_SPAN] whose products are weighted sums; positions past the end count 0.
inline void pack_position(const float* const* values, int, int dim, float* out, int64_t panel_size) {
    for (int d = 0; d < dim; d += PANEL)
        std::memcpy(out + d / PANEL * panel_size, values[0] + d, std::min(PANEL, dim - d) * sizeof(float));
}
inline void pack_position(const BFloat16* const* values, int left, int dim, BFloat16* out,
                          int64_t panel_size) {
    const auto first = reinterpret_cast<const uint16_t*>(values[0]);
    const auto second = reinterpret_cast<const uint16_t*>(values[1]);
    for (int d = 0; d < dim; d += PANEL) {
        const auto target = reinterpret_cast<uint32_t*>(out + d / PANEL * panel_size);
        const int columns = std::min(PANEL, dim - d);
        for (int i = 0; i < columns; i++)
            target[i] = first[d + i] | (left > 1 ? uint32_t(second[d + i]) << 16 : 0);
    }
}
template <typename T>
void pack_values(const PanelRows<T>& at, int dim, T* panels) {
    constexpr int64_t panel_size = PANEL_SPAN * PANEL;
    for (int s = 0; s < at.count; s += DEPTH<T>)
        pack_position(at.values + s, at.count - s, dim, panels + s * PANEL, panel_size);
}

// Rows of T, expanded where the cache holds others.
template <typename T>
class Expanded {
  public:
    const PanelRows<T>& of(const PanelRows<T>& at, int) { return at; }
    const PanelRows<T>& of(const PanelRows<int8_t>& at, int dim) {
        T* row = room.of(int64_t(2) * PANEL_SPAN * dim);
        rows.count = at.count;
        for (int s = 0; s < PANEL_SPAN; s++, row += 2 * dim) {
            rows.keys[s] = row, rows.values[s] = row + dim;
            if (s >= at.count) continue;
            load_row(at.keys[s], dim, row);
            load_row(at.values[s], dim, row + dim);
        }
        return rows;
    }

  private:
    PanelRows<T> rows;
    Buffer<T> room;
};

template <typename T>
class PanelTile {
  public:
    template <typename K>
    void attend(const Problem& p, const T* queries, const K* keys, T* out, int sequence, int first_query,
                int num_queries, int kv_head) {
        start(p, num_queries);
        const int64_t row = p.row_starts[sequence] + first_query;
        const auto of_row = [&](int r, int64_t stride) {
            return (row + r / groups) * stride + int64_t(kv_head * groups + r % groups) * dim;
        };
        for (int r = 0; r < rows; r++) {
            const T* query = queries + of_row(r, p.query_stride);
            Operand<T>* line = &operands[r * query_width];
            for (int d = 0; d < dim; d += LANES)
                store_some(line + d, load_some(query + d, dim - d), dim - d);
        }
        const int64_t position = p.starts[sequence] + first_query, end = position + num_queries;
        const int64_t lowest = p.window && position >= p.window ? position - p.window + 1 : 0;
        const int32_t* table = p.tables + sequence * p.table_stride;
        const K* head = keys + int64_t(kv_head) * p.block_size * row_stride<K>(dim);
        PanelRows<K> at;
        for (int64_t begin = lowest / PANEL_SPAN * PANEL_SPAN; begin < end; begin += PANEL_SPAN) {
            find_rows(p, table, head, begin, end, &at);
            const PanelRows<T>& wide = expanded.of(at, dim);
            pack_keys(wide, dim, key_panels);
            pack_values(wide, dim, value_panels);
            for (int first = 0; first < rows; first += TILE_ROWS)
                span(first, std::min(TILE_ROWS, rows - first), begin, position, p.window);
        }
        for (int r = 0; r < rows; r++) {
            T* target = out + of_row(r, p.out_stride);
            const float* line = &sums[r * sum_width];
            for (int d = 0; d < dim; d += LANES)
                store_some(target + d, load(line + d) / running[r].total, dim - d);
        }
    }

  private:
    int rows, groups, dim;
    int64_t query_width, weight_width, sum_width;
    float scale;  // of scores, with the factor that turns exp2 into exp
    Buffer<Operand<T>> operand_rows, weight_rows;
    Buffer<T> packed_keys, packed_values;
    Buffer<float> score_rows, sum_lines;
    Operand<T> *operands, *weights;
    T *key_panels, *value_panels;
    float *scores, *sums;
    std::vector<Running> running;
    Expanded<T> expanded;

    void start(const Problem& p, int num_queries) {
        groups = p.num_heads / p.num_kv_heads, rows = num_queries * groups, dim = p.head_dim;
        scale = p.scale * LOG2_E;
        query_width = operand_stride<Operand<T>>(dim), weight_width = operand_stride<Operand<T>>(PANEL_SPAN);
        sum_width = (dim + PANEL - 1) / PANEL * PANEL;
        operands = operand_rows.of(rows * query_width);
        weights = weight_rows.of(TILE_ROWS * weight_width);
        key_panels = packed_keys.of(PANEL_SPAN * dim);
        value_panels = packed_values.zeros(PANEL_SPAN * sum_width);
        scores = score_rows.of(TILE_ROWS * PANEL_SPAN);
        sums = sum_lines.zeros(rows * sum_width);
        running.assign(rows, Running{});
    }

    // `count` rows from `first` on and the span from `begin` on, of which later positions are unseen.
    void span(int first, int count, int64_t begin, int64_t position, int window) {
        const int64_t last = position + (first + count - 1) / groups + 1 - begin;
        const int seen = int(std::min<int64_t>(last, PANEL_SPAN));
        if (seen <= 0) return;
        const int64_t steps = dim / DEPTH<T>;
        for (int s = 0; s < seen; s += PANEL)
            sum_rows<1, T>(count, &operands[first * query_width], query_width, &key_panels[s * dim], steps,
                           nearby(), 0, &scores[s], PANEL_SPAN);
        for (int r = first; r < first + count; r++) {
            const int64_t end_seen = position + r / groups + 1 - begin;
            soften<PANEL_SPAN>(&scores[(r - first) * PANEL_SPAN], &weights[(r - first) * weight_width],
                               end_seen, window, seen, scale, running[r]);
        }
        const int64_t value_steps = (seen + DEPTH<T> - 1) / DEPTH<T>;
        alignas(64) float part[TILE_ROWS * PANEL];
        for (int d = 0; d < sum_width; d += PANEL) {
            sum_rows<1, T>(count, weights, weight_width, &value_panels[d * PANEL_SPAN],
                           value_steps, nearby(), 0, part, PANEL);
            for (int r = 0; r < count; r++)
                for (int i = 0; i < PANEL; i += LANES) {
                    float* sum = &sums[(first + r) * sum_width + d + i];
                    store(sum, load(sum) * running[first + r].shrink + load(part + r * PANEL + i));
                }
        }
    }

    const char* nearby() const { return reinterpret_cast<const char*>(key_panels); }
};
