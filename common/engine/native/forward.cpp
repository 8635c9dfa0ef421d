// A whole step in one call: every layer over all rows, then the logits of those that are sampled.
//
// Plain C ABI, no headers but the standard library's.
#include "attention.h"
#include "elementwise.h"
#include "own.h"
#include "product.h"

namespace {

struct Layer {
    const void *input_norm, *qk_norm, *post_norm;  // qk_norm is null where there is none
    Product qkv, output, gate_up, down;
    int64_t window;  // 0: none
};

struct Model {
    const Layer* layers;
    const void *norm, *cos, *sin;  // cos and sin are tables of [positions, head_dim]
    Product head;
    int64_t num_layers, hidden, inner, head_dim;
    float eps;
};

struct Step {
    int64_t rows;
    const int64_t* positions;
    Placement placement;
    Problem attention;
    int64_t layer_stride;  // elements of the cache from a layer's keys to the next one's
};

template <typename T>
Vec finished(const Product& p, int64_t column, const float* sums, int64_t count) {
    Vec sum = load(sums);
    if (p.scales) sum *= load_some(p.scales + column, count);
    return p.bias ? sum + load_some(static_cast<const T*>(p.bias) + column, count) : sum;
}

// A row before it is rounded.
template <typename T>
struct Exact {
    Buffer<Operand<T>> row;
};

// Rows of operands for a product (see multiply): row r is filled by fill(r, its place).
template <typename T, typename F>
const void* prepare(const Product& p, int64_t rows, Operand<T>* operands, F&& fill) {
    if (p.rounds) {
        static_assert(sizeof(Rounded) <= sizeof(Operand<T>), "rows have the room of operands");
        const int64_t stride = operand_stride<Rounded>(p.in);
        Operand<T>* const exact = own<Exact<T>>().row.of(p.in);
        each_row(rows, [&](int64_t row) {
            fill(row, exact);
            round_row(exact, reinterpret_cast<Rounded*>(operands) + row * stride, p.in);
        });
    } else {
        const int64_t stride = operand_stride<Operand<T>>(p.in);
        each_row(rows, [&](int64_t row) {
            Operand<T>* line = operands + row * stride;
            fill(row, line);
            for (int64_t d = p.in; d % DEPTH<int8_t>; d++) convert(0.0f, line + d);
        });
    }
    return operands;
}

// y = x W^T + b, of rows p.out apart.
template <typename T, typename Out>
void multiply_into(const Product& p, const void* x, int64_t rows, Out* y) {
    multiply<T>(p, x, rows, [&](int64_t row, int64_t column, int64_t columns, const float* sums) {
        for (int64_t d = 0; d < columns; d += LANES) {
            Out* target = y + row * p.out + column + d;
            __builtin_prefetch(target + TILE_ROWS * p.out, 1);  // of the next tile
            Vec sum = finished<T>(p, column + d, sums + d, columns - d);
            if (!std::is_same_v<T, Out>) sum = round_as(static_cast<T*>(nullptr), sum);  // else stored so
            store_some(target, sum, columns - d);
        }
    });
}

// y += x W^T + b, the product rounded before it is added.
template <typename T>
void multiply_onto(const Product& p, const void* x, int64_t rows, T* y) {
    multiply<T>(p, x, rows, [&](int64_t row, int64_t column, int64_t columns, const float* sums) {
        for (int64_t d = 0; d < columns; d += LANES) {
            T* target = y + row * p.out + column + d;
            __builtin_prefetch(target + TILE_ROWS * p.out, 1);  // of the next tile
            const Vec sum = finished<T>(p, column + d, sums + d, columns - d);
            store_some(target, load_some(target, columns - d) + round_as(y, sum), columns - d);
        }
    });
}

template <typename T>
struct Buffers {
    Buffer<Operand<T>> operands;
    Buffer<T> qkv, attended, gate_up;
};

template <typename T>
struct Run {
    const Model& model;
    const Step& step;
    T* x;
    Operand<T>* operands;
    T *qkv, *attended, *gate_up;

    Run(const Model& m, const Step& s, T* residual, Buffers<T>& buffers) : model(m), step(s), x(residual) {
        const int64_t widest = std::max({m.hidden, m.inner, s.attention.out_stride});
        operands = buffers.operands.of(s.rows * operand_stride<Operand<T>>(widest));
        qkv = buffers.qkv.of(s.rows * s.attention.query_stride);
        attended = buffers.attended.of(s.rows * s.attention.out_stride);
        gate_up = buffers.gate_up.of(s.rows * 2 * m.inner);
    }

