// Attention without the score matrix, forward and backward (Dao 2023, FlashAttention-2, arXiv 2307.08691).
//
// Two families with the same arguments: f32 by fused multiply-adds, and 16-bit floats by the tensor cores
// (mma.m16n8k16, compute capability 8.0), sums in f32. Head sizes up to D are padded with zeros on the way in. Nothing
// is added by atomics: results are the same in every run.
//
// Queries, keys and values are (batch, rows, heads·d) with strides between samples and rows. `lse` holds, for
// (batch, head, query), log2 Σ exp(score); `delta` Σ y·dy.
#include "common.cuh"

#define LOG2E 1.4426950408889634f

// One head's rows.
template <typename T> struct Rows {
    const T* first;
    u64 stride;
    u32 count, d;
    __device__ T at(u32 row, u32 column) const {
        return row < count && column < d ? first[row * stride + column] : from_f32<T>(0.0f);
    }
};
template <typename T> __device__ inline Rows<T> head(const T* x, u64 sample, u64 row, u32 count, u32 d) {
    return {x + blockIdx.z * sample + blockIdx.y * d, row, count, d};
}

#define ATTENTION(T)                                                                                             \
    const T *q, const T *k, const T *v, u64 q_sample, u64 q_row, u64 k_sample, u64 k_row, u64 v_sample, u64 v_row, \
        u32 n, u32 m, u32 d, u32 causal
#define ATTENTION_ARGS q, k, v, q_sample, q_row, k_sample, k_row, v_sample, v_row, n, m, d, causal

// Σ y·dy of each query and head; a warp each. y and dy are contiguous.
template <typename T> __device__ void attention_delta(const T* y, const T* grad, float* delta, u32 n, u32 heads, u32 d) {
    const u32 row = thread_of_grid() / 32, lane = threadIdx.x % 32;  // (query, head) of sample blockIdx.y
    float sum = 0.0f;
    if (row < n * heads) {
        const u64 first = ((u64)blockIdx.y * n * heads + row) * d;
        for (u32 i = lane; i < d; i += 32) sum += to_f32(y[first + i]) * to_f32(grad[first + i]);
    }
    sum = warp_sum(sum);
    if (row < n * heads && lane == 0) delta[((u64)blockIdx.y * heads + row % heads) * n + row / heads] = sum;
}

// ---- f32: blocks of 16 x 16 threads, tiles of 64 x 64 scores, 4 x 4 a thread ---------------------------------------

#define SIDE 64
#define PAD 68
#define DEPTH 32

template <int D> struct Shared {
    union {
        struct { alignas(16) float a[DEPTH][PAD], b[DEPTH][PAD]; } in;
        alignas(16) float x[DEPTH][D];
    };
    alignas(16) float p[SIDE][PAD];
};

__device__ inline void four(const float* from, float (&to)[4]) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w;
}

// acc[i][j] = a[a0 + 4 ty + i] · b[b0 + 4 tx + j]
template <int D> __device__ void tile_scores(Shared<D>& s, Rows<float> a, u32 a0, Rows<float> b, u32 b0, float (&acc)[4][4]) {
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const u32 row = threadIdx.x % SIDE, part = threadIdx.x / SIDE * (DEPTH / 4);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) acc[i][j] = 0.0f;
    for (u32 first = 0; first < a.d; first += DEPTH) {
        __syncthreads();
        for (u32 i = part; i < part + DEPTH / 4; ++i) {
            s.in.a[i][row] = a.at(a0 + row, first + i);
            s.in.b[i][row] = b.at(b0 + row, first + i);
        }
        __syncthreads();
        for (int kk = 0; kk < DEPTH; ++kk) {
            float x[4], y[4];
            four(&s.in.a[kk][4 * ty], x);
            four(&s.in.b[kk][4 * tx], y);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) acc[i][j] += x[i] * y[j];
        }
    }
}

