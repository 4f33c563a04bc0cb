// Activations, GEGLU, bias and residual, nearest upsampling, transposition, and the sums that are their gradients.
#include "common.cuh"

// Value and derivative of activation `kind` at x, numbered as `Activation` in activation.rs.
__device__ inline void activation(u32 kind, float x, float& value, float& slope) {
    if (kind == 0 || kind == 3) {  // SiLU, QuickGELU: x σ(k x)
        const float k = kind == 0 ? 1.0f : 1.702f;
        const float s = sigmoid(k * x);
        value = x * s;
        slope = s * (1.0f + k * x * (1.0f - s));
    } else if (kind == 1) {  // GELU: x Φ(x)
        const float phi = 0.5f * (1.0f + erff(x * 0.70710678f));
        value = x * phi;
        slope = phi + x * 0.39894228f * expf(-0.5f * x * x);
    } else {  // GELU by tanh: x σ(2u), u = √(2/π) (x + 0.044715 x³)
        const float s = sigmoid(2.0f * 0.79788456f * (x + 0.044715f * x * x * x));
        value = x * s;
        slope = s + x * s * (1.0f - s) * 2.0f * 0.79788456f * (1.0f + 3.0f * 0.044715f * x * x);
    }
}

// `out` is the activation of `x`, or with `grad` its gradient.
template <typename T, int V> __device__ void activate(const T* x, const T* grad, T* out, u64 count, u32 kind) {
    const u64 first = thread_of_grid() * V;
    if (first >= count) return;
    float xs[V] = {}, gs[V] = {}, ys[V];
    const bool whole = first + V <= count;
    if (whole) {
        load(x + first, xs);
        if (grad) load(grad + first, gs);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) {
        if (!whole) {
            if (first + i >= count) return;
            xs[i] = to_f32(x[first + i]);
            if (grad) gs[i] = to_f32(grad[first + i]);
        }
        float value, slope;
        activation(kind, xs[i], value, slope);
        ys[i] = grad ? gs[i] * slope : value;
        if (!whole) out[first + i] = from_f32<T>(ys[i]);
    }
    if (whole) store(out + first, ys);
}

// x (rows, 2 width) → out (rows, width); V divides width.
template <typename T, int V> __device__ void geglu(const T* x, T* out, u64 count, u32 width) {
    const u64 first = thread_of_grid() * V;
    if (first >= count) return;
    const u64 at = first + quotient(first, width) * width;
    float value[V], gate[V];
    load(x + at, value);
    load(x + at + width, gate);
#pragma unroll
    for (int i = 0; i < V; ++i) {
        float gelu, slope;
        activation(1, gate[i], gelu, slope);
        value[i] *= gelu;
    }
    store(out + first, value);
}
template <typename T, int V>
__device__ void geglu_grad(const T* x, const T* grad, T* out, u64 count, u32 width) {
    const u64 first = thread_of_grid() * V;
    if (first >= count) return;
    const u64 at = first + quotient(first, width) * width;
    float value[V], gate[V], g[V];
    load(x + at, value);
    load(x + at + width, gate);
    load(grad + first, g);
#pragma unroll
    for (int i = 0; i < V; ++i) {
        float gelu, slope;
        activation(1, gate[i], gelu, slope);
        gate[i] = g[i] * value[i] * slope;
        value[i] = g[i] * gelu;
    }
    store(out + at, value);
    store(out + at + width, gate);
}

// out = x + bias[(i / inner) % channels] (+ residual); V divides inner, or inner is 1 and V divides channels.
// `out` may be `x`.
template <typename T, int V>
__device__ void add_bias(const T* x, const T* bias, const T* residual, T* out, u64 count, u32 channels, u32 inner) {
    const u64 first = thread_of_grid() * V;
    if (first >= count) return;
    float xs[V], bs[V], rs[V];
    load(x + first, xs);
    const u64 row = quotient(first, inner);
    const T* from = bias + (row - quotient(row, channels) * channels);
    if (V > 1 && inner == 1) {
        load(from, bs);
    } else {
#pragma unroll
        for (int i = 0; i < V; ++i) bs[i] = to_f32(*from);
    }
    if (residual) load(residual + first, rs);
#pragma unroll
    for (int i = 0; i < V; ++i) xs[i] += bs[i] + (residual ? rs[i] : 0.0f);
    store(out + first, xs);
}

