// GroupNorm (with SiLU) and LayerNorm (with a weight for each of several sets of rows), statistics in f32.
#include "common.cuh"

#define CHUNK_THREADS 256
#define CHUNK_EACH 32  // values of a thread, kept in registers from the mean to the squares

// ---- GroupNorm: rows are groups of `length` values; grid (chunks, rows) -------------------------------------------

// Mean and Σ (x − mean)² of each chunk of a row, to partial (rows, chunks, 2).
template <typename T, int V> __device__ void group_partials(const T* x, float* partial, u32 length) {
    const u32 chunk = CHUNK_THREADS * CHUNK_EACH, first = blockIdx.x * chunk;
    const u32 count = min(chunk, length - first);
    const T* from = x + (u64)blockIdx.y * length + first;
    float values[CHUNK_EACH];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK_EACH; i += V) {
        const u32 at = (i / V * CHUNK_THREADS + threadIdx.x) * V;  // V divides length, so a pack is in or out
        float pack[V] = {};
        if (at < count) load(from + at, pack);
#pragma unroll
        for (int j = 0; j < V; ++j) sum += values[i + j] = pack[j];
    }
    const float mean = block_sum(sum) / count;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < CHUNK_EACH; ++i) {
        const u32 at = (i / V * CHUNK_THREADS + threadIdx.x) * V;
        if (at < count) squares += (values[i] - mean) * (values[i] - mean);
    }
    squares = block_sum(squares);
    if (threadIdx.x == 0) {
        float* to = partial + 2 * ((u64)blockIdx.y * gridDim.x + blockIdx.x);
        to[0] = mean;
        to[1] = squares;
    }
}

// Mean and 1/√(variance + ε) of each row from its chunks, to stats (rows, 2); a warp a row (Chan et al. 1979).
__device__ void group_stats(const float* partial, float* stats, u32 rows, u32 length, u32 chunks, float eps) {
    const u32 row = thread_of_grid() / 32, lane = threadIdx.x % 32, chunk = CHUNK_THREADS * CHUNK_EACH;
    const bool valid = row < rows;
    const float* from = partial + 2 * (u64)row * chunks;
    float mean = 0.0f;
    for (u32 i = lane; valid && i < chunks; i += 32)
        mean += from[2 * i] * ((float)min(chunk, length - i * chunk) / length);
    mean = warp_sum(mean);
    float squares = 0.0f;
    for (u32 i = lane; valid && i < chunks; i += 32) {
        const float apart = from[2 * i] - mean;
        squares += from[2 * i + 1] + apart * apart * min(chunk, length - i * chunk);
    }
    squares = warp_sum(squares);
    if (valid && lane == 0) {
        stats[2 * row] = mean;
        stats[2 * row + 1] = rsqrtf(squares / length + eps);
    }
}

// y = norm(x) w + b (then SiLU); channel of the i-th value: i / inner % channels, row: i / length. V divides inner.
template <typename T, int V>
__device__ void group_apply(
    const T* x, const T* weight, const T* bias, const float* stats, T* y, u64 count, u32 length, u32 channels,
    u32 inner, u32 silu) {
    const u64 first = thread_of_grid() * V;
    if (first >= count) return;
    const u32 row = quotient(first, length), channel = quotient(first, inner) % channels;
    const float w = stats[2 * row + 1] * to_f32(weight[channel]);
    const float b = to_f32(bias[channel]) - stats[2 * row] * w;
    float values[V];
    load(x + first, values);
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const float v = values[i] * w + b;
        values[i] = silu ? v * sigmoid(v) : v;
    }
    store(y + first, values);
}

// dL/d(norm(x) w + b) where SiLU follows.
__device__ inline float before_silu(float grad, float v) {
    const float s = sigmoid(v);
    return grad * s * (1.0f + v * (1.0f - s));
}

