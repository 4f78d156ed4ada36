// The bodies of norm_rope.h as kernels: block x is a few rows, block y a chunk of their heads.
#include "norm_rope.h"

namespace lct {
namespace {

__device__ DeviceTeam team_of(const Sizes& sizes) { return {sizes.lanes, sizes.dim / kChannels}; }

template <class T>
__global__ void __launch_bounds__(kThreads, 5) join_kernel(const __grid_constant__ JoinParams p) {
  join_body<T>(team_of(p.sizes), p, blockIdx.x, blockIdx.y);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 6) assemble_kernel(const __grid_constant__ AssembleParams p) {
  assemble_body<T>(team_of(p.sizes), p, blockIdx.x, blockIdx.y);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 5) backward_kernel(const __grid_constant__ BackwardParams p) {
  backward_body<T>(team_of(p.sizes), p, blockIdx.x, blockIdx.y);
}

template <class Params>
const char* launch(void (*const kernels[3])(Params), const Params& params, DType dtype, int device, void* stream) {
  const int64_t blocks = blocks_of(params.sizes);
  if (!blocks) return nullptr;
  const OnDevice there(device);
  if (!there) return launch_error();
  const dim3 grid(unsigned(blocks), unsigned(params.sizes.chunks));
  kernels[int(dtype)]<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(params);
  return launch_error();
}

}  // namespace

const char* join_cuda(const JoinParams& params, DType dtype, int device, void* stream) {
  void (*const kernels[3])(const JoinParams) = {join_kernel<Half>, join_kernel<BFloat>, join_kernel<float>};
  return launch(kernels, params, dtype, device, stream);
}

const char* assemble_cuda(const AssembleParams& params, DType dtype, int device, void* stream) {
  void (*const kernels[3])(const AssembleParams) = {assemble_kernel<Half>, assemble_kernel<BFloat>,
                                                    assemble_kernel<float>};
  return launch(kernels, params, dtype, device, stream);
}

const char* backward_cuda(const BackwardParams& params, DType dtype, int device, void* stream) {
  void (*const kernels[3])(const BackwardParams) = {backward_kernel<Half>, backward_kernel<BFloat>,
                                                    backward_kernel<float>};
  return launch(kernels, params, dtype, device, stream);
}

}  // namespace lct