// out[i][4 c + j] += Σ_t p[4 ty + i][t] x[x0 + t][64 c + 4 tx + j], p from its 4 x 4 parts.
template <int D>
__device__ void tile_product(Shared<D>& s, const float (&p)[4][4], Rows<float> x, u32 x0, float (&out)[4][D / 16]) {
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    __syncthreads();
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) s.p[4 * tx + j][4 * ty + i] = p[i][j];
    for (u32 first = 0; first < SIDE; first += DEPTH) {
        __syncthreads();
        for (u32 i = threadIdx.x; i < DEPTH * D; i += 256) s.x[i / D][i % D] = x.at(x0 + first + i / D, i % D);
        __syncthreads();
        for (int kk = 0; kk < DEPTH; ++kk) {
            float w[4], y[4];
            four(&s.p[first + kk][4 * ty], w);
#pragma unroll
            for (int c = 0; c < D / 64; ++c) {
                four(&s.x[kk][64 * c + 4 * tx], y);
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int j = 0; j < 4; ++j) out[i][4 * c + j] += w[i] * y[j];
            }
        }
    }
}

__device__ inline float row_sum(float x) {
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}
__device__ inline float row_max(float x) {
#pragma unroll
    for (int mask = 8; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
    return x;
}

// Rows `first + 4 ty + i` of one head of a contiguous gradient or output.
template <int D>
__device__ void store_rows(const float (&x)[4][D / 16], const float (&scale)[4], float* out, u32 count, u32 d, u32 first) {
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const u64 width = (u64)gridDim.y * d;
    for (int i = 0; i < 4; ++i)
        for (int c = 0; c < D / 16; ++c) {
            const u32 row = first + 4 * ty + i, column = c / 4 * 64 + 4 * tx + c % 4;
            if (row < count && column < d)
                out[((u64)blockIdx.z * count + row) * width + blockIdx.y * d + column] = x[i][c] * scale[i];
        }
}

template <typename T, int D> __device__ void attention_plain(ATTENTION(T), T* y, float* lse) {
    __shared__ Shared<D> s;
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16, first = blockIdx.x * SIDE;
    const Rows<T> queries = head(q, q_sample, q_row, n, d), keys = head(k, k_sample, k_row, m, d),
                  values = head(v, v_sample, v_row, m, d);
    const float scale = LOG2E * rsqrtf((float)d);
    float out[4][D / 16] = {}, top[4], total[4] = {}, p[4][4];
    for (int i = 0; i < 4; ++i) top[i] = -INFINITY;
    const u32 end = causal ? min(m, first + SIDE) : m;
    for (u32 key = 0; key < end; key += SIDE) {
        tile_scores<D>(s, queries, first, keys, key, p);
        for (int i = 0; i < 4; ++i) {
            const u32 row = first + 4 * ty + i;
            float highest = top[i];
            for (int j = 0; j < 4; ++j) {
                const u32 column = key + 4 * tx + j;
                p[i][j] = column < m && !(causal && column > row) ? p[i][j] * scale : -INFINITY;
                highest = fmaxf(highest, p[i][j]);
            }
            highest = row_max(highest);
            const float shrink = exp2f(top[i] - highest);
            top[i] = highest;
            float sum = 0.0f;
            for (int j = 0; j < 4; ++j) sum += p[i][j] = exp2f(p[i][j] - highest);
            total[i] = total[i] * shrink + row_sum(sum);
            for (int c = 0; c < D / 16; ++c) out[i][c] *= shrink;
        }
        tile_product<D>(s, p, values, key, out);
    }
    float inverse[4];
    for (int i = 0; i < 4; ++i) {
        const u32 row = first + 4 * ty + i;
        inverse[i] = 1.0f / total[i];
        if (tx == 0 && row < n) lse[((u64)blockIdx.z * gridDim.y + blockIdx.y) * n + row] = top[i] + log2f(total[i]);
    }
    store_rows<D>(out, inverse, y, n, d, first);
}

// Gradients of the queries: a block has 64 queries and goes over the keys.
template <typename T, int D>
__device__ void attention_plain_grad_q(ATTENTION(T), const T* grad, const float* lse, const float* delta, T* out_q) {
    __shared__ Shared<D> s;
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16, first = blockIdx.x * SIDE;
    const u64 width = (u64)gridDim.y * d, place = ((u64)blockIdx.z * gridDim.y + blockIdx.y) * n;
    const Rows<T> queries = head(q, q_sample, q_row, n, d), keys = head(k, k_sample, k_row, m, d),
                  values = head(v, v_sample, v_row, m, d), grads = head(grad, n * width, width, n, d);
    const float scale = rsqrtf((float)d);
    float out[4][D / 16] = {}, p[4][4], dp[4][4];
    const u32 end = causal ? min(m, first + SIDE) : m;
    for (u32 key = 0; key < end; key += SIDE) {
        tile_scores<D>(s, queries, first, keys, key, p);
        tile_scores<D>(s, grads, first, values, key, dp);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) {
                const u32 row = first + 4 * ty + i, column = key + 4 * tx + j;
                const bool seen = row < n && column < m && !(causal && column > row);
                p[i][j] = seen ? exp2f(p[i][j] * scale * LOG2E - lse[place + row]) * (dp[i][j] - delta[place + row]) : 0.0f;
            }
        tile_product<D>(s, p, keys, key, out);
    }
    const float scales[4] = {scale, scale, scale, scale};
    store_rows<D>(out, scales, out_q, n, d, first);
}

