// Paged causal attention for the CPU: block tables are walked in place, nothing is gathered.
//
// Online softmax over spans of positions at absolute multiples of their length, in fp32 (FlashAttention-2,
// algorithm 1; the paging is PagedAttention's); where the processor multiplies bfloat16, products are
// of bfloat16, softmax weights included. All query heads of a KV head go through each loaded key and
// value together. Whatever the tile a row is in, its own sums are formed in one fixed order,
// so its bits depend on its sequence alone: fully masked spans multiply by one and add zero.
//
// Plain C ABI, no headers but the standard library's.
#include "attention_panels.h"
#include "attention_rows.h"

namespace {

constexpr int TILE_QUERIES = 16;
constexpr int FEWEST_PANEL_ROWS = 2 * TILE_ROWS;
constexpr int64_t SPAN_BYTES = 128 * 1024;  // of keys and values: two spans of them fit the second cache
constexpr int MANY_SEQUENCES = 16;

#ifdef _OPENMP
constexpr bool ONE_THREAD = false;
#else
constexpr bool ONE_THREAD = true;
#endif

// How many KV heads of a sequence of few queries go together, so that what they read lies together. For
// few sequences threads need something to share.
template <typename K>
int heads_together(const Problem& p) {
    if (!ONE_THREAD && p.num_sequences < MANY_SEQUENCES) return 1;
    const int64_t span_bytes = 2 * SPAN * row_stride<K>(p.head_dim) * int64_t(sizeof(K));
    return int(std::clamp<int64_t>(SPAN_BYTES / span_bytes, 1, p.num_kv_heads));
}

// What the threads share out. With `fixed_order` a row goes the same way whatever is beside it.
template <typename K>
std::vector<Item> items_of(const Problem& p) {
    const int groups = p.num_heads / p.num_kv_heads;
    std::vector<Item> items;
    for (int sequence = 0; sequence < p.num_sequences; sequence++) {
        const int rows = p.row_starts[sequence + 1] - p.row_starts[sequence];
        const bool panels = !p.fixed_order && rows * groups >= FEWEST_PANEL_ROWS;
        const int tile = panels ? std::max(PANEL_ROWS / groups, 1) : TILE_QUERIES;
        const int heads = rows * groups > DIRECT_ROWS ? 1 : heads_together<K>(p);
        for (int first = 0; first < rows; first += tile)
            for (int kv_head = 0; kv_head < p.num_kv_heads; kv_head += heads)
                items.push_back({sequence, first, std::min(tile, rows - first), kv_head,
                                 std::min(heads, p.num_kv_heads - kv_head)});
    }
    return items;
}

}  // namespace

template <typename T, typename K>
void attend(const Problem& p, const T* queries, const K* keys, T* out) {
    const std::vector<Item> items = items_of<K>(p);
    auto& rows = own<RowTile<K>>();
    auto& panels = own<PanelTile<T>>();
    const int groups = p.num_heads / p.num_kv_heads;
#pragma omp for schedule(dynamic)
    for (size_t index = 0; index < items.size(); index++) {
        const Item& item = items[index];
        const bool known = ONE_THREAD && index + 1 < items.size();  // what this thread does next
        if (!p.fixed_order && item.count * groups >= FEWEST_PANEL_ROWS)
            panels.attend(p, queries, keys, out, item.sequence, item.first, item.count, item.kv_head);
        else
            rows.attend(p, queries, keys, out, item, known ? &items[index + 1] : nullptr);
    }
}

template void attend(const Problem&, const float*, const float*, float*);
template void attend(const Problem&, const float*, const int8_t*, float*);
template void attend(const Problem&, const BFloat16*, const BFloat16*, BFloat16*);
template void attend(const Problem&, const BFloat16*, const int8_t*, BFloat16*);

extern "C" void kvbaton_attend(const Problem* problem, void* queries, void* keys,
                               void* out, int32_t bfloat16, int32_t int8_kv, int32_t threads) {
#ifndef _OPENMP
    (void)threads;
#endif
#pragma omp parallel num_threads(threads) if (threads > 1)
    with_types(bfloat16, int8_kv, [&](auto* keys, auto* queries, auto* out) {
        attend(*problem, queries, keys, out);
    }, keys, queries, out);
}
