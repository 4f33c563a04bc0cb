// AdamW, moving averages and the length of gradients, all in f32, one launch a tensor.
#include "common.cuh"

// As `adamw` in train/adamw.rs, in the same order of operations.
extern "C" __global__ void adamw_f32(
    float* w, float* first, float* second, const float* grad, u64 count, float beta1, float beta2, float take1,
    float take2, float keep, float step, float root, float eps) {
    const u64 i = thread_of_grid();
    if (i >= count) return;
    const float g = grad[i];
    const float m = beta1 * first[i] + take1 * g, v = beta2 * second[i] + take2 * g * g;
    first[i] = m;
    second[i] = v;
    w[i] = keep * w[i] - step * m / (sqrtf(v) / root + eps);
}
EXPORT(adamw_f32)

// kept = keep · kept + take · x
extern "C" __global__ void blend_f32(float* kept, const float* x, u64 count, float keep, float take) {
    const u64 i = thread_of_grid();
    if (i < count) kept[i] = keep * kept[i] + take * x[i];
}
EXPORT(blend_f32)

// Σ x² over what falls to each block, to out (blocks).
extern "C" __global__ void square_sums_f32(const float* x, float* out, u64 count) {
    float sum = 0.0f;
    for (u64 i = thread_of_grid(); i < count; i += (u64)gridDim.x * blockDim.x) sum += x[i] * x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
EXPORT(square_sums_f32)