// Gradients of keys and values: a block has 64 keys and goes over the queries.
template <typename T, int D>
__device__ void attention_plain_grad_kv(
    ATTENTION(T), const T* grad, const float* lse, const float* delta, T* out_k, T* out_v) {
    __shared__ Shared<D> s;
    const u32 tx = threadIdx.x % 16, ty = threadIdx.x / 16, first = blockIdx.x * SIDE;
    const u64 width = (u64)gridDim.y * d, place = ((u64)blockIdx.z * gridDim.y + blockIdx.y) * n;
    const Rows<T> queries = head(q, q_sample, q_row, n, d), keys = head(k, k_sample, k_row, m, d),
                  values = head(v, v_sample, v_row, m, d), grads = head(grad, n * width, width, n, d);
    const float scale = rsqrtf((float)d);
    float sum_k[4][D / 16] = {}, sum_v[4][D / 16] = {}, p[4][4], dp[4][4];
    for (u32 query = causal ? first : 0; query < n; query += SIDE) {
        tile_scores<D>(s, keys, first, queries, query, p);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) {
                const u32 row = first + 4 * ty + i, column = query + 4 * tx + j;
                const bool seen = column < n && !(causal && row > column);
                p[i][j] = seen ? exp2f(p[i][j] * scale * LOG2E - lse[place + column]) : 0.0f;
            }
        tile_product<D>(s, p, grads, query, sum_v);
        tile_scores<D>(s, values, first, grads, query, dp);
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) {
                const u32 column = query + 4 * tx + j;
                p[i][j] *= column < n ? dp[i][j] - delta[place + column] : 0.0f;
            }
        tile_product<D>(s, p, queries, query, sum_k);
    }
    const float scales[4] = {scale, scale, scale, scale}, ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    store_rows<D>(sum_k, scales, out_k, m, d, first);
    store_rows<D>(sum_v, ones, out_v, m, d, first);
}

// ---- 16-bit floats: blocks of 4 warps, 16 rows of scores a warp ----------------------------------------------------
//
// Where thread `lane` of a warp keeps the parts of a tile, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix
// Fragments for mma.m16n8k16"): of the sums 16 x 8, (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1); of the left
// operand 16 x 16 pairs at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); of the right operand 16 x 8 pairs down
// column g from rows 2t and 2t + 8. Two tiles of sums beside each other are therefore a left operand as they lie.