    template <typename K>
    void attend_layer(const Layer& layer, K* keys) {
        const auto norm = static_cast<const T*>(layer.input_norm);
        multiply_into<T>(layer.qkv, normed(layer.qkv, norm), step.rows, qkv);
        const auto cos = static_cast<const T*>(model.cos), sin = static_cast<const T*>(model.sin);
        each_row(step.rows, [&](int64_t row) {
            const int64_t at = step.positions[row] * model.head_dim;
            place_row(step.placement, qkv, static_cast<const T*>(layer.qk_norm), cos + at, sin + at, keys, row);
        });
        Problem problem = step.attention;
        problem.window = int32_t(layer.window);
        attend(problem, qkv, keys, attended);
        const int64_t width = layer.output.in;
        const auto ready = prepare<T>(layer.output, step.rows, operands, [&](int64_t row, Operand<T>* line) {
            for (int64_t d = 0; d < width; d += LANES)
                store_some(line + d, load_some(attended + row * width + d, width - d), width - d);
        });
        multiply_onto(layer.output, ready, step.rows, x);
    }

    void feed_forward(const Layer& layer) {
        const auto norm = static_cast<const T*>(layer.post_norm);
        multiply_into<T>(layer.gate_up, normed(layer.gate_up, norm), step.rows, gate_up);
        const auto ready = prepare<T>(layer.down, step.rows, operands, [&](int64_t row, Operand<T>* line) {
            swiglu(gate_up + row * 2 * model.inner, line, model.inner);
        });
        multiply_onto(layer.down, ready, step.rows, x);
    }

    const void* normed(const Product& p, const T* norm) {
        return prepare<T>(p, step.rows, operands, [&](int64_t row, Operand<T>* line) {
            rms_norm(x + row * model.hidden, norm, line, model.hidden, model.eps);
        });
    }
};

template <typename T, typename K>
void forward(const Model& model, const Step& step, K* keys, T* x, int threads) {
    Run<T> run(model, step, x, own<Buffers<T>>());
#ifndef _OPENMP
    (void)threads;
#endif
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int64_t index = 0; index < model.num_layers; index++) {
        run.attend_layer(model.layers[index], keys + index * step.layer_stride);
        run.feed_forward(model.layers[index]);
    }
}

template <typename T>
void logits(const Model& model, const T* x, const int64_t* rows, int64_t count, float* out, int threads) {
    Operand<T>* operands = own<Buffer<Operand<T>>>().of(count * operand_stride<Operand<T>>(model.hidden));
#ifndef _OPENMP
    (void)threads;
#endif
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const auto ready = prepare<T>(model.head, count, operands, [&](int64_t row, Operand<T>* line) {
            const auto norm = static_cast<const T*>(model.norm);
            rms_norm(x + rows[row] * model.hidden, norm, line, model.hidden, model.eps);
        });
        multiply_into<T>(model.head, ready, count, out);
    }
}

template <typename T>
void product(const Product& p, const T* x, T* y, int64_t rows, int threads) {
    Operand<T>* operands = own<Buffer<Operand<T>>>().of(rows * operand_stride<Operand<T>>(p.in));
#ifndef _OPENMP
    (void)threads;
#endif
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const auto ready = prepare<T>(p, rows, operands, [&](int64_t row, Operand<T>* line) {
            for (int64_t d = 0; d < p.in; d++) convert(x[row * p.in + d], line + d);
        });
        multiply_into<T>(p, ready, rows, y);
    }
}

}  // namespace

// Columns of a panel of packed weights, and numbers of the inner dimension that lie together in it.
extern "C" int64_t kvbaton_panel() { return PANEL; }
extern "C" int64_t kvbaton_depth(int32_t bytes_each) { return DEPTH<int8_t> / bytes_each; }

// Adds all layers to the residual stream x [rows, hidden] and writes the rows' keys and values.
extern "C" void kvbaton_forward(const Model* model, const Step* step, void* keys, void* x,
                                int32_t bfloat16, int32_t int8_kv, int32_t threads) {
    with_types(bfloat16, int8_kv, [&](auto* keys, auto* x) {
        forward(*model, *step, keys, x, threads);
    }, keys, x);
}

// Logits [count, p.head.out] of these rows of x.
extern "C" void kvbaton_logits(const Model* model, void* x, const int64_t* rows, int64_t count,
                               float* out, int32_t bfloat16, int32_t threads) {
    with_type(bfloat16, [&](auto* x) { logits(*model, x, rows, count, out, threads); }, x);
}

// y [rows, p.out] = x [rows, p.in] W^T + b, by itself.
extern "C" void kvbaton_product(const Product* p, void* x, void* y, int64_t rows, int32_t bfloat16,
                                int32_t threads) {
    with_type(bfloat16, [&](auto* x, auto* y) { product(*p, x, y, rows, threads); }, x, y);
}