// Σ g and Σ g x̂ over the pixels of each channel of each sample, one a block, to sums (B·C, 2).
template <typename T>
__device__ void group_sums(
    const T* x, const T* weight, const T* bias, const float* stats, const T* grad, float* sums, u32 channels,
    u32 per_group, u32 inner, u32 silu) {
    const u32 channel = blockIdx.x % channels, row = blockIdx.x / per_group;
    const float mean = stats[2 * row], inverse = stats[2 * row + 1];
    const float w = to_f32(weight[channel]), b = to_f32(bias[channel]);
    const u64 first = (u64)blockIdx.x * inner;
    float sum = 0.0f, dot = 0.0f;
    for (u32 i = threadIdx.x; i < inner; i += blockDim.x) {
        const float normal = (to_f32(x[first + i]) - mean) * inverse;
        float g = to_f32(grad[first + i]);
        if (silu) g = before_silu(g, normal * w + b);
        sum += g;
        dot += g * normal;
    }
    sum = block_sum(sum);
    dot = block_sum(dot);
    if (threadIdx.x == 0) {
        sums[2 * (u64)blockIdx.x] = sum;
        sums[2 * (u64)blockIdx.x + 1] = dot;
    }
}

// The means over each row of g w and g w x̂, to means (rows, 2); a warp a row.
template <typename T>
__device__ void group_means(
    const float* sums, const T* weight, float* means, u32 rows, u32 length, u32 channels, u32 per_group) {
    const u32 row = thread_of_grid() / 32, lane = threadIdx.x % 32;
    float sum = 0.0f, dot = 0.0f;
    for (u32 i = lane; row < rows && i < per_group; i += 32) {
        const u64 channel = (u64)row * per_group + i;
        const float w = to_f32(weight[channel % channels]);
        sum += sums[2 * channel] * w;
        dot += sums[2 * channel + 1] * w;
    }
    sum = warp_sum(sum);
    dot = warp_sum(dot);
    if (row < rows && lane == 0) {
        means[2 * row] = sum / length;
        means[2 * row + 1] = dot / length;
    }
}

// dx = (g w − mean(g w) − x̂ mean(g w x̂)) / std.
template <typename T, int V>
__device__ void group_grad(
    const T* x, const T* weight, const T* bias, const float* stats, const float* means, const T* grad, T* out,
    u64 count, u32 length, u32 channels, u32 inner, u32 silu) {
    const u64 first = thread_of_grid() * V;
    if (first >= count) return;
    const u32 row = quotient(first, length), channel = quotient(first, inner) % channels;
    const float mean = stats[2 * row], inverse = stats[2 * row + 1];
    const float w = to_f32(weight[channel]), b = to_f32(bias[channel]);
    float xs[V], gs[V];
    load(x + first, xs);
    load(grad + first, gs);
#pragma unroll
    for (int i = 0; i < V; ++i) {
        const float normal = (xs[i] - mean) * inverse;
        const float g = silu ? before_silu(gs[i], normal * w + b) : gs[i];
        xs[i] = inverse * (g * w - means[2 * row] - normal * means[2 * row + 1]);
    }
    store(out + first, xs);
}

// Gradients of weight and bias from sums (B, C, 2); a thread a channel.
template <typename T>
__device__ void group_weight_grad(const float* sums, T* grad_w, T* grad_b, u32 batch, u32 channels) {
    const u32 channel = thread_of_grid();
    if (channel >= channels) return;
    float sum = 0.0f, dot = 0.0f;
    for (u32 i = 0; i < batch; ++i) {
        sum += sums[2 * ((u64)i * channels + channel)];
        dot += sums[2 * ((u64)i * channels + channel) + 1];
    }
    grad_w[channel] = from_f32<T>(dot);
    grad_b[channel] = from_f32<T>(sum);
}

// ---- LayerNorm: a row a block; rows are in sets of `per_set`, each with its weight and bias -----------------------

// y = x̂ (offset + w) + b; x̂'s mean and 1/std to stats (rows, 2). Offset 1: a modulation (Peebles and Xie 2023).
template <typename T, int V>
__device__ void layer_norm(
    const T* x, const T* weight, const T* bias, T* y, float* stats, u32 width, u32 per_set, float offset, float eps) {
    const u64 first = (u64)blockIdx.x * width, set = (u64)(blockIdx.x / per_set) * width;
    const u32 step = blockDim.x * V;
    float sum = 0.0f;
    for (u32 i = threadIdx.x * V; i < width; i += step) {
        float values[V];
        load(x + first + i, values);
#pragma unroll
        for (int j = 0; j < V; ++j) sum += values[j];
    }
    const float mean = block_sum(sum) / width;
    float squares = 0.0f;
    for (u32 i = threadIdx.x * V; i < width; i += step) {
        float values[V];
        load(x + first + i, values);
#pragma unroll
        for (int j = 0; j < V; ++j) squares += (values[j] - mean) * (values[j] - mean);
    }
    const float inverse = rsqrtf(block_sum(squares) / width + eps);
    for (u32 i = threadIdx.x * V; i < width; i += step) {
        float values[V], w[V], b[V];
        load(x + first + i, values);
        load(weight + set + i, w);
        load(bias + set + i, b);
#pragma unroll
        for (int j = 0; j < V; ++j) values[j] = (values[j] - mean) * inverse * (offset + w[j]) + b[j];
        store(y + first + i, values);
    }
    if (threadIdx.x == 0) {
        stats[2 * blockIdx.x] = mean;
        stats[2 * blockIdx.x + 1] = inverse;
    }
}