#define WARPS 4
#define BLOCK_ROWS (16 * WARPS)

template <typename T> __device__ inline u32 bits(T x) { return *reinterpret_cast<const unsigned short*>(&x); }
template <typename T> __device__ inline u32 pair(T low, T high) { return bits(low) | bits(high) << 16; }
template <typename T> __device__ inline u32 pair_f32(float low, float high) { return pair(from_f32<T>(low), from_f32<T>(high)); }

template <typename T> __device__ inline void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);
#ifdef __CUDACC__
#define MMA(T, type)                                                                                           \
    template <> __device__ inline void mma<T>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {           \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 "                            \
                     "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                   \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                          \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                      \
    }
#else
#define MMA(T, type) template <> inline void mma<T>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) { host_mma<T>(d, a, b); }
#endif
MMA(__half, "f16")
MMA(__nv_bfloat16, "bf16")

// Rows of a tile in shared memory; 8 more columns, so that the 8 rows and 4 pairs of an access lie in 32 banks.
template <typename T, int R, int D> struct Tile {
    alignas(16) T x[R][D + 8];

    // Rows from `first` on. `whole`: rows and columns are vectors of 16 bytes, aligned.
    __device__ void fill(const Rows<T>& from, u32 first, u32 whole) {
        for (u32 i = threadIdx.x; i < R * D / 8; i += 32 * WARPS) {
            const u32 row = i / (D / 8), column = i % (D / 8) * 8;
            typedef Pack<T, 8> Eight;
            if (whole) {
                Eight eight;
                if (first + row < from.count && column < from.d) {
                    eight = *reinterpret_cast<const Eight*>(from.first + (first + row) * from.stride + column);
                } else {
                    for (int j = 0; j < 8; ++j) eight.values[j] = from_f32<T>(0.0f);
                }
                *reinterpret_cast<Eight*>(&x[row][column]) = eight;
            } else {
                for (int j = 0; j < 8; ++j) x[row][column + j] = from.at(first + row, column + j);
            }
        }
    }
    // A right operand: its columns are rows `row` .. `row` + 8, its rows are columns from `column` on.
    __device__ void across(u32 row, u32 column, u32 (&b)[2]) const {
        const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        const T* from = &x[row + g][column + 2 * t];
        b[0] = pair(from[0], from[1]);
        b[1] = pair(from[8], from[9]);
    }
    // A right operand as it lies: its rows are rows `row` .. `row` + 16, its columns `column` .. `column` + 8.
    __device__ void down(u32 row, u32 column, u32 (&b)[2]) const {
        const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        b[0] = pair(x[row + 2 * t][column + g], x[row + 2 * t + 1][column + g]);
        b[1] = pair(x[row + 2 * t + 8][column + g], x[row + 2 * t + 9][column + g]);
    }
};

// The 16 rows of this warp as left operands, from `first` on.
template <typename T, int D> __device__ inline void left_operands(const Rows<T>& rows, u32 first, u32 (&a)[D / 16][4]) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            const u32 row = first + g + part % 2 * 8, column = 16 * i + 2 * t + part / 2 * 8;
            a[i][part] = pair(rows.at(row, column), rows.at(row, column + 1));
        }
}

// sums = rows · tileᵀ
template <typename T, int R, int D>
__device__ inline void warp_scores(const u32 (&a)[D / 16][4], const Tile<T, R, D>& tile, float (&sums)[R / 8][4]) {
#pragma unroll
    for (int j = 0; j < R / 8; ++j) {
        sums[j][0] = sums[j][1] = sums[j][2] = sums[j][3] = 0.0f;
#pragma unroll
        for (int i = 0; i < D / 16; ++i) {
            u32 b[2];
            tile.across(8 * j, 16 * i, b);
            mma<T>(sums[j], a[i], b);
        }
    }
}