// Σ over the `inner` values of each row, one row a block, to f32.
template <typename T> __device__ void row_sums(const T* x, float* out, u32 inner) {
    const T* row = x + (u64)blockIdx.x * inner;
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < inner; i += blockDim.x) sum += to_f32(row[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Σ over rows of (rows, columns), 32 columns and the rows of one split a block of 32 x 8 threads;
// to (splits, columns).
template <typename T, typename Out> __device__ void column_sums(const T* x, Out* out, u32 rows, u32 columns) {
    __shared__ float sums[8][33];
    const u32 column = blockIdx.x * 32 + threadIdx.x, each = (rows + gridDim.y - 1) / gridDim.y;
    const u32 end = min(rows, (blockIdx.y + 1) * each);
    float sum = 0.0f;
    if (column < columns)
        for (u32 row = blockIdx.y * each + threadIdx.y; row < end; row += 8)
            sum += to_f32(x[(u64)row * columns + column]);
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < columns) {
#pragma unroll
        for (int i = 1; i < 8; ++i) sum += sums[i][threadIdx.x];
        out[(u64)blockIdx.y * columns + column] = from_f32<Out>(sum);
    }
}

// Each pixel of (planes, h, w) becomes four.
template <typename T> __device__ void upsample(const T* x, T* out, u64 count, u32 w) {
    const u64 i = thread_of_grid();
    if (i >= count) return;
    const u64 upper = 2 * (i + quotient(i, w) * w);  // 4 w a row, 2 a pixel
    Pack<T, 2> pair;
    pair.values[0] = pair.values[1] = x[i];
    *reinterpret_cast<Pack<T, 2>*>(out + upper) = pair;
    *reinterpret_cast<Pack<T, 2>*>(out + upper + 2 * w) = pair;
}
template <typename T> __device__ void upsample_grad(const T* grad, T* out, u64 count, u32 w) {
    const u64 i = thread_of_grid();
    if (i >= count) return;
    const u64 upper = 2 * (i + quotient(i, w) * w);  // 4 w a row, 2 a pixel
    float a[2], b[2];
    load(grad + upper, a);
    load(grad + upper + 2 * w, b);
    out[i] = from_f32<T>(a[0] + a[1] + b[0] + b[1]);
}

// Each matrix (rows, columns) of a batch turned over, in tiles of 32 x 32 by 32 x 8 threads.
template <typename T> __device__ void transpose(const T* x, T* out, u32 rows, u32 columns) {
    __shared__ float tile[32][33];
    const u64 matrix = (u64)blockIdx.z * rows * columns;
    const u32 row = blockIdx.y * 32, column = blockIdx.x * 32;
    for (u32 i = threadIdx.y; i < 32; i += 8)
        if (row + i < rows && column + threadIdx.x < columns)
            tile[i][threadIdx.x] = to_f32(x[matrix + (u64)(row + i) * columns + column + threadIdx.x]);
    __syncthreads();
    for (u32 i = threadIdx.y; i < 32; i += 8)
        if (column + i < columns && row + threadIdx.x < rows)
            out[matrix + (u64)(column + i) * rows + row + threadIdx.x] = from_f32<T>(tile[threadIdx.x][i]);
}

#define VECTOR_KERNELS(name, T, V, suffix)                                                                          \
    extern "C" __global__ void activate_##name##suffix(const T* x, T* out, u64 count, u32 kind) {                   \
        activate<T, V>(x, nullptr, out, count, kind);                                                               \
    }                                                                                                               \
    EXPORT(activate_##name##suffix)                                                                                 \
    extern "C" __global__ void activate_grad_##name##suffix(const T* x, const T* grad, T* out, u64 count, u32 kind) { \
        activate<T, V>(x, grad, out, count, kind);                                                                  \
    }                                                                                                               \
    EXPORT(activate_grad_##name##suffix)                                                                            \
    extern "C" __global__ void geglu_##name##suffix(const T* x, T* out, u64 count, u32 width) {                     \
        geglu<T, V>(x, out, count, width);                                                                          \
    }                                                                                                               \
    EXPORT(geglu_##name##suffix)                                                                                    \
    extern "C" __global__ void geglu_grad_##name##suffix(const T* x, const T* grad, T* out, u64 count, u32 width) { \
        geglu_grad<T, V>(x, grad, out, count, width);                                                               \
    }                                                                                                               \
    EXPORT(geglu_grad_##name##suffix)                                                                               \
    extern "C" __global__ void add_bias_##name##suffix(                                                             \
        const T* x, const T* bias, const T* residual, T* out, u64 count, u32 channels, u32 inner) {                 \
        add_bias<T, V>(x, bias, residual, out, count, channels, inner);                                             \
    }                                                                                                               \
    EXPORT(add_bias_##name##suffix)

#define KERNELS(name, T, V)                                                                                         \
    VECTOR_KERNELS(name, T, V, _v)                                                                                  \
    VECTOR_KERNELS(name, T, 1, )                                                                                    \
    extern "C" __global__ void row_sums_##name(const T* x, float* out, u32 inner) { row_sums<T>(x, out, inner); }   \
    EXPORT(row_sums_##name)                                                                                         \
    extern "C" __global__ void column_sums_##name(const T* x, float* out, u32 rows, u32 columns) {                  \
        column_sums<T, float>(x, out, rows, columns);                                                               \
    }                                                                                                               \
    EXPORT(column_sums_##name)                                                                                      \
    extern "C" __global__ void sum_splits_##name(const float* x, T* out, u32 rows, u32 columns) {                   \
        column_sums<float, T>(x, out, rows, columns);                                                               \
    }                                                                                                               \
    EXPORT(sum_splits_##name)                                                                                       \
    extern "C" __global__ void upsample_##name(const T* x, T* out, u64 count, u32 w) {                              \
        upsample<T>(x, out, count, w);                                                                              \
    }                                                                                                               \
    EXPORT(upsample_##name)                                                                                         \
    extern "C" __global__ void upsample_grad_##name(const T* grad, T* out, u64 count, u32 w) {                      \
        upsample_grad<T>(grad, out, count, w);                                                                      \
    }                                                                                                               \
    EXPORT(upsample_grad_##name)                                                                                    \
    extern "C" __global__ void transpose_##name(const T* x, T* out, u32 rows, u32 columns) {                        \
        transpose<T>(x, out, rows, columns);                                                                        \
    }                                                                                                               \
    EXPORT(transpose_##name)

FOR_TYPES(KERNELS)
#undef VECTOR_KERNELS
#undef KERNELS