template <typename T, int V>
__device__ void layer_norm_grad(
    const T* x, const T* weight, const float* stats, const T* grad, T* out, u32 width, u32 per_set, float offset) {
    const u64 first = (u64)blockIdx.x * width, set = (u64)(blockIdx.x / per_set) * width;
    const float mean = stats[2 * blockIdx.x], inverse = stats[2 * blockIdx.x + 1];
    const u32 step = blockDim.x * V;
    float sum = 0.0f, dot = 0.0f;
    for (u32 i = threadIdx.x * V; i < width; i += step) {
        float xs[V], w[V], g[V];
        load(x + first + i, xs);
        load(weight + set + i, w);
        load(grad + first + i, g);
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float gw = g[j] * (offset + w[j]);
            sum += gw;
            dot += gw * (xs[j] - mean) * inverse;
        }
    }
    sum = block_sum(sum) / width;
    dot = block_sum(dot) / width;
    for (u32 i = threadIdx.x * V; i < width; i += step) {
        float xs[V], w[V], g[V];
        load(x + first + i, xs);
        load(weight + set + i, w);
        load(grad + first + i, g);
#pragma unroll
        for (int j = 0; j < V; ++j)
            xs[j] = inverse * (g[j] * (offset + w[j]) - sum - (xs[j] - mean) * inverse * dot);
        store(out + first + i, xs);
    }
}

// Σ g x̂ and Σ g over the rows of one split of one set: grid (columns / 32, splits, sets) of 32 x 8 threads,
// to partial (2, sets, splits, width).
template <typename T>
__device__ void layer_norm_sums(const T* x, const float* stats, const T* grad, float* partial, u32 width, u32 per_set) {
    __shared__ float sums[2][8][33];
    const u32 column = blockIdx.x * 32 + threadIdx.x, each = (per_set + gridDim.y - 1) / gridDim.y;
    const u32 end = min(per_set, (blockIdx.y + 1) * each);
    float sum = 0.0f, dot = 0.0f;
    if (column < width)
        for (u32 i = blockIdx.y * each + threadIdx.y; i < end; i += 8) {
            const u32 row = blockIdx.z * per_set + i;
            const u64 at = (u64)row * width + column;
            const float g = to_f32(grad[at]);
            sum += g;
            dot += g * (to_f32(x[at]) - stats[2 * row]) * stats[2 * row + 1];
        }
    sums[0][threadIdx.y][threadIdx.x] = dot;
    sums[1][threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y < 2 && column < width) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) total += sums[threadIdx.y][i][threadIdx.x];
        const u64 set = ((u64)threadIdx.y * gridDim.z + blockIdx.z) * gridDim.y + blockIdx.y;
        partial[set * width + column] = total;
    }
}

// Gradients of weight and bias (sets, width) from their partial sums; a thread a value.
template <typename T>
__device__ void layer_weight_grad(const float* partial, T* grad_w, T* grad_b, u32 width, u32 splits, u32 sets) {
    const u64 i = thread_of_grid(), count = (u64)sets * width;
    if (i >= 2 * count) return;
    const u64 set = quotient(i, width);
    const float* from = partial + set * splits * width + (i - set * width);
    float sum = 0.0f;
    for (u32 s = 0; s < splits; ++s) sum += from[(u64)s * width];
    if (i < count) grad_w[i] = from_f32<T>(sum);
    else grad_b[i - count] = from_f32<T>(sum);
}

extern "C" __global__ void group_stats_f32(
    const float* partial, float* stats, u32 rows, u32 length, u32 chunks, float eps) {
    group_stats(partial, stats, rows, length, chunks, eps);
}
EXPORT(group_stats_f32)