// sums += p · tile, p rounded to T
template <typename T, int R, int D>
__device__ inline void warp_product(const float (&p)[R / 8][4], const Tile<T, R, D>& tile, float (&sums)[D / 8][4]) {
#pragma unroll
    for (int i = 0; i < R / 16; ++i) {
        const u32 a[4] = {
            pair_f32<T>(p[2 * i][0], p[2 * i][1]), pair_f32<T>(p[2 * i][2], p[2 * i][3]),
            pair_f32<T>(p[2 * i + 1][0], p[2 * i + 1][1]), pair_f32<T>(p[2 * i + 1][2], p[2 * i + 1][3])};
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            u32 b[2];
            tile.down(16 * i, 8 * j, b);
            mma<T>(sums[j], a, b);
        }
    }
}

__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The warp's rows of one head, `scale[0]` for the upper and `scale[1]` for the lower of a thread.
template <typename T, int D>
__device__ inline void store_warp(const float (&x)[D / 8][4], const float (&scale)[2], T* out, u32 count, u32 d, u32 first) {
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u64 width = (u64)gridDim.y * d;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 row = first + g + i / 2 * 8, column = 8 * j + 2 * t + i % 2;
            if (row < count && column < d)
                out[((u64)blockIdx.z * count + row) * width + blockIdx.y * d + column] = from_f32<T>(x[j][i] * scale[i / 2]);
        }
}

template <typename T, int D, int R> __device__ void attention_mma(ATTENTION(T), u32 whole, T* y, float* lse) {
    __shared__ Tile<T, R, D> key_tile, value_tile;
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 first = blockIdx.x * BLOCK_ROWS + threadIdx.x / 32 * 16;
    const Rows<T> keys = head(k, k_sample, k_row, m, d), values = head(v, v_sample, v_row, m, d);
    const float scale = LOG2E * rsqrtf((float)d);
    u32 queries[D / 16][4];
    left_operands<T, D>(head(q, q_sample, q_row, n, d), first, queries);
    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
    const u32 end = causal ? min(m, (blockIdx.x + 1) * BLOCK_ROWS) : m;
    for (u32 key = 0; key < end; key += R) {
        __syncthreads();
        key_tile.fill(keys, key, whole);
        value_tile.fill(values, key, whole);
        __syncthreads();
        float p[R / 8][4];
        warp_scores<T, R, D>(queries, key_tile, p);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 row = first + g + 8 * half;
            float highest = top[half];
#pragma unroll
            for (int j = 0; j < R / 8; ++j)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    const u32 column = key + 8 * j + 2 * t + i % 2;
                    p[j][i] = column < m && !(causal && column > row) ? p[j][i] * scale : -INFINITY;
                    highest = fmaxf(highest, p[j][i]);
                }
            highest = quad_max(highest);
            const float shrink = exp2f(top[half] - highest);
            top[half] = highest;
            total[half] *= shrink;
#pragma unroll
            for (int j = 0; j < R / 8; ++j)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) total[half] += p[j][i] = exp2f(p[j][i] - highest);
#pragma unroll
            for (int j = 0; j < D / 8; ++j)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) out[j][i] *= shrink;
        }
        warp_product<T, R, D>(p, value_tile, out);
    }
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 row = first + g + 8 * half;
        total[half] = quad_sum(total[half]);
        inverse[half] = 1.0f / total[half];
        if (t == 0 && row < n)
            lse[((u64)blockIdx.z * gridDim.y + blockIdx.y) * n + row] = top[half] + log2f(total[half]);
    }
    store_warp<T, D>(out, inverse, y, n, d, first);
}

