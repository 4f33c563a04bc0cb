// What the CUDA kernels need of CUDA, on the CPU: the threads of a block are fibres that switch at barriers and
// exchanges within a warp; blocks run one after the other. 16-bit floats are their bits, rounded to nearest even.
#pragma once
#include <ucontext.h>

#include <array>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 { unsigned x, y, z; };
struct float4 { float x, y, z, w; } __attribute__((aligned(16)));
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };

inline float __bfloat162float(__nv_bfloat16 x) {
    uint32_t u = uint32_t(x.bits) << 16; float f; memcpy(&f, &u, 4); return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    uint32_t u; memcpy(&u, &f, 4);
    if (f != f) return {uint16_t(0x7fff)};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
    int exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
    float f = exponent == 31 ? (fraction ? NAN : INFINITY)
            : exponent       ? ldexpf(float(fraction + 1024), exponent - 25) : ldexpf(float(fraction), -24);
    return x.bits & 0x8000 ? -f : f;
}
inline __half __float2half_rn(float f) {
    uint16_t sign = std::signbit(f) ? 0x8000 : 0;
    float a = fabsf(f);
    if (f != f) return {0x7fff};
    if (a == 0.0f) return {sign};
    if (a >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    int exponent; frexpf(a, &exponent);                       // a = m * 2^exponent, 0.5 <= m < 1
    int shift = exponent - 11 < -24 ? -24 : exponent - 11;    // of the last place kept
    int q = int(nearbyintf(ldexpf(a, -shift)));               // halves to even
    // A quotient of 2048 carries into the exponent, which is the next number.
    return {uint16_t(sign | (shift == -24 ? q : ((shift + 24) << 10) + q))};
}

namespace host {
constexpr size_t STACK = 128 << 10;
struct Fibre { ucontext_t context; std::vector<char> stack = std::vector<char>(STACK); bool done = false; };
inline std::vector<Fibre> fibres;
inline std::vector<uint64_t> barriers, exchanges;             // how many each thread has come to
inline std::vector<std::array<uint32_t, 8>> slots[2];         // what each thread shows to its warp
inline ucontext_t scheduler;
inline void (*body)(void*); inline void* body_of;
inline unsigned current, threads; inline int order;           // 0: threads in order, 1: last first
inline const char* error;

inline void yield() { swapcontext(&fibres[current].context, &scheduler); }
inline void enter() { body(body_of); fibres[current].done = true; swapcontext(&fibres[current].context, &scheduler); }

/// Shows `values` to the other threads of the warp and waits until all of them have shown theirs.
inline const std::array<uint32_t, 8>* exchange(const std::array<uint32_t, 8>& values) {
    unsigned me = current, first = me / 32 * 32; uint64_t turn = ++exchanges[me];
    auto& shown = slots[turn % 2]; shown[me] = values;
    for (unsigned i = first; i < first + 32; ++i) while (exchanges[i] < turn && !error) yield();
    return &shown[first];
}

inline void run_block() {
    unsigned left = threads;
    for (unsigned i = 0; i < threads; ++i) {
        Fibre& f = fibres[i]; f.done = false; barriers[i] = exchanges[i] = 0;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data(); f.context.uc_stack.ss_size = STACK; f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
    for (uint64_t rounds = 0; left > 0; ++rounds) {
        for (unsigned i = 0; i < threads; ++i) {
            current = order ? threads - 1 - i : i;
            if (fibres[current].done) continue;
            unsigned t = current;
            threadIdx = {t % blockDim.x, t / blockDim.x, 0};
            swapcontext(&scheduler, &fibres[t].context);
            left -= fibres[t].done;
        }
        if (rounds > 10'000'000) { error = "threads wait for each other"; return; }
    }
    for (unsigned i = 1; i < threads; ++i)
        if (barriers[i] != barriers[0]) error = "not every thread came to a barrier";
}

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** params, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(params[I])...);
}

/// The types of a kernel's arguments: p pointer, U 64-bit and u 32-bit number, f float.
template <typename A> constexpr char code() {
    return std::is_pointer_v<A> ? 'p' : std::is_same_v<A, float> ? 'f' : sizeof(A) == 8 ? 'U' : 'u';
}
template <typename... A> const char* signature(void (*)(A...)) {
    static const char codes[] = {code<A>()..., 0};
    return codes;
}

/// Runs every block of a grid; 0, or 1 with `error` set.
template <typename... A>
int launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, void** params) {
    gridDim = {grid[0], grid[1], grid[2]}; blockDim = {block[0], block[1], block[2]};
    threads = block[0] * block[1] * block[2]; error = nullptr;
    if (threads == 0 || threads > 1024 || threads % 32 || block[2] != 1) { error = "block size"; return 1; }
    if (fibres.size() < threads) fibres = std::vector<Fibre>(threads);
    barriers.resize(threads); exchanges.resize(threads); slots[0].resize(threads); slots[1].resize(threads);
    auto run = [&] { call(kernel, params, std::index_sequence_for<A...>{}); };
    body = [](void* f) { (*static_cast<decltype(run)*>(f))(); }; body_of = &run;
    for (unsigned z = 0; z < grid[2]; ++z) for (unsigned y = 0; y < grid[1]; ++y) for (unsigned x = 0; x < grid[0]; ++x) {
        blockIdx = {x, y, z};
        run_block();
        if (error) return 1;
    }
    body_of = nullptr;
    return 0;
}
}  // namespace host

inline void __syncthreads() {
    uint64_t turn = ++host::barriers[host::current];
    for (unsigned i = 0; i < host::threads; ++i)
        while (host::barriers[i] < turn && !host::error) {
            if (host::fibres[i].done) { host::error = "a thread ended before a barrier"; break; }
            host::yield();
        }
}
inline float __shfl_xor_sync(unsigned, float value, int mask) {
    uint32_t bits; memcpy(&bits, &value, 4);
    unsigned lane = host::current % 32;
    bits = host::exchange({bits})[lane ^ mask][0];
    memcpy(&value, &bits, 4); return value;
}
template <typename T> T min(T a, T b) { return b < a ? b : a; }
template <typename T> T max(T a, T b) { return a < b ? b : a; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __uint_as_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }

/// d += a b for tiles of 16 x 16 and 16 x 8, each thread with its parts of them as PTX lays them out
/// (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type").
template <typename T> void host_mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    auto warp = host::exchange({a[0], a[1], a[2], a[3], b[0], b[1]});
    auto value = [&](unsigned lane, int reg, int half) { T t; t.bits = uint16_t(warp[lane][reg] >> (16 * half)); return to_f32(t); };
    unsigned lane = host::current % 32;
    for (int i = 0; i < 4; ++i) {
        unsigned row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (unsigned k = 0; k < 16; ++k) {
            unsigned part = k % 8 / 2, high = k / 8;
            sum += value(row % 8 * 4 + part, row / 8 + 2 * high, k % 2) * value(column * 4 + part, 4 + high, k % 2);
        }
        d[i] += sum;
    }
}
#define EXPORT(name) \
    extern "C" int host_##name(const unsigned* grid, const unsigned* block, void** params) { \
        return host::launch(name, grid, block, params); \
    } \
    extern "C" const char* signature_##name() { return host::signature(name); } \
    extern "C" const char* file_##name() { return __FILE__; }