#define VECTOR_KERNELS(name, T, V, suffix)                                                                            \
    extern "C" __global__ void __launch_bounds__(CHUNK_THREADS)                                                       \
        group_partials_##name##suffix(const T* x, float* partial, u32 length) {                                       \
        group_partials<T, V>(x, partial, length);                                                                     \
    }                                                                                                                 \
    EXPORT(group_partials_##name##suffix)                                                                             \
    extern "C" __global__ void group_apply_##name##suffix(                                                            \
        const T* x, const T* weight, const T* bias, const float* stats, T* y, u64 count, u32 length, u32 channels,    \
        u32 inner, u32 silu) {                                                                                        \
        group_apply<T, V>(x, weight, bias, stats, y, count, length, channels, inner, silu);                           \
    }                                                                                                                 \
    EXPORT(group_apply_##name##suffix)                                                                                \
    extern "C" __global__ void group_grad_##name##suffix(                                                             \
        const T* x, const T* weight, const T* bias, const float* stats, const float* means, const T* grad, T* out,    \
        u64 count, u32 length, u32 channels, u32 inner, u32 silu) {                                                   \
        group_grad<T, V>(x, weight, bias, stats, means, grad, out, count, length, channels, inner, silu);             \
    }                                                                                                                 \
    EXPORT(group_grad_##name##suffix)                                                                                 \
    extern "C" __global__ void layer_norm_##name##suffix(                                                             \
        const T* x, const T* weight, const T* bias, T* y, float* stats, u32 width, u32 per_set, float offset,         \
        float eps) {                                                                                                  \
        layer_norm<T, V>(x, weight, bias, y, stats, width, per_set, offset, eps);                                     \
    }                                                                                                                 \
    EXPORT(layer_norm_##name##suffix)                                                                                 \
    extern "C" __global__ void layer_norm_grad_##name##suffix(                                                        \
        const T* x, const T* weight, const float* stats, const T* grad, T* out, u32 width, u32 per_set,               \
        float offset) {                                                                                               \
        layer_norm_grad<T, V>(x, weight, stats, grad, out, width, per_set, offset);                                   \
    }                                                                                                                 \
    EXPORT(layer_norm_grad_##name##suffix)

#define KERNELS(name, T, V)                                                                                           \
    VECTOR_KERNELS(name, T, V, _v)                                                                                    \
    VECTOR_KERNELS(name, T, 1, )                                                                                      \
    extern "C" __global__ void group_sums_##name(                                                                     \
        const T* x, const T* weight, const T* bias, const float* stats, const T* grad, float* sums, u32 channels,     \
        u32 per_group, u32 inner, u32 silu) {                                                                         \
        group_sums<T>(x, weight, bias, stats, grad, sums, channels, per_group, inner, silu);                          \
    }                                                                                                                 \
    EXPORT(group_sums_##name)                                                                                         \
    extern "C" __global__ void group_means_##name(                                                                    \
        const float* sums, const T* weight, float* means, u32 rows, u32 length, u32 channels, u32 per_group) {        \
        group_means<T>(sums, weight, means, rows, length, channels, per_group);                                       \
    }                                                                                                                 \
    EXPORT(group_means_##name)                                                                                        \
    extern "C" __global__ void group_weight_grad_##name(                                                              \
        const float* sums, T* grad_w, T* grad_b, u32 batch, u32 channels) {                                           \
        group_weight_grad<T>(sums, grad_w, grad_b, batch, channels);                                                  \
    }                                                                                                                 \
    EXPORT(group_weight_grad_##name)                                                                                  \
    extern "C" __global__ void layer_norm_sums_##name(                                                                \
        const T* x, const float* stats, const T* grad, float* partial, u32 width, u32 per_set) {                      \
        layer_norm_sums<T>(x, stats, grad, partial, width, per_set);                                                  \
    }                                                                                                                 \
    EXPORT(layer_norm_sums_##name)                                                                                    \
    extern "C" __global__ void layer_weight_grad_##name(                                                              \
        const float* partial, T* grad_w, T* grad_b, u32 width, u32 splits, u32 sets) {                                \
        layer_weight_grad<T>(partial, grad_w, grad_b, width, splits, sets);                                           \
    }                                                                                                                 \
    EXPORT(layer_weight_grad_##name)

FOR_TYPES(KERNELS)
#undef VECTOR_KERNELS
#undef KERNELS