template <typename T, int D, int R>
__device__ void attention_mma_grad_q(
    ATTENTION(T), u32 whole, const T* grad, const float* lse, const float* delta, T* out_q) {
    __shared__ Tile<T, R, D> key_tile, value_tile;
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 first = blockIdx.x * BLOCK_ROWS + threadIdx.x / 32 * 16;
    const u64 width = (u64)gridDim.y * d, place = ((u64)blockIdx.z * gridDim.y + blockIdx.y) * n;
    const Rows<T> keys = head(k, k_sample, k_row, m, d), values = head(v, v_sample, v_row, m, d);
    const float scale = rsqrtf((float)d);
    u32 queries[D / 16][4], grads[D / 16][4];
    left_operands<T, D>(head(q, q_sample, q_row, n, d), first, queries);
    left_operands<T, D>(head(grad, n * width, width, n, d), first, grads);
    float out[D / 8][4] = {}, row_lse[2], row_delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const u32 row = min(first + g + 8 * half, n - 1);
        row_lse[half] = lse[place + row];
        row_delta[half] = delta[place + row];
    }
    const u32 end = causal ? min(m, (blockIdx.x + 1) * BLOCK_ROWS) : m;
    for (u32 key = 0; key < end; key += R) {
        __syncthreads();
        key_tile.fill(keys, key, whole);
        value_tile.fill(values, key, whole);
        __syncthreads();
        float p[R / 8][4], dp[R / 8][4];
        warp_scores<T, R, D>(queries, key_tile, p);
        warp_scores<T, R, D>(grads, value_tile, dp);
#pragma unroll
        for (int j = 0; j < R / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 row = first + g + i / 2 * 8, column = key + 8 * j + 2 * t + i % 2;
                const bool seen = row < n && column < m && !(causal && column > row);
                p[j][i] = seen ? exp2f(p[j][i] * scale * LOG2E - row_lse[i / 2]) * (dp[j][i] - row_delta[i / 2]) : 0.0f;
            }
        warp_product<T, R, D>(p, key_tile, out);
    }
    const float scales[2] = {scale, scale};
    store_warp<T, D>(out, scales, out_q, n, d, first);
}

template <typename T, int D, int R>
__device__ void attention_mma_grad_kv(
    ATTENTION(T), u32 whole, const T* grad, const float* lse, const float* delta, T* out_k, T* out_v) {
    __shared__ Tile<T, R, D> query_tile, grad_tile;
    __shared__ float tile_lse[R], tile_delta[R];
    const u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const u32 first = blockIdx.x * BLOCK_ROWS + threadIdx.x / 32 * 16;
    const u64 width = (u64)gridDim.y * d, place = ((u64)blockIdx.z * gridDim.y + blockIdx.y) * n;
    const Rows<T> queries = head(q, q_sample, q_row, n, d), grads = head(grad, n * width, width, n, d);
    const float scale = rsqrtf((float)d);
    u32 keys[D / 16][4], values[D / 16][4];
    left_operands<T, D>(head(k, k_sample, k_row, m, d), first, keys);
    left_operands<T, D>(head(v, v_sample, v_row, m, d), first, values);
    float sum_k[D / 8][4] = {}, sum_v[D / 8][4] = {};
    for (u32 query = causal ? blockIdx.x * BLOCK_ROWS : 0; query < n; query += R) {
        __syncthreads();
        query_tile.fill(queries, query, whole);
        grad_tile.fill(grads, query, whole);
        if (threadIdx.x < R) {
            const u32 row = min(query + threadIdx.x, n - 1);
            tile_lse[threadIdx.x] = lse[place + row];
            tile_delta[threadIdx.x] = delta[place + row];
        }
        __syncthreads();
        float p[R / 8][4], dp[R / 8][4];
        warp_scores<T, R, D>(keys, query_tile, p);
        warp_scores<T, R, D>(values, grad_tile, dp);
#pragma unroll
        for (int j = 0; j < R / 8; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 row = first + g + i / 2 * 8, column = 8 * j + 2 * t + i % 2;
                const bool seen = query + column < n && !(causal && row > query + column);
                p[j][i] = seen ? exp2f(p[j][i] * scale * LOG2E - tile_lse[column]) : 0.0f;
                dp[j][i] = p[j][i] * (dp[j][i] - tile_delta[column]);
            }
        warp_product<T, R, D>(p, grad_tile, sum_v);
        warp_product<T, R, D>(dp, query_tile, sum_k);
    }
    const float scales[2] = {scale, scale}, ones[2] = {1.0f, 1.0f};
    store_warp<T, D>(sum_k, scales, out_k, m, d, first);
    store_warp<T, D>(sum_v, ones, out_v, m, d, first);
}

