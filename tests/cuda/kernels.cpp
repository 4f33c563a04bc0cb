// All kernels for the CPU, in one shared library.
#include "host_cuda.h"

#include "../../src/layers/cuda/kernels/attention.cu"
#include "../../src/layers/cuda/kernels/norm.cu"
#include "../../src/layers/cuda/kernels/optimiser.cu"
#include "../../src/layers/cuda/kernels/pointwise.cu"

extern "C" void host_set_order(int order) { host::order = order; }
extern "C" const char* host_error() { return host::error ? host::error : ""; }
