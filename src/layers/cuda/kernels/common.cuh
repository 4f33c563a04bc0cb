// What all kernels share. Compiled by nvcc for the GPU, and by any C++17 compiler for the tests, which bring a
// host_cuda.h that stands for CUDA.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#define EXPORT(name)
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ inline float to_f32(float x) { return x; }
__device__ inline float to_f32(__half x) { return __half2float(x); }
__device__ inline float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T> __device__ inline T from_f32(float x);
template <> __device__ inline float from_f32<float>(float x) { return x; }
template <> __device__ inline __half from_f32<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 from_f32<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// V values that lie together, moved in one access of at most 16 bytes.
template <typename T, int V> struct alignas(sizeof(T) * V) Pack { T values[V]; };

template <typename T, int V> __device__ inline void load(const T* from, float (&to)[V]) {
    const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
#pragma unroll
    for (int i = 0; i < V; ++i) to[i] = to_f32(pack.values[i]);
}
template <typename T, int V> __device__ inline void store(T* to, const float (&from)[V]) {
    Pack<T, V> pack;
#pragma unroll
    for (int i = 0; i < V; ++i) pack.values[i] = from_f32<T>(from[i]);
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// a / b, where it can in 32 bits, which takes a fifth of the instructions.
__device__ inline u64 quotient(u64 a, u32 b) { return a >> 32 ? a / b : (u32)a / b; }

__device__ inline u64 thread_of_grid() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
    return x;
}
// The sum over the block, for every thread; at most 1024 threads in whole warps.
__device__ inline float block_sum(float x) {
    __shared__ float sums[32];
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.0f);
    __syncthreads();
    return x;
}

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Each kernel for each type that tensors have; vectors of 16 bytes.
#define FOR_TYPES(make) make(f32, float, 4) make(f16, __half, 8) make(bf16, __nv_bfloat16, 8)