#define DELTA(name, T, V)                                                                                     \
    extern "C" __global__ void attention_delta_##name(                                                        \
        const T* y, const T* grad, float* delta, u32 n, u32 heads, u32 d) {                                   \
        attention_delta<T>(y, grad, delta, n, heads, d);                                                      \
    }                                                                                                         \
    EXPORT(attention_delta_##name)
FOR_TYPES(DELTA)

#define PLAIN_KERNELS(D)                                                                                      \
    extern "C" __global__ void __launch_bounds__(256) attention_f32_d##D(ATTENTION(float), float* y, float* lse) {       \
        attention_plain<float, D>(ATTENTION_ARGS, y, lse);                                                        \
    }                                                                                                         \
    EXPORT(attention_f32_d##D)                                                                                \
    extern "C" __global__ void __launch_bounds__(256) attention_grad_q_f32_d##D(                              \
        ATTENTION(float), const float* grad, const float* lse, const float* delta, float* out_q) {                           \
        attention_plain_grad_q<float, D>(ATTENTION_ARGS, grad, lse, delta, out_q);                                \
    }                                                                                                         \
    EXPORT(attention_grad_q_f32_d##D)                                                                         \
    extern "C" __global__ void __launch_bounds__(256) attention_grad_kv_f32_d##D(                             \
        ATTENTION(float), const float* grad, const float* lse, const float* delta, float* out_k, float* out_v) {                 \
        attention_plain_grad_kv<float, D>(ATTENTION_ARGS, grad, lse, delta, out_k, out_v);                        \
    }                                                                                                         \
    EXPORT(attention_grad_kv_f32_d##D)

// `R` rows of keys or queries in shared memory at once: 64 heads of 64, 32 of 128, below 48 KiB.
#define MMA_KERNELS(name, T, D, R)                                                                             \
    extern "C" __global__ void __launch_bounds__(32 * WARPS)                                                  \
        attention_##name##_d##D(ATTENTION(T), u32 whole, T* y, float* lse) {                                     \
        attention_mma<T, D, R>(ATTENTION_ARGS, whole, y, lse);                                                \
    }                                                                                                         \
    EXPORT(attention_##name##_d##D)                                                                           \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_grad_q_##name##_d##D(                  \
        ATTENTION(T), u32 whole, const T* grad, const float* lse, const float* delta, T* out_q) {                \
        attention_mma_grad_q<T, D, R>(ATTENTION_ARGS, whole, grad, lse, delta, out_q);                        \
    }                                                                                                         \
    EXPORT(attention_grad_q_##name##_d##D)                                                                    \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) attention_grad_kv_##name##_d##D(                 \
        ATTENTION(T), u32 whole, const T* grad, const float* lse, const float* delta, T* out_k, T* out_v) {      \
        attention_mma_grad_kv<T, D, R>(ATTENTION_ARGS, whole, grad, lse, delta, out_k, out_v);                \
    }                                                                                                         \
    EXPORT(attention_grad_kv_##name##_d##D)

PLAIN_KERNELS(64)
PLAIN_KERNELS(128)
MMA_KERNELS(f16, __half, 64, 64)
MMA_KERNELS(f16, __half, 128, 32)
MMA_KERNELS(bf16, __nv_bfloat16, 64, 64)
MMA_KERNELS(bf16, __nv_bfloat16, 128, 32)
